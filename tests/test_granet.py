"""GraNet: its schedules, its training beside the twin, what regeneration does, and its costs."""

import pytest
import torch
from torch import nn

import digits
import gossamer
import plain
from gossamer.allocation import allocate
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import granet as twin

STEPS = 60


def _progress(step: int, total: int = 1000) -> gossamer.Progress:
    return gossamer.Progress(step, total)


# Worked numbers


@pytest.mark.parametrize(
    ("start", "sparsities"),
    [(1.0, [0.2439, 0.5203, 0.7875, 0.8859]), (0.5, [0.6084, 0.7313, 0.85, 0.8938])],
)
def test_density_at_quarter_points(start: float, sparsities: list[float]) -> None:
    """5.10: the cubic from 0 and from 0.5 to 0.9."""
    method = gossamer.GraNet(density=0.1, initial_density=start)
    got = [1 - method.density_at(_progress(step)) for step in (50, 125, 250, 375)]
    assert got == pytest.approx(sparsities, abs=5e-5)
    expected = [1 - twin.sparsity(step, 0, 500, 1 - start, 0.9) for step in range(1001)]
    assert [method.density_at(_progress(step)) for step in range(1001)] == pytest.approx(expected)
    assert method.density_at(_progress(500)) == method.density_at(_progress(1000)) == 0.1


def test_mean_density() -> None:
    """Section 4: 0.5 to 0.9 over the first half."""
    method = gossamer.GraNet(density=0.1, initial_density=0.5)
    mean = sum(method.density_at(_progress(step, 100_000)) for step in range(100_000)) / 100_000
    assert mean == pytest.approx(0.15, abs=5e-5)


def test_drop_rate_at_quarter_points() -> None:
    """5.10: the cosine from 0.5 to 0.005 over the whole run."""
    method = gossamer.GraNet()
    got = [method.drop_rate(_progress(step)) for step in (0, 250, 500, 750, 1000)]
    assert got == pytest.approx([0.5, 0.4275, 0.2525, 0.0775, 0.005], abs=5e-5)
    assert got == pytest.approx(
        [twin.regenerated(step, 1000, 0.5, 0.005) for step in (0, 250, 500, 750, 1000)]
    )


def test_updates_on_the_grid_and_at_the_end_of_pruning() -> None:
    method = gossamer.GraNet(update_interval=10, prune_start=0.02, prune_end=0.45, t_end=0.8)
    steps = [s for s in range(101) if method.updates_at(_progress(s, 100))]
    assert steps == [10, 20, 30, 40, 45, 50, 60, 70]
    assert [s for s in range(101) if method.wants_dense_grad(_progress(s, 100))] == steps
    whole = gossamer.GraNet(update_interval=10)
    assert [s for s in range(101) if whole.updates_at(_progress(s, 100))] == [*range(10, 100, 10)]


# One update by hand


def test_a_survivor_that_comes_back_was_never_gone() -> None:
    """Pruned to 6 of 12, then half of them move; RigL's worked step (5.11) for the second half."""
    weight = [[0.9, 0.01, -0.1, 0.02], [0.01, 0.4, 0.01, -0.05], [0.2, 0.02, 0.01, 0.7]]
    gradient = [[0.1, -0.8, 0.05, 0.3], [0.6, 0.02, -0.2, -0.9], [0.01, 0.4, -0.5, 0.03]]
    layer = nn.Linear(4, 3, bias=False)
    method = gossamer.GraNet(
        density=0.5, update_interval=1, prune_end=0.5, drop_fraction=0.5, drop_fraction_end=0.5
    )
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=2)
    (site,) = sparsifier.sites
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    with torch.no_grad():
        site.weight.copy_(torch.tensor(weight))
    (layer.weight * torch.tensor(gradient)).sum().backward()
    optimizer.step()
    sparsifier.step(optimizer)
    assert site.support.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]]
    expected = [[0.9, 0, 0, 0], [0, 0.4, 0, -0.05], [0, 0, 0, 0.7]]
    assert torch.equal(site.weight.detach(), torch.tensor(expected))
    momentum = optimizer.state[site.weight]["momentum_buffer"]
    assert torch.equal(momentum != 0, torch.tensor(expected) != 0)
    arrays = ([torch.tensor(weight).numpy()], [site.support.numpy() | True])
    support = twin.update(*arrays, [torch.tensor(gradient).numpy()], 6, 0.5)
    assert (support.kept[0] | support.grown[0]).tolist() == site.support.tolist()


def test_pruning_ranks_all_layers_and_regeneration_stays_in_each() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    method = gossamer.GraNet(density=0.4, update_interval=1, prune_end=0.5)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=10)
    with torch.no_grad():
        sparsifier.sites[0].weight.uniform_(1.0, 2.0)
        sparsifier.sites[1].weight.uniform_(0.1, 0.2)
    for site, scale in zip(sparsifier.sites, (1.0, 100.0), strict=True):
        site.masked.dense_gradient = scale * torch.randn(10, 10)
    changes = method.update(sparsifier.sites, _progress(5, 10), torch.Generator())
    counts = [int((change.kept | change.grown).sum()) for change in changes]
    assert counts == [80, 0]  # global magnitude emptied the second layer; nothing grows there


# Training


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg", {}),
        ("mlp", {"initial_density": 0.5, "update_interval": 4}),
        ("mobilenet", {"scope": "layer", "initial_density": 0.5}),
        ("mlp", {"scope": "layer", "distribution": "uniform", "prune_start": 0.1}),
    ],
    ids=["global", "global-sparse-start", "layer-sparse-start", "layer-uniform"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str) -> None:
    method = gossamer.GraNet(density=0.2, t_end=0.9, **options)
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    masks = {site.name: site.support.numpy() for site in sparsifier.sites}
    shapes = [site.original_shape for site in sparsifier.sites]
    total = sum(shape.numel() for shape in shapes)
    start, end = round(method.prune_start * STEPS), STEPS // 2
    interval = method.update_interval or 3

    def rule(now: plain.Moment) -> plain.Change | None:
        on_grid = start < now.step < 0.9 * STEPS and now.step % interval == 0
        if not (on_grid or now.step == end):
            return None
        share = twin.sparsity(now.step, start, end, 1 - method.initial_density, 0.8)
        rate = twin.regenerated(now.step, STEPS, 0.5, 0.005)
        count = round((1 - share) * total)
        layers = list(zip(now.weights, now.masks, now.gradients, strict=True))
        if method.scope == "global":
            return plain.Change(*twin.update(*zip(*layers, strict=True), count, rate))
        before = [int(mask.sum()) for mask in now.masks]
        counts = allocate(method.distribution, shapes, count, at_most=before)
        parts = [
            twin.update([w], [m], [g], wanted, rate)
            for (w, m, g), wanted in zip(layers, counts, strict=True)
        ]
        return plain.Change([part.kept[0] for part in parts], [part.grown[0] for part in parts])

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
@pytest.mark.parametrize("initial", [1.0, 0.5])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact(name: str, scope: str, initial: float) -> None:
    method = gossamer.GraNet(
        density=0.13, initial_density=initial, scope=scope, update_interval=4, prune_end=0.55
    )
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=40)
    total = sum(site.original_numel for site in sparsifier.sites)
    assert sparsifier.density == round(initial * total) / total
    grown, revision = 0, 0
    before = [site.support.clone() for site in sparsifier.sites]

    def check(step: int) -> None:
        nonlocal grown, revision
        update = method.updates_at(_progress(step, 40))
        assert sparsifier.revision - revision == update
        revision = sparsifier.revision
        if update:
            wanted = round(method.density_at(_progress(step, 40)) * total)
            assert sum(site.nonzeros for site in sparsifier.sites) == wanted
        for index, site in enumerate(sparsifier.sites):
            new = site.support & ~before[index]
            assert not site.weight.detach()[new].any()
            grown += int(new.sum())
            before[index] = site.support.clone()

    train(model, sparsifier, optimizer_for("sgd", model), batches(40), after_step=check)
    assert grown > 20
    assert sparsifier.density == round(0.13 * total) / total


# Cost


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_training_macs(initial: float) -> None:
    """Section 4: E_t[(3 f_S dT + 2 f_S + f_D) / (dT + 1)]; of 5 steps one takes a dense gradient.

    The formula counts dT + 1 steps for each update, so our interval is dT + 1.
    """
    steps, interval = 200, 5
    method = gossamer.GraNet(initial_density=initial, update_interval=interval)
    bill = plain.training_macs(method, steps)
    updates = range(interval, steps, interval)
    expected = sum(3 * macs for macs in bill.forward) + sum(
        bill.dense_forward - bill.forward[step - 1] for step in updates
    )
    assert bill.total == expected
    # In expectation over the run, with one update more than there are (none after the last step).
    d_t = interval - 1
    mean = sum(
        (3 * macs * d_t + 2 * macs + bill.dense_forward) / (d_t + 1) for macs in bill.forward
    )
    assert bill.total == pytest.approx(mean, rel=0.01)
    assert bill.forward[-1] == round(0.1 * bill.dense_forward)


# Digits


@pytest.mark.slow
def test_pruning_and_regrowing_beats_a_fixed_mask() -> None:
    """90 % sparsity, 3 seeds: about 98.3 and 96.9 %."""

    def accuracy(method: gossamer.Method) -> float:
        outcomes = [digits.train(method, seed, weight_decay=5e-4, norm=False) for seed in range(3)]
        return sum(outcome.accuracy for outcome in outcomes) / 3

    better = gossamer.GraNet(density=0.1)
    other = gossamer.Static(density=0.1, distribution="uniform")
    assert accuracy(better) > accuracy(other) + 0.007


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"density": 0.5, "initial_density": 0.4}, r"initial_density=0\.4 is below density=0\.5"),
        ({"prune_end": 0.3, "prune_start": 0.3}, "prune_start < prune_end <= t_end"),
        ({"t_end": 0.3}, "prune_start < prune_end <= t_end"),
        ({"scope": "local"}, "scope='local'"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"drop_fraction": 1.1}, r"drop_fraction=1\.1"),
        ({"update_interval": 0}, "update_interval=0"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.GraNet(**wrong)


def test_a_run_that_cannot_serve_it() -> None:
    method = gossamer.GraNet(update_interval=60)
    with pytest.raises(ValueError, match=r"update_interval=60 is longer than the 50 steps"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
    method = gossamer.GraNet(update_interval=100)
    with pytest.raises(ValueError, match=r"update_interval=100 leaves no update before step 100"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
    small = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"density=0\.01 is below the reachable minimum"):
        gossamer.Sparsifier(small, gossamer.GraNet(density=0.01), total_steps=100)
