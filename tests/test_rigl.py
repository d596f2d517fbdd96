"""RigL: its worked numbers, its training beside the twin, what it moves, and its costs."""

import pytest
import torch
from torch import Tensor, nn

import gossamer
import plain
import resnet50
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import rigl as twin

STEPS = 60
ITOP = {"drop_fraction": 0.5, "drop_fraction_end": 0.005, "t_end": 1.0}


def _progress(step: int, total: int = 1000) -> gossamer.Progress:
    return gossamer.Progress(step, total)


# Schedules


def test_drop_rate_at_quarter_points() -> None:
    """5.10: at quarters of T_end."""
    method = gossamer.RigL()
    got = [method.drop_rate(_progress(step, 400)) for step in (0, 75, 150, 225, 300)]
    assert got == pytest.approx([0.3, 0.2561, 0.15, 0.0439, 0], abs=5e-5)
    expected = [twin.drop_fraction(step, 300, 0.3, 0.0) for step in range(401)]
    assert [method.drop_rate(_progress(step, 400)) for step in range(401)] == pytest.approx(
        expected
    )


def test_drop_rate_of_itop() -> None:
    """5.10: at quarters of the run."""
    method = gossamer.RigL(**ITOP)
    got = [method.drop_rate(_progress(step)) for step in (0, 250, 500, 750, 1000)]
    assert got == pytest.approx([0.5, 0.4275, 0.2525, 0.0775, 0.005], abs=5e-5)


@pytest.mark.parametrize(
    ("options", "total", "steps"),
    [
        ({"update_interval": 10}, 100, range(10, 75, 10)),
        ({"update_interval": 25}, 100, [25, 50]),  # not at T_end itself
        ({"update_interval": 10, "t_end": 1.0}, 100, range(10, 100, 10)),
        ({}, 32_000, range(100, 24_000, 100)),
        ({}, 500, range(25, 375, 25)),
        ({}, 3, [1]),
    ],
    ids=str,
)
def test_updates(options: dict[str, float], total: int, steps) -> None:
    method = gossamer.RigL(**options)
    assert [s for s in range(total + 1) if method.updates_at(_progress(s, total))] == [*steps]
    assert [s for s in range(total + 1) if method.wants_dense_grad(_progress(s, total))] == [*steps]


# One update by hand


WEIGHT = [[0.9, 0, -0.1, 0], [0, 0.4, 0, -0.05], [0.2, 0, 0, 0.7]]
GRADIENT = [[0.1, -0.8, 0.05, 0.3], [0.6, 0.02, -0.2, -0.9], [0.01, 0.4, -0.5, 0.03]]
EXPECTED = [[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_weight_that_comes_back_was_never_gone(scope: str) -> None:
    """5.11: of 6 weights 3 are dropped; -.05 grows again and keeps its value and its momentum."""
    weight, gradient = torch.tensor(WEIGHT), torch.tensor(GRADIENT)
    layer = nn.Linear(4, 3, bias=False)
    method = gossamer.RigL(
        density=0.5,
        update_interval=1,
        drop_fraction=0.5,
        drop_fraction_end=0.5,
        scope=scope,
    )
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=10)
    (site,) = sparsifier.sites
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    with torch.no_grad():
        site.masked.mask.copy_(weight != 0)
        site.weight.copy_(weight)
    (layer.weight * gradient).sum().backward()
    optimizer.step()
    sparsifier.step(optimizer)
    assert site.support.int().tolist() == EXPECTED
    expected = torch.tensor([[0.9, 0, 0, 0], [0, 0.4, 0, -0.05], [0, 0, 0, 0.7]])
    assert torch.equal(site.weight.detach(), expected)
    momentum = optimizer.state[site.weight]["momentum_buffer"]
    assert torch.equal(momentum, gradient * (expected != 0))
    support = twin.update([weight.numpy()], [(weight != 0).numpy()], [gradient.numpy()], 0.5)
    assert (support.kept[0] | support.grown[0]).astype(int).tolist() == EXPECTED


def test_global_moves_weights_to_the_layer_of_large_gradients() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    counts = {}
    for scope in ("layer", "global"):
        method = gossamer.RigL(density=0.4, update_interval=1, scope=scope)
        sparsifier = gossamer.Sparsifier(model, method, total_steps=100)
        for site, scale in zip(sparsifier.sites, (1.0, 100.0), strict=True):
            site.masked.dense_gradient = scale * (1 + torch.rand(10, 10))
        changes = method.update(sparsifier.sites, _progress(1, 100), torch.Generator())
        counts[scope] = [int((change.kept | change.grown).sum()) for change in changes]
        moved = int(0.4 * 200 * method.drop_rate(_progress(1, 100)))
        sparsifier.finalize()
    assert counts["layer"] == [40, 40]
    assert sum(counts["global"]) == 80
    assert counts["global"][1] > 40 + moved / 4


def test_ties_go_by_index() -> None:
    layer = nn.Linear(10, 10, bias=False)
    method = gossamer.RigL(density=0.5, update_interval=1, drop_fraction_end=0.3)
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=10)
    (site,) = sparsifier.sites
    with torch.no_grad():
        site.weight.copy_(site.masked.mask)
    before = site.support.flatten().nonzero().flatten()
    empty = (~site.support).flatten().nonzero().flatten()
    site.masked.dense_gradient = torch.where(site.support, 0.0, 1.0)
    (change,) = method.update(sparsifier.sites, _progress(1, 10), torch.Generator())
    assert torch.equal(change.kept.flatten().nonzero().flatten(), before[:35])
    assert torch.equal(change.grown.flatten().nonzero().flatten(), empty[:15])


# Training


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg", {}),
        ("mlp", {"update_interval": 4, "distribution": "uniform"}),
        ("mobilenet", {"scope": "global"}),
        ("mlp", ITOP),
    ],
    ids=["layer", "uniform", "global", "itop"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str) -> None:
    method = gossamer.RigL(density=0.2, **options)
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    start = {site.name: site.support.numpy() for site in sparsifier.sites}
    interval, end = method.update_interval or 3, method.t_end * STEPS
    update = twin.update if method.scope == "layer" else twin.update_global

    def rule(now: plain.Moment) -> plain.Change | None:
        if now.step % interval or now.step >= end:
            return None
        rate = twin.drop_fraction(now.step, end, method.drop_fraction, method.drop_fraction_end)
        return plain.Change(*update(now.weights, now.masks, now.gradients, rate))

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
@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact_and_growth_starts_at_zero(name: str, scope: str) -> None:
    method = gossamer.RigL(density=0.13, scope=scope, update_interval=3)
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=40)
    start = [site.nonzeros for site in sparsifier.sites]
    before: list[Tensor] = [site.support.clone() for site in sparsifier.sites]
    optimizer = optimizer_for("adam", model)
    grown = 0

    def check(step: int) -> None:
        nonlocal grown
        counts = [site.nonzeros for site in sparsifier.sites]
        assert sum(counts) == sum(start)
        if scope == "layer":
            assert counts == start
        for index, site in enumerate(sparsifier.sites):
            new = site.support & ~before[index]
            assert not new.any() or method.updates_at(_progress(step, 40))
            assert not site.weight.detach()[new].any()
            assert not optimizer.state[site.weight]["exp_avg"][new].any()
            grown += int(new.sum())
            before[index] = site.support.clone()
            if not method.wants_dense_grad(_progress(step + 1, 40)):
                assert not site.masked.wants_dense_gradient

    train(model, sparsifier, optimizer, batches(40), after_step=check)
    assert grown > 20
    assert sparsifier.revision == len(range(3, 30, 3))


# Cost


def test_training_macs_of_a_run() -> None:
    """Section 4: (3 f_S dT + 2 f_S + f_D) / (dT + 1) per step; our interval counts the update."""
    method = gossamer.RigL(update_interval=5, t_end=1.0)
    bill = plain.training_macs(method, 100)
    (sparse,) = set(bill.forward)
    d_t, updates = 4, 19  # none after the last step, which costs as much as any other
    formula = (3 * sparse * d_t + 2 * sparse + bill.dense_forward) / (d_t + 1)
    assert bill.total == pytest.approx(5 * updates * formula + 5 * 3 * sparse, rel=1e-12)


@pytest.mark.parametrize(
    ("density", "inference", "training"),
    [(0.2, 0.4138, 0.4157), (0.1, 0.2418, 0.2443), (0.05, 0.1217, 0.1246)],
)
def test_macs_of_resnet50(density: float, inference: float, training: float) -> None:
    """5.9, ERK: 100 plain steps and one with an update."""
    method = gossamer.RigL(density=density, update_interval=101, t_end=1.0)
    got = resnet50.factors(method, total_steps=32_000, counted=101)
    assert got == pytest.approx((inference, training), abs=5e-5)
    sparse = got[0]
    assert got[1] == pytest.approx((3 * sparse * 100 + 2 * sparse + 1) / 101 / 3, rel=1e-12)


@pytest.mark.parametrize(("density", "inference"), [(0.2, 0.2231), (0.1, 0.1260), (0.05, 0.0774)])
def test_macs_of_resnet50_uniform_with_a_dense_first_layer(
    density: float, inference: float
) -> None:
    """5.9: the first layer is left out of the Sparsifier."""
    method = gossamer.RigL(density=density, distribution="uniform")
    got, _ = resnet50.factors(method, total_steps=32_000, counted=1, dense=["conv1"])
    assert got == pytest.approx(inference, abs=5e-5)


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, r"density=0\.0"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"update_interval": 0}, "update_interval=0"),
        ({"drop_fraction": 1.1}, r"drop_fraction=1\.1"),
        ({"drop_fraction_end": -0.1}, r"drop_fraction_end=-0\.1"),
        ({"t_end": 0.0}, r"t_end=0\.0"),
        ({"scope": "local"}, "scope='local'"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.RigL(**wrong)


def test_a_run_that_is_over_before_the_first_update() -> None:
    method = gossamer.RigL(update_interval=75)
    with pytest.raises(ValueError, match=r"update_interval=75 leaves no update before step 75"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
