"""Every engine computes what the model computes, and says why when it cannot be had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.measure import engines
from gossamer.measure.engines import ENGINES, Engine, find_engine
from gossamer.measure.latency import compare_latency

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def images(batch: int = 2, device: str = "cpu") -> Tensor:
    return torch.randn(batch, 3, 8, 8, device=device)


def here(name: str, device: str = "cpu") -> Engine:
    engine = find_engine(name)
    if reason := engine.missing(images(device=device)):
        pytest.skip(reason)
    return engine


@pytest.mark.parametrize("name", ["eager", "channels_last", "bf16", "onnx", "sparse"])
def test_outputs_are_the_models(name: str) -> None:
    _check_outputs(here(name), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "compiled-bf16", "frozen", "frozen-bf16"])
def test_outputs_of_compiled_engines(name: str) -> None:
    _check_outputs(here(name), "cpu")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("name", [name for name, e in ENGINES.items() if e.device != "cpu"])
def test_outputs_on_cuda(name: str) -> None:
    _check_outputs(here(name, "cuda"), "cuda")


def _check_outputs(engine: Engine, device: str) -> None:
    model, example = net().to(device), images(device=device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = engine.prepare(model, example, threads=1)
    assert model.training  # the engine has a copy, in eval mode: dropout would show
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    limit = 1e-5 if engine.dtype is None and device == "cpu" else 0.05
    assert prepared.error < limit
    other = images(device=device)  # it computes, it does not remember
    with torch.inference_mode():
        found = engines._as_tensors(prepared.call(other))
        expected = model.eval()(other)
    found = found[0] if isinstance(found, list) else found
    assert isinstance(found, Tensor)
    assert (found.float() - expected).abs().max() < limit * expected.abs().max()


def test_an_engine_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: nn.Module, *_: object) -> Callable[..., object]:
        return lambda x: model(x + 0.5)

    monkeypatch.setattr(engines, "_in_onnxruntime", wrong)
    with pytest.raises(ValueError, match="the engine onnx computes something else than the model"):
        here("onnx").prepare(net(), images())


def test_outputs_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_in_onnxruntime", lambda model, *_: lambda x: model(x)[:1])
    with pytest.raises(ValueError, match=r"outputs of shape \(1, 4\), the model of \(2, 4\)"):
        here("onnx").prepare(net(), images())


# What cannot be had


def test_why_an_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    assert find_engine("eager").missing(x) == ""
    assert find_engine("fp16").missing(x) == "it is for cuda, the example is on cpu"
    assert "no image-like input" in find_engine("channels_last").missing(torch.zeros(2, 3))
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert "onnx, onnxscript, onnxruntime (pip install" in find_engine("onnx").missing(x)
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    assert "no C++ compiler: install g++" in find_engine("compiled").missing(x)
    monkeypatch.setattr(engines, "_has_bfloat16", lambda device: False)
    assert "no bfloat16 instructions" in find_engine("frozen-bf16").missing(x)
    with pytest.raises(ValueError, match="engine frozen-bf16 cannot be had here: this cpu has no"):
        find_engine("frozen-bf16").prepare(net(), x)


def test_an_unknown_engine() -> None:
    with pytest.raises(ValueError, match=r"no engine 'onx' \(did you mean onnx\?\): choose of"):
        find_engine("onx")


class _DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_an_engine_cannot_run() -> None:
    with pytest.raises(ValueError, match="engine onnx cannot run _DataDependent"):
        here("onnx").prepare(_DataDependent(), images())


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_whole() -> None:
    with pytest.raises(ValueError, match="engine compiled cannot run _DataDependent"):
        here("compiled").prepare(_DataDependent(), images())


class _TwoInputs(nn.Module):
    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"sum": tokens.float() * scale, "scale": scale}


@pytest.mark.parametrize("name", ["eager", "bf16", "onnx"])
def test_several_inputs_by_name(name: str) -> None:
    example = {"scale": torch.randn(2, 5), "tokens": torch.randint(0, 9, (2, 5))}
    prepared = here(name).prepare(_TwoInputs(), example)
    assert prepared.error < 1e-2
    assert compare_latency({name: prepared.call}, example, rounds=1, min_round_ms=0.1)


# Compiled models in one process


@pytest.mark.slow
def test_compiled_models_do_not_share_code() -> None:
    """Torch caches by code object: the ninth width would run eager, a frozen model unfrozen."""
    engine, x = here("compiled"), images()
    models = [net(width) for width in range(4, 15)]
    calls = [engine.prepare(model, x, threads=1).call for model in models]
    twin = net(4)
    frozen = here("frozen").prepare(twin, x, threads=1)  # of the shapes of the first
    assert frozen.error < 1e-5
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for model, call in zip([*models, twin], [*calls, frozen.call], strict=True):
            assert torch.allclose(call(x), model.eval()(x), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs  # nothing compiled anew
    assert not counters["recompile_limit"]


@pytest.mark.gpu
@pytest.mark.slow
@CUDA
def test_the_proof_on_a_gpu() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "resnet50_inference.py"
    options = ["--device", "cuda", "--batch", "2", "--engines", "fp16,graphs-fp16", "--rounds", "3"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skip in its best engine" in done.stdout
