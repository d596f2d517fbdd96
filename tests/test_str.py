"""STR: the soft threshold by hand and by its twin, its forecast, and what it does on digits."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import digits
import gossamer
import resnet50
from gossamer.forecast import implied_threshold, onset_step
from gossamer.sparse_weight import SoftThreshold
from gossamer.surrogates import soft_threshold
from reference import str as twin

HAND = [[0.9, -0.6, 0.3], [-0.1, 0.05, 0.0]]
GRADIENT = [[1.0, 2.0, 3.0], [4.0, -5.0, 6.0]]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def soft(
    weight: Tensor, s: Tensor, grad: Tensor, alpha: float = 0.0, cut: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Effective weight, dL/dW and dL/ds."""
    weight, s = weight.clone().requires_grad_(), s.clone().requires_grad_()
    limit = None if cut is None else weight.new_tensor(cut)
    effective = soft_threshold(weight, s, weight.new_tensor(alpha), limit)
    effective.backward(grad)
    assert weight.grad is not None
    assert s.grad is not None
    return effective.detach(), weight.grad, s.grad


# The function


def test_by_hand() -> None:
    effective, to_weight, to_s = soft(double(HAND), double([[0.0]]), double(GRADIENT))
    assert torch.allclose(effective, double([[0.4, -0.1, 0.0], [0.0, 0.0, 0.0]]))
    assert to_weight.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert to_s.item() == pytest.approx(0.25)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (6, 2, 5)])
@pytest.mark.parametrize("s", [-3200.0, -5.0, -1.0, -0.2, 0.0])
def test_equals_the_twin(shape: tuple[int, ...], s: float) -> None:
    weight, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight.view(-1)[::4] = 0
    effective, to_weight, to_s = soft(weight, weight.new_full((1,) * len(shape), s), grad)
    assert np.allclose(effective, twin.effective(weight.numpy(), s))
    expected, expected_s = twin.gradients(weight.numpy(), s, grad.numpy())
    assert np.allclose(to_weight, expected)
    assert to_s.item() == pytest.approx(expected_s, rel=1e-9, abs=1e-300)


def test_every_row_has_its_own_threshold() -> None:
    weight, grad = torch.randn(5, 3, 3, 3).double(), torch.randn(5, 3, 3, 3).double()
    s = torch.linspace(-6, 0, 5).double().reshape(5, 1, 1, 1)
    effective, to_weight, to_s = soft(weight, s, grad)
    for row in range(5):
        w, g, value = weight[row].numpy(), grad[row].numpy(), s[row].item()
        assert np.allclose(effective[row], twin.effective(w, value))
        assert np.allclose(to_weight[row], twin.gradients(w, value, g)[0])
        assert to_s[row].item() == pytest.approx(twin.gradients(w, value, g)[1])


def test_gradient_is_the_derivative_above_the_threshold() -> None:
    weight = (torch.rand(3, 4).double() + 0.6) * torch.randn(3, 4).sign()
    s = torch.full((3, 1), -0.3).double()  # t = 0.43
    check = torch.autograd.gradcheck
    zero = double(0.0)
    assert check(
        lambda w, r: soft_threshold(w, r, zero), (weight.requires_grad_(), s.requires_grad_())
    )


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_large_weights_in_any_memory_format(granularity: str) -> None:
    """Backwards of weights larger than a tile, channels last or not, are those of small ones."""
    weight, grad = torch.randn(70, 256, 3, 3).double(), torch.randn(70, 256, 3, 3).double()
    sparse = SoftThreshold(weight, granularity, -1.0).double()
    s = sparse.s.detach()
    expected = soft(weight, s, grad, alpha=0.3)
    last = torch.channels_last
    got = soft(weight.to(memory_format=last), s, grad.to(memory_format=last), alpha=0.3)
    mixed = soft(weight.to(memory_format=last), s, grad, alpha=0.3)
    for one, two, three in zip(expected, got, mixed, strict=True):
        assert torch.allclose(one, two)
        assert torch.allclose(one, three)
    assert got[1].is_contiguous(memory_format=last)
    by_row = [soft(w[None], s[: len(s)][i % len(s)][None], g[None], alpha=0.3)
              for i, (w, g) in enumerate(zip(weight, grad, strict=True))]  # fmt: skip
    assert torch.allclose(expected[1], torch.cat([row[1] for row in by_row]))
    total = torch.cat([row[2] for row in by_row])
    assert torch.allclose(expected[2], total if granularity == "row" else total.sum(0, True))


def test_half_precision_and_autocast() -> None:
    weight, grad = torch.randn(8, 8).bfloat16(), torch.randn(8, 8).bfloat16()
    effective, to_weight, to_s = soft(weight, torch.full((1, 1), -1.0).bfloat16(), grad)
    assert {t.dtype for t in (effective, to_weight, to_s)} == {torch.bfloat16}
    assert torch.equal(effective != 0, weight.abs() > torch.tensor(-1.0).bfloat16().sigmoid())
    layer = nn.Linear(8, 8)
    sparsifier = gossamer.Sparsifier(layer, gossamer.STR(s_init=-2.0), total_steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, 8)).sum().backward()
    assert sparsifier.sites[0].weight.grad is not None
    assert sparsifier.sites[0].weight.grad.dtype == torch.float32


# Training


def test_training_equals_the_twin() -> None:
    """SGD with momentum and decay on a quadratic loss: W and s to rounding, step by step."""
    layer = nn.Linear(6, 5, bias=False).double()
    start, goal = layer.weight.detach().clone(), torch.randn(5, 6).double() / 4
    lrs = [0.1 * (1 + math.cos(math.pi * step / 60)) / 2 for step in range(60)]
    sparsifier = gossamer.Sparsifier(layer, gossamer.STR(s_init=-4.0), total_steps=60)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.8, weight_decay=0.05)
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        ((layer.weight - goal) ** 2).sum().div(2).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    weight, s = twin.train(
        start.numpy(), -4.0, lambda w: w - goal.numpy(), lrs, momentum=0.8, decay=0.05
    )
    site = sparsifier.sites[0]
    assert np.allclose(site.weight.detach(), weight, atol=1e-12)
    assert site.sparse.s.item() == pytest.approx(s, rel=1e-12)
    assert 0 < sparsifier.density < 1
    assert sparsifier.revision == 60  # accounts are taken anew as the density falls
    assert sparsifier.finalize() is layer
    assert np.allclose(layer.weight.detach(), twin.effective(weight, s))


def test_starts_dense_and_with_the_networks_own_outputs() -> None:
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach().clone()
    sparsifier = gossamer.Sparsifier(layer, gossamer.STR(), total_steps=10)
    assert torch.equal(layer.weight, weight)
    assert sparsifier.density == 1
    assert gossamer.STR().budget([torch.Size([5, 6]), torch.Size([2, 3, 3, 3])]) == [30, 54]


@pytest.mark.parametrize("s_init", [-3200.0, -5.0])
def test_a_layer_of_zeros(s_init: float) -> None:
    """With t = 0 the map is the identity and zeros learn; under a threshold STR gives them none."""
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight)
    sparsifier = gossamer.Sparsifier(layer, gossamer.STR(s_init=s_init), total_steps=10)
    layer(torch.randn(4, 6)).pow(2).sum().backward()
    grad = sparsifier.sites[0].weight.grad
    assert grad is not None
    assert bool(grad.any()) == (s_init == -3200)


# Groups and checks


def test_thresholds_are_a_group_of_their_own() -> None:
    model = digits.mlp()
    sparsifier = gossamer.Sparsifier(model, gossamer.STR(granularity="row"), total_steps=10)
    rest, own = sparsifier.parameter_groups(weight_decay=0.5)
    assert [tuple(p.shape) for p in own["params"]] == [(256, 1), (256, 1), (10, 1)]
    assert own["weight_decay"] == 0.5
    assert len(rest["params"]) == 6 + 4  # weights and biases, and those of the norms


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"s_init": 1.0}, "s_init=1.0"), ({"granularity": "channel"}, "granularity='channel'")],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.STR(**wrong)


# The forecast


def imagenet() -> list[float]:
    """STR's schedule: 0.256 at batch 256, 5 epochs of warm-up, a cosine over the other 95."""
    rates = [0.256 * (epoch + 1) / 5 for epoch in range(5)]
    rates += [0.128 * (1 + math.cos(math.pi * epoch / 95)) for epoch in range(95)]
    return [rate for rate in rates for _ in range(5005)]


def cifar() -> list[float]:
    steps = 160 * 391
    return [0.05 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def test_forecast_is_the_recurrence() -> None:
    lrs = [0.005 * (1 + math.cos(math.pi * step / 20_000)) for step in range(20_000)]
    for s_init, decay in ((-5.0, 1e-2), (-100.0, 5e-3), (-3200.0, 2e-2)):
        end = twin.decayed(s_init, lrs, momentum=0.875, decay=decay)
        expected = 1 / (1 + math.exp(-end)) if end > -700 else 0.0
        assert implied_threshold(decay, lrs, 0.875, s_init) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("s_init", "decay", "epoch"),
    [(-3200, 2.25e-5, 30), (-3200, 1.75e-5, 40), (-12800, 5.65e-5, 16), (-100, 3.05e-5, 11)],
)
def test_onsets_on_imagenet(s_init: float, decay: float, epoch: int) -> None:
    step = onset_step(decay, imagenet(), 0.875, s_init, 1e-3)
    assert step is not None
    assert math.ceil(step / 5005) == epoch


def test_the_imagenet_setting_does_nothing_on_cifar() -> None:
    assert 3.0517578125e-5 * sum(imagenet()) / 0.125 == pytest.approx(15.6, rel=0.03)
    assert 2.25e-5 * sum(cifar()) / 0.1 == pytest.approx(0.71, abs=0.01)
    end = twin.decayed(-3200, cifar(), momentum=0.9, decay=2.25e-5)
    assert end == pytest.approx(-1569, rel=0.01)
    assert implied_threshold(2.25e-5, cifar(), 0.9, -3200) == 0.0
    assert onset_step(2.25e-5, cifar(), 0.9, -3200, 1e-3) is None
    assert onset_step(5e-4, cifar(), 0.9, -100, 1e-3) == pytest.approx(14 * 391, abs=391)


def sparse_mlp(
    method: gossamer.Method, **optimizer: float
) -> tuple[gossamer.Sparsifier, torch.optim.Optimizer]:
    sparsifier = gossamer.Sparsifier(digits.mlp(), method, total_steps=920)
    groups = sparsifier.parameter_groups(weight_decay=optimizer.pop("threshold_decay", 0.015))
    return sparsifier, torch.optim.SGD(groups, lr=0.1, momentum=0.875, **optimizer)


def test_forecast_reads_the_thresholds_own_group() -> None:
    sparsifier, optimizer = sparse_mlp(gossamer.STR(s_init=-5.0), weight_decay=5e-4)
    found = gossamer.forecast(sparsifier.sites, optimizer, [0.05] * 920)
    assert found.decay_sum == pytest.approx(0.015 * 920 * 0.05 / 0.125)
    assert found.s_start == -5
    assert found.s_end == pytest.approx(-5 * math.exp(-found.decay_sum))
    assert found.threshold_end == implied_threshold(0.015, [0.05] * 920, 0.875, -5)
    magnitudes = torch.cat([site.weight.detach().abs().flatten() for site in sparsifier.sites])
    assert found.median_weight == pytest.approx(magnitudes.median().item(), rel=1e-3)
    assert found.sparsity_end == pytest.approx(
        float((magnitudes < found.threshold_end).double().mean()), abs=1e-4
    )
    assert not found.futile
    assert "Lambda = decay * sum(lr) / (1 - momentum) = 5.52" in str(found)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True
    ),
    "dampened": lambda p: torch.optim.SGD(
        p, lr=0.01, momentum=0.9, weight_decay=0.01, dampening=0.5
    ),
    "dampened without momentum": lambda p: torch.optim.SGD(
        p, lr=0.01, weight_decay=0.1, dampening=0.5
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forecast_reads_the_optimizer(name: str) -> None:
    layer = nn.Linear(4, 3)
    sparsifier = gossamer.Sparsifier(layer, gossamer.STR(s_init=-5.0), total_steps=2000)
    optimizer = OPTIMIZERS[name](layer.parameters())
    found = gossamer.forecast(sparsifier.sites, optimizer, [0.01] * 2000)
    assert found.decay_sum == pytest.approx(1 if name == "dampened" else 2)
    s = sparsifier.sites[0].sparse.s
    s.grad = torch.zeros_like(s)  # decay alone: there is no loss
    for _ in range(2000):
        optimizer.step()
    assert s.item() == pytest.approx(found.s_end, rel=0.02)


def test_forecast_knows_no_formula_for_coupled_decay() -> None:
    sparsifier, _ = sparse_mlp(gossamer.AutoSparse())
    adam = torch.optim.Adam(sparsifier.model.parameters(), weight_decay=0.5)
    with pytest.raises(ValueError, match=r"Adam scales weight decay.*use SGD"):
        gossamer.forecast(sparsifier.sites, adam, [0.01] * 100)


def test_forecast_warns_when_nothing_can_be_pruned() -> None:
    sparsifier, optimizer = sparse_mlp(gossamer.STR(s_init=-100.0), threshold_decay=5e-3)
    with pytest.warns(UserWarning, match=r"no sparsity can appear. Lambda .* = 1.84.*times"):
        found = gossamer.forecast(sparsifier.sites, optimizer, [0.05] * 920)
    assert found.futile
    assert found.threshold_end < 1e-6
    # The advice it gives is enough, by its own measure.
    needed = float(str(found).split("Give the thresholds ")[1].split()[0])
    optimizer.param_groups[1]["weight_decay"] *= needed
    better = gossamer.forecast(sparsifier.sites, optimizer, [0.05] * 920)
    assert better.sparsity_end == pytest.approx(0.5, abs=0.1)
    nearer = float(str(found).split("s_init=")[1].split()[0])
    assert implied_threshold(5e-3, [0.05] * 920, 0.875, nearer) == pytest.approx(
        found.median_weight, rel=0.2
    )


def test_forecast_is_about_soft_thresholds() -> None:
    model = digits.mlp()
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.5), total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="only STR and AutoSparse have soft thresholds"):
        gossamer.forecast(sparsifier.sites, optimizer, [0.1])
    sparsifier, _ = sparse_mlp(gossamer.STR())
    with pytest.raises(ValueError, match=r"lacks the thresholds.*parameter_groups"):
        gossamer.forecast(sparsifier.sites, optimizer, [0.1])
    with pytest.raises(ValueError, match="decay leads to 1/2"):
        onset_step(0.1, [0.1], 0.9, -5, 0.5)


@pytest.mark.parametrize(
    ("method", "decay", "futile"),
    [
        (gossamer.STR(), 5e-4, True),
        (gossamer.STR(), 0.0, True),
        (gossamer.STR(s_init=-100.0), 2e-3, True),
        (gossamer.STR(s_init=-5.0), 0.0, False),
        (gossamer.STR(s_init=-5.0), 1.5e-2, False),
        (gossamer.AutoSparse(s_init=-50.0), 1e-3, True),
        (gossamer.AutoSparse(), 1e-3, False),
    ],
)
def test_the_first_step_warns_by_itself(
    method: gossamer.Method, decay: float, futile: bool
) -> None:
    sparsifier, optimizer = sparse_mlp(method, threshold_decay=decay)
    # A warm-up is no reason to warn: the rate that the optimizer was made with counts.
    for group in optimizer.param_groups:
        group["lr"] = 1e-5

    def step() -> None:
        sparsifier.model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        sparsifier.step(optimizer)

    if futile:
        with pytest.warns(
            UserWarning, match="no sparsity can appear in the 919 steps to come"
        ) as told:
            step()
        assert told[0].filename == __file__
    else:
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()  # once is enough


@pytest.mark.slow
def test_the_warning_is_right() -> None:
    """s_init = -100 at Lambda 1.84: 0.0 % of the weights are pruned, which half time shows."""
    with pytest.warns(UserWarning, match="no sparsity can appear in the 460 steps to come"):
        outcome = digits.train(gossamer.STR(s_init=-100.0), seed=0, weight_decay=5e-3)
    assert outcome.density > 0.9999


# A learned budget

# Sparsity in % of each layer of ResNet-50 at 90.23 % in all, from the authors' budget file; a
# stage's shortcut projection follows its first block.
BUDGET = """
59.8
83.28 89.48 85.8 83.34 89.89 90.6 91.7 88.07 87.03 90.99
85.95 93.91 93.13 94.96 95.31 91.5 93.66 94.61 94.86 93.38 93.26 93.21 94.14
88.85 96.14 93.19 97.2 95.36 95.06 94.84 96.77 95.59 94.99 96.08 96.1 94.94 95.49 95.66 94.49
95.09 94.92 93.14
90.32 95.66 91.14 96.79 93.69 93.98 90.48 87.57 84.37 80.29
64.5
"""


def test_the_learned_budget_of_resnet50_costs_what_is_published() -> None:
    dense = resnet50.layers()
    pooling = 2048 * 7 * 7
    assert len(dense) == 54
    assert sum(layer.weights for layer in dense) == 25_502_912
    macs = sum(layer.macs_executed for layer in dense)
    assert macs + pooling == 4_089_284_608
    sparse = [
        replace(layer, nonzeros=round((1 - float(pruned) / 100) * layer.weights))
        for layer, pruned in zip(dense, BUDGET.split(), strict=True)
    ]
    kept = sum(layer.nonzeros for layer in sparse)
    assert kept == pytest.approx(2.49e6, abs=5e3)
    assert 1 - kept / 25_502_912 == pytest.approx(0.9023, abs=5e-5)
    sparse_macs = sum(layer.macs_sparse for layer in sparse)
    assert sparse_macs + pooling == pytest.approx(343e6, abs=5e5)
    # 0.84 of the MACs that the same density in every layer would take.
    assert sparse_macs / (0.1 * macs) == pytest.approx(0.84, abs=0.005)
