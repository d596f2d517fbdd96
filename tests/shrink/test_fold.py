"""Constants of silent channels: folded where that is exact, kept where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer


def silence(layer: nn.Module, channels: list[int]) -> None:
    assert isinstance(layer.weight, Tensor)
    with torch.no_grad():
        layer.weight[channels] = 0


def check(model: nn.Module, x: Tensor) -> gossamer.Shrunk:
    """Shrinks, and compares the outputs on data it has not seen."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shrunk = gossamer.shrink(model, x[:2])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(
            copy.deepcopy(shrunk.model).eval()(x),
            copy.deepcopy(model).eval()(x),
            rtol=0,
            atol=1e-12,
        )
    return shrunk


def width(shrunk: gossamer.Shrunk, layer: str) -> int:
    (row,) = [row for row in shrunk.report if row.layer == layer]
    return row.after


def note(shrunk: gossamer.Shrunk, layer: str) -> str:
    (row,) = [row for row in shrunk.report if row.layer == layer]
    return row.note


def test_a_linear_layer_takes_the_constants() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    model = model.double()
    silence(model[0], [1, 4, 7])
    shrunk = check(model, torch.randn(16, 6).double())
    assert width(shrunk, "0") == 5
    assert note(shrunk, "0") == "3 constant, folded into the next bias"
    assert width(shrunk, "2") == 5
    expected = model[2].bias + model[2].weight[:, [1, 4, 7]] @ model[0].bias[[1, 4, 7]].tanh()
    torch.testing.assert_close(shrunk.model[2].bias, expected)


def test_constants_go_from_layer_to_layer() -> None:
    """A layer that is silent leaves constants behind; so does the next, if it reads only those."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model = model.double()
    silence(model[0], [0, 1])
    with torch.no_grad():
        model[2].weight[[3, 4], 2:] = 0  # reads what is constant, and nothing else
    shrunk = check(model, torch.randn(16, 6).double())
    assert (width(shrunk, "0"), width(shrunk, "2")) == (2, 3)


def test_batch_norm_and_pooling_are_part_of_the_constant() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),  # does not pad
        nn.BatchNorm2d(4),
        nn.Hardswish(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 3),
    ).double()
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.bias, 0.2, 0.9)
        nn.init.uniform_(norm.running_mean)
    silence(model[0], [2, 5])
    silence(model[3], [0])
    shrunk = check(model.eval(), torch.randn(8, 1, 8, 8).double())
    assert (width(shrunk, "0"), width(shrunk, "3")) == (4, 3)


def padded(mode: str = "zeros", bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 64, 3),
    ).double()


def test_zeros_at_the_border_stand_in_the_way_of_a_constant_but_not_of_zero() -> None:
    model = padded()
    silence(model[0], [0, 1, 2])
    with torch.no_grad():
        model[0].bias[:3] = torch.tensor([0.5, -0.5, -0.1])  # ReLU leaves 0.5, 0, 0
    shrunk = check(model, torch.randn(8, 1, 8, 8).double())
    assert width(shrunk, "0") == 4
    assert note(shrunk, "0") == (
        "2 constant, folded into the next bias; constant channels kept: 2 pads with zeros, which "
        "stand in the constant's place at the border"
    )


def test_other_padding_continues_the_constant() -> None:
    model = padded("reflect")
    silence(model[0], [0, 1, 2])
    assert width(check(model, torch.randn(8, 1, 8, 8).double()), "0") == 3


def test_a_reader_without_bias_takes_only_zeros() -> None:
    model = padded("circular", bias=False)
    silence(model[0], [0, 1])
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([0.5, -0.5])
    shrunk = check(model, torch.randn(8, 1, 8, 8).double())
    assert width(shrunk, "0") == 5
    assert "2 has no bias to fold their constants into" in note(shrunk, "0")


def test_a_reader_without_bias_hands_them_to_the_norm_behind_it() -> None:
    class Bottle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(1, 6, 3, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(6)
            self.two = nn.Conv2d(6, 5, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(5)
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(F.relu(self.norm1(self.one(x))))
            return self.fc(F.relu(self.norm2(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Bottle().double()
    x = torch.randn(8, 1, 8, 8).double()
    with torch.no_grad():
        model.norm1.bias.copy_(torch.linspace(-1, 1, 6))
    model(x)  # norms have seen data
    silence(model.one, [0, 4, 5])
    shrunk = check(model, x)
    assert width(shrunk, "one") == 3
    assert note(shrunk, "one") == "3 constant, folded into the next bias"
    assert not torch.equal(shrunk.model.norm2.running_mean, model.norm2.running_mean)
    # In training the norm takes constants off by itself.
    torch.testing.assert_close(shrunk.model.train()(x), model.train()(x), rtol=0, atol=1e-12)


class Gated(nn.Module):
    """What the first layer computes is scaled by the input, constants too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)) * x.mean(1, keepdim=True))
        return out


def test_a_constant_that_the_input_scales_is_none() -> None:
    model = Gated().double()
    silence(model.first, [0, 1])
    with torch.no_grad():
        model.first.bias[:2] = torch.tensor([0.5, -0.5])
    shrunk = check(model, torch.randn(8, 6).double())
    assert width(shrunk, "first") == 7  # zero times anything is zero
    assert "what they emit is not one constant" in note(shrunk, "first")


@pytest.mark.parametrize(
    "method",
    [gossamer.SRigL(density=0.2, gamma_sal=0.9, update_interval=4), gossamer.DST(alpha=0.02)],
    ids=["srigl", "dst"],
)
def test_after_training(method: gossamer.Method) -> None:
    """Neurons that a method has emptied leave the network, with their biases folded."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    model = model.double()
    sparsifier = gossamer.Sparsifier(model, method, total_steps=60)
    optimizer = torch.optim.SGD(sparsifier.parameter_groups(), lr=0.1, momentum=0.9)
    x = torch.randn(128, 16).double()
    y = x[:, :4].argmax(1)
    for _ in range(60):
        (F.cross_entropy(model(x), y) + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    empty = sum(int((~site.support.any(1)).sum()) for site in sparsifier.sites[:2])
    assert empty > 5
    shrunk = check(sparsifier.finalize(), x)
    assert width(shrunk, "0") + width(shrunk, "2") <= 96 - empty
