"""The examples run, and go on from their checkpoints to the same end."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {
    "plain_loop": ("slim.safetensors", "checkpoint-4.pt"),
    "accelerate_loop": ("slim.safetensors", "state-2"),
    "lightning_trainer": ("slim.safetensors", "checkpoints/epoch=2.ckpt"),
    "hf_trainer": ("slim-bert/model.safetensors", "bert-run/checkpoint-220"),
}

pytestmark = [
    # Lightning 2.6 on torch 2.13, its advice on loaders, and that a second run is elsewhere.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def example(name: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], None] = module.main
    return main


def ends_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs it whole, then again from a checkpoint of the first run; returns the first's folder."""
    written, checkpoint = TESTED[name]
    main = example(name)
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder, arguments in ((whole, []), (again, ["--ckpt_path", str(whole / checkpoint)])):
        folder.mkdir()
        monkeypatch.chdir(folder)
        main(arguments)
    first, second = load_file(whole / written), load_file(again / written)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(second[key], tensor), key
    return whole


def test_all_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TESTED, "distributed_loop"}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_distributed_loop(engine: str, tmp_path: Path) -> None:
    script = str(EXAMPLES / "distributed_loop.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ends = []
    for resume in ([], ["--resume"]):
        done = subprocess.run(
            [*command, script, "--engine", engine, *resume],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        ends.append(load_file(tmp_path / "slim.safetensors"))
        assert "accuracy" in done.stdout
    assert "epoch 0" not in done.stdout
    assert ends[0]["0.weight"].shape[0] < 256
    for key, tensor in ends[0].items():
        assert torch.equal(ends[1][key], tensor), key


def test_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_alike("plain_loop", tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].startswith("epoch 5: 9")  # nine out of ten, at least
    assert lines[5].endswith("48 channels")
    assert lines[-1] == "True"


def test_accelerate_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    whole = ends_alike("accelerate_loop", tmp_path, monkeypatch)
    assert "accuracy 8" in capsys.readouterr().out
    for name, tensor in load_file(whole / "slim.safetensors").items():
        if name.endswith("weight"):
            assert (tensor.unflatten(1, (-1, 4)) != 0).sum(-1).max() == 2
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_lightning_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ends_alike("lightning_trainer", tmp_path, monkeypatch)
    assert load_file(whole / "slim.safetensors")["0.weight"].shape[0] < 100


CLEAN = """
import torch
from gossamer.integrations.transformers import load_pretrained
model = load_pretrained("slim-bert").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(32).view(2, 16) % 17).logits, "logits.pt")
"""


@pytest.mark.slow
def test_hf_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2:4 in the attention, narrower MLPs; a clean process computes the same from the folder."""
    from gossamer.integrations.transformers import load_pretrained

    whole = ends_alike("hf_trainer", tmp_path, monkeypatch)
    subprocess.run([sys.executable, "-c", CLEAN], cwd=whole, check=True)
    model = load_pretrained(whole / "slim-bert").eval()
    for layer in model.bert.encoder.layer:
        assert layer.intermediate.dense.out_features < 128
        for part in (*layer.attention.self.children(), layer.attention.output.dense):
            if isinstance(part, torch.nn.Linear):
                assert (part.weight.unflatten(1, (-1, 4)) != 0).sum(-1).max() == 2
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(32).view(2, 16) % 17).logits
    assert torch.equal(torch.load(whole / "logits.pt", weights_only=True), wanted)
