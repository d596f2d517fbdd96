"""GMP: its schedule, its training beside the twin, its counts and its costs."""

import pytest
import torch
from torch import nn

import digits
import gossamer
import plain
from gossamer.allocation import allocate
from gossamer.schedules import window
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import gmp as twin

STEPS = 40


def _at(method: gossamer.GMP, step: int, total: int = 1000) -> float:
    return method.density_at(gossamer.Progress(step, total))


# Worked numbers


@pytest.mark.parametrize(
    ("start", "sparsities"),
    [(1.0, [0.2439, 0.5203, 0.7875, 0.8859]), (0.5, [0.6084, 0.7313, 0.85, 0.8938])],
)
def test_schedule_at_quarter_points(start: float, sparsities: list[float]) -> None:
    """5.10: the cubic from 0 and from 0.5 to 0.9."""
    method = gossamer.GMP(density=0.1, initial_density=start, prune_start=0.2, prune_end=0.7)
    got = [1 - _at(method, 200 + step) for step in (50, 125, 250, 375)]
    assert got == pytest.approx(sparsities, abs=5e-5)
    assert [_at(method, step) for step in (0, 200)] == [start, start]
    assert [_at(method, step) for step in (700, 701, 1000)] == [0.1] * 3
    expected = [1 - twin.sparsity(step, 200, 700, 1 - start, 0.9) for step in range(1001)]
    assert [_at(method, step) for step in range(1001)] == pytest.approx(expected)


@pytest.mark.parametrize(("density", "mean"), [(0.1, 0.2687), (0.2, 0.35)])
def test_mean_density(density: float, mean: float) -> None:
    """Section 4: pruned over the first 75 % of training."""
    method = gossamer.GMP(density=density)
    got = sum(_at(method, step, 100_000) for step in range(100_000)) / 100_000
    assert got == pytest.approx(mean, abs=6e-5)  # 0.26875


def test_updates_lie_on_the_grid_and_at_the_end() -> None:
    method = gossamer.GMP(update_interval=10, prune_start=0.12, prune_end=0.55)
    steps = [s for s in range(101) if method.updates_at(gossamer.Progress(s, 100))]
    assert steps == [20, 30, 40, 50, 55]
    assert not any(method.wants_dense_grad(gossamer.Progress(s, 100)) for s in range(101))


@pytest.mark.parametrize("total", [1, 2, 3, 10, 99, 1000])
@pytest.mark.parametrize("fractions", [(0.0, 0.75), (0.0, 0.01), (0.99, 1.0), (0.3, 0.31)])
def test_the_schedule_ends_inside_the_run(total: int, fractions: tuple[float, float]) -> None:
    start, end = window(*fractions, total)
    assert 0 <= start < end <= total
    method = gossamer.GMP(prune_start=fractions[0], prune_end=fractions[1], update_interval=1)
    assert _at(method, end, total) == 0.1
    if round(fractions[1] * total) > 1:
        method.validate({}, total)
        assert method.updates_at(gossamer.Progress(end, total))


# Training


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg", {"scope": "global"}),
        ("mlp", {"scope": "global", "initial_density": 0.5, "distribution": "erk"}),
        ("mobilenet", {}),
        ("mlp", {"distribution": "erk", "prune_start": 0.2, "update_interval": 3}),
    ],
    ids=["global", "global-sparse-start", "layer", "layer-erk"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str) -> None:
    method = gossamer.GMP(density=0.2, **options)
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    masks = {site.name: site.support.numpy() for site in sparsifier.sites}
    shapes = [site.original_shape for site in sparsifier.sites]
    total = sum(shape.numel() for shape in shapes)
    start, end = round(method.prune_start * STEPS), 30
    interval = method.update_interval or 2

    def rule(now: plain.Moment) -> plain.Change | None:
        if not start < now.step <= end or (now.step % interval and now.step != end):
            return None
        share = twin.sparsity(now.step, start, end, 1 - method.initial_density, 0.8)
        count = round((1 - share) * total)
        if method.scope == "global":
            kept = twin.prune_global(now.weights, now.masks, count)
        else:
            before = [int(mask.sum()) for mask in now.masks]
            counts = allocate(method.distribution, shapes, count, at_most=before)
            kept = twin.prune(now.weights, now.masks, counts)
        return plain.Change(kept, [mask & False for mask in kept])

    data = batches(STEPS)
    losses = train(model, sparsifier, optimizer_for(optimizer, model), data)
    expected, masks = plain.train(other, masks, optimizer_for(optimizer, other), data, rule)
    assert losses == expected
    for site in sparsifier.sites:
        assert (site.support.numpy() == masks[site.name]).all(), site.name
    sparsifier.finalize()
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("distribution", ["uniform", "erk", "er"])
@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact_and_weights_never_come_back(
    name: str, distribution: str, scope: str
) -> None:
    method = gossamer.GMP(density=0.13, distribution=distribution, scope=scope, update_interval=4)
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=24)
    shapes = [site.original_shape for site in sparsifier.sites]
    total = sum(shape.numel() for shape in shapes)
    before = [site.support.clone() for site in sparsifier.sites]
    assert all(mask.all() for mask in before)
    revisions = [sparsifier.revision]

    def check(step: int) -> None:
        update = method.updates_at(gossamer.Progress(step, 24))
        revisions.append(sparsifier.revision)
        assert revisions[-1] - revisions[-2] == update
        counts = [site.nonzeros for site in sparsifier.sites]
        if update:
            assert sum(counts) == round(_at(method, step, 24) * total)
            if scope == "layer":
                goal = allocate(distribution, shapes, sum(counts))
                assert all(abs(a - b) <= 1 for a, b in zip(counts, goal, strict=True))
        for index, site in enumerate(sparsifier.sites):
            assert not (site.support & ~before[index]).any()
            before[index] = site.support.clone()
            assert site.masked.dense_gradient is None

    train(model, sparsifier, optimizer_for("sgd", model), batches(24), after_step=check)
    assert revisions[-1] == 5  # steps 4, 8, 12, 16 and the end of the schedule, 18
    assert sparsifier.density == round(0.13 * total) / total


def test_the_smallest_go_ties_from_the_back() -> None:
    layer = nn.Linear(4, 2, bias=False)
    method = gossamer.GMP(density=0.5, update_interval=1, prune_end=1.0)
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -0.3, 0.2, 0.1], [0.3, 0.1, -0.1, 0.1]]))
    (change,) = method.update(sparsifier.sites, gossamer.Progress(2, 2), torch.Generator())
    assert change.kept.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert not change.grown.any()


# Cost


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_training_macs_follow_the_density(scope: str) -> None:
    """Section 4: E_t[3 f_D (1 - s_t)]."""
    steps = 200
    bill = plain.training_macs(gossamer.GMP(scope=scope, update_interval=1), steps)
    assert bill.total == sum(3 * macs for macs in bill.forward)
    assert bill.forward[0] == bill.dense_forward
    assert bill.forward[-1] == round(0.1 * bill.dense_forward)
    # The density of a step is that before its update: half a step late, 0.45 / 200 on average.
    mean = bill.total / steps / (3 * bill.dense_forward)
    assert mean == pytest.approx(0.2687 + 0.45 / steps, abs=2e-4)


# Digits


@pytest.mark.slow
def test_pruning_beats_a_fixed_mask() -> None:
    """90 % sparsity, 3 seeds: about 98.0 and 96.9 %."""

    def accuracy(method: gossamer.Method) -> float:
        outcomes = [digits.train(method, seed, weight_decay=5e-4, norm=False) for seed in range(3)]
        return sum(outcome.accuracy for outcome in outcomes) / 3

    better = gossamer.GMP(density=0.1)
    other = gossamer.Static(density=0.1, distribution="uniform")
    assert accuracy(better) > accuracy(other) + 0.005


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"density": 0.5, "initial_density": 0.4}, r"initial_density=0\.4 is below density=0\.5"),
        ({"prune_end": 0.3, "prune_start": 0.3}, r"prune_end=0\.3 leaves no time"),
        ({"scope": "local"}, "scope='local'"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"update_interval": 0}, "update_interval=0"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.GMP(**wrong)


def test_a_run_that_cannot_serve_it() -> None:
    method = gossamer.GMP(update_interval=50, prune_start=0.5)
    with pytest.raises(ValueError, match=r"update_interval=50 is longer than the 25 steps"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
    method = gossamer.GMP(update_interval=75)
    with pytest.raises(ValueError, match=r"update_interval=75 leaves no update before step 75"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
    small = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"density=0\.01 is below the reachable minimum"):
        gossamer.Sparsifier(small, gossamer.GMP(density=0.01), total_steps=100)
