"""`gossamer analyze`: its figures on a network made by hand, and on a run."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import gossamer
from gossamer.channels import find_groups
from gossamer.measure import channel_stats
from gossamer.train.analyze import analyze, cut_rows
from gossamer.train.cli import main
from gossamer.train.config import TrainConfig
from gossamer.train.data import Batches, load_data
from gossamer.train.models import build_model
from gossamer.train.run import restore, train

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def images() -> Batches:
    data = load_data("digits", val_fraction=0.1, seed=0, image_size=None)
    return Batches(data.val, batch_size=64, mean=data.mean, std=data.std)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = TrainConfig(
        model="vgg-small",
        width=0.25,
        epochs=2,
        batch_size=64,
        lr=0.05,
        threads=1,
        out=str(tmp_path_factory.mktemp("runs") / "run"),
    )
    train(config, gossamer.Chase(density=0.2, channel_sparsity=0.3, min_channels=2))
    return config


def test_a_run_is_analysed(run: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((run.folder / "analysis.json").read_text())
    assert found["held"]["channels"] == 0.3
    assert 0 < found["held"]["weights"] < 0.3

    sites = restore(run.folder).sparsifier.sites
    assert list(found["layers"]) == [site.name for site in sites]
    for site in sites:
        stats = channel_stats(site.effective, site.support)
        assert found["layers"][site.name]["by_density"]["spread"] == stats.by_density.spread
    with (run.folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]  # of the last layer
    assert float(last["channel_spread"]) == stats.by_density.spread
    assert float(last["umm_spread_random"]) == stats.by_umm.random
    assert float(last["channels_below_half"]) == stats.by_density.below_half
    assert float(last["channels_below_mean"]) == stats.by_density.below_mean
    assert float(last["umm_below_mean"]) == stats.by_umm.below_mean

    cuts = found["cuts"]
    assert (cuts[0]["share"], cuts[0]["error"], cuts[0]["macs_executed"]) == (0, 0, 1)
    assert [row["channels"] for row in cuts] == sorted(row["channels"] for row in cuts)
    assert all(row["error"] > 0 for row in cuts[1:])
    assert cuts[-1]["macs_executed"] < 0.9

    drawing = ElementTree.parse(run.folder / "analysis.svg").getroot()
    shown = "".join(drawing.itertext())
    assert "features.3" in shown
    assert "share of channels below half the mean density" in shown
    told = (run.folder / "analysis.md").read_text()
    assert "the sparsest 30% of each layer's channels hold" in told

    assert main(["analyze", str(run.folder)]) == 0
    assert "at random places they would hold" in capsys.readouterr().out


def test_the_run_stays_as_it_was(run: TrainConfig) -> None:
    before = {p.name: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    analyze(run.folder)
    after = {p.name: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    assert after == before | {name: after[name] for name in after if name.startswith("analysis")}


def test_what_nobody_hears_is_cut_for_nothing() -> None:
    torch.manual_seed(0)
    model = build_model("vgg-small", num_classes=10, in_shape=(1, 8, 8), width=0.5).eval()
    example = torch.randn(2, 1, 8, 8)
    groups = [group for group in find_groups(model, example) if group.internal]
    total = sum(group.channels for group in groups)
    # The weakest tenth computes nothing.
    silent = 0
    for group in groups:
        producer = model.get_submodule(group.producers[0].layer)
        norm = model.get_submodule(group.carriers[0].layer)
        assert isinstance(producer, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        for channel in range(group.channels // 8):
            with torch.no_grad():
                producer.weight[channel] = 0
                norm.bias[channel] = -1.0  # and ReLU makes it nothing
            silent += 1
    assert silent >= 0.1 * total
    rows = cut_rows(model, groups, example, images())
    by_share = {row["share"]: row for row in rows}
    assert by_share[0.1]["error"] < 1e-5
    assert by_share[0.1]["macs_executed"] < 1
    assert by_share[0.5]["error"] > 0.01
    # Each group keeps its strongest channel, and the network is left as it was.
    assert sum(group.channels for group in groups) == total
    assert cut_rows(model, [], example, images()) == []


def test_no_run_to_analyse(
    run: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(tmp_path)]) == 1
    assert "holds no run: give the folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    assert main(["analyze", str(tmp_path)]) == 1
    assert f"gossamer train --resume --out {tmp_path}" in capsys.readouterr().err
