"""`gossamer compare`: what a file may say, cells in processes, and what comes of them.

Most tests let a few lines of Python stand in for `gossamer train`: they are about what happens
around it. A slow one has the real thing.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import gossamer
from gossamer.measure.latency import Conditions
from gossamer.shrink.file import read_plan
from gossamer.train import cli
from gossamer.train.compare import compare, failures, means, processes, read, timing
from gossamer.train.compare.plot import draw
from gossamer.train.compare.results import figures_of, groups, rows
from gossamer.train.compare.rivals import launched
from gossamer.train.compare.timing import time_cells
from gossamer.train.config import to_yaml
from gossamer.train.flags import UsageError
from gossamer.train.narrowing import Widths, digest
from gossamer.train.recipes import settings_file
from gossamer.train.run import train

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
TINY = {"model": "vgg-small", "width": 0.25, "epochs": 1, "batch_size": 64, "lr": 0.05}
LISTS = {"densities": [0.3, 0.2], "seeds": [0, 1], "methods": ["static"]}


@pytest.fixture
def compared(tmp_path):
    """Writes a comparison and reads it."""

    def write(**settings):
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump({**TINY, **LISTS, **settings}))
        return read(file, str(tmp_path / "out"))

    return write


# ------------------------------------------------------------------ the file


def test_cells_are_methods_by_densities_by_seeds(compared, tmp_path):
    entries = ["static", {"method": "chase", "min_channels": 2}, {"method": "srste", "lr": "1e-3"}]
    found = compared(methods=entries, threads=2)
    assert [str(cell) for cell in found.cells] == [
        "dense, seed 0",
        "dense, seed 1",
        "static, density 0.3, seed 0",
        "static, density 0.2, seed 0",
        "chase, density 0.3, seed 0",
        "chase, density 0.2, seed 0",
        "srste, seed 0",
        "static, density 0.3, seed 1",
        "static, density 0.2, seed 1",
        "chase, density 0.3, seed 1",
        "chase, density 0.2, seed 1",
        "srste, seed 1",
    ]
    dense, chase, srste = found.cells[0], found.cells[5], found.cells[6]
    assert dense.method == gossamer.Static(density=1.0)
    assert chase.method == gossamer.Chase(density=0.2, min_channels=2)
    assert chase.config.folder == tmp_path / "out" / "cells" / "chase-d0.2-s0"
    assert (chase.config.lr, srste.config.lr) == (0.05, 0.001)
    assert {cell.config.threads for cell in found.cells} == {2} == {found.threads}
    assert found.notes == ("srste runs once per seed: it has no density to set.",)
    assert len({cell.config.folder for cell in found.cells}) == len(found.cells)


def test_the_file_in_the_docs_is_understood(tmp_path):
    text = (ROOT / "docs" / "compare.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "some.yaml").write_text(block)
    cells = read(tmp_path / "some.yaml").cells
    assert len(cells) == 3 * (1 + 2 * 4 * (1 + 3))
    assert isinstance(cells[-4].method, gossamer.DST)


def test_entries_may_have_densities_of_their_own(compared):
    found = compared(
        methods=["static", {"method": "static", "label": "half", "density": 0.5}], seeds=[3]
    )
    assert [str(cell) for cell in found.cells][1:] == [
        "static, density 0.3, seed 3",
        "static, density 0.2, seed 3",
        "half, seed 3",
    ]
    assert found.cells[3].method == gossamer.Static(density=0.5)
    assert found.notes == ("half runs once per seed: its entry sets density.",)
    found = compared(methods=["static", {"method": "str", "densities": [0.1, 0.05]}], seeds=[3])
    assert [str(cell) for cell in found.cells][3:] == [
        "str, density 0.1, seed 3",
        "str, density 0.05, seed 3",
    ]
    assert found.cells[4].method == gossamer.STR(target_density=0.05)
    assert found.cells[4].config.folder.name == "str-d0.05-s3"
    assert not found.notes


def test_learned_thresholds_get_a_target(compared):
    cells = compared(methods=["str"], seeds=[0]).cells[1:]
    assert [cell.method for cell in cells] == [
        gossamer.STR(target_density=density) for density in (0.3, 0.2)
    ]


def test_defaults(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("methods: [static]\nthreads: null\n")
    found = read(file)
    assert found.folder == Path("runs/some")
    assert [str(cell) for cell in found.cells[3:]] == [f"static, seed {seed}" for seed in range(3)]
    assert found.threads == 1
    file.write_text("methods: [static]\nout: there\n")
    assert read(file).folder == Path("there")
    assert read(file, "here").folder == Path("here")
    moved = tmp_path / "compare.yaml"
    moved.write_text("methods: [static]\n")
    (tmp_path / "cells").mkdir()
    assert read(moved).folder == tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": []}, "methods: got []; wanted a list"),
        ({"methods": "set"}, "methods: got 'set'; wanted a list"),
        ({"methods": [{"density": 1}]}, "entry 1: got {'density': 1}; wanted a name"),
        ({"methods": ["statik"]}, "no method is called 'statik' (did you mean 'static'?)"),
        ({"methods": ["static", "static"]}, "two entries are called 'static': give one"),
        ({"methods": [{"method": "static", "label": "dense"}]}, "'dense' is the dense twin's"),
        ({"methods": [{"method": "static", "alpha": 1}]}, "'alpha' is a setting of dst"),
        ({"methods": [{"method": "static", "epohcs": 1}]}, "did you mean epochs?"),
        ({"methods": [{"method": "static", "epochs": "x"}]}, "static: epochs: got 'x'; wanted int"),
        ({"methods": [{"method": "static", "exclude": "a"}]}, "exclude: got 'a'; wanted a list"),
        ({"methods": [{"method": "static", "seed": 1}]}, "list seeds under `seeds`"),
        ({"methods": [{"method": "static", "model": "vgg16"}]}, "must be the same for all"),
        ({"methods": [{"method": "static", "label": "a b"}, {"method": "set", "label": "a-b"}]},
         "would share the folder"),
        ({"densities": 0.1}, "densities: got 0.1; wanted a list of numbers"),
        ({"densities": ["few"]}, "densities: got 'few'; wanted a list of numbers"),
        ({"densities": [0.1, "1e-1"]}, "densities: 1e-1 is there twice"),
        ({"seeds": [0, 1.5]}, "seeds: got 1.5; wanted a list of whole numbers"),
        ({"seeds": []}, "seeds: got []; wanted a list of whole numbers"),
        ({"seed": 1}, "'seed' is not given for all runs: list seeds under `seeds`"),
        ({"baseline": True}, "the dense twin is always trained"),
        ({"alpha": 1}, "'alpha' is a setting of dst"),
        ({"rivals": "slim"}, "rivals: got 'slim'; wanted a list, [slim]"),
        ({"rivals": ["slm"]}, "rivals: there is no rival 'slm' (did you mean slim?): choose of"),
        ({"rivals": ["slim", "slim"]}, "rivals: slim is there twice"),
        ({"rivals": ["slim-wall-time"]}, "slim-wall-time needs slim, whose epochs"),
        ({"methods": [{"method": "static", "rivals": [1]}]}, "static: rivals: there is no rival 1"),
        ({"methods": [{"method": "static", "densities": 0.1}]},
         "methods, static: densities: got 0.1; wanted a list of numbers"),
        ({"methods": [{"method": "static", "densities": []}]}, "static: densities: got []; wanted"),
        ({"methods": [{"method": "srste", "densities": [0.1]}]}, "srste has no density to set"),
        ({"methods": [{"method": "str", "densities": [0.1], "target_density": 0.2}]},
         "methods, str: got target_density and densities; wanted one of them"),
        ({"methods": [{"method": "statik", "densities": [0.1]}]}, "no method is called 'statik'"),
        ({"widths_of": "runs/x"}, "dense networks of the slim ones' widths are `rivals`"),
        ({"sparsities": [0.1]}, "no setting 'sparsities' (did you mean densities?)"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood(settings, message, compared, tmp_path, capsys):
    with pytest.raises(UsageError) as error:
        compared(**settings)
    assert message in str(error.value)
    assert str(tmp_path / "tiny.yaml") in str(error.value)
    assert cli.main(["compare", str(tmp_path / "tiny.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_values_that_are_refused(compared, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"tiny\.yaml, static: Static: density=1\.5 is out of"):
        compared(densities=[1.5])
    assert cli.main(["compare", str(tmp_path / "tiny.yaml")]) == 1
    assert cli.main(["compare", str(tmp_path / "none.yaml")]) == 1
    assert "there is no file " in capsys.readouterr().err
    (tmp_path / "tiny.yaml").write_text("method: chase\n")
    assert cli.main(["compare", str(tmp_path / "tiny.yaml")]) == 2
    assert "gossamer train --config" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "tiny.yaml"), "--jobs", "0"]) == 2


# ------------------------------------------------------------------ rivals


def test_rivals_follow_their_cell(compared):
    found = compared(
        methods=[
            {"method": "chase", "min_channels": 2, "epochs": 3, "lr": 0.2},
            {"method": "static", "rivals": ["uniform"], "keep_channels": ["classifier"]},
            {"method": "static", "label": "alone", "rivals": []},
        ],
        rivals=["slim-wall-time", "slim"],
        densities=[0.2],
    )
    assert [str(cell) for cell in found.cells[2:9]] == [
        "chase, density 0.2, seed 0",
        "chase, density 0.2, slim, seed 0",
        "chase, density 0.2, slim-wall-time, seed 0",
        "static, density 0.2, seed 0",
        "static, density 0.2, uniform, seed 0",
        "alone, density 0.2, seed 0",
        "chase, density 0.2, seed 1",
    ]
    chase, slim, timed, static, uniform = found.cells[2:7]
    assert [cell.after for cell in (slim, timed, uniform)] == [(chase,), (chase, slim), (static,)]
    # The dense twin's recipe, and the epochs and kept channels of the cell.
    dense = found.cells[0]
    own = {"widths_of": str(chase.config.folder), "out": f"{chase.config.folder}-slim"}
    assert slim.config == replace(dense.config, epochs=3, **own)
    assert slim.method == timed.method == uniform.method == dense.method
    assert timed.config.out.endswith("cells/chase-d0.2-s0-slim-wall-time")
    assert uniform.config.widths_match == "macs"
    assert uniform.config.keep_channels == ("classifier",)
    assert [cell.optional for cell in (slim, timed, uniform)] == [True, True, False]


def test_the_recipe_of_rivals():
    cells = read(settings_file("digits-rivals")).cells
    assert len(cells) == 3 * (1 + 1 + 3)
    assert [cell.rival for cell in cells[3:7]] == ["", "slim", "slim-wall-time", "uniform"]


def took(seconds, device="cpu", threads=1):
    clocks = {"wall_seconds": {"sparse": 2 * seconds}, "cpu_seconds": {"sparse": seconds}}
    return clocks | {"machine": {"device": device, "threads": threads}}


def ended(cell, source, seconds=1.0):
    """As if the cell's run had ended like that of `source`, in so many seconds."""
    cell.config.folder.mkdir(parents=True)
    shutil.copy(source.run.model, cell.run.model)
    cell.run.summary.write_text(json.dumps(took(seconds)))


def test_epochs_that_fit_into_the_wall_time(compared, trained):
    found = compared(
        methods=["chase"], seeds=[0], densities=[0.2], rivals=["slim", "slim-wall-time"], epochs=7
    )
    dense, chase, slim, timed = found.cells
    ended(chase, trained.cells[2], seconds=30.0)
    ended(slim, trained.cells[2], seconds=20.0)
    assert launched(timed) == replace(timed.config, epochs=10)  # of 10.5
    assert [launched(cell) for cell in (dense, slim)] == [dense.config, slim.config]
    timed.run.path.mkdir()
    timed.run.config.write_text(to_yaml(launched(timed), timed.method))
    slim.run.summary.write_text(json.dumps(took(1.0)))
    assert launched(timed).epochs == 10  # once it has been started it stays so
    found.check_unchanged()
    for device, threads in (("cuda", 1), ("cpu", 2)):  # one clock does not see all of it
        slim.run.summary.write_text(json.dumps(took(1.0, device, threads)))
        assert slim.training() == (2.0, "wall")
    slim.run.summary.write_text("{}")
    timed.run.config.unlink()
    with pytest.raises(ValueError, match=r"slim.summary\.json is damaged .*: remove its folder"):
        launched(timed)


def test_a_rival_of_a_network_that_is_gone_is_refused(compared, trained):
    found = compared(methods=["chase"], densities=[0.2], seeds=[0], rivals=["slim"])
    _, chase, slim = found.cells
    ended(chase, trained.cells[2])
    ended(slim, trained.cells[2])
    widths = Widths(str(chase.config.folder), digest(chase.run.model), read_plan(chase.run.model))
    slim.run.widths.write_text(json.dumps(widths.to_dict()))
    found.check_unchanged()
    with chase.run.model.open("ab") as file:
        file.write(b"trained anew")
    with pytest.raises(
        ValueError, match=r"chase-d0.2-s0-slim has the widths that .*chase-d0.2-s0 had"
    ):
        found.check_unchanged()
    chase.run.summary.unlink()
    with pytest.raises(
        ValueError, match=r"removed or trained anew since: remove .*chase-d0.2-s0-slim"
    ):
        found.check_unchanged()


def test_rivals_have_rows_of_their_own(tmp_path):
    found = [row("dense", 0, 0.75, 200), row("set", 0, 0.5, 40, 0.1)]
    found += [row("set", 0, 0.75, 60, 0.1, "slim"), row("set", 0, 0.25, 50, 0.1, "uniform")]
    assert [line[0] for line in means(found)[1:]] == [
        "dense",
        "set 0.1",
        "set 0.1 slim",
        "set 0.1 uniform",
    ]
    assert [line[3] for line in means(found)[1:]] == ["-", "-25.00", "+0.00", "-50.00"]
    draw(tmp_path / "plot.svg", "rivals", found)
    svg = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}</text>" in svg for name in ("dense", "set", "set slim", "set uniform"))


# ------------------------------------------------------------------ real cells


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A comparison of which two cells have been trained, in this process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    methods = ["static", {"method": "chase", "min_channels": 2}]
    settings = {**TINY, "methods": methods, "densities": [0.2], "seeds": [0]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    found = read(folder / "tiny.yaml", str(folder / "out"))
    for cell in (found.cells[0], found.cells[2]):
        train(cell.config, cell.method)
    return found


def test_the_dense_twin_is_that_of_a_baseline(trained, tmp_path):
    """Static sparsity of nothing: bit for bit what `gossamer train --baseline` trains."""
    cell = trained.cells[0]
    config = replace(cell.config, out=str(tmp_path), baseline=True)
    summary = train(config, gossamer.Static(density=0.1))
    twin = torch.load(tmp_path / "checkpoints" / "dense.ckpt", weights_only=True)["state_dict"]
    ours = safetensors.torch.load_file(cell.run.model)
    assert twin.keys() == {f"model.{name}" for name in ours}
    assert all(torch.equal(tensor, twin[f"model.{name}"]) for name, tensor in ours.items())
    slim = json.loads(cell.run.summary.read_text())["slim"]
    for name in ("accuracy", "density", "nonzeros", "macs_executed", "macs_sparse"):
        assert slim[name] == summary["dense"][name], name
    assert slim["macs_training"] == summary["dense"]["macs_training"]


def test_rows_have_all_figures(trained):
    cells = [cell for cell in trained.cells if cell.finished]
    found = rows(trained.cells, {trained.cells[1]: "no luck"}, time_cells(cells, 1))
    assert [row["status"] for row in found] == ["done", "failed", "done"]
    dense, _, chase = found
    for row in (dense, chase):
        assert {name for name, value in row.items() if value is None} <= {"density_asked"}
    summary = json.loads(cells[1].run.summary.read_text())
    assert (chase["label"], chase["density_asked"], chase["seed"]) == ("chase", 0.2, 0)
    for name in ("accuracy", "bytes_on_disk", "macs_executed", "macs_sparse", "macs_training"):
        assert chase[name] == summary["slim"][name]
    assert chase["density"] == summary["sparse"]["density"] == pytest.approx(0.2, rel=0.01)
    assert chase["latency_ms"] != summary["slim"]["latency_ms"]  # taken afterwards
    assert chase["latency_ratio_low"] <= chase["latency_ratio"] <= chase["latency_ratio_high"]
    with cells[1].run.metrics("sparse").open() as file:
        assert chase["val_accuracy"] == float(list(csv.DictReader(file))[-1]["val_accuracy"])

    grouped = groups(found)
    assert list(grouped) == [("dense", None, ""), ("chase", 0.2, "")]
    assert chase["epochs"] == 1
    own = figures_of([dense], [dense])
    assert own["difference"] == [0]
    assert own["macs_executed"] == own["bytes_on_disk"] == [1]
    assert figures_of([chase], [dense])["macs_executed"][0] < 0.8
    assert failures(found) == ["static 0.2 seed 0: no luck"]


def row(label, seed, accuracy, macs, density=None, rival=""):
    sizes = ("nonzeros", "bytes_on_disk", "macs_executed", "macs_sparse", "macs_training")
    return dict.fromkeys((*sizes, "train_seconds"), macs) | {
        "label": label,
        "rival": rival,
        "epochs": 30,
        "density_asked": density,
        "seed": seed,
        "status": "done",
        "accuracy": accuracy,
        "val_accuracy": accuracy,
        "density": 0.25,
        "latency_ratio": None,
        "machine": "a processor",
        "torch": "2.13.0",
        "threads": 1,
        "train_clock": "cpu",
    }


def test_the_table_by_hand():
    found = [row("dense", 0, 0.75, 200), row("dense", 1, 0.5, 200)]
    found += [row("set", 1, 0.25, 40, 0.1), row("set", 0, 1.0, 60, 0.1)]
    head, dense, sparse = means(found)
    assert dict(zip(head, dense, strict=True)) == {
        "method": "dense",
        "seeds": "2",
        "accuracy": "62.50 +- 17.68",
        "vs dense": "-",
        "validation": "62.50 +- 17.68",
        "density": "0.2500",
        "epochs": "30",
        "nonzeros": "1.000",
        "bytes": "1.000",
        "MACs executed": "1.000",
        "MACs sparse": "1.000",
        "MACs training": "1.000",
        "training time": "1.000",
        "latency": "-",
    }
    cells = dict(zip(head, sparse, strict=True))
    assert cells["vs dense"] == "+0.00 +- 35.36"  # each against its own seed's: 25 and -25 points
    assert cells["MACs sparse"] == "0.250 +- 0.071"
    head, _, sparse = means(found, narrow=True)
    cells = dict(zip(head, sparse, strict=True))
    assert (cells["vs dense"], cells["MACs sparse"]) == ("+0.00", "0.250")
    assert cells["accuracy"] == "62.50 +- 53.03"
    assert means(found[2:])[1][3] == "-"  # no dense twin has been trained


@pytest.mark.parametrize(
    "other", [{"machine": "another"}, {"torch": "2.14.0"}, {"threads": 2}, {"train_clock": "wall"}]
)
def test_training_times_are_of_one_machine(other):
    found = [row("dense", 0, 0.75, 200), row("dense", 1, 0.5, 100) | other]
    found += [row("set", 0, 0.25, 50, 0.1), row("set", 1, 0.25, 50, 0.1) | other]
    found += [row("mest", 0, 0.25, 50, 0.1) | {"machine": "a third"}]
    column = means(found)[0].index("training time")
    assert [line[column] for line in means(found)[1:]] == ["1.000", "0.375 +- 0.177", "-"]


def test_the_legend_has_room(tmp_path):
    found = [row("dense", 0, 0.75, 200) | {"latency_ratio": 1.0}]
    found += [row(f"method {n}", 0, 0.5, 100, 0.1) | {"latency_ratio": 0.5} for n in range(30)]
    draw(tmp_path / "plot.svg", "many", found)
    text = (tmp_path / "plot.svg").read_text()
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', text)[1])
    lowest = max(float(y) for y in re.findall(r'<text [^>]* y="([\d.]+)"', text))
    assert "method 29" in text
    assert lowest < height


# ------------------------------------------------------------------ processes

CONDITIONS = [field.name for field in fields(Conditions)]
# What stands in for `gossamer train --resume --out FOLDER ...`.
STAND_IN = """
import os, pathlib, shutil, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
assert sys.argv[1:3] == ["train", "--resume"] and (out / "config.yaml").exists()
assert os.environ["OMP_NUM_THREADS"] == sys.argv[sys.argv.index("--threads") + 1] == "1"
model = pathlib.Path(MODEL)
if (model / out.name / "error").exists():
    print("epoch 1")
    sys.exit((model / out.name / "error").read_text())
if (model / "hang").exists() and "dense" not in out.name:
    def stop(*_):
        (out / "stopped").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (out / "started").touch()
    time.sleep(60)
like = model / out.name.split("-")[0]
like = like if like.exists() else model / "run"
for name in ("metrics.csv", "model.safetensors", "summary.json"):
    shutil.copy(like / name, out / "partly")
    os.replace(out / "partly", out / name)
(out / "started").touch()
"""


@pytest.fixture
def stand_in(trained, tmp_path, monkeypatch):
    """Nothing takes time: every cell ends like the dense one. Returns a folder that steers them."""
    quartiles = {"low": 0.9, "median": 1.0, "high": 1.1}

    def time_cells(cells, threads):
        times = {"milliseconds": quartiles, "ratio": quartiles}
        return {
            "conditions": {**dict.fromkeys(CONDITIONS, 1), "gpu": None, "cpu": "a processor"},
            "cells": {
                cell.config.folder.name: {**times, "sha256": timing._digest(cell)} for cell in cells
            },
        }

    monkeypatch.setattr("gossamer.train.compare.time_cells", time_cells)
    model = tmp_path / "model"
    shutil.copytree(trained.cells[0].config.folder, model / "run")
    monkeypatch.setattr(processes, "_COMMAND", STAND_IN.replace("MODEL", repr(str(model))))
    return model


def fails(steering, name, text):
    (steering / name).mkdir()
    (steering / name / "error").write_text(text)


def test_it_trains_times_and_writes_everything(compared, stand_in):
    comparison, said = compared(densities=[0.2]), []
    found = compare(comparison, jobs=2, say=said.append)
    assert [row["status"] for row in found] == ["done"] * 4
    out = comparison.folder
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == [
        "accuracy.svg",
        "cells",
        "compare.md",
        "compare.yaml",
        "latency.json",
        "results.csv",
    ]
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [each["folder"] for each in table] == [str(c.config.folder) for c in comparison.cells]
    text = (out / "compare.md").read_text()
    assert "| static 0.2 | 2 |" in text
    assert "(accuracy.svg)" in text
    assert "after all training, one network at a time" in text
    assert (out / "compare.yaml").read_text() == comparison.text
    svg = (out / "accuracy.svg").read_text()
    for words in ("MACs executed / dense", "MACs sparse / dense", "latency / dense", "static"):
        assert f">{words}</text>" in svg
    assert said[0].startswith("4 of 4 cells to train, 2 at a time on 1 threads each")
    assert said[-1] == "timing 4 networks, one at a time"
    assert said[-2].startswith("[4/4] ")


def test_finished_cells_are_not_run_again(compared, stand_in):
    comparison = compared(densities=[0.2], seeds=[0])
    compare(comparison, jobs=1, say=lambda line: None)
    times = (comparison.folder / "latency.json").read_text()
    for cell in comparison.cells:
        (cell.run.path / "started").unlink()
    said = []
    compare(comparison, jobs=1, say=said.append)
    assert said == []
    assert (comparison.folder / "latency.json").read_text() == times
    # A density more: one cell to train, and all are timed again.
    wider = compared(densities=[0.2, 0.3], seeds=[0])
    compare(wider, jobs=1, say=said.append)
    assert [cell.label for cell in wider.cells if (cell.run.path / "started").exists()] == [
        "static"
    ]
    assert said[0].startswith("1 of 3 cells to train")
    assert len(json.loads((comparison.folder / "latency.json").read_text())["cells"]) == 3
    # A cell removed and trained anew is another network, and all are timed again.
    shutil.rmtree(wider.cells[2].config.folder)
    with (stand_in / "run" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    compare(wider, jobs=1, say=said.append)
    assert said[-1] == "timing 3 networks, one at a time"


def kept_of(comparison, folder):
    """The results.csv of a comparison whose run folders are lost."""
    file = Path(shutil.copy(comparison.folder / "results.csv", folder / "earlier.csv"))
    shutil.rmtree(comparison.folder)
    return file


def test_rows_of_an_earlier_comparison_are_kept(compared, stand_in, tmp_path, capsys):
    earlier = compared(densities=[0.2, 0.4], seeds=[0])
    before = compare(earlier, jobs=1, say=lambda line: None)
    file, said = kept_of(earlier, tmp_path), []
    wider = compared(densities=[0.2, 0.3], seeds=[0])
    found = compare(wider, jobs=1, keep=file, say=said.append)
    assert said[:2] == [
        f"2 rows of {file} are kept",
        f"{file} has rows of other settings, which are left out: static",
    ]
    assert said[2].startswith("1 of 3 cells to train")
    assert said[-1] == "timing 1 networks, one at a time"
    assert found[:2] == before[:2]
    assert [cell.config.folder.exists() for cell in wider.cells] == [False, False, True]
    text = (wider.folder / "compare.md").read_text()
    assert "2 runs were made earlier, and their rows have been kept" in text
    assert "| static 0.2 | 1 |" in text
    assert "| static 0.3 | 1 |" in text
    # What has been trained here meanwhile comes before what is kept; all that is written is read.
    words = ["compare", str(tmp_path / "tiny.yaml"), "--out", str(wider.folder)]
    again = Path(shutil.copy(wider.folder / "results.csv", tmp_path / "again.csv"))
    assert cli.main([*words, "--keep", str(again), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == found
    assert printed.err == f"2 rows of {again} are kept\n"
    # Nothing at all to do, in another folder.
    comparison = read(tmp_path / "tiny.yaml", str(tmp_path / "elsewhere"))
    assert compare(comparison, keep=again, say=lambda line: None) == found
    assert not (comparison.folder / "cells").exists()
    assert (comparison.folder / "accuracy.svg").exists()
    assert "Latency is measured" not in (comparison.folder / "compare.md").read_text()


def test_a_kept_row_stands_for_the_same_settings_only(compared):
    named = {"method": "static", "label": "another name"}
    one = compared(methods=["static"], rivals=["slim", "slim-wall-time", "uniform"]).cells
    same = compared(methods=[named], rivals=["slim", "slim-wall-time", "uniform"], threads=3).cells
    assert [cell.settings for cell in one] == [cell.settings for cell in same]
    assert len({cell.settings for cell in one}) == len(one)
    other = compared(methods=[{"method": "static", "distribution": "uniform"}], rivals=["slim"])
    differ = {cell.settings for cell in one} & {cell.settings for cell in other.cells}
    assert differ == {cell.settings for cell in one if cell.label == "dense"}
    assert not {cell.settings for cell in compared(lr=0.1).cells} & {c.settings for c in one}


def test_a_rival_that_is_missing_needs_its_cell_again(compared, stand_in, trained, tmp_path):
    shutil.copytree(trained.cells[2].config.folder, stand_in / "chase")
    settings = {"densities": [0.2], "seeds": [0], "methods": ["chase", "static"]}
    rivals = ["slim", "slim-wall-time"]
    earlier = compared(**settings, rivals=rivals)
    compare(earlier, jobs=1, say=lambda line: None)
    file, said = kept_of(earlier, tmp_path), []
    found = compare(compared(**settings, rivals=rivals), keep=file, say=said.append)
    assert said == [f"7 rows of {file} are kept"]
    assert [row["status"] for row in found] == ["done"] * 5 + ["left out"] * 2
    shutil.rmtree(earlier.folder)
    more = compared(**settings, rivals=[*rivals, "uniform"])
    compare(more, jobs=1, keep=file, say=said.append)
    assert said[1] == f"5 rows of {file} are kept"  # all but those whose network is needed
    missing = ["chase-d0.2-s0", "chase-d0.2-s0-uniform", "static-d0.2-s0"]
    assert sorted(path.name for path in (more.folder / "cells").iterdir()) == missing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is damaged \(it has no column label\): give the results.csv that"),
        ("label,rival\na,b\n", "it has no column method"),
        (None, r"No such file"),
    ],
)
def test_what_cannot_be_kept(text, message, compared, tmp_path):
    file = tmp_path / "kept.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        compare(compared(), keep=file, say=lambda line: None)


def test_a_kept_row_that_is_damaged(compared, stand_in, tmp_path):
    comparison = compared(densities=[0.2], seeds=[0])
    compare(comparison, jobs=1, say=lambda line: None)
    file = kept_of(comparison, tmp_path)
    accuracy = json.loads((stand_in / "run" / "summary.json").read_text())["slim"]["accuracy"]
    file.write_text(file.read_text().replace(str(accuracy), "much"))
    with pytest.raises(ValueError, match=r"earlier.csv is damaged \(.*'much'\): give the results"):
        compare(comparison, keep=file, say=lambda line: None)


def test_a_cell_that_fails_does_not_lose_the_rest(compared, stand_in, tmp_path, capsys):
    comparison = compared(densities=[0.2])
    fails(stand_in, "static-d0.2-s0", "gossamer: error: the disk is full")
    fails(stand_in, "dense-s1", "Traceback\n  somewhere\nMemoryError: too much")
    words = ["compare", str(tmp_path / "tiny.yaml"), "--out", str(comparison.folder), "--jobs", "1"]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "failed: dense seed 1: MemoryError: too much" in err.splitlines()
    assert "failed: static 0.2 seed 0: the disk is full" in err.splitlines()
    log = comparison.folder / "cells" / "static-d0.2-s0" / "train.log"
    assert f"failed: the disk is full; see {log}" in err
    assert log.read_text() == "epoch 1\ngossamer: error: the disk is full\n"
    assert "static 0.2      1" in out
    assert (
        "Failed: static 0.2 seed 0: the disk is full."
        in (comparison.folder / "compare.md").read_text()
    )
    with (comparison.folder / "results.csv").open() as file:
        status = {row["folder"]: row["status"] for row in csv.DictReader(file)}
    assert list(status.values()) == ["done", "failed", "failed", "done"]

    for path in stand_in.glob("*/error"):  # what was wrong is put right
        path.unlink()
    assert cli.main([*words, "--json"]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} == {"done"}
    assert "Failed" not in (comparison.folder / "compare.md").read_text()


def test_nothing_starts_when_every_dense_twin_fails(compared, stand_in):
    comparison, said = compared(seeds=[0, 1]), []
    for seed in (0, 1):
        fails(stand_in, f"dense-s{seed}", "gossamer: error: no such data")
    found = compare(comparison, jobs=1, say=said.append)
    assert [row["status"] for row in found] == ["failed"] * 2 + ["waiting"] * 4
    assert failures(found) == ["dense seed 0, dense seed 1: no such data"]
    assert said[-1] == "every dense twin has failed: no other cell is started"
    assert "4 of 6 cells have not been trained" in (comparison.folder / "compare.md").read_text()


def test_a_killed_cell_and_a_silent_one(compared, stand_in, monkeypatch):
    comparison = compared(densities=[0.2], seeds=[0])
    dies = STAND_IN.replace("MODEL", repr(str(stand_in))).replace(
        'print("epoch 1")', "os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setattr(processes, "_COMMAND", dies)
    fails(stand_in, "static-d0.2-s0", "")
    found = compare(comparison, jobs=1, say=lambda line: None)
    assert found[1]["error"] == "ended by SIGKILL (is there enough memory?)"
    monkeypatch.setattr(processes, "_COMMAND", "raise SystemExit(3)")
    found = compare(comparison, jobs=1, say=lambda line: None)
    assert found[1]["error"] == "ended with code 3 and said nothing"


def test_where_nothing_was_cut_there_are_no_rivals(compared, stand_in):
    """Every cell ends like the dense twin."""
    listed = {"method": "static", "label": "asked", "rivals": ["slim"]}
    rivals, said = ["slim", "uniform", "uniform-nonzeros"], []
    comparison = compared(densities=[0.2], seeds=[0], methods=["static", listed], rivals=rivals)
    found = compare(comparison, jobs=1, say=said.append)
    left_out = ["left out"] * 2
    assert [row["status"] for row in found] == [*["done"] * 2, *left_out, *["done"] * 2, "failed"]
    assert found[4]["rival"] == "uniform-nonzeros"
    assert "[3/7] static, density 0.2, slim, seed 0: left out, because nothing was cut" in said[3]
    (error,) = failures(found)
    assert error.startswith("asked 0.2 slim seed 0: nothing was cut from ")
    assert error.endswith(
        "cells/asked-d0.2-s0: its network is as wide as before, and a dense network "
        "of those widths is the dense twin"
    )
    text = (comparison.folder / "compare.md").read_text()
    assert (
        "because nothing was cut there: static 0.2 slim seed 0; static 0.2 uniform seed 0." in text
    )
    said.clear()
    compare(comparison, jobs=1, say=said.append)
    assert said[0].startswith("1 of 7 cells to train")


def test_rivals_wait_for_their_cell(compared, stand_in, trained):
    shutil.copytree(trained.cells[2].config.folder, stand_in / "chase")
    rivals, said = ["slim", "slim-wall-time"], []
    comparison = compared(densities=[0.2], methods=["chase"], rivals=rivals)
    fails(stand_in, "chase-d0.2-s1", "gossamer: error: no luck")
    found = compare(comparison, jobs=2, say=said.append)
    chase = [row for row in found if row["label"] == "chase"]
    assert [row["status"] for row in chase] == ["done"] * 3 + ["failed"] + ["waiting"] * 2
    order = [line.split("] ")[1].split(":")[0] for line in said if line[0] == "["]
    places = [
        order.index(f"chase, density 0.2, {name}seed 0")
        for name in ("", "slim, ", "slim-wall-time, ")
    ]
    assert places == sorted(places)
    assert {row["method"] for row in chase[1:3]} == {"dense"}
    assert "| chase 0.2 slim-wall-time | 1 |" in (comparison.folder / "compare.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_children_and_the_next_call_goes_on(
    number, compared, stand_in, tmp_path, capsys
):
    comparison = compared(densities=[0.2, 0.3], seeds=[0])
    (stand_in / "hang").touch()
    hanging = comparison.cells[1:]

    def interrupt():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if all((cell.run.path / "started").exists() for cell in hanging):
                break
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    words = ["compare", str(tmp_path / "tiny.yaml"), "--out", str(comparison.folder), "--jobs", "2"]
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(words) == 130
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert all((cell.run.path / "stopped").exists() for cell in hanging)
    err = capsys.readouterr().err
    assert f"gossamer compare {tmp_path / 'tiny.yaml'} --out {comparison.folder}" in err
    (stand_in / "hang").unlink()
    assert cli.main(words) == 0
    assert "2 of 3 cells to train" in capsys.readouterr().err


@pytest.mark.parametrize(("patience", "caught"), [(0.2, [2]), (600, [2, 2])])
def test_a_child_that_will_not_stop_is_ended(patience, caught, compared, stand_in, monkeypatch):
    comparison = compared(densities=[0.2], seeds=[0])
    stubborn = STAND_IN.replace("MODEL", repr(str(stand_in))).replace(
        "signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    )
    monkeypatch.setattr(processes, "_COMMAND", stubborn)
    monkeypatch.setattr(processes, "_PATIENCE", patience)
    (stand_in / "hang").touch()
    cell = comparison.cells[1]
    process = processes._Process(cell, cell.config, None)
    while not (comparison.cells[1].run.path / "started").exists():
        time.sleep(0.02)
    start = time.monotonic()
    processes._stop([process], caught)
    assert time.monotonic() - start < 10
    assert process.error() == "ended by SIGKILL (is there enough memory?)"


def test_changed_settings_are_refused(compared, stand_in):
    compare(compared(densities=[0.2], seeds=[0]), jobs=1, say=lambda line: None)
    changed = compared(densities=[0.2], seeds=[0], lr=0.01, threads=2)
    refused = (
        r"dense-s0/config.yaml says lr: 0\.05, and now it is 0\.01: .* or remove .*dense-s0 to"
    )
    with pytest.raises(ValueError, match=refused):
        compare(changed, say=lambda line: None)


def test_one_comparison_at_a_time(compared, stand_in):
    comparison = compared(densities=[0.2], seeds=[0])
    busy = pytest.raises(ValueError, match="a comparison is at work in")
    with processes.locked(comparison.folder), busy:
        compare(comparison, say=lambda line: None)
    compare(comparison, jobs=1, say=lambda line: None)


def test_without_matplotlib_it_says_so_first(compared, stand_in, monkeypatch):
    comparison = compared()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="drawn with matplotlib: pip install"):
        compare(comparison, say=lambda line: None)
    assert not comparison.folder.exists()


def test_how_many_at_a_time(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [processes.default_jobs(threads, "auto") for threads in (1, 4, 8)] == [6, 1, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.default_jobs(1, "auto") == processes.default_jobs(1, "cuda") == 1
    assert processes.default_jobs(2, "cpu") == 3


# ------------------------------------------------------------------ the whole of it


@pytest.mark.slow
def test_real_rivals(compared, tmp_path):
    comparison = compared(
        epochs=2,
        densities=[0.2],
        seeds=[0],
        methods=[{"method": "chase", "min_channels": 2}],
        rivals=["slim", "slim-wall-time", "uniform", "uniform-nonzeros"],
    )
    found = compare(comparison, jobs=1, say=lambda line: None)
    assert {row["status"] for row in found} == {"done"}
    _, chase, slim, timed, uniform, few = found
    assert few["nonzeros"] == pytest.approx(chase["nonzeros"], rel=0.05)
    for rival in (slim, timed):
        assert rival["macs_executed"] == rival["macs_sparse"] == chase["macs_executed"]
        assert rival["channel_sparsity"] == chase["channel_sparsity"]
    assert uniform["macs_executed"] == pytest.approx(chase["macs_executed"], rel=0.02)
    assert timed["macs_training"] / timed["epochs"] == slim["macs_training"] / slim["epochs"]


@pytest.mark.slow
def test_the_real_thing(compared, tmp_path):
    """Real processes: broken off in the middle, gone on with, and equal to single runs."""
    comparison = compared(epochs=4, densities=[0.2], seeds=[0])
    words = ["compare", str(tmp_path / "tiny.yaml"), "--out", str(comparison.folder), "--jobs", "1"]
    code = "import sys; from gossamer.train.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words]
    static = comparison.cells[1]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not static.run.checkpoint("sparse").exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert comparison.cells[0].finished
    assert not static.finished
    second = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    assert "1 of 2 cells to train" in second.stderr
    assert "sparse: resumed after epoch" in processes.log_of(static).read_text()
    alone = train(replace(static.config, out=str(tmp_path / "alone")), static.method)
    found = json.loads(second.stdout)[1]
    assert found["accuracy"] == alone["slim"]["accuracy"]
    assert found["macs_training"] == alone["slim"]["macs_training"]
    assert found["latency_ratio"] > 0
