"""Joined layers: bit for bit what they are one by one, and themselves for whoever looks at them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from gossamer.runtime import kernels
from gossamer.runtime.fuse import fuse
from gossamer.runtime.join import join
from gossamer.runtime.layers import DenseLayer, SparseLayer
from nets import NETS, SKIP_NETS, net

pytestmark = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))


class Tangle(nn.Module):
    """Values that live long, are added twice, or leave the run in its midst."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.layers[0](x)
        b = self.layers[1](a)
        c = self.layers[2](b) + a
        d = self.layers[3](c) + x
        e = self.layers[4](d) + b
        f = self.layers[5](e) + a
        return self.layers[6](f), c


def images(count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(count))


def sparse(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """With every convolution in the sparse kernels, not joined."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) < 0.3
    fused, _, _ = fuse(model.eval(), x)
    assert isinstance(fused, fx.GraphModule)
    for name, layer in list(fused.named_modules()):
        if isinstance(layer, DenseLayer) and layer.geometry.maps == 2:
            fused.set_submodule(name, SparseLayer.of(layer, "rows"))
    return fused


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of layers of each call of the kernels."""
    found: list[int] = []
    plain = kernels.Prepared.__call__

    def counted(self: kernels.Prepared, inputs: Any) -> list[Tensor]:
        found.append(len(self.steps))
        return plain(self, inputs)

    monkeypatch.setattr(kernels.Prepared, "__call__", counted)
    return found


GRAPHS = [name for name in (NETS | SKIP_NETS) if name not in ("sequence1d", "mobilenetv2")]


@pytest.mark.parametrize("name", ["tangle", *GRAPHS])
@torch.no_grad()
def test_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = 6 if name == "tangle" else 3
    model = Tangle() if name == "tangle" else net(name, dtype=torch.float32)
    one_by_one = sparse(model, images(2, channels))
    inputs = [images(n, channels) for n in (2, 2, 5, 1)]
    wanted = [one_by_one(x) for x in inputs]
    layers = sum(isinstance(m, SparseLayer) for m in one_by_one.modules())
    joined = join(one_by_one)
    found = calls(monkeypatch)
    for x, y in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(joined(x), y, rtol=0, atol=0)
    assert sum(found) == len(inputs) * layers
    if name == "tangle":
        assert found == [layers] * len(inputs)


@torch.no_grad()
def test_outputs_are_their_own() -> None:
    """A later call leaves what an earlier one gave."""
    model = join(sparse(Tangle(), images(2, 6)))
    first = model(images(2, 6))
    kept = [y.clone() for y in first]
    model(images(3, 6)), model(-images(2, 6))
    assert all(map(torch.equal, first, kept))


@torch.no_grad()
def test_hooks_and_other_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = join(sparse(Tangle(), images(2, 6)))
    wanted = model(images(2, 6))
    found, seen = calls(monkeypatch), []
    layer = model.get_submodule("layers.3")
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(images(2, 6)), wanted, rtol=0, atol=0)
    assert (found, seen) == ([1] * 7, [1])
    handle.remove()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["layers.6.bias"] += 1
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model(images(2, 6))[0], wanted[0] + 1)
    assert found[-1] == 7


@torch.no_grad()
def test_copies_compute_the_same() -> None:
    model = join(sparse(Tangle(), images(2, 6)))
    wanted = model(images(2, 6))
    twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    for again in (twin, join(twin)):
        torch.testing.assert_close(again(images(2, 6)), wanted, rtol=0, atol=0)


def test_gradients_are_refused() -> None:
    model = join(sparse(Tangle(), images(2, 6)))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        model(images(2, 6).requires_grad_())
