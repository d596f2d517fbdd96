"""Top-KAST: sets, gradients and penalty by hand and by the twin; what moves, and what stays."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import digits
import gossamer
from gossamer.methods.topkast import Nested, exploration_penalty, nested_sets, nested_weight
from gossamer.train.work import Work
from nets import NETS, batches, net, train
from reference import autosparse
from reference import topkast as twin

HAND = [0.9, -0.8, 0.5, -0.4, 0.3, -0.2, 0.1, 0.05, -0.02, 0.01]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nested(sparsifier: gossamer.Sparsifier, index: int = 0) -> Nested:
    sparse = sparsifier.sites[index].sparse
    assert isinstance(sparse, Nested)
    return sparse


# The functions


def test_by_hand() -> None:
    weight = double(HAND).requires_grad_()
    inner, outer = nested_sets(weight, 2, 5)
    assert inner.nonzero().flatten().tolist() == [0, 1]
    assert outer.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    penalty = exploration_penalty(weight, inner.double(), outer.double(), 0.2)
    assert penalty.item() == pytest.approx(0.725 + 1.25)
    penalty.backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, double([0.9, -0.8, 2.5, -2.0, 1.5, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize(("alpha", "share"), [(0.4, 0.4), (0.0, 0.0), (1.0, 1.0)])
def test_gradient_by_hand(alpha: float, share: float) -> None:
    weight = double(HAND).requires_grad_()
    inner, outer = (mask.double() for mask in nested_sets(weight, 2, 5))
    effective = nested_weight(weight, inner, outer, double(alpha))
    assert effective.tolist() == [0.9, -0.8] + [0.0] * 8
    effective.sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, double([1.0, 1.0] + 3 * [share] + 5 * [0.0]))


@pytest.mark.parametrize("shape", [(6, 8), (4, 3, 3, 3)])
def test_sets_and_penalty_equal_the_twin(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).double()
    weight.view(-1)[::3] = weight.view(-1)[0]  # ties go by index
    for counts in ((1, 2), (10, 10), (10, 31), (weight.numel(),) * 2):
        got = nested_sets(weight, *counts)
        sets = twin.select(weight.numpy(), *counts)
        assert np.array_equal(got[0], sets.inner)
        assert np.array_equal(got[1], sets.outer)
        density = counts[0] / weight.numel()
        leaf = weight.clone().requires_grad_()
        value = exploration_penalty(leaf, got[0].double(), got[1].double(), density)
        value.backward()
        expected, gradient = twin.penalty(weight.numpy(), sets, density)
        assert value.item() == pytest.approx(expected)
        assert leaf.grad is not None
        assert np.allclose(leaf.grad, gradient)


# Training


@pytest.mark.parametrize("schedule", ["none", "sigmoid_cosine"])
def test_training_equals_the_twin(schedule: str) -> None:
    """SGD with momentum on a quadratic loss, selections and annealing included."""
    steps, reset = 60, 0.75 if schedule != "none" else 1.0
    layer = nn.Linear(6, 5, bias=False).double()
    start, goal = layer.weight.detach().clone(), torch.randn(5, 6).double()
    method = gossamer.TopKAST(
        density=0.2,
        backward_density=0.5,
        refresh_interval=7,
        exploration_penalty=0.05,
        alpha=0.6,
        alpha_schedule=schedule,
        alpha_reset=reset,
    )
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=steps)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.8)
    for _ in range(steps):
        loss = ((layer.weight - goal) ** 2).sum() / 2 + sparsifier.penalty()
        loss.backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    alphas = [
        0.6 if schedule == "none" else autosparse.alpha_at(step, steps, 0.6, reset)
        for step in range(steps)
    ]
    weight, sets = twin.train(
        start.numpy(),
        (6, 15),
        lambda w: w - goal.numpy(),
        alphas,
        interval=7,
        lr=0.05,
        momentum=0.8,
        coefficient=0.05,
    )
    site = sparsifier.sites[0]
    assert np.allclose(site.weight.detach(), weight, atol=1e-12)
    assert np.array_equal(site.support, sets.inner)
    assert not np.array_equal(sets.inner, twin.select(start.numpy(), 6, 15).inner)
    sparsifier.finalize()
    assert np.allclose(layer.weight.detach(), np.where(sets.inner, weight, 0))


@pytest.mark.parametrize("distribution", ["uniform", "erk", "er"])
@pytest.mark.parametrize(("density", "backward"), [(0.1, 0.1), (0.1, 0.35), (0.3, 1.0)])
@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact(name: str, density: float, backward: float, distribution: str) -> None:
    method = gossamer.TopKAST(
        density=density, backward_density=backward, distribution=distribution, refresh_interval=2
    )
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=6)
    shapes = [site.original_shape for site in sparsifier.sites]
    total = sum(shape.numel() for shape in shapes)
    inner, outer = method.budget(shapes), method.backward_budget(shapes)
    assert sum(inner) == round(density * total)
    assert sum(outer) == max(sum(inner), round(backward * total))

    def check() -> None:
        for index, site in enumerate(sparsifier.sites):
            sets = nested(sparsifier, index)
            assert site.nonzeros == inner[index] == sets.inner.sum()
            assert sets.outer.sum() == outer[index]
            assert not (sets.inner > sets.outer).any()

    check()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, sparsifier, optimizer, batches(6), after_step=lambda _: check())
    assert sparsifier.density == sum(inner) / total


@pytest.mark.parametrize(
    ("given", "total", "expected"),
    [(None, 12, 12), (None, 3000, 1000), (None, 200_000, 2000), (5, 3000, 600)],
)
def test_selections_of_a_run(
    given: int | None, total: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is before training; none follows the last step."""
    method = gossamer.TopKAST(density=0.2, refresh_interval=given)
    selected = []
    monkeypatch.setattr(gossamer.TopKAST, "_select", lambda *_: selected.append(True))
    for step in range(total + 1):
        method.advance([], gossamer.Progress(step, total), None)
    assert len(selected) == expected


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_the_backward_set_moves(optimizer: str) -> None:
    """Weights off B keep their values bit for bit, also when momentum came with them from B."""
    model = net("mlp")
    method = gossamer.TopKAST(density=0.2, backward_density=0.4, refresh_interval=3)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=30)
    made = OPTIMIZERS[optimizer](model.parameters())
    left = 0
    before = [site.weight.detach().clone() for site in sparsifier.sites]
    outer = [nested(sparsifier, i).outer.clone() for i in range(3)]

    def check(_: int) -> None:
        nonlocal left
        for index, site in enumerate(sparsifier.sites):
            off = outer[index] == 0
            assert torch.equal(site.weight[off], before[index][off])
            assert not torch.equal(site.weight[~off], before[index][~off])
            before[index] = site.weight.detach().clone()
            left += int((outer[index] > nested(sparsifier, index).outer).sum())
            outer[index] = nested(sparsifier, index).outer.clone()

    train(model, sparsifier, made, batches(30), after_step=check)
    assert left > 0


def test_weights_come_back_with_the_values_they_left_with() -> None:
    layer = nn.Linear(10, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(double([HAND]))
    method = gossamer.TopKAST(
        density=0.2, backward_density=0.3, refresh_interval=1, exploration_penalty=0.0
    )
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    site = sparsifier.sites[0]
    # B holds 0.9, -0.8 and 0.5; what acts is drawn below 0.4, and -0.4 and 0.3 are still there.
    (layer.weight * double([[0.8, -0.7, 0.0] + [0.0] * 7])).sum().backward()
    optimizer.step()
    sparsifier.step(optimizer)
    assert site.support.flatten().nonzero().flatten().tolist() == [2, 3]
    assert site.effective.flatten()[3].item() == -0.4


def test_alpha_follows_its_schedule() -> None:
    layer = nn.Linear(10, 4)
    method = gossamer.TopKAST(alpha=0.5, alpha_schedule="sigmoid_cosine", alpha_reset=0.9)
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    work = Work(layer, torch.zeros(1, 10), sparsifier)
    macs = 0
    for step in range(20):
        expected = autosparse.alpha_at(step, 20, 0.5, 0.9)
        assert nested(sparsifier).alpha.item() == pytest.approx(expected)
        # 8 of 40 weights act, 20 learn while alpha lasts: (3 D + M) of a dense product, then 3 D.
        macs += 2 * 8 + (20 if expected > 0 else 8)
        work.add(1)
        assert work.total == macs
        layer(torch.randn(2, 10)).sum().backward()
        optimizer.step()
        sparsifier.step(optimizer)
    plain = gossamer.TopKAST()
    assert {plain.alpha_at(gossamer.Progress(step, 20)) for step in range(20)} == {1.0}


def test_without_penalty() -> None:
    layer = nn.Linear(10, 4)
    method = gossamer.TopKAST(exploration_penalty=0.0)
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=20)
    assert method.penalty(sparsifier.sites) is None
    assert sparsifier.penalty().item() == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"density": 0.5, "backward_density": 0.4}, r"backward_density=0\.4 must hold"),
        ({"backward_density": 1.1}, r"backward_density=1\.1"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"alpha_schedule": "cubic"}, "alpha_schedule='cubic'"),
        ({"refresh_interval": 0}, "refresh_interval=0"),
        ({"refresh_interval": 2.5}, r"refresh_interval=2\.5.*whole number"),
        ({"exploration_penalty": -1.0}, r"exploration_penalty=-1\.0"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        gossamer.TopKAST(**wrong)


# Digits


@pytest.mark.slow
def test_exploring_beats_a_fixed_mask_on_digits() -> None:
    """90 % sparsity without norms: about 96.6, 97.2, 98.2, 97.6 and 98.1 %, each +- 0.4."""

    def accuracy(method: gossamer.Method, weight_decay: float = 0.0) -> float:
        outcomes = [
            digits.train(method, seed, weight_decay=weight_decay, norm=False, he=False)
            for seed in range(3)
        ]
        assert {round(outcome.density, 4) for outcome in outcomes} == {0.1}
        return fmean(outcome.accuracy for outcome in outcomes)

    def topkast(**options: object) -> gossamer.TopKAST:
        return gossamer.TopKAST(density=0.1, refresh_interval=digits.PER_EPOCH, **options)

    fixed = accuracy(gossamer.Static(density=0.1, distribution="uniform"), 5e-4)
    greedy = accuracy(topkast(backward_density=0.1))
    exploring = accuracy(topkast())
    assert exploring > fixed + 0.01
    assert exploring > greedy > fixed
    # Annealing saves weight gradients. At this size it gains nothing.
    for alpha in (0.5, 1.0):
        method = topkast(alpha=alpha, alpha_schedule="sigmoid_cosine", alpha_reset=0.9)
        annealed = accuracy(method)
        assert fixed + 0.005 < annealed < exploring + 0.003
