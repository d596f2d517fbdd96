"""Chase: worked numbers, and every promise of its notes (6.2 to 6.4) on real, tiny training."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from audit import Audit
from gossamer.allocation import allocate
from gossamer.removal import select_channels
from gossamer.train.models import build_model
from nets import (
    NETS,
    OPTIMIZERS,
    READERS,
    SKIP_NETS,
    STREAMS,
    batches,
    evaluate,
    images,
    mlp,
    net,
    optimizer_for,
    train,
)
from reference import chase as twin

STEPS = 60

# Updates every 4 steps, some ten removals until step 48, phase B in the last 12.
SHORT = {"density": 0.2, "channel_sparsity": 0.5, "update_interval": 4, "min_channels": 2}
SHORT["channel_multiple"] = 1


def _chase(**changes) -> gossamer.Chase:
    return gossamer.Chase(**(SHORT | changes))


def _sparsifier(model: nn.Module, chase: gossamer.Chase, **options) -> gossamer.Sparsifier:
    dtype = next(model.parameters()).dtype
    options = {"total_steps": STEPS, "example": images(2, dtype=dtype)} | options
    return gossamer.Sparsifier(model, chase, **options)


# Worked numbers: schedules (6.2)


def test_ceiling_at_quarter_points() -> None:
    chase = gossamer.Chase(density=0.1, memory_margin=0.05, explore_end=0.8)
    values = [chase.ceiling(gossamer.Progress(step, 1000)) for step in (0, 200, 400, 600, 800)]
    assert values == pytest.approx([0.15, 0.14268, 0.125, 0.10732, 0.1], abs=5e-6)
    assert values[-1] == 0.1
    expected = [twin.ceiling(step, 800, 0.1, 0.05) for step in range(1001)]
    got = [chase.ceiling(gossamer.Progress(step, 1000)) for step in range(1001)]
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("density", "given", "margin"),
    [(0.2, None, 0.05), (0.025, None, 0.05), (0.01, None, 0.02), (0.01, 0.05, 0.05)],
)
def test_margin_of_few_weights(density: float, given: float | None, margin: float) -> None:
    chase = gossamer.Chase(density=density, memory_margin=given)
    assert chase.ceiling(gossamer.Progress(0, 1000)) == pytest.approx(density + margin)


def test_drop_rate() -> None:
    chase = gossamer.Chase()
    assert chase.drop_rate(gossamer.Progress(800, 1000)) == pytest.approx(0.0523, abs=5e-5)
    assert chase.drop_rate(gossamer.Progress(1000, 1000)) == 0.005
    # CIFAR: 0.047 at epoch 130 of 160.
    assert chase.drop_rate(gossamer.Progress(130, 160)) == pytest.approx(0.047, abs=5e-4)


@pytest.mark.parametrize("final", [0.5, 0.4, 0.3, 0.7, 0.123])
def test_channel_schedule(final: float) -> None:
    chase = gossamer.Chase(channel_sparsity=final, explore_end=0.8)

    def at(step: int) -> float:
        return chase.sparsity_at(gossamer.Progress(step, 1000))

    assert [at(step) / final for step in (200, 400, 600)] == pytest.approx(
        [0.578125, 0.875, 0.984375]
    )
    assert at(800) == at(801) == at(1000) == final
    values = [at(step) for step in range(1001)]
    assert values == sorted(values)


@pytest.mark.parametrize(("interval", "events"), [(8000, 8), (1000, 65)])
def test_removal_steps_of_the_published_runs(interval: int, events: int) -> None:
    """CIFAR: midway between updates as in the official code; ours ends on S_c inside the window."""
    chase = gossamer.Chase(update_interval=1000, channel_interval=interval, explore_end=130 / 160)
    steps = chase.removal_steps(80_000)
    official = [*range(interval - 500, 65_000, interval)]
    assert len(official) == events
    assert steps[: events - 1] == official[:-1]
    assert steps[-1] == 65_000
    assert set(steps[events - 1 :]) <= {official[-1], 65_000}


@pytest.mark.parametrize("total", [20, 60, 100, 999, 1234, 50_000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel_start": 0.05, "channel_end": 0.5},
        {"explore_end": 1.0},
        {"channel_start": 0.3, "channel_end": 0.31},
    ],
    ids=str,
)
def test_removal_steps_stay_in_their_window(total: int, options: dict[str, float]) -> None:
    chase = gossamer.Chase(**options)
    steps = chase.removal_steps(total)
    end = options.get("channel_end", chase.explore_end)
    assert steps == sorted(set(steps))
    assert steps[0] > options.get("channel_start", 0) * total - 1
    assert chase.sparsity_at(gossamer.Progress(steps[-1], total)) == 0.4  # the default
    start = round(options.get("channel_start", 0) * total)
    assert steps[-1] == max(start + 1, round(end * total))
    updates = [s for s in range(1, total) if chase.updates_at(gossamer.Progress(s, total))]
    spacing = updates[1] - updates[0]
    if spacing > 1:
        assert not set(steps[:-1]) & set(updates)


def test_updates_on_the_grid_and_at_the_end_of_phase_a() -> None:
    chase = gossamer.Chase(update_interval=10, explore_end=0.75)
    steps = [s for s in range(1, 101) if chase.updates_at(gossamer.Progress(s, 100))]
    assert steps == [10, 20, 30, 40, 50, 60, 70, 75, 80, 90, 100]
    wanted = [s for s in range(1, 101) if chase.wants_dense_grad(gossamer.Progress(s, 100))]
    assert wanted == steps
    frozen = gossamer.Chase(update_interval=10, explore_end=0.75, t_end=0.85)
    steps = [s for s in range(1, 101) if frozen.updates_at(gossamer.Progress(s, 100))]
    assert steps == [10, 20, 30, 40, 50, 60, 70, 75, 80]


def test_t_end_comes_after_phase_a() -> None:
    """Frozen earlier, the support would stay above the density for good."""
    with pytest.raises(ValueError, match=r"t_end=0\.5") as error:
        gossamer.Chase(update_interval=10, t_end=0.5, explore_end=0.8)
    assert "explore_end=0.8" in str(error.value)


# Worked numbers: counts (6.2)


def _thousand_weights(active: int) -> tuple[gossamer.Chase, gossamer.Sparsifier]:
    model = nn.Sequential(nn.Linear(40, 25, bias=False)).double()
    chase = gossamer.Chase(density=0.1, memory_margin=0.05, explore_end=1.0, channel_sparsity=0)
    sparsifier = gossamer.Sparsifier(model, chase, total_steps=1000)
    sparse = sparsifier.sites[0].masked
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(1000, dtype=torch.float64)
    mask[torch.randperm(1000, generator=generator)[:active]] = 1
    sparse.mask.copy_(mask.reshape(25, 40))
    with torch.no_grad():
        sparsifier.sites[0].weight.mul_(sparse.mask)
    sparse.dense_gradient = torch.randn(25, 40, generator=generator, dtype=torch.float64)
    return chase, sparsifier


@pytest.mark.parametrize(("active", "kept"), [(150, 100), (101, 100), (100, 100), (90, 90)])
def test_counts_in_the_middle_of_phase_a(active: int, kept: int) -> None:
    chase, sparsifier = _thousand_weights(active)
    generator = torch.Generator()
    (change,) = chase.update(sparsifier.sites, gossamer.Progress(500, 1000), generator)
    assert int(change.kept.sum()) == kept
    assert int((change.kept | change.grown).sum()) == 125
    assert not (change.kept & change.grown).any()
    weight = sparsifier.sites[0].weight.detach().abs()
    support = sparsifier.sites[0].support
    assert (change.kept <= support).all()
    if kept < active:
        assert weight[change.kept].min() >= weight[support & ~change.kept].max()
    gradient = sparsifier.sites[0].gradient_magnitude
    assert gradient[change.grown].min() >= gradient[~(change.kept | change.grown)].max()


def test_growth_stops_at_the_live_capacity() -> None:
    chase, sparsifier = _thousand_weights(90)
    sparse = sparsifier.sites[0].masked
    sparse.live_out[2:] = False  # 80 positions are left, 8 of them and more are active
    sparse.mask.mul_(sparse.live)
    (change,) = chase.update(sparsifier.sites, gossamer.Progress(500, 1000), torch.Generator())
    assert torch.equal(change.kept | change.grown, sparse.live)


def test_phase_b_drops_a_fraction_rounded_up_and_grows_back() -> None:
    model = nn.Sequential(nn.Linear(40, 25, bias=False)).double()
    chase = gossamer.Chase(density=0.1, explore_end=0.5, update_interval=10, channel_sparsity=0)
    sparsifier = gossamer.Sparsifier(model, chase, total_steps=1000)
    sparsifier.sites[0].masked.dense_gradient = torch.randn(25, 40, dtype=torch.float64)
    for step in (510, 700, 990, 1000):
        (change,) = chase.update(sparsifier.sites, gossamer.Progress(step, 1000), torch.Generator())
        dropped = math.ceil(twin.drop_fraction(step, 1000, 0.5, 0.005) * 100)
        assert int(change.kept.sum()) == 100 - dropped
        assert int((change.kept | change.grown).sum()) == 100


# Worked numbers: scores and selection (6.3)


@pytest.mark.parametrize(
    ("score", "expected"), [("umm", 0.2), ("masked_mean", 0.8 / 3), ("density", 0.75)]
)
def test_scores(score: str, expected: float) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    chase = gossamer.Chase(density=0.5, channel_score=score, min_channels=1)
    sparsifier = gossamer.Sparsifier(
        model, chase, total_steps=100, example=torch.randn(2, 4).double()
    )
    (pool,) = sparsifier.pools
    row = torch.tensor([0.0, 0.0, -0.6, 0.2], dtype=torch.float64)
    pool.producer.masked.mask[3] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    with torch.no_grad():
        pool.producer.weight[3] = row
    assert chase.score(pool)[3].item() == pytest.approx(expected)
    mask = pool.producer.support.numpy()
    weight = pool.producer.weight.detach().numpy()
    by_twin = {
        "umm": twin.umm(weight, 4),
        "masked_mean": twin.masked_mean(weight, mask),
        "density": twin.channel_density(mask),
    }
    np.testing.assert_allclose(chase.score(pool).numpy(), by_twin[score], rtol=1e-14)


A, B = [0.1, 0.2, 0.3, 0.4], [0.05, 0.06, 0.07, 0.5]


@pytest.mark.parametrize(
    ("beta", "floor", "expected"), [(0.5, 1, ([0], [0, 1, 2])), (1.0, 2, ([0, 1], [0, 1]))]
)
def test_selection_of_the_two_layers(beta: float, floor: int, expected) -> None:
    scores = [torch.tensor(A), torch.tensor(B)]
    live = [torch.ones(4, dtype=torch.bool)] * 2
    removed = select_channels(scores, live, floors=[floor] * 2, live_target=4)
    assert tuple(channels.tolist() for channels in removed) == expected
    by_twin = twin.select([np.array(A), np.array(B)], [m.numpy() for m in live], [floor] * 2, 4)
    assert tuple(by_twin) == expected
    assert twin.floor(4, 0.5, beta, 1) == floor


@pytest.mark.parametrize(("beta", "expected"), [(0.5, ([0], [0, 1, 2])), (1.0, ([0, 1], [0, 1]))])
def test_selection_of_the_two_layers_in_a_model(beta: float, expected) -> None:
    """The same through weights, pools, floors and the schedule."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    chase = gossamer.Chase(
        density=1.0, channel_sparsity=0.5, min_channel_factor=beta, min_channels=1
    )
    sparsifier = gossamer.Sparsifier(model, chase, total_steps=100, example=torch.randn(2, 4))
    with torch.no_grad():
        for pool, umm in zip(sparsifier.pools, (A, B), strict=True):
            pool.producer.weight.copy_(torch.tensor(umm)[:, None].expand(4, 4))
    end = gossamer.Progress(80, 100)
    removed = chase.removals(sparsifier.pools, end, {})
    assert tuple(channels.tolist() for channels in removed) == expected


def test_all_zero_channels_go_first_and_ties_by_index() -> None:
    scores = [torch.tensor([0.0, 0.3, 0.0, 0.0, 0.2]), torch.tensor([0.0, 0.1, 0.0, 0.4, 0.0])]
    live = [torch.ones(5, dtype=torch.bool)] * 2
    for quota, expected in {
        1: ([0], []),
        4: ([0, 2, 3], [0]),
        6: ([0, 2, 3], [0, 2, 4]),
        7: ([0, 2, 3], [0, 1, 2, 4]),
    }.items():
        removed = select_channels(scores, live, floors=[0, 0], live_target=10 - quota)
        assert tuple(channels.tolist() for channels in removed) == expected


def test_more_live_channels_than_wanted_or_none_to_remove() -> None:
    scores = [torch.rand(5), torch.rand(6)]
    live = [torch.ones(5, dtype=torch.bool), torch.ones(6, dtype=torch.bool)]
    for target in (11, 12):
        removed = select_channels(scores, live, floors=[1, 1], live_target=target)
        assert [len(channels) for channels in removed] == [0, 0]
        assert removed[0].dtype == torch.int64


@pytest.mark.parametrize("seed", range(40))
def test_selection_is_the_brute_force_set(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pools = int(torch.randint(1, 7, (), generator=generator))
    widths = torch.randint(1, 30, (pools,), generator=generator).tolist()
    ties = seed % 2
    scores, live = [], []
    for width in widths:
        values = torch.rand(width, generator=generator, dtype=torch.float64)
        scores.append((values * 4).floor() / 4 if ties else values)
        live.append(torch.rand(width, generator=generator) < 0.8)
        if seed % 3 == 0:
            live[-1][:] = True
    alive = [int(mask.sum()) for mask in live]
    floors = [int(torch.randint(0, n + 1, (), generator=generator)) for n in alive]
    for target in {sum(floors), (sum(floors) + sum(alive)) // 2, sum(alive) - 1, sum(alive)}:
        if not sum(floors) <= target:
            continue
        removed = select_channels(scores, live, floors=floors, live_target=target)
        expected = twin.select(
            [s.numpy() for s in scores], [m.numpy() for m in live], floors, target
        )
        assert [channels.tolist() for channels in removed] == expected
        left = [n - len(channels) for n, channels in zip(alive, removed, strict=True)]
        assert sum(left) == target
        assert all(n >= floor for n, floor in zip(left, floors, strict=True))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_selection_in_multiples(seed: int, multiple: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(multiple, 12 * multiple, (5,), generator=generator).tolist()
    scores = [torch.rand(width, generator=generator) for width in widths]
    live = [torch.ones(width, dtype=torch.bool) for width in widths]
    floors = [min(width, multiple) for width in widths]
    target = round(0.6 * sum(widths))
    removed = select_channels(
        scores, live, floors=floors, live_target=target, multiples=[multiple] * 5
    )
    left = [width - len(channels) for width, channels in zip(widths, removed, strict=True)]
    for now, before, floor in zip(left, widths, floors, strict=True):
        assert now == before or now % multiple == 0
        assert now >= floor
    assert abs(sum(left) - target) <= multiple // 2
    for score, channels in zip(scores, removed, strict=True):  # the lowest of each layer go
        staying = sorted(set(range(len(score))) - set(channels.tolist()))
        if len(channels):
            assert score[channels].max() <= score[staying].min()


@pytest.mark.parametrize(
    ("sparsity", "widths"), [(0.5, (20, 40)), (0.8, (20, 40)), (0.9, (40, 80))]
)
def test_factor_one_removes_evenly(sparsity: float, widths: tuple[int, int]) -> None:
    """`min_channel_factor=1`: every layer keeps the same share, whatever the scores say."""
    one, two = widths
    model = nn.Sequential(
        nn.Linear(4, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, 2)
    )
    chase = gossamer.Chase(
        density=1.0,
        channel_sparsity=sparsity,
        min_channel_factor=1.0,
        min_channels=1,
        channel_multiple=1,
    )
    sparsifier = gossamer.Sparsifier(model, chase, total_steps=100, example=torch.randn(2, 4))
    with torch.no_grad():
        sparsifier.sites[0].weight.mul_(1e-6)  # the scores alone would empty the first layer
    removed = chase.removals(sparsifier.pools, gossamer.Progress(80, 100), {})
    left = [width - len(channels) for width, channels in zip(widths, removed, strict=True)]
    assert left == [round(width * (1 - sparsity)) for width in widths]


# Invariants after every step of training (6.4), against the twin


def _audited(name: str, chase: gossamer.Chase, optimizer: str = "sgd", **options):
    model = net(name)
    sparsifier = _sparsifier(model, chase, **options)
    opt = optimizer_for(optimizer, model)
    audit = Audit(sparsifier, opt, (STREAMS if chase.prune_residual else READERS)[name])
    losses = train(
        model, sparsifier, opt, batches(STEPS), before_step=audit.before, after_step=audit.after
    )
    assert all(math.isfinite(loss) for loss in losses)
    return model, sparsifier, opt, audit


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cut", ["end", "during"])
@pytest.mark.parametrize("name", NETS)
def test_every_step_equals_the_twin(name: str, cut: str) -> None:
    _, sparsifier, _, audit = _audited(name, _chase(), cut=cut)
    assert [pool.name for pool in sparsifier.pools] == list(READERS[name])
    updates = [event for event in audit.events if event.updated]
    removals = [event for event in audit.events if event.removed]
    assert len(updates) == STEPS // 4
    assert len(removals) > 5
    # Phase A sits above the budget, phase B and the end exactly on it.
    budget = round(0.2 * audit.original)
    late = [event.nonzeros for event in updates if event.step >= 48]
    assert late == [budget] * 4
    assert all(event.nonzeros > budget for event in updates if event.step < 48)
    assert sum(site.nonzeros for site in sparsifier.sites) == budget
    total = sum(audit.widths.values())
    assert sparsifier.live_channels == round(0.5 * total)
    assert sparsifier.channel_sparsity == pytest.approx(1 - round(0.5 * total) / total)
    if cut == "during":
        assert len(sparsifier.plan) > 0
        assert sum(len(site.weight) for site in sparsifier.sites if site.name in audit.widths) == (
            round(0.5 * total)
        )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cut", ["end", "during"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_equals_the_twin_with_every_optimizer(optimizer: str, cut: str) -> None:
    _, _, opt, audit = _audited("vgg", _chase(), optimizer, cut=cut)
    assert len(audit.events) > 20
    state = opt.state[audit.sites["features.3"].weight]
    assert any(torch.is_tensor(value) and value.dim() > 0 for value in state.values())


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"memory_margin": 0.0},
        {"memory_margin": 0.5, "density": 0.6},  # the ceiling is cut off at 1
        {"density": 1.0},
        {"density": 0.9, "channel_sparsity": 0.8},  # the live capacity is below the budget
        {"channel_sparsity": 0.0},
        {"channel_score": "masked_mean"},
        {"channel_score": "density"},
        {"min_channel_factor": 0.0, "min_channels": 1, "channel_sparsity": 0.75},
        {"min_channel_factor": 1.0},
        {"channel_start": 0.2, "channel_end": 0.5, "channel_interval": 8},
        {"channel_interval": 4},
        {"explore_end": 1.0},
        {"explore_end": 0.3},
        {"update_interval": 1},
        {"update_interval": 7},
        {"distribution": "uniform"},
        {"drop_fraction": 1.0, "explore_end": 0.5},
        {"drop_fraction": 0.0, "drop_fraction_end": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", ["end", "during"])
def test_every_step_equals_the_twin_with_other_settings(changes, cut: str) -> None:
    _audited("conv_flatten_linear", _chase(**changes), cut=cut)


def test_some_weights_are_dropped_and_grown_in_the_same_update() -> None:
    """Else the promise that they start anew (the audit checks it) would be empty."""
    model = net("mlp")
    chase = _chase(channel_sparsity=0, drop_fraction=0.9, drop_fraction_end=0.9, explore_end=0.1)
    sparsifier = _sparsifier(model, chase)
    optimizer = optimizer_for("adam", model)
    regrown = 0
    photographs = {}

    def before(step: int) -> None:
        for site in sparsifier.sites:
            photographs[site.name] = (site.support.clone(), site.weight.detach().clone())

    def after(step: int) -> None:
        nonlocal regrown
        for site in sparsifier.sites:
            support, weight = photographs[site.name]
            again = support & site.support & (weight != 0) & (site.weight == 0)
            regrown += int(again.sum())
            state = optimizer.state[site.weight]
            assert not state["exp_avg"][again].any()
            assert not state["exp_avg_sq"][again].any()

    train(model, sparsifier, optimizer, batches(STEPS), before_step=before, after_step=after)
    assert regrown > 50


def test_memory_margin_zero_holds_the_density() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, _chase(memory_margin=0.0, channel_sparsity=0))
    budget = round(0.2 * sum(site.original_numel for site in sparsifier.sites))
    counts = []
    train(
        model,
        sparsifier,
        optimizer_for("sgd", model),
        batches(STEPS),
        after_step=lambda _: counts.append(sum(site.nonzeros for site in sparsifier.sites)),
    )
    assert set(counts) == {budget}


def test_first_layer_counts_are_erk_and_exact() -> None:
    model = net("bottleneck")
    sparsifier = _sparsifier(model, _chase())
    shapes = [site.original_shape for site in sparsifier.sites]
    total = sum(shape.numel() for shape in shapes)
    counts = [site.nonzeros for site in sparsifier.sites]
    assert counts == allocate("erk", shapes, round(0.2 * total))
    assert sum(counts) == round(0.2 * total)
    assert sparsifier.density == round(0.2 * total) / total


def _plant(model: nn.Module, layers: Sequence[str], kind: str, dead_of) -> None:
    """A huge gradient at what `dead_of` marks, arriving the way any gradient does: by autograd."""
    for name in layers:
        module = model.get_submodule(name)
        parameter = module.parametrizations.weight.original if kind == "weight" else module.bias

        def plant(gradient: Tensor, name: str = name) -> Tensor:
            return torch.where(dead_of(name), torch.full_like(gradient, 1e6), gradient)

        parameter.register_hook(plant)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["vgg", "mobilenet", "conv_flatten_linear"])
def test_nothing_grows_in_removed_channels(name: str, optimizer: str) -> None:
    model = net(name)
    sparsifier = _sparsifier(model, _chase(), cut="end")
    opt = optimizer_for(optimizer, model)
    sites = {site.name: site for site in sparsifier.sites}
    _plant(model, list(sites), "weight", lambda name: ~sites[name].masked.live)
    audit = Audit(sparsifier, opt, READERS[name])
    train(model, sparsifier, opt, batches(STEPS), before_step=audit.before, after_step=audit.after)
    assert sum(event.removed for event in audit.events) > 10


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_bias_of_a_removed_channel_stays_zero(optimizer: str) -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, _chase(), cut="end")
    opt = optimizer_for(optimizer, model)
    sites = {site.name: site for site in sparsifier.sites}
    convs = [name for name in sites if name.startswith("features")]
    _plant(model, convs, "bias", lambda name: ~sites[name].masked.live_out.flatten())
    nonzero = []

    def after(step: int) -> None:
        for name in convs:
            bias = sites[name].module.bias.detach()
            if bias[~sites[name].masked.live_out.flatten()].any():
                nonzero.append((step, name))

    train(model, sparsifier, opt, batches(STEPS), after_step=after)
    assert nonzero == []


# Without channels it is plain dynamic sparse training


def _plain_dst(model: nn.Module, masks: dict[str, Tensor], optimizer, chase, data):
    """Dynamic sparse training of an ordinary model by hand: no package code, only the twin."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    original = sum(layer.weight.numel() for layer in layers.values())
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.mul_(masks[name])
    losses = []
    for step, (x, y) in enumerate(data, 1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        dense = {name: layer.weight.grad.clone() for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight.grad.mul_(masks[name])
        optimizer.step()
        losses.append(loss.item())
        phase_a = round(chase.explore_end * len(data))
        if step % chase.update_interval and step != phase_a:
            continue
        support = twin.update(
            [layer.weight.detach().numpy() for layer in layers.values()],
            [masks[name].bool().numpy() for name in layers],
            [np.ones(tuple(layer.weight.shape), dtype=bool) for layer in layers.values()],
            [dense[name].numpy() for name in layers],
            step=step,
            total=len(data),
            phase_a=phase_a,
            original=original,
            density=chase.density,
            margin=chase.margin,
            drop=(chase.drop_fraction, chase.drop_fraction_end),
        )
        for (name, layer), kept, mask in zip(
            layers.items(), support.kept, support.mask, strict=True
        ):
            masks[name] = torch.from_numpy(mask).to(layer.weight.dtype)
            factor = torch.from_numpy(kept).to(layer.weight.dtype)
            layer.weight.data.mul_(factor)
            for value in optimizer.state[layer.weight].values():
                if value.dim():
                    value.mul_(factor)
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["vgg", "basic"])
def test_without_channels_it_is_plain_dst(name: str, optimizer: str) -> None:
    chase = _chase(channel_sparsity=0)
    plain, model = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, chase, total_steps=STEPS)  # needs no example
    assert sparsifier.pools == []
    masks = {site.name: site.masked.mask.clone() for site in sparsifier.sites}
    data = batches(STEPS)
    losses = train(model, sparsifier, optimizer_for(optimizer, model), data)
    plain.train()
    assert losses == _plain_dst(plain, masks, optimizer_for(optimizer, plain), chase, data)
    sparsifier.finalize()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_until_the_first_removal_channels_change_nothing() -> None:
    first = _chase().removal_steps(STEPS)[0]
    data = batches(STEPS)
    runs = []
    for chase in (_chase(), _chase(channel_sparsity=0)):
        model = net("vgg")
        sparsifier = _sparsifier(model, chase)
        losses = train(model, sparsifier, optimizer_for("sgd", model), data[: first + 1])
        runs.append(losses)
    assert runs[0][:first] == runs[1][:first]
    assert runs[0][first] != runs[1][first]


# Masked and cut networks train on as one (6.4, item 7)


def _pair(name: str, optimizer: str, dtype: torch.dtype, chase: gossamer.Chase):
    runs = {}
    for cut in ("end", "during"):
        model = net(name, dtype=dtype)
        sparsifier = _sparsifier(model, chase, cut=cut)
        opt = optimizer_for(optimizer, model)
        if optimizer == "adamw":
            # Where a gradient is zero but for rounding (a bias in front of a batch norm), Adam
            # divides that noise by eps: at the usual 1e-8 it alone moves outputs by 1e-10.
            opt.param_groups[0]["eps"] = 1e-3
        runs[cut] = (model, sparsifier, opt)
    return runs


def _train_alike(runs, *, least_cuts: int = 2) -> None:
    """Losses, outputs and masks of the masked and the cut network, after every step."""
    x = images(4, seed=9)
    data = batches(STEPS)
    widths = set()
    for batch in data:
        losses, outputs, counts = [], [], []
        for model, sparsifier, opt in runs.values():
            losses += train(model, sparsifier, opt, [batch])
            outputs.append(evaluate(model, x))
            counts.append([site.nonzeros for site in sparsifier.sites])
        widths.add(sum(p.numel() for p in runs["during"][0].parameters()))
        assert abs(losses[0] - losses[1]) <= 1e-12 * max(1, abs(losses[0]))
        scale = max(1.0, float(outputs[0].abs().max()))
        assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-12 * scale
        assert counts[0] == counts[1]
    assert len(widths) > least_cuts

    masked, slim = runs["end"][1], runs["during"][1]
    assert masked.live_channels == slim.live_channels
    assert sum(p.numel() for p in runs["end"][0].parameters()) > max(widths) - 1
    for site, cut in zip(masked.sites, slim.sites, strict=True):
        assert torch.equal(_at(slim.plan, site.name, site.masked.mask), cut.masked.mask), site.name
    _same_parameters(*runs.values())


def _at(plan: gossamer.Plan, layer: str, tensor: Tensor) -> Tensor:
    """What the plan keeps of a layer's tensor: `(out, in, ...)`, or `(out,)`."""
    rows, columns = plan.kept(f"{layer}.weight", 0), plan.kept(f"{layer}.weight", 1)
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None or tensor.dim() < 2 else tensor[:, columns]


def _same_parameters(masked, slim) -> None:
    """Parameters and optimizer state of both networks, where the cut one still has them."""
    plan, seen = slim[1].plan, 0
    named = dict(masked[0].named_parameters())
    for name, parameter in slim[0].named_parameters():
        layer = (
            name.split(".parametrizations")[0] if "parametr" in name else name.rpartition(".")[0]
        )
        wide = named[name]
        pairs = [(wide, parameter)]
        for key, value in slim[2].state[parameter].items():
            if torch.is_tensor(value) and value.dim():
                pairs.append((masked[2].state[wide][key], value))
                seen += 1
        for whole, cut in pairs:
            kept = _at(plan, layer, whole.detach())
            torch.testing.assert_close(kept, cut.detach(), rtol=0, atol=1e-10, msg=name)
    assert seen > 4


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", NETS)
def test_masked_and_cut_train_alike(name: str, optimizer: str) -> None:
    _train_alike(_pair(name, optimizer, torch.float64, _chase()))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "layer"},
        {"channel_score": "masked_mean"},
        {"channel_score": "density"},
        {"channel_multiple": 4, "min_channels": 4},
        {"memory_margin": 0.0},
        {"channel_interval": 4, "channel_start": 0.1, "channel_end": 0.6},
    ],
    ids=str,
)
def test_masked_and_cut_train_alike_with_other_settings(changes) -> None:
    _train_alike(_pair("vgg", "nesterov", torch.float64, _chase(**changes)))


class InFours(nn.Module):
    """Reshapes channels in fours: a width that is no multiple of 4 fails, and the half does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        b, c, h, w = x.shape
        x = x.reshape(b, 4, c // 4, h, w).reshape(b, c, h, w)
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def test_a_cut_that_fails_later_is_only_masked() -> None:
    """The group is locked with its reason, all others are cut, and training does not notice."""
    runs = {}
    for cut in ("end", "during"):
        torch.manual_seed(0)
        model = InFours().double()
        sparsifier = _sparsifier(model, _chase(min_channel_factor=0.9), cut=cut)
        assert {pool.name for pool in sparsifier.pools} == {"conv1", "conv2"}
        runs[cut] = (model, sparsifier, optimizer_for("sgd", model))
    _train_alike(runs)
    model, slim, _ = runs["during"]
    assert "fails once they are cut" in slim.locked["conv1"]
    assert slim.live_channels == 16
    assert len(model.conv1.weight) == 16
    assert len(model.conv2.weight) < 16
    site = slim.pools[0].producer
    dead = ~site.masked.live_out.flatten()
    assert dead.any()
    assert not site.weight.detach()[dead].any()
    assert not site.module.bias.detach()[dead].any()


def test_resuming_after_a_cut_that_failed() -> None:
    def fresh():
        torch.manual_seed(0)
        model = InFours().double()
        sparsifier = _sparsifier(model, _chase(min_channel_factor=0.9))
        return model, sparsifier, optimizer_for("sgd", model)

    data = batches(STEPS)
    expected = train(*fresh(), data)
    first = fresh()
    losses = train(*first, data[:21])
    assert "conv1" in first[1].locked
    second = fresh()
    second[1].load_state_dict(first[1].state_dict())
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    assert losses + train(*second, data[21:]) == expected


def test_masked_and_cut_train_alike_in_float32() -> None:
    runs = _pair("vgg", "sgd", torch.float32, _chase())
    data = batches(STEPS, dtype=torch.float32)
    x = images(4, dtype=torch.float32)
    for batch in data[:12]:  # over the first cuts; later, rounding may tip a ranking
        outputs = []
        for model, sparsifier, opt in runs.values():
            train(model, sparsifier, opt, [batch])
            outputs.append(evaluate(model, x))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert runs["during"][1].channel_sparsity > 0


def test_clipping_and_schedulers_do_not_notice_a_cut() -> None:
    runs = _pair("vgg", "sgd", torch.float64, _chase())
    histories = []
    for model, sparsifier, opt in runs.values():
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
        norms, losses = [], []
        model.train()
        for x, y in batches(STEPS):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            opt.step()
            schedule.step()
            sparsifier.step(opt)
            opt.zero_grad()
            losses.append(float(loss.detach()))
        histories.append((losses, norms))
    for masked, slim in zip(*histories, strict=True):
        np.testing.assert_allclose(masked, slim, rtol=1e-11)


def _kept(plan: gossamer.Plan) -> dict[tuple[str, int], list[int]]:
    return {(cut.tensor, cut.dim): cut.keep.tolist() for cut in plan.changes}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NETS)
def test_masked_then_shrunk_is_the_network_cut_during_training(name: str) -> None:
    _shrunk_alike(_pair(name, "sgd", torch.float64, _chase()))


def _shrunk_alike(runs) -> None:
    data = batches(STEPS)
    for model, sparsifier, opt in runs.values():
        train(model, sparsifier, opt, data)
        sparsifier.finalize()
    x = images(4, seed=5)
    masked = gossamer.shrink(runs["end"][0], x)
    slim = gossamer.shrink(runs["during"][0], x, plan=runs["during"][1].plan)
    kept = [_kept(made.plan) for made in (masked, slim)]
    assert kept[0] == kept[1]
    shapes = [{k: v.shape for k, v in made.model.state_dict().items()} for made in (masked, slim)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(
        evaluate(masked.model, x), evaluate(slim.model, x), rtol=1e-11, atol=1e-11
    )


# Resuming (6.4, item 9)


def _fresh(name: str, optimizer: str, cut: str):
    model = net(name, dtype=torch.float32)
    sparsifier = _sparsifier(model, _chase(prune_residual=name in SKIP_NETS), cut=cut)
    return model, sparsifier, optimizer_for(optimizer, model)


def _states(model, sparsifier, optimizer) -> dict:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sparsifier": sparsifier.state_dict(),
    }


def _equal(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


# Removals of this run are at 2, 6, 10, ..., 48 and updates at 4, 8, ..., 60.
STOPS = {
    ("vgg", "sgd", "during"): [1, 2, 3, 4, 9, 10, 21, 47, 48, 55, 56],
    ("mobilenet", "adamw", "during"): [9, 10, 12, 48],
    ("conv_flatten_linear", "rmsprop", "during"): [1, 2, 4, 47, 50],
    ("bottleneck", "adam", "end"): [10, 12, 48],
    ("mobilenetv2", "sgd", "during"): [9, 10],
    ("densenet", "adamw", "during"): [9, 10],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "optimizer", "cut", "stop"),
    [(*run, stop) for run, stops in STOPS.items() for stop in stops],
)
def test_resuming_changes_nothing(
    name: str, optimizer: str, cut: str, stop: int, tmp_path: Path
) -> None:
    data = batches(STEPS, dtype=torch.float32)
    assert _chase().removal_steps(STEPS)[:3] == [2, 6, 10]
    whole = _fresh(name, optimizer, cut)
    expected = train(*whole, data)

    first = _fresh(name, optimizer, cut)
    losses = train(*first, data[:stop])
    torch.save(_states(*first), tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = _fresh(name, optimizer, cut)
    second[1].load_state_dict(saved["sparsifier"])
    second[0].load_state_dict(saved["model"])
    second[2].load_state_dict(saved["optimizer"])
    assert second[1].step_count == stop
    losses += train(*second, data[stop:])
    assert losses == expected
    assert _equal(_states(*second), _states(*whole))
    assert second[1].density == whole[1].density
    assert second[1].live_channels == whole[1].live_channels


def test_resuming_twice_and_in_a_model_of_other_weights(tmp_path: Path) -> None:
    """Everything comes from the checkpoint: the fresh model and its masks may be any."""
    data = batches(STEPS, dtype=torch.float32)
    whole = _fresh("vgg", "sgd", "during")
    expected = train(*whole, data)
    run = _fresh("vgg", "sgd", "during")
    losses: list[float] = []
    for start, end in ((0, 13), (13, 31), (31, STEPS)):
        losses += train(*run, data[start:end])
        torch.save(_states(*run), tmp_path / "checkpoint.pt")
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        model = net("vgg", seed=end, dtype=torch.float32)
        run = (model, _sparsifier(model, _chase()), optimizer_for("sgd", model))
        run[1].load_state_dict(saved["sparsifier"])
        run[0].load_state_dict(saved["model"])
        run[2].load_state_dict(saved["optimizer"])
    assert losses == expected


def test_resume_into_an_optimizer_that_was_loaded_first() -> None:
    """`load_state_dict(state, optimizer)` also cuts state that a full-width optimizer holds."""
    model = net("vgg")
    sparsifier = _sparsifier(model, _chase())
    optimizer = optimizer_for("sgd", model)
    train(model, sparsifier, optimizer, batches(20))
    full = net("vgg")
    fresh = _sparsifier(full, _chase())
    other = optimizer_for("sgd", full)
    for parameter in full.parameters():
        other.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    fresh.load_state_dict(sparsifier.state_dict(), other)
    for parameter, twin_parameter in zip(full.parameters(), model.parameters(), strict=True):
        assert parameter.shape == twin_parameter.shape
        assert other.state[parameter]["momentum_buffer"].shape == parameter.shape


# Other settings


@pytest.mark.parametrize("cut", ["end", "during"])
def test_scope_layer_holds_shares_and_totals(cut: str) -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, _chase(scope="layer"), cut=cut)
    original = sum(site.original_numel for site in sparsifier.sites)
    counts = {}

    def after(step: int) -> None:
        counts[step] = [site.nonzeros for site in sparsifier.sites]
        if step % 4 == 0:
            ceiling = twin.ceiling(step, 48, 0.2, 0.05)
            assert sum(counts[step]) == round((ceiling if step <= 48 else 0.2) * original)

    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=after)
    shapes = [site.masked.live_shape for site in sparsifier.sites]
    shares = allocate("erk", shapes, round(0.2 * original))
    for got, share in zip(counts[STEPS], shares, strict=True):
        assert abs(got - share) <= max(2, 0.02 * share), (counts[STEPS], shares)


def test_scope_layer_without_channels_is_erk_after_every_update() -> None:
    model = net("basic")
    sparsifier = _sparsifier(model, _chase(scope="layer", channel_sparsity=0))
    shapes = [site.original_shape for site in sparsifier.sites]
    original = sum(site.original_numel for site in sparsifier.sites)
    seen = []

    def after(step: int) -> None:
        if step % 4 == 0:
            ceiling = twin.ceiling(step, 48, 0.2, 0.05) if step <= 48 else 0.2
            seen.append([site.nonzeros for site in sparsifier.sites])
            assert seen[-1] == allocate("erk", shapes, round(ceiling * original))

    before = [site.support.clone() for site in sparsifier.sites]
    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=after)
    assert len(seen) == STEPS // 4
    for old, site in zip(before, sparsifier.sites, strict=True):
        assert old.all() or not torch.equal(old, site.support), site.name


def test_random_growth_keeps_counts_and_needs_no_dense_gradient() -> None:
    chase = _chase(grow="random")
    assert not any(chase.wants_dense_grad(gossamer.Progress(step, 60)) for step in range(61))
    model = net("vgg")
    sparsifier = _sparsifier(model, chase)
    original = sum(site.original_numel for site in sparsifier.sites)
    supports, dense = {}, []

    def after(step: int) -> None:
        dense.append([site.masked.dense_gradient is not None for site in sparsifier.sites])
        if step % 4 == 0:
            ceiling = twin.ceiling(step, 48, 0.2, 0.05) if step <= 48 else 0.2
            assert sum(site.nonzeros for site in sparsifier.sites) == round(ceiling * original)
            supports[step] = [site.support.clone() for site in sparsifier.sites]

    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=after)
    assert not any(map(any, dense))
    assert any(not torch.equal(*pair) for pair in zip(supports[52], supports[56], strict=True))


def test_random_growth_depends_on_the_seed_alone() -> None:
    masks = []
    for seed in (0, 0, 1):
        model = net("mlp")
        sparsifier = _sparsifier(model, _chase(grow="random"), seed=seed, cut="end")
        torch.rand(len(masks) + 1)  # the global generator is nobody's business
        train(model, sparsifier, optimizer_for("sgd", model), batches(20))
        masks.append(torch.cat([site.masked.mask.flatten() for site in sparsifier.sites]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("cut", ["end", "during"])
def test_channel_multiple(cut: str) -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, _chase(channel_multiple=4, min_channels=4), cut=cut)
    original = [pool.original_channels for pool in sparsifier.pools]

    def after(step: int) -> None:
        for pool, width in zip(sparsifier.pools, original, strict=True):
            live = int(pool.live.sum())
            assert live == width or live % 4 == 0
            assert live >= 4

    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=after)
    assert abs(sparsifier.live_channels - round(0.5 * sum(original))) <= 2
    assert sparsifier.channel_sparsity > 0.4


def test_keep_channels_and_excluded_layers_keep_their_widths() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(
        model, _chase(channel_sparsity=0.4), keep_channels=["features.10"], exclude=["features.3"]
    )
    # features.0 is read by, and features.3 is, a dense layer.
    assert [pool.name for pool in sparsifier.pools] == ["features.7"]
    assert set(sparsifier.locked) == {"features.0", "features.3", "features.10", "classifier"}
    assert "keep_channels" in sparsifier.locked["features.10"]
    assert "features.3" in sparsifier.locked["features.0"]
    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS))
    widths = {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths == {"features.0": 12, "features.3": 16, "features.7": 12, "features.10": 20}
    assert type(model.features[3]) is nn.Conv2d
    assert int((model.features[3].weight == 0).sum()) == 0


# Skip paths: residual streams, concatenations, branches


def _skip(**changes) -> gossamer.Chase:
    return _chase(prune_residual=True, **changes)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cut", ["end", "during"])
@pytest.mark.parametrize("name", SKIP_NETS)
def test_every_step_on_skip_paths_equals_the_twin(name: str, cut: str) -> None:
    _, sparsifier, _, audit = _audited(name, _skip(), cut=cut)
    assert {pool.name for pool in sparsifier.pools} == set(STREAMS[name])
    assert all(event.removed or event.updated for event in audit.events)
    for pool in sparsifier.pools:
        stream = STREAMS[name][pool.name]
        assert sorted(site.name for site in pool.producers) == sorted(stream.producers)
        for site in pool.producers:  # one truth in all producers
            assert torch.equal(site.masked.live_out.flatten(), pool.live)
    # Every layer but the last lies in some pool: what is live is what the budget speaks of.
    total = sum(audit.widths.values())
    assert sparsifier.live_channels == round(0.5 * total)
    assert sum(site.nonzeros for site in sparsifier.sites) == round(0.2 * audit.original)
    shared = [name for name, stream in STREAMS[name].items() if len(stream.readers) > 1]
    assert any(audit.removed_numbers()[name] for name in shared)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"channel_score": "masked_mean"},
        {"channel_score": "density"},
        {"min_channel_factor": 1.0},
        {"min_channel_factor": 0.0, "min_channels": 1, "channel_sparsity": 0.75},
        {"density": 0.9, "channel_sparsity": 0.8},
    ],
    ids=str,
)
def test_skip_paths_equal_the_twin_with_other_settings(changes) -> None:
    _audited("basic", _skip(**changes))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "sgd") for name in SKIP_NETS), ("mobilenetv2", "adamw")]
)
def test_masked_and_cut_skip_paths_train_alike(name: str, optimizer: str) -> None:
    runs = _pair(name, optimizer, torch.float64, _skip())
    if name == "mobilenetv2":  # at higher rates its stem grows to 4000, and rounding with it
        for _, _, opt in runs.values():
            opt.param_groups[0]["lr"] = 0.001
    _train_alike(runs)


@pytest.mark.parametrize("name", ["bottleneck", "densenet"])
def test_masked_then_shrunk_skip_paths(name: str) -> None:
    _shrunk_alike(_pair(name, "sgd", torch.float64, _skip()))


def test_a_sum_of_convolutions_is_scored_as_the_one_convolution_it_is() -> None:
    """conv(a) + conv(b) = conv([a, b]): a channel's score does not depend on how it is written."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 8, 1)
            self.one = nn.Conv2d(2, 8, 1, bias=False)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            both = self.wide(x) + self.one(x[:, :2])
            return self.last(F.relu(both)).mean((2, 3))

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(5, 8, 1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.wide(torch.cat([x, x[:, :2]], 1)))).mean((2, 3))

    torch.manual_seed(0)
    summed, joined = Summed().double(), Joined().double()
    with torch.no_grad():
        joined.wide.weight.copy_(torch.cat([summed.wide.weight, summed.one.weight], 1))
        joined.wide.bias.copy_(summed.wide.bias)
        joined.last.load_state_dict(summed.last.state_dict())
    x = images(2)
    torch.testing.assert_close(evaluate(summed, x), evaluate(joined, x), rtol=0, atol=1e-12)
    mask = torch.rand(8, 5, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.4
    for score in ("umm", "masked_mean", "density"):
        scores = []
        for model in (summed, joined):
            chase = _skip(channel_score=score, density=1.0, min_channels=1)
            sparsifier = _sparsifier(copy.deepcopy(model), chase, cut="end")
            (pool,) = sparsifier.pools
            columns = [range(5)] if len(pool.producers) == 1 else [range(3), range(3, 5)]
            for site, part in zip(pool.producers, columns, strict=True):
                site.masked.mask.copy_(mask[:, part])
                with torch.no_grad():
                    site.weight.mul_(site.masked.mask)
            scores.append(chase.score(pool))
        torch.testing.assert_close(*scores, rtol=1e-14, atol=0)
        assert scores[0].unique().numel() > 3


def test_a_channel_of_a_stream_counts_once() -> None:
    model = net("basic")
    sparsifier = _sparsifier(model, _skip())
    widths = {pool.name: pool.original_channels for pool in sparsifier.pools}
    # Three layers write the 12 channels of layer1, and three read them.
    assert widths["layer1.0.conv2"] == 12
    assert sum(widths.values()) == 8 + (12 + 12 + 12) + (20 + 20)
    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS))
    left = {pool.name: pool.group.channels for pool in sparsifier.pools}
    assert sum(left.values()) == round(0.5 * sum(widths.values()))
    assert sparsifier.channel_sparsity == 1 - sum(left.values()) / sum(widths.values())
    stream = left["layer1.0.conv2"]
    assert model.layer1[0].conv2.weight.shape[0] == stream
    assert model.layer1[0].shortcut[0].weight.shape[0] == stream
    assert model.layer1[1].conv2.weight.shape[0] == stream
    assert model.layer1[1].conv1.weight.shape[1] == stream
    assert model.layer2[0].conv1.weight.shape[1] == stream
    assert model.layer2[0].shortcut[0].weight.shape[1] == stream


@pytest.mark.parametrize("cut", ["end", "during"])
def test_floors_and_multiples_hold_on_skip_paths(cut: str) -> None:
    model = net("mobilenetv2")
    chase = _skip(channel_multiple=4, min_channels=4, min_channel_factor=0.0, channel_sparsity=0.6)
    sparsifier = _sparsifier(model, chase, cut=cut)

    def after(step: int) -> None:
        for pool in sparsifier.pools:
            live = int(pool.live.sum())
            assert live >= 4
            assert live == pool.original_channels or live % 4 == 0

    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=after)
    assert sparsifier.channel_sparsity == pytest.approx(0.6, abs=0.03)


def test_without_the_flag_skip_paths_stay_and_say_how_to_cut_them() -> None:
    sparsifier = _sparsifier(net("basic"), _chase())
    assert "prune_residual=True" in sparsifier.locked["layer1.0.conv2"]
    assert "prune_residual=True" in sparsifier.locked["conv1"]
    assert [pool.name for pool in sparsifier.pools] == list(READERS["basic"])


@pytest.mark.parametrize("dense", ["layer1.1.conv2", "layer1.1.conv1"])
def test_all_ends_of_a_stream_must_be_sparse(dense: str) -> None:
    """The second writer, or one of three readers, is left dense."""
    sparsifier = _sparsifier(net("basic"), _skip(channel_sparsity=0.3), exclude=[dense])
    assert "layer1.0.conv2" not in {pool.name for pool in sparsifier.pools}
    assert dense in sparsifier.locked["layer1.0.conv2"]
    assert {"conv1", "layer2.0.conv2"} <= {pool.name for pool in sparsifier.pools}


def test_keep_channels_of_a_stream() -> None:
    sparsifier = _sparsifier(net("basic"), _skip(channel_sparsity=0.3), keep_channels=["conv1"])
    assert "keep_channels" in sparsifier.locked["conv1"]
    assert "layer1.0.conv2" in {pool.name for pool in sparsifier.pools}


def test_prune_residual_of_a_plain_chain_is_the_same_run() -> None:
    runs = []
    for chase in (_chase(), _skip()):
        model = net("vgg")
        sparsifier = _sparsifier(model, chase)
        runs.append(train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS)))
    assert runs[0] == runs[1]


# Eligible channels of the published networks


@pytest.mark.slow
def test_eligible_channels_of_resnet50() -> None:
    model = build_model("resnet50-imagenet", num_classes=1000, in_shape=(3, 224, 224))
    sparsifier = gossamer.Sparsifier(
        model,
        gossamer.Chase(channel_sparsity=0.5),
        total_steps=1000,
        example=torch.randn(1, 3, 32, 32),
    )
    stages = {f"layer{stage}": 0 for stage in (1, 2, 3, 4)}
    for pool in sparsifier.pools:
        assert pool.name.endswith((".conv1", ".conv2"))
        stages[pool.name.split(".")[0]] += pool.original_channels
    assert list(stages.values()) == [384, 1024, 3072, 3072]
    assert sum(stages.values()) == 7552
    floors = [twin.floor(pool.original_channels, 0.5, 0.2, 1) for pool in sparsifier.pools]
    assert sum(floors) == 738
    assert {"conv1", "layer1.0.conv3", "layer4.0.conv3", "fc"} <= set(sparsifier.locked)
    # Widths of a uniform removal, in dense-format MACs relative to the full network.
    ratios = [_uniform_ratio(sparsifier, removed) for removed in (0.3, 0.4, 0.5)]
    assert ratios == pytest.approx([0.641, 0.538, 0.446], abs=1e-3)


def test_eligible_channels_of_resnet50_with_skip_paths() -> None:
    """An eighth as wide; the stem and a stream per stage come on top: 64 + 256 + ... + 2048."""
    model = build_model("resnet50-imagenet", num_classes=10, in_shape=(3, 64, 64), width=1 / 8)
    sparsifier = gossamer.Sparsifier(
        model,
        gossamer.Chase(channel_sparsity=0.5, prune_residual=True),
        total_steps=1000,
        example=torch.randn(1, 3, 32, 32),
    )
    streams = {p.name: p for p in sparsifier.pools if not p.group.internal}
    widths = {name: pool.original_channels for name, pool in streams.items()}
    assert widths == {
        "conv1": 8,
        "layer1.0.conv3": 32,
        "layer2.0.conv3": 64,
        "layer3.0.conv3": 128,
        "layer4.0.conv3": 256,
    }
    writers = [len(pool.producers) for pool in streams.values()]
    readers = [len(pool.group.consumers) for pool in streams.values()]
    assert writers == [1, 3 + 1, 4 + 1, 6 + 1, 3 + 1]  # one a block, and the shortcut
    assert readers == [2, 2 + 2, 3 + 2, 5 + 2, 2 + 1]  # blocks behind, next stage's two, or the fc
    assert sum(pool.original_channels for pool in sparsifier.pools) == (7552 + 3904) / 8
    assert set(sparsifier.locked) == {"fc"}


def _uniform_ratio(sparsifier: gossamer.Sparsifier, removed: float) -> float:
    """MACs at 224x224 with every eligible width cut to the same share, over those of all widths."""
    with torch.device("meta"):
        model = build_model("resnet50-imagenet", num_classes=1000, in_shape=(3, 224, 224))
    positions: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda m, _, out, name=name: positions.__setitem__(
                    name, out.numel() // m.weight.shape[0]
                )
            )
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    kept = {pool.name: 1 - removed for pool in sparsifier.pools}
    kept_in = {pool.group.consumers[0].layer: 1 - removed for pool in sparsifier.pools}
    macs = {site.name: site.original_numel * positions[site.name] for site in sparsifier.sites}
    left = sum(n * kept.get(name, 1) * kept_in.get(name, 1) for name, n in macs.items())
    return left / sum(macs.values())


@pytest.mark.slow
def test_eligible_channels_of_vgg19() -> None:
    model = build_model("vgg19", num_classes=100, in_shape=(3, 32, 32))
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][-1]
    sparsifier = gossamer.Sparsifier(
        model,
        gossamer.Chase(channel_sparsity=0.5),
        total_steps=1000,
        example=torch.randn(1, 3, 32, 32),
        keep_channels=[last],
    )
    assert sum(pool.original_channels for pool in sparsifier.pools) == 4992
    assert sum(twin.floor(pool.original_channels, 0.5, 0.2, 1) for pool in sparsifier.pools) == 493
    assert last in sparsifier.locked


# What training does to the channels (6.4, item 11)


@pytest.mark.slow
def test_dynamic_training_makes_channel_densities_uneven() -> None:
    """Coefficient of variation of channel density, against that of a random mask."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))

    def spread(method: gossamer.Method) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        sparsifier = gossamer.Sparsifier(model, method, total_steps=300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for step in range(300):
            at = order[(step * 32) % 1760 :][:32]
            F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
        ratios = []
        for site in sparsifier.sites[1:3]:
            density = site.support.flatten(1).double().mean(1)
            n, d = site.original_fan_in, float(density.mean())
            random = math.sqrt((1 - d) / (d * n))
            ratios.append(float(density.std(correction=0) / density.mean()) / random)
        return ratios

    static = spread(gossamer.Static(density=0.1))
    dynamic = spread(gossamer.Chase(density=0.1, channel_sparsity=0, update_interval=10))
    assert all(0.6 < ratio < 1.5 for ratio in static), static
    assert all(ratio > 1.5 for ratio in dynamic), dynamic


def test_a_copy_taken_before_a_cut_is_not_touched_by_it() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, _chase())
    optimizer = optimizer_for("sgd", model)
    data = batches(STEPS)
    train(model, sparsifier, optimizer, data[:1])
    twin_model = copy.deepcopy(model)
    before = {key: value.clone() for key, value in twin_model.state_dict().items()}
    train(model, sparsifier, optimizer, data[1:20])
    assert len(sparsifier.plan) > 0
    for key, value in twin_model.state_dict().items():
        assert torch.equal(value, before[key])
    evaluate(twin_model, images(2))


def test_dimensions_of_the_example_do_not_matter() -> None:
    """A batch of any size, a tuple and a dict serve as the example."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, picture: Tensor) -> Tensor:
            return self.body(picture)

    for example in (images(1), images(17), (images(3),), [images(3)], {"picture": images(3)}):
        model = Named().double()
        sparsifier = gossamer.Sparsifier(model, _chase(), total_steps=STEPS, example=example)
        train(model, sparsifier, optimizer_for("sgd", model), batches(12))
        assert sparsifier.channel_sparsity > 0
