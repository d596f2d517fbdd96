"""The `gossamer` command: what it understands, what it says, and what it never imports."""

import csv
import io
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import gossamer
from gossamer.registry import METHODS
from gossamer.train import cli, flags
from gossamer.train.compare.grid import read
from gossamer.train.config import TrainConfig, to_yaml
from gossamer.train.progress import Bar

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TINY = ["--model", "vgg-small", "--width", "0.25", "--epochs", "2", "--lr", "0.05"]
TINY += ["--density", "0.2", "--min_channels", "2"]


def run(*words):
    return cli.main([str(word) for word in words])


def fails(capsys, code, *words):
    """The one line of error that a command ends with."""
    assert run(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gossamer: error: ")
    assert err.count("\n") == 1
    return err


# ------------------------------------------------------------------ help


def test_help_shows_an_example(capsys):
    assert run("--help") == 0
    assert "gossamer train --method chase" in capsys.readouterr().out
    assert run() == 2
    assert run("--version") == 0
    assert gossamer.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_train_help_has_every_setting_with_its_text(method, capsys):
    assert run("train", "--method", method, "--help") == 0
    settings, examples = capsys.readouterr().out.split("examples:")
    assert "gossamer train --config digits-chase" in examples
    text = " ".join(settings.split())
    for cls in (TrainConfig, METHODS[method].cls):
        for field in fields(cls):
            assert f"--{field.name} " in text or f"--{field.name}, " in text, field.name
    assert "validation images. (default: 0)" in text
    own = {name for info in METHODS.values() for name in info.cls.hyperparameters()}
    for name in own - set(METHODS[method].cls.hyperparameters()):
        assert f"--{name} " not in text


@pytest.mark.parametrize("method", METHODS)
def test_no_method_takes_a_name_of_the_run(method):
    taken = {field.name for field in fields(TrainConfig)} | {"config", "resume", "overwrite"}
    assert not taken & set(METHODS[method].cls.hyperparameters())
    assert not {"json", "sparsity"} & set(METHODS[method].cls.hyperparameters())


def test_only_training_imports_what_is_heavy():
    code = (
        "import sys; from gossamer.train.cli import main\n"
        "for words in ['--help'], ['methods'], ['train', '--help'], ['compare', '--help']:\n"
        "    assert main(words) == 0, words\n"
        "    heavy = {'lightning', 'datasets', 'sklearn', 'matplotlib', 'rich', 'onnx'}\n"
        "    assert not heavy & sys.modules.keys(), (words, heavy & sys.modules.keys())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------ flags and files


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("density: 0.3\nepochs: 7\nlr: 1e-2\nexclude: [fc, conv1]\nbaseline: true\n")
    request = flags.parse(["--config", str(file), "--epochs", "9"])
    assert request.method == gossamer.Chase(density=0.3)
    config = request.config
    assert (config.epochs, config.lr, config.exclude) == (9, 0.01, ("fc", "conv1"))
    assert config.baseline
    assert (config.momentum, config.milestones, config.include) == (0.9, (0.5, 0.75), None)
    assert (request.resume, request.overwrite, request.as_json) == (False, False, False)


def test_the_method_is_chosen_by_flag_or_file(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("method: static\ndistribution: uniform\n")
    assert flags.parse(["--config", str(file)]).method == gossamer.Static(distribution="uniform")
    request = flags.parse([f"--config={file}", "--method=chase", "--grow", "random"])
    assert request.method == gossamer.Chase(distribution="uniform", grow="random")
    assert flags.parse([]).method == gossamer.Chase()


def test_lists_and_switches():
    words = "--baseline --no_flip --augment true --exclude a b --milestones 0.3 0.6"
    config = flags.parse(words.split()).config
    assert (config.baseline, config.flip, config.augment) == (True, False, True)
    assert (config.exclude, config.milestones) == (("a", "b"), (0.3, 0.6))
    assert flags.parse(["--update_interval", "null"]).method == gossamer.Chase()


def test_sparsity_is_one_minus_density(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("sparsity: 0.9\n")

    def density(*words):
        method = flags.parse(["--config", str(file), *words]).method
        assert isinstance(method, gossamer.Chase)
        return method.density

    assert density() == 0.1
    assert density("--sparsity", "0.8") == 0.2
    assert density("--density", "0.3") == 0.3
    file.write_text("density: 0.4\n")
    assert density("--sparsity", "0.8") == 0.2
    with pytest.raises(flags.UsageError, match="say the same: give one of them"):
        density("--sparsity", "0.8", "--density", "0.2")
    file.write_text("density: 0.4\nsparsity: 0.6\n")
    with pytest.raises(flags.UsageError, match="say the same: give one of them"):
        density()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_understood(recipe):
    if "methods" in yaml.safe_load(recipe.read_text()):
        assert read(recipe).cells
    else:
        flags.parse(["--config", str(recipe)])


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run, made on the command line."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", open(folder.parent / "out", "w"))  # noqa: SIM115
        patch.setattr(sys, "stderr", open(folder.parent / "err", "w"))  # noqa: SIM115
        assert run("train", *TINY, "--baseline", "--out", folder) == 0
        sys.stdout.close()
        sys.stderr.close()
    return folder


def test_it_prints_the_networks_side_by_side(run_folder):
    out = (run_folder.parent / "out").read_text()
    summary = json.loads((run_folder / "summary.json").read_text())
    assert "FLOPs are 2 per MAC" in out
    head, accuracy = out.splitlines()[3:5]
    assert head.split() == ["dense", "sparse", "slim"]
    assert accuracy.split() == [
        "accuracy",
        *(f"{summary[name]['accuracy']:.2%}" for name in ("dense", "sparse", "slim")),
    ]
    path = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    assert path["after epoch"] == ["start", "1", "2"]
    assert path["exploration"][0] == path["density"][0] == "0.2000"
    assert "SAD from the start: " in out
    assert "all channels kept: classifier - they are an output of the model" in out
    snippet = out[out.index("    import gossamer") :].replace("    ", "")
    loaded: dict[str, object] = {}
    exec(snippet, loaded)
    assert isinstance(loaded["model"], torch.nn.Module)

    err = (run_folder.parent / "err").read_text().splitlines()  # nothing of Lightning's
    assert [line.split("  ")[0] for line in err] == [
        "sparse: epoch 1/2",
        "sparse: epoch 2/2",
        "dense: epoch 1/2",
        "dense: epoch 2/2",
    ]
    assert all(word in err[0] for word in ("loss", "accuracy", "density", "live", "val"))


def test_a_run_is_a_model_of_the_other_commands(run_folder, tmp_path, capsys):
    shutil.copy(run_folder / "model.safetensors", tmp_path / "moved.safetensors")
    slim = json.loads((run_folder / "summary.json").read_text())["slim"]
    for model in (run_folder, tmp_path / "moved.safetensors"):  # the file says what it is
        assert run("check", model, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["macs_executed"] == slim["macs_executed"]
        assert found["removable"] == 0


def test_config_yaml_repeats_the_run(run_folder, tmp_path, capsys):
    config = run_folder / "config.yaml"
    assert "holds a run already" in fails(capsys, 1, "train", "--config", config)
    assert run("train", "--config", config, "--out", tmp_path / "again", "--json") == 0
    again = json.loads(capsys.readouterr().out)  # stdout holds nothing else
    summary = json.loads((run_folder / "summary.json").read_text())
    for name in ("dense", "sparse", "slim"):
        assert {**again[name], "latency_ms": 0} == {**summary[name], "latency_ms": 0}
    saved = [
        yaml.safe_load((folder / "config.yaml").read_text())
        for folder in (run_folder, tmp_path / "again")
    ]
    assert {**saved[0], "out": ""} == {**saved[1], "out": ""}


def test_a_terminal_gets_a_bar():
    row = {"epoch": 1, "train_loss": 0.5, "train_accuracy": 0.75, "val_accuracy": 0.5}
    row |= {"density": 0.125, "live_channels": 48, "seconds": 1.0}
    for width in (80, 120):
        screen = io.StringIO()
        bar = Bar(Console(file=screen, force_terminal=True, width=width, color_system=None))
        bar.ended()  # nothing was started: nothing to end
        bar.noted("forecast: |w| [0.1] rises")
        bar.started("sparse", 3, 10, 0)
        bar.stepped(0, 4, lambda: {"loss": 0.9, "accuracy": 0.5, **row})
        bar.epoch_ended(row)
        bar.ended()
        lines = screen.getvalue()
        assert lines.startswith("forecast: |w| [0.1] rises\n")
        assert "sparse 1/3" in lines
        assert "loss 0.500  accuracy 75.0%  val 50.0%  density 0.125  live 48" in lines


def test_a_forecast_is_a_line(tmp_path, capsys):
    words = ["--method", "autosparse", "--threshold_decay", "0.01", *TINY[:4], "--epochs", "1"]
    assert run("train", *words, "--out", tmp_path / "run") == 0
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["forecast", "sparse"]
    assert "decay alone takes s from -5 to" in err[0]


# ------------------------------------------------------------------ the trace of a dense run

TUNED = ["--method", "autosparse", *TINY[:8]]


def test_a_trace_gives_the_losses_of_its_dense_network(run_folder, tmp_path):
    words = [*TUNED, "--tune_end", "0.5", "--dense_trace", str(run_folder), "--seed", "3"]
    request = flags.parse(words)
    with (run_folder / "metrics-dense.csv").open() as file:
        first = next(csv.DictReader(file))
    assert isinstance(request.method, gossamer.AutoSparse)
    assert request.method.dense_losses == (float(first["train_loss"]),)

    saved = tmp_path / "config.yaml"  # repeats the run without the trace
    saved.write_text(to_yaml(request.config, request.method))
    assert flags.parse(["--config", str(saved)]).method == request.method
    with pytest.raises(flags.UsageError, match="say the same: give one of them"):
        flags.parse(["--config", str(saved), "--dense_trace", str(run_folder)])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--epochs 4", 1, "says epochs: 2, and here it is 4: losses are compared epoch by epoch"),
        ("--width 0.5", 1, "says width: 0.25, and here it is 0.5"),
        ("--data mnist", 1, "says data: digits, and here it is mnist"),
        ("--tune_end 0.4", 1, "tune_end=0.4 of 2 epochs is 0.8 epochs, and a trace has whole ones"),
        ("--tune_end 0.1", 1, "give tune_end=0.5"),
        ("--method static", 2, "'dense_losses' is a setting of autosparse, not of static"),
        ("--dense_trace OUT", 1, "holds no run with a dense twin (metrics-dense.csv)"),
    ],
)
def test_traces_that_do_not_fit(words, code, message, run_folder, tmp_path, capsys):
    words = words.replace("OUT", str(tmp_path)).split()
    assert message in fails(capsys, code, "train", *TUNED, "--dense_trace", run_folder, *words)


def test_a_trace_that_is_too_short(run_folder, tmp_path, capsys):
    shutil.copy(run_folder / "config.yaml", tmp_path)
    lines = (run_folder / "metrics-dense.csv").read_text().splitlines()
    (tmp_path / "metrics-dense.csv").write_text("\n".join(lines[:2]))
    error = fails(capsys, 1, "train", *TUNED, "--tune_end", "1", "--dense_trace", tmp_path)
    assert "has 1 epochs, and 2 are needed: finish that run" in error


class Interrupting:
    """A watcher that presses Ctrl-C in the second epoch."""

    def noted(self, text):
        pass

    def started(self, *_):
        pass

    def stepped(self, epoch, step, figures):
        if epoch == 1:
            raise KeyboardInterrupt

    def epoch_ended(self, row):
        pass

    def ended(self):
        pass


@pytest.mark.parametrize(
    "how", ["out", *(pytest.param(how, marks=pytest.mark.slow) for how in ("config", "moved"))]
)
def test_interrupted_and_resumed(how, run_folder, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_watcher", Interrupting)
        assert run("train", *TINY, "--out", folder) == 130
    assert f"gossamer train --resume --out {folder}" in capsys.readouterr().err
    if how == "moved":
        folder = folder.rename(tmp_path / "elsewhere")
    words = ["--out", folder] if how == "out" else ["--config", folder / "config.yaml"]
    assert run("train", "--resume", "--json", *words) == 0
    out, err = capsys.readouterr()
    assert "sparse: resumed after epoch 1 of 2" in err
    summary = json.loads((run_folder / "summary.json").read_text())
    assert json.loads(out)["slim"]["accuracy"] == summary["slim"]["accuracy"]
    assert (folder / "summary.json").exists()
    assert not (tmp_path / "run").exists() or how != "moved"

    assert run("train", "--resume", *words) == 0  # finished: shows it again
    assert "accuracy" in capsys.readouterr().out


def test_a_full_disk_is_one_line(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # config.yaml fits, weights do not
    try:
        assert run("train", *TINY, "--out", tmp_path / "run") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gossamer: error: could not write ")
    assert "sparse.ckpt (File too large)" in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == []
