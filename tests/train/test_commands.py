"""gossamer shrink, export and check on the command line."""

import json
import sys

import pytest
import safetensors
import torch

import gossamer
from gossamer.train import cli
from gossamer.train.models import build_model
from gossamer.train.source import Architecture, open_model

TINY = Architecture(name="vgg-small", num_classes=4, in_shape=(1, 8, 8), width=0.25, data="digits")


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


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A file of a full-width network with zeros: three channels dead, one layer 2:4."""
    torch.manual_seed(0)
    model = build_model("vgg-small", num_classes=4, in_shape=(1, 8, 8), width=0.25).eval()
    with torch.no_grad():
        model.features[3].weight[:, :3] = 0
        model.features[7].weight[:, ::2] = 0
        model.features[10].weight[:, :1] = 0
    path = tmp_path_factory.mktemp("commands") / "sparse.safetensors"
    gossamer.save(path, model, metadata=TINY.metadata())
    return path


@pytest.mark.parametrize("command", ["shrink", "export", "check"])
def test_help_shows_an_example(command, capsys):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"examples:\n  gossamer {command} " in out
    assert all(word in out for word in ("--in_shape C H W", "--json", "MODEL"))


def test_check(sparse, capsys):
    assert run("check", sparse) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.split("\n\n")[0].splitlines()}
    assert rows["layer"][:4] == ["layer", "shape", "2:4", "density"]
    assert rows["features.7"][1:4] == ["16x8x3x3", "yes", "0.5000"]
    assert "not 2:4: features.3[0, 4-7, 0, 0] holds 4 non-zeros" in out
    assert "channels do nothing: `gossamer shrink` would cut them" in out
    assert "of the weights are zero, and as values zeros bring nothing" in out

    assert run("check", sparse, "--json", "--pattern", "4:8") == 0
    found = json.loads(capsys.readouterr().out)
    layers = {layer["layer"]: layer for layer in found["layers"]}
    assert layers["features.7"]["fits"] is True
    assert layers["features.3"]["fits"] is False
    assert "fits" not in layers["features.0"]  # one input is no group of eight
    gone = {row["layer"]: row["before"] - row["after"] for row in found["channels"]}
    assert gone["features.0"] == 3
    assert gone["features.7"] == 1
    kept = [row for row in found["channels"] if row["layer"] == "classifier"]
    assert kept[0]["note"].startswith("kept: ")
    assert found["removable"] == sum(gone.values())
    assert found["macs_executed_if_cut"] < found["macs_executed"]


def test_check_of_a_network_without_zeros(capsys):
    assert run("check", "lenet5") == 0
    out = capsys.readouterr().out
    assert "every channel that may be cut does something" in out
    assert "zeros bring" not in out


def test_shrink_cuts_what_check_says(sparse, tmp_path, capsys):
    assert run("check", sparse, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    out = tmp_path / "slim.safetensors"
    assert run("shrink", sparse, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["removed"] == told["removable"] > 0
    assert found["layers"] == told["channels"]
    assert found["before"]["macs_executed"] == told["macs_executed"]
    assert found["after"]["macs_executed"] == told["macs_executed_if_cut"]
    assert found["max_abs_difference"] < 1e-5

    full, slim = open_model(str(sparse)), open_model(str(out))  # it says what it is, as before
    assert slim.architecture == TINY
    with torch.no_grad():
        difference = slim.model(full.example) - full.model(full.example)
    assert float(difference.abs().max()) == found["max_abs_difference"]
    with safetensors.safe_open(out, framework="pt") as file:
        assert file.get_slice("features.0.weight").get_shape()[0] == 5

    assert run("shrink", out, "--out", out) == 0  # nothing more; the plan stays
    text = capsys.readouterr().out
    assert "\n0 channels cut; outputs differ by at most 0\n" in text
    assert "MACs executed" in text
    assert open_model(str(out)).plan == slim.plan


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("program", "sparse.pt2"),
        ("safetensors", None),
        pytest.param("onnx", "sparse.onnx", marks=pytest.mark.slow),
    ],
)
def test_export(to, name, sparse, tmp_path, capsys):
    source = tmp_path / "sparse.safetensors"
    source.write_bytes(sparse.read_bytes())
    out = tmp_path / (name or "other.safetensors")
    words = () if name else ("--out", out)
    assert run("export", source, "--to", to, *words) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out}: {out.stat().st_size:,} bytes, {to} (torch ")
    assert "verified in " in text
    assert "zeros bring nothing" in text
    if to == "safetensors":
        assert open_model(str(out)).architecture == TINY
    words = () if to == "safetensors" else ("--fixed_batch",)
    assert run("export", source, "--to", to, "--out", out, "--batch", 3, "--json", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(out)
    assert [check["batch"] for check in found["verified"]["checks"]][:2] == [3, 3]
    assert found["verified"]["difference"] <= found["verified"]["tolerance"]


def test_onnx_is_an_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = fails(capsys, 1, "export", "lenet5", "--out", tmp_path / "lenet5.onnx")
    assert 'pip install "gossamer[onnx]"' in error
