"""One training run: what it writes, that it repeats and resumes bit for bit, what it refuses."""

import csv
import errno
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import gossamer
from gossamer.measure.macs import account, training_products
from gossamer.registry import METHODS
from gossamer.shrink.file import read_plan
from gossamer.train.checkpoints import check_network, read
from gossamer.train.config import TrainConfig, from_dict, to_dict
from gossamer.train.data import Batches, load_data
from gossamer.train.engine import History, make_optimizer, rate
from gossamer.train.expand import expand, scatter, take
from gossamer.train.figures import accuracy, topology
from gossamer.train.models import build_model
from gossamer.train.report import moves, untouched
from gossamer.train.run import train
from gossamer.train.work import Work

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

FIGURES = {
    "accuracy",
    "density",
    "channel_sparsity",
    "nonzeros",
    "bytes_on_disk",
    "macs_executed",
    "macs_sparse",
    "macs_training",
    "latency_ms",
}
EPOCHS, STEPS, BATCH = 3, 20, 64


def chase(**settings):
    defaults = {"density": 0.2, "channel_sparsity": 0.5, "min_channels": 2}
    return gossamer.Chase(**{**defaults, **settings})


def tiny(folder, **settings):
    defaults = {"model": "vgg-small", "width": 0.25, "epochs": EPOCHS, "batch_size": BATCH}
    return TrainConfig(**{**defaults, "lr": 0.05, "out": str(folder), **settings})


class Watching:
    """Remembers what it is told, and breaks training off where it is asked to."""

    def __init__(self, stop_in=None, at_epoch=None, at_step=None, error=KeyboardInterrupt):
        self.networks, self.rows, self.notes = [], [], []
        self.stop, self.error = (stop_in, at_epoch, at_step), error

    def noted(self, text):
        self.notes.append(text)

    def started(self, network, epochs, steps, done):
        self.networks.append((network, done))

    def stepped(self, epoch, step, figures):
        if (self.networks[-1][0], epoch, step) == self.stop:
            raise self.error
        assert {"loss", "accuracy", "density", "live_channels"} <= figures().keys()

    def epoch_ended(self, row):
        self.rows.append(row)

    def ended(self):
        pass


def rows(folder, name="metrics.csv"):
    with (Path(folder) / name).open() as file:
        return list(csv.DictReader(file))


def lasting(summary):
    """The summary without what a clock has measured, or the folder's name."""
    keys = ("model", "method", "data", "seed", "reference", "topology", "locked", "left_dense")
    kept = {key: summary[key] for key in keys}
    for name in ("dense", "sparse", "slim"):
        if name in summary:
            kept[name] = {k: v for k, v in summary[name].items() if k != "latency_ms"}
    return kept


def same_model(one, other):
    """Whether two runs ended with the same slim model, bit for bit."""
    paths = [Path(folder) / "model.safetensors" for folder in (one, other)]
    first, second = map(safetensors.torch.load_file, paths)
    return (
        read_plan(paths[0]) == read_plan(paths[1])
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
    )


def same_metrics(one, other):
    """Whether two runs saw the same at every epoch, but for the time it took."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        clocks = {"seconds": 0, "cpu_seconds": 0}
        assert {**mine, **clocks} == {**theirs, **clocks}
    assert rows(one, "layers.csv") == rows(other, "layers.csv")


def with_dropout(num_classes: int, in_shape: tuple[int, int, int]) -> nn.Module:
    """A factory as a user has one; dropout must come out the same after a resume."""
    return nn.Sequential(
        nn.Conv2d(in_shape[0], 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16 * in_shape[1] * in_shape[2], num_classes),
    )


class Untraceable(nn.Sequential):
    """A trace watches which module is running; this network forbids it."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._forward_pre_hooks:
            raise RuntimeError("nobody may watch this network")
        return super().forward(x)


# ------------------------------------------------------------------ what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with its dense twin, and its summary."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train(tiny(folder, baseline=True), chase())


def test_the_folder_is_whole(finished):
    folder, summary = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "layers.csv",
        "metrics-dense.csv",
        "metrics.csv",
        "model.safetensors",
        "report.md",
        "summary.json",
    ]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "dense.ckpt",
        "sparse.ckpt",
    ]
    for path in (folder / "checkpoints").iterdir():
        torch.load(path, weights_only=True)  # nothing in it can run code


def test_the_summary(finished):
    folder, summary = finished
    dense, sparse, slim = (summary[name] for name in ("dense", "sparse", "slim"))
    assert FIGURES == dense.keys() == sparse.keys()
    assert FIGURES | {"max_abs_difference", "output_scale"} == slim.keys()
    assert slim["max_abs_difference"] <= 1e-5 * slim["output_scale"]
    assert slim["accuracy"] == sparse["accuracy"] > 0.3

    # Masks alone deliver nothing on dense hardware.
    assert sparse["macs_executed"] == dense["macs_executed"]
    assert sparse["bytes_on_disk"] == dense["bytes_on_disk"]
    assert slim["macs_executed"] < 0.7 * dense["macs_executed"]
    assert slim["bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert slim["macs_sparse"] == sparse["macs_sparse"] < 0.6 * dense["macs_sparse"]

    assert dense["density"] == 1.0
    weights = 18002 - 4 * 8 - 4 * 16 - 4 * 32  # norms have no density
    assert sparse["density"] == pytest.approx(0.2, abs=1 / weights)
    assert slim["density"] > 0.2
    assert (dense["channel_sparsity"], sparse["channel_sparsity"]) == (0.0, 0.5)
    assert slim["channel_sparsity"] >= 0.5

    assert dense["macs_training"] == summary["reference"]["macs_training"]
    assert dense["macs_training"] == 3 * EPOCHS * STEPS * BATCH * dense["macs_executed"]
    assert sparse["macs_training"] == slim["macs_training"] < 0.6 * dense["macs_training"]
    assert set(summary["wall_seconds"]) == {"dense", "sparse"}


def test_the_metrics(finished):
    folder, summary = finished
    table = rows(folder)
    assert list(table[0]) == [
        "epoch",
        "step",
        "lr",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "density",
        "live_channels",
        "channel_sparsity",
        "sad_cumulative",
        "sad_from_start",
        "sad_since_last",
        "exploration",
        "churn",
        "revived",
        "seconds",
        "cpu_seconds",
        "macs_training",
    ]
    assert [int(row["epoch"]) for row in table] == [1, 2, 3]
    assert [int(row["step"]) for row in table] == [20, 40, 60]
    assert float(table[-1]["lr"]) == pytest.approx(0.05 * rate(tiny("x"), 59, STEPS))
    assert int(table[-1]["live_channels"]) == 56
    assert float(table[-1]["macs_training"]) == summary["slim"]["macs_training"]
    dense = rows(folder, "metrics-dense.csv")
    assert len(dense) == EPOCHS
    assert not {"exploration", "sad_from_start"} & dense[0].keys()


def test_the_report_says_what_its_words_mean(finished):
    folder, summary = finished
    report = (folder / "report.md").read_text()
    for text in ("FLOPs are 2 per MAC", "batch 32", "gossamer.load", "features.0", "epochs: 3"):
        assert text in report
    assert f"{summary['slim']['bytes_on_disk']:,}" in report


def test_the_slim_model_is_loaded_into_the_users_class(finished):
    folder, summary = finished
    data = load_data("digits", seed=0)
    torch.manual_seed(99)
    model = build_model("vgg-small", num_classes=10, in_shape=(1, 8, 8), width=0.25)
    gossamer.load(folder / "model.safetensors", model)
    test = Batches(data.test, batch_size=50, mean=data.mean, std=data.std)
    assert accuracy(model, test) == summary["slim"]["accuracy"]
    assert (summary["data"]["mean"], summary["data"]["std"]) == (
        data.mean.tolist(),
        data.std.tolist(),
    )


def test_config_yaml_repeats_the_run(finished, tmp_path):
    from gossamer.train.config import read_yaml

    folder, summary = finished
    config, method = from_dict(read_yaml(folder / "config.yaml"))
    assert (config, method) == (tiny(folder, baseline=True), chase())
    again = train(replace(config, out=str(tmp_path / "again")), method)
    assert lasting(again) == lasting(summary)
    assert same_model(tmp_path / "again", folder)


def test_a_static_mask_costs_what_its_support_costs(tmp_path):
    summary = train(tiny(tmp_path / "run", method="static"), gossamer.Static(density=0.2))
    sparse = summary["sparse"]
    assert sparse["macs_training"] == 3 * EPOCHS * STEPS * BATCH * sparse["macs_sparse"]
    assert "dense" not in summary
    assert "The dense twin was not trained" in (tmp_path / "run" / "report.md").read_text()


def test_a_network_that_cannot_be_traced_is_trained_all_the_same(tmp_path):
    config = tiny(tmp_path / "run", method="static", model=f"{__name__}:Untraceable", width=1.0)
    summary = train(config, gossamer.Static(density=0.5))
    assert "cannot be traced" in summary["slim"]["not_cut"]
    assert summary["slim"]["max_abs_difference"] == 0
    assert (
        "Nothing was cut: the channels cannot be traced"
        in (tmp_path / "run" / "report.md").read_text()
    )


# ------------------------------------------------------------------ what training did


def test_layers_add_up_to_the_metrics(finished):
    folder = finished[0]
    layers, table = rows(folder, "layers.csv"), rows(folder)
    assert [int(row["epoch"]) for row in layers] == [e for e in range(EPOCHS + 1) for _ in range(7)]
    weights = sum(int(row["weights"]) for row in layers[:7])
    assert weights == 18_248
    for epoch in range(EPOCHS + 1):
        mine = [row for row in layers if int(row["epoch"]) == epoch]
        wanted = table[epoch - 1] if epoch else {"sad_from_start": 0, "exploration": 0.2}
        for key in wanted.keys() & {"density", "sad_from_start", "sad_since_last", "exploration"}:
            total = sum(int(row["weights"]) * float(row[key]) for row in mine) / weights
            assert total == pytest.approx(float(wanted[key]), abs=1e-4)
    live = [int(row["live_channels"]) for row in layers if int(row["epoch"]) == EPOCHS]
    assert sum(live) <= 56 + 10  # Chase has removed the others

    exploration = [float(row["exploration"]) for row in table]
    assert 0.2 < exploration[0] <= exploration[1] <= exploration[2] <= 1
    assert 0 < float(table[-1]["churn"]) < 1
    assert 0 < float(table[-1]["revived"]) < 1
    moved = [float(row["sad_since_last"]) for row in table]
    assert float(table[0]["sad_from_start"]) == moved[0]
    assert float(table[-1]["sad_cumulative"]) == pytest.approx(sum(moved))


def test_the_summary_tells_what_training_did(finished):
    folder, summary = finished
    table, topology = rows(folder), summary["topology"]
    assert topology["from_start"]["per_weight"] == float(table[-1]["sad_from_start"])
    assert topology["since_last"]["per_weight"] == float(table[-1]["sad_since_last"])
    assert topology["sad_cumulative"] == float(table[-1]["sad_cumulative"])
    assert topology["density"] == pytest.approx(summary["sparse"]["density"])
    assert [point["epoch"] for point in topology["path"]] == [0, 1, 2, 3]
    assert topology["path"][0]["exploration"] == topology["path"][0]["density"]
    assert topology["path"][-1]["live_channels"] == topology["live_channels"]
    assert summary["left_dense"] == {}
    assert summary["locked"] == {"classifier": "they are an output of the model"}
    assert summary["forecast"] is None

    report = (folder / "report.md").read_text()
    for text in (
        "| after epoch | start | 1 | 2 | 3 |",
        f"| exploration | 0.2000 | {float(table[0]['exploration']):.4f} |",
        f"SAD from the start: {topology['from_start']['changed']:,} of 18,248 weights",
        "revived: of the weights that were ever dropped",
        "all channels kept: classifier - they are an output of the model",
    ):
        assert text in report


def test_the_path_has_the_start_the_quarters_and_the_end():
    history = History(start={"density": 1.0, "alpha": 0.5})
    for epoch in range(13):
        history.layers += [{"epoch": epoch, "live_channels": live} for live in (epoch, 100)]
    history.rows = [
        {"density": 1 - epoch / 20, "alpha": 0.1, "lr": 0.1, "sad_cumulative": 0.0}
        for epoch in range(1, 13)
    ]
    path = topology(history)["path"]
    assert [point["epoch"] for point in path] == [0, 3, 6, 9, 12]
    assert path[1] == {"epoch": 3, "density": 0.85, "alpha": 0.1, "live_channels": 103}
    assert path[0]["alpha"] == 0.5


def test_a_method_that_moves_nothing_has_no_page_of_zeros(tmp_path):
    folder = tmp_path / "run"
    summary = train(tiny(folder, method="static", epochs=2), gossamer.Static(density=0.2))
    assert summary["topology"]["from_start"]["changed"] == 0
    assert summary["topology"]["exploration"] == summary["topology"]["density"]
    assert moves(summary) == [("after epoch", "start", "1", "2")]
    assert untouched(summary) == ""
    report = (folder / "report.md").read_text()
    assert "The supports stayed as they were at the start." in report
    assert "exploration" not in report
    assert {row["sad_from_start"] for row in rows(folder)} == {"0.0"}


def test_thresholds_and_alpha_have_paths(tmp_path):
    folder, watcher = tmp_path / "run", Watching()
    method = gossamer.AutoSparse(granularity="row", alpha_reset=0.6)
    config = tiny(folder, method="autosparse", threshold_decay=0.05)
    summary = train(config, method, watcher=watcher)
    table, layers = rows(folder), rows(folder, "layers.csv")
    assert [float(row["alpha"]) for row in table][1:] == [0, 0]
    assert 0 < float(table[0]["alpha"]) < 0.5
    lowest, highest = (
        pick(float(row[f"threshold_{name}"]) for row in layers[-7:])
        for pick, name in ((min, "min"), (max, "max"))
    )
    assert (lowest, highest) == (
        float(table[-1]["threshold_min"]),
        float(table[-1]["threshold_max"]),
    )
    assert lowest < float(table[-1]["threshold_mean"]) < highest
    start = [float(row["threshold_mean"]) for row in layers[:7]]
    assert start == pytest.approx([torch.sigmoid(torch.tensor(-5.0)).item()] * 7)
    shown = {line[0]: line[1:] for line in moves(summary)}
    assert shown["alpha"] == ("0.5", f"{float(table[0]['alpha']):.3g}", "0", "0")
    assert shown["threshold, mean"][0] == "0.00669"

    (text,) = watcher.notes
    assert text == f"forecast: {summary['forecast']}"
    assert f"Forecast: {summary['forecast']}." in (folder / "report.md").read_text()
    lrs = [0.05 * rate(config, step, STEPS) for step in range(EPOCHS * STEPS)]
    assert f"Lambda = decay * sum(lr) / (1 - momentum) = {0.05 * sum(lrs) / 0.1:.3g}" in text


def test_an_annealed_penalty_has_a_path_and_dense_layers_a_reason(tmp_path):
    method = gossamer.SRSTE(lam=0.1, anneal_until=0.5)
    summary = train(tiny(tmp_path / "run", method="srste", epochs=2), method)
    lams = [float(row["lam"]) for row in rows(tmp_path / "run")]
    assert lams == pytest.approx([0.1, 0.1])
    assert {line[0]: line[1:] for line in moves(summary)}["lam"] == ("0", "0.1", "0.1")
    assert untouched(summary).startswith("left dense: features.0 - has 1 input per row")


def test_long_lists_of_layers_are_cut_short():
    locked = {f"skip{i}": "a skip path" for i in range(5)}
    locked |= {f"other{i}": f"reason {i}" for i in range(4)}
    summary = {"left_dense": {"stem": "has 3 inputs"}, "locked": locked}
    assert untouched(summary, most=2).splitlines() == [
        "left dense: stem - has 3 inputs",
        "all channels kept: skip0, skip1 and 3 more - a skip path",
        "all channels kept: other0 - reason 0",
        "all channels kept: 3 more, for other reasons (report.md)",
    ]
    assert len(untouched(summary).splitlines()) == 6
    assert "skip4 - a skip path" in untouched(summary)


def test_a_forecast_of_nothing_is_told_before_training(tmp_path):
    watcher = Watching()
    config = tiny(tmp_path / "run", method="str", epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("default", "STR: no sparsity", UserWarning)
        summary = train(config, gossamer.STR(), watcher=watcher)
    foretold, early, halfway = watcher.notes
    assert foretold.startswith("forecast: no sparsity can appear: Lambda")
    for warned in (early, halfway):  # the method's own
        assert warned.startswith("warning: STR: no sparsity can appear in the")
    assert summary["sparse"]["density"] == 1


def test_with_a_target_there_is_no_forecast(tmp_path):
    watcher = Watching()
    config = tiny(tmp_path / "run", method="autosparse", epochs=2)
    summary = train(config, gossamer.AutoSparse(target_density=0.5), watcher=watcher)
    assert watcher.notes == []
    assert summary["forecast"] is None
    assert summary["topology"]["density"] == pytest.approx(0.5, rel=0.01)


def test_thresholds_have_a_decay_of_their_own(tmp_path):
    model = build_model("vgg-small", num_classes=4, in_shape=(3, 8, 8), width=0.25)
    sparsifier = gossamer.Sparsifier(model, gossamer.DST(), total_steps=10)
    for optimizer in ("sgd", "adamw"):
        for given, used in ((None, 5e-4), (0.0, 0.0), (0.1, 0.1)):
            config = tiny("x", threshold_decay=given, optimizer=optimizer)
            groups = make_optimizer(config, model, sparsifier).param_groups
            assert [group["weight_decay"] for group in groups] == [5e-4, used]
            assert len(groups[1]["params"]) == len(sparsifier.sites)
    for name, other in (("static", gossamer.Static()), ("srste", gossamer.SRSTE())):
        with pytest.raises(ValueError, match=f"threshold_decay=0.1: {name} learns no thresholds"):
            train(tiny(tmp_path / "run", method=name, threshold_decay=0.1), other)
    assert not (tmp_path / "run").exists()


def test_the_gradients_of_thresholds_can_be_clipped(tmp_path):
    def density(name, **clip):
        config = tiny(tmp_path / name, method="dst", epochs=1, threshold_decay=0.0, **clip)
        return train(config, gossamer.DST(alpha=0.01))["sparse"]["density"]

    free = density("free")
    assert free < 0.95
    assert density("wide", threshold_clip=1e6) == free
    assert density("held", threshold_clip=1e-9) > 0.9999
    with pytest.raises(ValueError, match=r"threshold_clip=0\.1: static learns no thresholds"):
        train(tiny(tmp_path / "run", method="static", threshold_clip=0.1), gossamer.Static())


@pytest.mark.parametrize(
    ("dense_loss", "factor"),
    [(1e-3, 1.05), pytest.param(1e3, 0.995, marks=pytest.mark.slow)],
)
def test_methods_that_follow_the_loss_are_told_it(dense_loss, factor, tmp_path):
    method = gossamer.AutoSparse(
        dense_losses=(dense_loss,), tune_end=0.5, alpha_schedule="none", alpha_reset=1.0
    )
    train(tiny(tmp_path / "run", method="autosparse", epochs=2), method)
    assert float(rows(tmp_path / "run")[0]["alpha"]) == pytest.approx(0.5 * factor)


# ------------------------------------------------------------------ stopping and going on


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"channels_last": True, "optimizer": "adamw", "lr": 0.003, "precision": "bf16"},
        {"model": f"{__name__}:with_dropout", "width": 1.0, "cut": "end", "schedule": "multistep"},
    ],
    ids=["sgd", "adamw-bf16-channels_last", "dropout-cut_at_the_end"],
)
def test_a_resumed_run_is_the_same_run(settings, tmp_path):
    whole = train(tiny(tmp_path / "whole", **settings), chase())
    config = tiny(tmp_path / "broken", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, chase(), watcher=Watching("sparse", 1, 4))
    live = [int(row["live_channels"]) for row in rows(tmp_path / "whole")]
    assert live[0] > live[-1]  # channels go before and after the interruption
    assert live[0] < rows_width(settings)
    assert len(rows(tmp_path / "broken")) == 1

    watcher = Watching()
    resumed = train(config, chase(), resume=True, watcher=watcher)
    assert watcher.networks == [("sparse", 1)]
    assert lasting(resumed) == lasting(whole)
    assert same_model(tmp_path / "broken", tmp_path / "whole")
    same_metrics(tmp_path / "broken", tmp_path / "whole")


QUICK = ("chase", "dst")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in METHODS],
)
def test_every_method_resumes(name, tmp_path):
    settings = {"str": {"s_init": -5.0}}  # by default it wants a longer run
    method = METHODS[name].cls(**settings.get(name, {}))
    whole = train(tiny(tmp_path / "whole", method=name, epochs=2), method)
    config = tiny(tmp_path / "broken", method=name, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, method, watcher=Watching("sparse", 1, 4))
    assert lasting(train(config, method, resume=True)) == lasting(whole)
    assert same_model(tmp_path / "broken", tmp_path / "whole")
    same_metrics(tmp_path / "broken", tmp_path / "whole")


def rows_width(settings):
    return 32 if "with_dropout" in settings.get("model", "") else 112


def test_the_dense_twin_is_interrupted_by_itself(finished, tmp_path):
    config = tiny(tmp_path / "run", baseline=True)
    with pytest.raises(KeyboardInterrupt):
        train(config, chase(), watcher=Watching("dense", 2, 1))
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    watcher = Watching()
    summary = train(config, chase(), resume=True, watcher=watcher)
    assert watcher.networks == [("dense", 2)]
    assert lasting(summary) == lasting(finished[1])


def test_a_twin_can_be_asked_for_later(finished, tmp_path):
    config = tiny(tmp_path / "run")
    assert "dense" not in train(config, chase())
    watcher = Watching()
    summary = train(replace(config, baseline=True), chase(), resume=True, watcher=watcher)
    assert watcher.networks == [("dense", 0)]
    assert lasting(summary) == lasting(finished[1])
    watcher = Watching()
    assert train(config, chase(), resume=True, watcher=watcher) == summary  # finished: only read
    assert watcher.networks == []


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run")
    write = Path.write_bytes

    def full(path, data):
        if "sparse.ckpt" in path.name and checkpoint.exists():
            write(path, bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    checkpoint = tmp_path / "run" / "checkpoints" / "sparse.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"could not write .*sparse.ckpt \(No space left"):
            train(config, chase())
    assert [path.name for path in checkpoint.parent.iterdir()] == ["sparse.ckpt"]
    history = torch.load(checkpoint, weights_only=True)["gossamer"]["history"]
    assert len(history["rows"]) == 1

    watcher = Watching()
    resumed = train(config, chase(), resume=True, watcher=watcher)
    assert watcher.networks == [("sparse", 1)]
    assert lasting(resumed)["slim"] == lasting(train(tiny(tmp_path / "other"), chase()))["slim"]


# ------------------------------------------------------------------ what is refused


def test_a_run_is_never_overwritten_silently(tmp_path):
    folder = tmp_path / "run"
    config = tiny(folder, epochs=1)
    train(config, chase(explore_end=1.0))
    (folder / "notes.txt").write_text("mine")
    before = (folder / "summary.json").read_text()
    with pytest.raises(FileExistsError, match="--resume goes on with it, --overwrite throws it"):
        train(config, chase())
    with pytest.raises(ValueError, match="no data set 'diggits'"):
        train(replace(config, data="diggits"), chase(), overwrite=True)
    with pytest.raises(ValueError, match="the highest reachable"):
        train(config, chase(channel_sparsity=0.95, min_channels=8), overwrite=True)
    assert (folder / "summary.json").read_text() == before
    train(replace(config, seed=1), chase(), overwrite=True)
    assert json.loads((folder / "summary.json").read_text())["seed"] == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_other_settings_are_not_resumed(finished, tmp_path):
    folder = finished[0]
    with pytest.raises(ValueError, match=r"config.yaml says epochs: 3, and now it is 5: resume"):
        train(tiny(folder, epochs=5), chase(), resume=True)
    with pytest.raises(ValueError, match=r"says density: 0.2, and now it is 0.3"):
        train(tiny(folder), chase(density=0.3), resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(tiny(tmp_path / "nowhere"), chase(), resume=True)


@pytest.fixture
def halted(tmp_path):
    """A run that stopped after one epoch, and its checkpoint."""
    config = tiny(tmp_path / "halted")
    with pytest.raises(KeyboardInterrupt):
        train(config, chase(), watcher=Watching("sparse", 1, 1))
    return config, tmp_path / "halted" / "checkpoints" / "sparse.ckpt"


def test_damaged_checkpoints_are_named(halted):
    config, path = halted
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"sparse.ckpt is damaged .* remove "):
        train(config, chase(), resume=True)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="is no checkpoint of `gossamer train`"):
        train(config, chase(), resume=True)


def test_checkpoints_of_other_runs_are_named(halted, finished, tmp_path):
    config, path = halted
    path.write_bytes((finished[0] / "checkpoints" / "dense.ckpt").read_bytes())
    with pytest.raises(ValueError, match="holds no Sparsifier's state"):
        train(config, chase(), resume=True)

    other = tiny(tmp_path / "static", method="static")
    with pytest.raises(KeyboardInterrupt):
        train(other, gossamer.Static(), watcher=Watching("sparse", 1, 1))
    path.write_bytes((tmp_path / "static" / "checkpoints" / "sparse.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"method: .?name.? is .Static. in it"):
        train(config, chase(), resume=True)

    wide = tiny(tmp_path / "wide", width=0.5)
    with pytest.raises(KeyboardInterrupt):
        train(wide, chase(), watcher=Watching("sparse", 1, 1))
    path.write_bytes((tmp_path / "wide" / "checkpoints" / "sparse.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"shapes: features.0 is"):
        train(config, chase(), resume=True)


def test_a_dense_checkpoint_of_another_network_is_named(finished):
    folder = finished[0]
    model = build_model("vgg-small", num_classes=10, in_shape=(1, 8, 8), width=0.5)
    path = folder / "checkpoints" / "dense.ckpt"
    with pytest.raises(ValueError, match=r"another network: for features.0.weight it has \(8, 1"):
        check_network(path, read(path), model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0: give at least 1"),
        ({"lr": 0.0}, "give a learning rate above 0"),
        ({"momentum": 1.0}, r"give a value in \[0, 1\)"),
        ({"warmup_epochs": 3}, "leaves none to train in"),
        ({"milestones": (1.5,)}, "fractions of the run"),
        ({"threads": 0}, "threads=0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"threshold_decay": -1.0}, "threshold_decay=-1.0: give at least 0"),
        ({"threshold_clip": 0.0}, "threshold_clip=0.0: give a norm above 0"),
        ({"method": "chaze"}, "did you mean 'chase'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("x", **settings)


# ------------------------------------------------------------------ the parts


def test_settings_survive_plain_data():
    config = tiny("x", include=("features.*",), milestones=(0.3,))
    assert from_dict(to_dict(config, chase())) == (config, chase())
    with pytest.raises(ValueError, match=r"no setting 'epoch' \(did you mean epochs\?\)"):
        from_dict({"epoch": 3})
    with pytest.raises(ValueError, match="'channel_sparsity' is a setting of chase, not of static"):
        from_dict({"method": "static", "channel_sparsity": 0.5})


def test_the_default_folder_names_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert tiny(None, out=None).folder == Path("runs/digits-vgg-small-chase-s0")
    config = tiny(None, out=None, data=str(tmp_path / "pets"), model="my.nets:make", seed=4)
    assert config.folder == Path("runs/pets-my.nets-make-chase-s4")


def test_learning_rates():
    cosine = tiny("x", epochs=10, warmup_epochs=2)
    assert [rate(cosine, step, 5) for step in (0, 4, 9, 10, 30)] == pytest.approx(
        [0.1, 0.5, 1, 1, 0.5]
    )
    assert rate(cosine, 50, 5) == pytest.approx(0)
    steps = tiny("x", epochs=10, schedule="multistep", milestones=(0.5, 0.8))
    assert [rate(steps, step, 5) for step in (24, 25, 40)] == pytest.approx([1, 0.1, 0.01])
    assert rate(tiny("x", schedule="constant"), 29, 10) == 1


def test_work_is_what_an_account_at_every_step_adds_up_to():
    torch.manual_seed(0)
    model = build_model("vgg-small", num_classes=4, in_shape=(3, 8, 8), width=0.25)
    example = torch.randn(2, 3, 8, 8)
    steps, batch = 20, 4
    sparsifier = gossamer.Sparsifier(
        model, chase(), total_steps=steps, example=example, exclude=["classifier"]
    )
    work = Work(model, example, sparsifier)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    expected, dense = 0.0, 0
    for step in range(1, steps + 1):
        supports = {site.name: site.nonzeros for site in sparsifier.sites}
        wanted = sparsifier.sites[0].masked.wants_dense_gradient
        dense += wanted
        products = training_products(
            account(model, example, supports=supports),
            sparse_forward=True,
            sparse_grad_input=True,
            sparse_grad_weight=not wanted,
        )
        expected += batch * sum(products)
        work.add(batch)
        assert work.total == expected, step
        images = torch.randn(batch, 3, 8, 8)
        nn.functional.cross_entropy(model(images), torch.arange(batch)).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    assert dense
    assert len(sparsifier.plan)


class Mixed(nn.Module):
    """Bias, norm, depthwise, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.one = nn.Linear(8 * 16, 20)
        self.two = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(self.body(x)).relu())


def test_expanding_undoes_the_cut():
    torch.manual_seed(0)
    model = Mixed().double()
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    for _ in range(3):
        model(images)  # norms have seen data
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.bias.normal_()
        model.body[3].weight[:5] = 0
        model.body[6].weight[:, :5] = 0
        model.one.weight[:, : 3 * 16] = 0
        model.two.weight[:, ::2] = 0
    cut = gossamer.shrink(model, images)
    assert cut.removed == 5 + 3 + 10
    torch.manual_seed(1)
    full = expand(cut.model, Mixed().double(), cut.plan)
    assert torch.allclose(full.eval()(images), model.eval()(images), rtol=0, atol=1e-12)
    assert not full.body[0].weight[:5].any()
    assert not full.body[0].bias[:5].any()

    weight = cut.model.one.weight.detach()
    whole = scatter(weight, model.one.weight.shape, "one.weight", cut.plan)
    assert torch.equal(take(whole, "one.weight", cut.plan), weight)
    assert torch.equal(whole, full.one.weight.detach())
