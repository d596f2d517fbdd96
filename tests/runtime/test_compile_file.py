"""Files of compiled models: small, the same model again, and never believed unseen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import gossamer
from gossamer.runtime import compile as compiling
from gossamer.runtime import compile_sparse, kernels, load, save
from gossamer.runtime.compile import Compiled
from gossamer.shrink.file import COMPILED_KEY
from nets import NETS, images, net

if kernels.missing():
    pytest.skip(str(kernels.missing()), allow_module_level=True)


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says, rows beat eager and nothing else is near."""
    order = {"rows": 1.0, "csr": 1.0, "eager": 2.0}

    def milliseconds(calls: dict[Any, object], rounds: int) -> dict[Any, float]:
        return {
            call: (1.0 if call.sparse else 2.0)
            if isinstance(call, compiling._Plan)
            else order.get(call.split("-")[0], 3.0)
            for call in calls
        }

    monkeypatch.setattr(compiling, "_milliseconds", milliseconds)


def sparse_net(name: str = "basic", density: float = 0.1) -> nn.Module:
    model = net(name, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            kept = torch.rand(module.weight.shape, generator=generator) < density
            module.weight.data *= kept
    return model


def compiled_net(name: str = "basic") -> tuple[Compiled, Tensor]:
    x = images(dtype=torch.float32)
    return compile_sparse(sparse_net(name), x), x


class Wide(nn.Sequential):
    """Large enough that the file is weights and not names."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 96, 3, bias=False),
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.Conv2d(96, 96, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, 200),
        )


@pytest.mark.parametrize("name", [*NETS, "branching"])
def test_a_fresh_model_of_the_class_is_the_same_again(name: str, tmp_path: Path) -> None:
    compiled, x = compiled_net(name) if name in NETS else _branching()
    save(tmp_path / "a.safetensors", compiled)
    fresh = net(name, seed=1, dtype=torch.float32) if name in NETS else _Branching()
    found = load(tmp_path / "a.safetensors", fresh)
    assert torch.equal(found.model(x), compiled.model(x))
    assert torch.equal(found.model(x[:1]), compiled.model(x[:1]))
    with pytest.raises(ValueError, match=r"compiled model: load it with gossamer\.runtime\.load"):
        gossamer.load(tmp_path / "a.safetensors", fresh)
    assert found.choices == compiled.choices
    assert found.recipe == compiled.recipe
    assert found.table() == compiled.table()
    assert fresh.training  # and otherwise as it was


class _Branching(nn.Module):
    """Its path depends on a value: it is fused module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        return self.fc(-x.mean((2, 3)) if x.sum() > 1e9 else x.mean((2, 3)))


def _branching() -> tuple[Compiled, Tensor]:
    model = _Branching().eval()
    model.fc.weight.data[:, ::3] = 0
    x = images(dtype=torch.float32)
    compiled = compile_sparse(model, x)
    assert compiled.recipe.by == "modules"
    return compiled, x


def test_the_file_is_small(tmp_path: Path) -> None:
    model = Wide().eval()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data *= torch.rand_like(module.weight) < 0.1
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "dense.safetensors")
    x = torch.randn(2, 3, 8, 8)
    save(tmp_path / "a.safetensors", compile_sparse(model, x))
    dense, sparse = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "a"))
    assert sparse < 0.25 * dense
    save(tmp_path / "a.safetensors", compile_sparse(model, x, storage="int8"))
    assert (tmp_path / "a.safetensors").stat().st_size < 0.8 * sparse


def test_measured_again_on_request(tmp_path: Path) -> None:
    compiled, x = compiled_net()
    save(tmp_path / "a.safetensors", compiled)
    found = load(tmp_path / "a.safetensors", net("basic", dtype=torch.float32), x[:2])
    assert [choice.input[0] for choice in found.choices] == [2] * len(found.choices)
    torch.testing.assert_close(found.model(x), compiled.model(x), rtol=1e-4, atol=1e-4)


def test_a_slim_model_with_its_plan(tmp_path: Path) -> None:
    x = images(dtype=torch.float32)
    model = sparse_net("mlp", 1.0)
    model[1].weight.data[::2] = 0
    model[1].bias.data[::2] = 0
    slim = gossamer.shrink(model, example=x)
    assert slim.removed
    compiled = compile_sparse(slim.model, x)
    save(tmp_path / "a.safetensors", compiled, slim.plan)
    found = load(tmp_path / "a.safetensors", net("mlp", dtype=torch.float32))
    assert torch.equal(found.model(x), compiled.model(x))


def test_without_kernels_csr_files_load_and_packed_ones_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = compiled_net("mlp")
    save(tmp_path / "packed.safetensors", packed)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_load", lambda: "the sparse kernels were not built: get g++")
        model = compile_sparse(sparse_net("mlp"), x)
        assert {choice.path for choice in model.choices} == {"csr"}
        save(tmp_path / "csr.safetensors", model)
        found = load(tmp_path / "csr.safetensors", net("mlp", dtype=torch.float32))
        assert torch.equal(found.model(x), model.model(x))
        with pytest.raises(RuntimeError, match="were not built"):
            load(tmp_path / "packed.safetensors", net("mlp", dtype=torch.float32))
    broken = _changed(tmp_path / "csr.safetensors", tensor="1.columns", place=3, value=10**6)
    with pytest.raises(ValueError, match="1 is no CSR matrix"):
        load(broken, net("mlp", dtype=torch.float32))


# ------------------------------------------------------------------ damage


def _parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safetensors.safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), json.loads(file.metadata()[COMPILED_KEY])


def _changed(
    path: Path,
    *,
    tensor: str = "",
    place: int = 0,
    value: int = 0,
    drop: str = "",
    **header: object,
) -> Path:
    """A copy with one number of a tensor, or entries of the header, changed."""
    tensors, told = _parts(path)
    if tensor:
        tensors[tensor].view(-1)[place] = value
    if drop:
        del tensors[drop]
    other = path.with_name("changed.safetensors")
    safetensors.torch.save_file(tensors, other, {COMPILED_KEY: json.dumps(told | header)})
    return other


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    compiled, _ = compiled_net("mlp")
    save(path, compiled)
    _, told = _parts(path)

    def refused(file: Path, message: str, model: nn.Module | None = None) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load(file, model or net("mlp", dtype=torch.float32))
        assert re.search(str(file), str(caught.value))

    refused(_changed(path, version=9), "version 9")
    refused(_changed(path, byteorder="middle"), "middle-endian")
    refused(_changed(path, paths=[1]), "damaged")
    refused(_changed(path, paths={"1": "__import__"}), "names other layers")
    refused(_changed(path, paths=told["paths"] | {"1": "__import__"}), "__import__")
    refused(_changed(path, recipe={"by": "exec"}), "damaged.*exec")
    refused(_changed(path, choices=[{"a": 1}]), "damaged")
    refused(_changed(path, drop="1.packed"), "it has no 1.packed")
    refused(_changed(path, drop="1.bias"), "missing.*1.bias")
    refused(_changed(path, tensor="1.packed", place=0, value=7), "not a packed layer")
    refused(path, "does not fit this Sequential", nn.Sequential(nn.Linear(3, 3)))
    refused(path, "what was packed is", _other_widths())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    refused(cut, "not a whole safetensors file")
    gossamer.save(cut, net("mlp"))
    refused(cut, "is no compiled model")
    with pytest.raises(FileNotFoundError, match="look at the path"):
        load(tmp_path / "none.safetensors", nn.Linear(1, 1))


def _other_widths() -> nn.Module:
    model = net("mlp", dtype=torch.float32)
    model[1] = nn.Linear(192, 30)
    return model


def test_no_byte_of_a_packed_weight_is_believed(tmp_path: Path) -> None:
    compiled, x = compiled_net("mlp")
    save(tmp_path / "a.safetensors", compiled)
    tensors, _ = _parts(tmp_path / "a.safetensors")
    count = tensors["1.packed"].numel()
    refused = 0
    for place in range(0, count, max(1, count // 60)):
        file = _changed(tmp_path / "a.safetensors", tensor="1.packed", place=place, value=255)
        try:
            found = load(file, net("mlp", dtype=torch.float32))
        except ValueError:
            refused += 1
        else:
            found.model(x)  # a value, or an index in range
    assert refused
