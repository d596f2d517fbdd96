"""SNFS: momentum, shares and counts by hand, its training beside the twin, and its costs."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
import plain
import resnet50
from gossamer.methods.snfs import (
    Remembering,
    drop_counts,
    growth_counts,
    momentum_shares,
)
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import snfs as twin

STEPS = 60


def _progress(step: int, total: int = 1000) -> gossamer.Progress:
    return gossamer.Progress(step, total)


def _momentum(site: gossamer.Site) -> Tensor:
    assert isinstance(site.sparse, Remembering)
    return site.sparse.momentum


# Schedules


def test_drop_rate_at_quarter_points() -> None:
    """The cosine from 0.5 to 0.005, as ITOP's in 5.10."""
    method = gossamer.SNFS()
    got = [method.drop_rate(_progress(step)) for step in (0, 250, 500, 750, 1000)]
    assert got == pytest.approx([0.5, 0.4275, 0.2525, 0.0775, 0.005], abs=5e-5)
    assert got == pytest.approx(
        [twin.drop_fraction(step, 1000, 0.5, 0.005) for step in (0, 250, 500, 750, 1000)]
    )


def test_dense_gradients_until_the_last_update() -> None:
    method = gossamer.SNFS(update_interval=10, t_end=0.75)
    assert [s for s in range(101) if method.updates_at(_progress(s, 100))] == [*range(10, 75, 10)]
    wanted = [s for s in range(1, 101) if method.wants_dense_grad(_progress(s, 100))]
    assert wanted == [*range(1, 71)]


# Counts by hand


def test_shares_are_means_over_the_support() -> None:
    momenta = [torch.tensor([[0.2, -0.4, 9.0]]), torch.tensor([[0.1], [0.1]])]
    supports = [torch.tensor([[True, True, False]]), torch.tensor([[True], [True]])]
    expected = pytest.approx([0.75, 0.25])
    assert momentum_shares(momenta, supports) == expected
    arrays = ([m.numpy() for m in momenta], [s.numpy() for s in supports])
    assert twin.shares(*arrays) == expected
    zero = [torch.zeros(1, 3), torch.zeros(2, 1)]
    assert momentum_shares(zero, supports) == [0.5, 0.5]


def test_a_dense_layer_that_gains_drops_no_more_than_it_lacks() -> None:
    active, weights = [90, 90, 30, 5], [100, 100, 100, 10]
    # 10 % are missing: the first layer gains and drops 0.1 * 90, the second drops half.
    assert drop_counts(0.5, active, weights, [0.4, 0.2, 0.3, 0.1]) == [9, 45, 15, 3]
    assert drop_counts(0.05, active, weights, [0.4, 0.2, 0.3, 0.1]) == [5, 5, 2, 1]
    assert drop_counts(0.0, active, weights, [0.4, 0.2, 0.3, 0.1]) == [0, 0, 0, 0]


def test_growth_follows_shares_and_spills_evenly() -> None:
    assert growth_counts([0.5, 0.3, 0.2], [10, 10, 10], [50] * 3, [100] * 3) == [15, 9, 6]
    # Remainders: the largest first.
    assert growth_counts([0.36, 0.35, 0.29], [3, 3, 4], [50] * 3, [100] * 3) == [4, 3, 3]
    # The first has room for its own 10 and 2 more: 12 of 24; 12 spill to the others, 6 each.
    assert growth_counts([0.8, 0.1, 0.1], [10] * 3, [98, 50, 50], [100] * 3) == [12, 9, 9]
    # All that was dropped comes back when every layer is full, and none stays empty.
    assert growth_counts([0.9, 0.1], [5, 5], [10, 10], [10, 10]) == [5, 5]
    assert growth_counts([1.0, 0.0], [5, 1], [10, 1], [99, 9]) == [5, 1]


# The momentum


def _setup(**options) -> tuple[nn.Module, gossamer.Sparsifier, torch.optim.Optimizer]:
    model = net("mlp")
    method = gossamer.SNFS(**({"density": 0.2, "update_interval": 5} | options))
    sparsifier = gossamer.Sparsifier(model, method, total_steps=40)
    return model, sparsifier, optimizer_for("sgd", model)


def test_it_is_the_mean_of_dense_gradients() -> None:
    """Beside gradients of an ordinary copy of the model, also off the support, also accumulated."""
    model, sparsifier, optimizer = _setup()
    expected = [torch.zeros_like(site.weight) for site in sparsifier.sites]
    for x, y in batches(12):
        dense = copy.deepcopy(model)
        gossamer.finalize(dense)
        F.cross_entropy(dense(x), y).backward()
        for mean, site in zip(expected, sparsifier.sites, strict=True):
            mean.mul_(0.9).add_(dense.get_submodule(site.name).weight.grad, alpha=0.1)
        for half, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(half), labels) / 2).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
        for mean, site in zip(expected, sparsifier.sites, strict=True):
            torch.testing.assert_close(_momentum(site), mean, rtol=1e-10, atol=1e-14)
            assert sparsifier.revision or _momentum(site)[~site.support].any()


def test_it_stops_with_the_last_update() -> None:
    model, sparsifier, optimizer = _setup(t_end=0.5)
    seen = []

    def after(step: int) -> None:
        seen.append(_momentum(sparsifier.sites[0]).clone())
        wants = sparsifier.sites[0].masked.wants_dense_gradient
        assert wants == (step < 15)

    train(model, sparsifier, optimizer, batches(20), after_step=after)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True] * 14 + [False] * 5


@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_overflowed_leaves_no_trace(value: float, step: int) -> None:
    """As GradScaler meets them; an update that was due comes one step later."""
    model, sparsifier, optimizer = _setup()
    updates = []

    def spoil(loss: Tensor) -> Tensor:
        return loss * (value if sparsifier.step_count + 1 == step else 1.0)

    before: list[Tensor] = []
    for x, y in batches(7):
        spoil(F.cross_entropy(model(x), y)).backward()
        revision = sparsifier.revision
        overflow = not all(torch.isfinite(site.weight.grad).all() for site in sparsifier.sites)
        if not overflow:
            optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
        now = [_momentum(site).clone() for site in sparsifier.sites]
        if overflow:
            assert sparsifier.step_count == step
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        before = now
        if sparsifier.revision > revision:
            updates.append(sparsifier.step_count)
    assert updates == ([6] if step == 5 else [5])
    assert all(torch.isfinite(momentum).all() for momentum in before)


def test_copies_have_it() -> None:
    model, sparsifier, optimizer = _setup()
    train(model, sparsifier, optimizer, batches(3))
    state = copy.deepcopy(model).state_dict()
    assert any(name.endswith("momentum") for name in state)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


# Training


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg", {}),
        ("mlp", {"update_interval": 4, "density": 0.7}),
        ("mobilenet", {"scope": "global", "distribution": "erk"}),
        ("mlp", {"smoothing": 0.0, "t_end": 0.5}),
    ],
    ids=["layer", "dense", "global", "gradient"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str) -> None:
    method = gossamer.SNFS(**({"density": 0.2} | options))
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    start = {site.name: site.support.numpy() for site in sparsifier.sites}
    interval, end = method.update_interval or 3, method.t_end * STEPS
    update = twin.update if method.scope == "layer" else twin.update_global
    momenta = [np.zeros(mask.shape) for mask in start.values()]

    def rule(now: plain.Moment) -> plain.Change | None:
        momenta[:] = twin.remember(momenta, now.gradients, method.smoothing)
        if now.step % interval or now.step >= end:
            return None
        rate = twin.drop_fraction(now.step, end, 0.5, 0.005)
        return plain.Change(*update(now.weights, now.masks, momenta, rate))

    data = batches(STEPS)
    losses = train(model, sparsifier, optimizer_for(optimizer, model), data)
    expected, masks = plain.train(other, start, optimizer_for(optimizer, other), data, rule)
    assert losses == expected
    assert any((masks[name] != start[name]).any() for name in masks)
    for site in sparsifier.sites:
        assert (site.support.numpy() == masks[site.name]).all(), site.name
    sparsifier.finalize()
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact_and_growth_starts_at_zero(name: str, density: float, scope: str) -> None:
    method = gossamer.SNFS(density=density, scope=scope, update_interval=3)
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=30)
    start = [site.nonzeros for site in sparsifier.sites]
    before = [site.support.clone() for site in sparsifier.sites]
    optimizer = optimizer_for("adam", model)

    def check(_: int) -> None:
        counts = [site.nonzeros for site in sparsifier.sites]
        assert sum(counts) == sum(start)
        assert scope == "global" or min(counts) >= 1
        for index, site in enumerate(sparsifier.sites):
            new = site.support & ~before[index]
            assert not site.weight.detach()[new].any()
            assert not optimizer.state[site.weight]["exp_avg"][new].any()
            before[index] = site.support.clone()

    train(model, sparsifier, optimizer, batches(30), after_step=check)
    assert sparsifier.revision == 9
    moved = [site.nonzeros for site in sparsifier.sites] != start
    assert moved == (density < 1)


# Cost


def test_training_macs() -> None:
    """Section 4: 2 f_S + f_D; 3 f_S once no update is to come."""
    method = gossamer.SNFS(update_interval=5, t_end=0.5)
    bill = plain.training_macs(method, 50)
    assert set(bill.forward) == {517}  # layers of the MLP run once: what moves changes nothing
    assert bill.total == 20 * (2 * 517 + bill.dense_forward) + 30 * 3 * 517


@pytest.mark.parametrize(("density", "factor"), [(0.2, 0.6092), (0.1, 0.4946)])
def test_macs_of_resnet50(density: float, factor: float) -> None:
    """5.9, ERK; what redistribution changes later is left out, as in the published figures."""
    method = gossamer.SNFS(density=density, distribution="erk")
    sparse, training = resnet50.factors(method, total_steps=32_000, counted=10)
    assert training == pytest.approx(factor, abs=5e-5)
    assert training == pytest.approx((2 * sparse + 1) / 3, rel=1e-12)


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, r"density=0\.0"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"update_interval": 0}, "update_interval=0"),
        ({"smoothing": 1.0}, r"smoothing=1\.0 leaves nothing"),
        ({"smoothing": -0.1}, r"smoothing=-0\.1"),
        ({"drop_fraction": 1.1}, r"drop_fraction=1\.1"),
        ({"drop_fraction_end": -0.1}, r"drop_fraction_end=-0\.1"),
        ({"t_end": 0.0}, r"t_end=0\.0"),
        ({"scope": "local"}, "scope='local'"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.SNFS(**wrong)


def test_a_run_that_is_over_before_the_first_update() -> None:
    method = gossamer.SNFS(update_interval=100)
    with pytest.raises(ValueError, match=r"update_interval=100 leaves no update before step 100"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
