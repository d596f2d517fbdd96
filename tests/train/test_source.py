"""What the command line calls a MODEL."""

import json
import sys
import textwrap

import pytest
import safetensors
import torch
from torch import nn

import gossamer
from gossamer.train.models import build_model
from gossamer.train.source import Architecture, open_model

TINY = Architecture(name="vgg-small", num_classes=4, in_shape=(1, 8, 8), width=0.25, data="digits")


def cut(architecture=TINY):
    """A network of which channels were cut."""
    model = build_model(
        architecture.name,
        num_classes=architecture.num_classes,
        in_shape=architecture.in_shape,
        width=architecture.width,
    ).eval()
    with torch.no_grad():
        model.features[3].weight[:, :3] = 0
    shrunk = gossamer.shrink(model, torch.zeros(2, *architecture.in_shape))
    assert shrunk.removed == 3
    return shrunk


def write(path, architecture=TINY, metadata=None):
    shrunk = cut(architecture)
    gossamer.save(path, shrunk.model, shrunk.plan, metadata)
    return shrunk.model


def same(model, other, x):
    with torch.no_grad():
        return torch.equal(model(x), other(x))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with the user's own module `mine`, that commands are run in."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import pathlib
        from torch import nn
        pathlib.Path("imported").touch()
        def make(num_classes):
            last = nn.Linear(8, num_classes)
            return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), last)
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_file_says_what_it_is(tmp_path):
    path = tmp_path / "slim.safetensors"
    model = write(path, metadata=TINY.metadata())
    source = open_model(str(path), batch=3)
    assert source.name == str(path)
    assert source.architecture == TINY
    assert source.example.shape == (3, 1, 8, 8)
    assert not source.model.training
    assert same(source.model, model, source.example)
    assert source.dense.features[0].out_channels == 8
    assert source.model.features[0].out_channels == 5
    assert len(source.plan) > 0
    again = open_model(str(path), batch=3)
    assert torch.equal(again.example, source.example)
    assert same(again.dense, source.dense, source.example)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "slim.safetensors"
    model = write(path)
    with pytest.raises(ValueError, match="does not say what network it holds: name it with"):
        open_model(str(path))
    words = {"model": "vgg-small", "num_classes": 4, "in_shape": (1, 8, 8), "width": 0.25}
    source = open_model(str(path), **words)
    assert same(source.model, model, source.example)
    with pytest.raises(ValueError, match="the plan was made for 8"):
        open_model(str(path), **{**words, "width": 1.0})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_file_keeps_its_dtype(dtype, tmp_path):
    path = tmp_path / "slim.safetensors"
    shrunk = cut()
    gossamer.save(path, shrunk.model.to(dtype), shrunk.plan, TINY.metadata())
    source = open_model(str(path))
    assert same(source.model, shrunk.model, source.example)
    assert {source.example.dtype, next(source.dense.parameters()).dtype} == {dtype}


def test_names():
    source = open_model("resnet20", width=0.25)
    assert source.dense is None
    assert len(source.plan) == 0
    assert source.architecture == Architecture(
        name="resnet20", num_classes=10, in_shape=(3, 32, 32), width=0.25
    )
    assert open_model("lenet5").example.shape == (2, 1, 28, 28)
    source = open_model("vgg-small", in_shape=(2, 8, 8), num_classes=7)
    assert source.model(source.example).shape == (2, 7)
    state = torch.get_rng_state()
    assert same(open_model("lenet5").model, open_model("lenet5").model, torch.ones(1, 1, 28, 28))
    assert torch.equal(state, torch.get_rng_state())


def test_factories(package):
    source = open_model("mine:make", in_shape=(3, 2, 2), num_classes=5)
    assert source.model(source.example).shape == (2, 5)
    nn.init.ones_(source.model[1].weight)
    gossamer.save("mine.safetensors", source.model, metadata=source.architecture.metadata())
    again = open_model("mine.safetensors", model="mine:make")
    assert same(again.model, source.model, source.example)
    assert not same(again.dense, source.model, source.example)


def test_a_file_runs_no_code(package):
    """Its header names a factory; nothing is imported unless the user says so."""
    evil = Architecture(name="mine:make", num_classes=3, in_shape=(3, 2, 2))
    gossamer.save("evil.safetensors", nn.Linear(3, 4), metadata=evil.metadata())
    with pytest.raises(ValueError, match="was made by mine:make, which is code: if you trust it"):
        open_model("evil.safetensors")
    assert "mine" not in sys.modules
    assert not (package / "imported").exists()


def test_metadata_stays_beside_the_plan(tmp_path):
    path = tmp_path / "slim.safetensors"
    write(path, metadata={"gossamer_plan": "{}", "format": "tf", "mine": "kept"})
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["mine"] == "kept"
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"spec": "resnet2"}, ValueError, "no file or run folder resnet2, and no model is called"),
        ({"spec": "slim.safetensors"}, FileNotFoundError, "there is no file or run folder slim"),
        ({"spec": "runs/none"}, FileNotFoundError, "there is no file or run folder runs/none"),
        ({"spec": "EMPTY"}, ValueError, "holds no run: give a folder that `gossamer train` wrote"),
        ({"spec": "UNFINISHED"}, ValueError, "has not ended: `gossamer train --resume --out"),
        ({"spec": "TEXT"}, ValueError, "is not a whole safetensors file"),
        ({"spec": "FILE", "width": 0.5}, ValueError, "was made with width=0.25, not 0.5"),
        ({"spec": "FILE", "num_classes": 5}, ValueError, "made from another model"),
        ({"spec": "DAMAGED"}, ValueError, r"DAMAGED is damaged \('in_shape' is missing\): name"),
        ({"spec": "lenet5", "model": "lenet5"}, ValueError, "and lenet5 is no file"),
        ({"spec": "lenet5", "batch": 0}, ValueError, "batch=0: give at least 1"),
        ({"spec": "mine:make"}, ValueError, "say what images it takes, with --in_shape C H W"),
    ],
)
def test_what_is_no_model(words, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "UNFINISHED").mkdir()
    (tmp_path / "UNFINISHED" / "config.yaml").write_text("epochs: 3")
    (tmp_path / "TEXT").write_text("no tensors")
    write(tmp_path / "FILE", metadata=TINY.metadata())
    write(tmp_path / "DAMAGED", metadata={"gossamer_model": json.dumps({"name": "lenet5"})})
    with pytest.raises(error, match=message):
        open_model(**words)
