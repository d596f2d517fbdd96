"""SRigL: fan-ins, salient weights and ablation by hand, its training beside the twin, its costs."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import digits
import gossamer
import plain
from gossamer.allocation import allocate
from gossamer.methods.srigl import largest_per_row, neurons_to_keep, rewire
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import srigl as twin

STEPS = 60


def _progress(step: int, total: int = 1000) -> gossamer.Progress:
    return gossamer.Progress(step, total)


def _fan_ins(support: Tensor) -> set[int]:
    """Fan-ins of the live neurons."""
    return set(support.flatten(1).sum(1).tolist()) - {0}


# Worked numbers


@pytest.mark.parametrize(
    ("shape", "fan_in"),
    [((512, 512, 3, 3), 460), ((300, 784), 78), ((1000, 2048), 204)],
    ids=["4608", "784", "2048"],
)
def test_fan_in_at_90_percent(shape: tuple[int, ...], fan_in: int) -> None:
    """5.12."""
    method = gossamer.SRigL(density=0.1, distribution="uniform")
    (count,) = method.budget([torch.Size(shape)])
    assert count == fan_in * shape[0]
    assert twin.fan_in(round(0.1 * math.prod(shape)), shape[0]) == fan_in


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
@pytest.mark.parametrize("density", [0.2, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_budgets_are_whole_fan_ins(name: str, density: float, distribution: str) -> None:
    """Each within one of its share; what is left over would pay for no layer that lost some."""
    method = gossamer.SRigL(density=density, distribution=distribution)
    shapes = [p.shape for p in net(name).parameters() if p.dim() > 1]
    rows = [shape[0] for shape in shapes]
    wanted = round(density * sum(shape.numel() for shape in shapes))
    shares = allocate(distribution, shapes, wanted, at_least=rows)
    counts = method.budget(shapes)
    left = wanted - sum(counts)
    assert left >= 0
    for count, share, row in zip(counts, shares, rows, strict=True):
        assert count % row == 0
        assert count >= row
        low = row * twin.fan_in(share, row)
        assert count == low or (count == low + row and share > low)
        if count < share:
            assert left < row


def test_drop_rate_at_quarter_points() -> None:
    """5.10: RigL's cosine, to 0 at three quarters of training."""
    method = gossamer.SRigL()
    got = [method.drop_rate(_progress(step)) for step in (0, 188, 375, 562, 750)]
    expected = [twin.drop_fraction(step, 750, 0.3) for step in (0, 188, 375, 562, 750)]
    assert got == pytest.approx(expected)
    quarters = [method.drop_rate(gossamer.Progress(i * 3, 16)) for i in range(5)]
    assert quarters == pytest.approx([0.3, 0.2561, 0.15, 0.0439, 0], abs=5e-5)


def test_updates_until_three_quarters() -> None:
    steps = [s for s in range(1, 3001) if gossamer.SRigL().updates_at(_progress(s, 3000))]
    assert steps == [*range(100, 2250, 100)]
    wanted = [s for s in range(1, 3001) if gossamer.SRigL().wants_dense_grad(_progress(s, 3000))]
    assert wanted == steps


# Functions, by hand


def test_largest_per_row() -> None:
    scores = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [5, 1, 2, 9], [1, 2, 3, 4]])
    among = torch.ones(4, 4, dtype=torch.bool)
    among[2, 3] = False
    got = largest_per_row(scores, torch.tensor([2, 3, 1, 0]), among)
    assert got.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("gamma", "at_least", "stay"),
    [
        (0.0, 1, [1, 1, 0, 1, 0]),  # no salient weight at all is always too few
        (0.3, 1, [1, 1, 0, 1, 0]),  # 1 of 3
        (0.5, 1, [1, 0, 0, 1, 0]),  # 2 of 3
        (1.0, 1, [1, 0, 0, 0, 0]),
        (1.0, 2, [1, 0, 0, 1, 0]),
        (1.0, 4, [1, 1, 1, 1, 0]),
    ],
)
def test_neurons_to_keep(gamma: float, at_least: int, stay: list[int]) -> None:
    salient = torch.tensor([4, 1, 0, 2, 0])
    live = torch.tensor([True, True, True, True, False])
    got = neurons_to_keep(salient, live, fan_in=3, gamma_sal=gamma, at_least=at_least)
    assert got.int().tolist() == stay


def test_an_update_by_hand() -> None:
    """3 neurons with 2 of 4 weights, 3 of 6 move; the last has no weight kept or wanted."""
    weight = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.0, 0.7, 0.1, 0.0], [0.0, 0.0, 0.2, 0.3]])
    gradient = torch.tensor([[0.0, 0.0, 0.5, 0.1], [0.6, 0.0, 0.7, 0.2], [0.1, 0.0, 0.1, 0.1]])
    support = weight != 0
    settings = {"budget": 6, "drop_fraction": 0.5}

    change = rewire(weight, support, gradient, gamma_sal=0.5, **settings)
    # 0.9, 0.8 and 0.7 stay; wanted are 0.7, 0.6 and 0.5. Two neurons share 6 weights: 3 for each.
    # The weight of 0.1 is dropped and wanted, so that it stays as it is.
    assert change.kept.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert change.grown.int().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]

    change = rewire(weight, support, gradient, gamma_sal=None, **settings)
    # No ablation: the last neuron grows back what its gradient wants most, by index.
    assert change.kept.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    assert change.grown.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_a_layer_keeps_the_neurons_its_budget_needs() -> None:
    """Two neurons of 4 inputs hold no more than 8 of 9 weights: the best three stay."""
    weight = torch.zeros(3, 4)
    weight[:, :3] = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.1, 0.6], [0.1, 0.1, 0.1]])
    gradient = torch.zeros(3, 4)
    change = rewire(weight, weight != 0, gradient, budget=9, drop_fraction=0.5, gamma_sal=1.0)
    assert (change.kept | change.grown).sum(1).tolist() == [3, 3, 3]
    change = rewire(weight, weight != 0, gradient, budget=8, drop_fraction=0.5, gamma_sal=1.0)
    assert (change.kept | change.grown).sum(1).tolist() == [4, 4, 0]


@pytest.mark.parametrize("seed", range(30))
def test_updates_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, inputs = int(rng.integers(1, 9)), int(rng.integers(1, 13))
    k = int(rng.integers(1, inputs + 1))
    mask = np.zeros((rows, inputs), dtype=bool)
    for row in rng.permutation(rows)[: rng.integers(1, rows + 1)]:
        mask[row, rng.permutation(inputs)[:k]] = True
    budget = min(int(mask.sum()) + int(rng.integers(0, rows)), rows * inputs)
    budget = max(int(mask.sum()), min(budget, int(mask.any(1).sum()) * inputs))
    ties = seed % 2
    weight, gradient = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    if ties:
        weight, gradient = np.round(weight), np.round(gradient)
    weight = weight * mask
    for fraction in (0.0, 0.3, 1.0):
        for gamma in (None, 0.0, 0.3, 0.95):
            settings = {"budget": budget}
            change = rewire(
                torch.tensor(weight), torch.tensor(mask), torch.tensor(abs(gradient)),
                drop_fraction=fraction, gamma_sal=gamma, **settings,
            )  # fmt: skip
            expected = twin.update(
                weight, mask, gradient, fraction=fraction, gamma=gamma, **settings
            )
            np.testing.assert_array_equal(change.kept.numpy(), expected.kept)
            np.testing.assert_array_equal(change.grown.numpy(), expected.grown)


def test_the_start_is_uniform() -> None:
    hits = np.zeros((3, 2, 2, 2))
    for seed in range(300):
        model = nn.Sequential(nn.Conv2d(2, 3, 2))
        method = gossamer.SRigL(density=0.25)
        site = gossamer.Sparsifier(model, method, total_steps=10, seed=seed).sites[0]
        assert site.support.flatten(1).sum(1).tolist() == [2, 2, 2]
        hits += site.support.numpy()
    # Binomial(300, 1/4): mean 75, standard deviation 7.5.
    assert abs(hits - 75).max() < 5 * 7.5


# Training


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg", {"gamma_sal": 0.8}),
        ("mlp", {"gamma_sal": 0.95, "update_interval": 7, "drop_fraction": 0.9}),
        ("mobilenet", {"distribution": "uniform", "ablation": False}),
    ],
    ids=["ablation", "strong-ablation", "no-ablation"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str) -> None:
    method = gossamer.SRigL(density=0.3, **options)
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    masks = {site.name: site.support.numpy() for site in sparsifier.sites}
    budget = method.budget([site.original_shape for site in sparsifier.sites])
    interval = method.update_interval or 3
    last = len(budget) - 1

    def rule(now: plain.Moment) -> plain.Change | None:
        if now.step % interval or now.step >= 45:
            return None
        fraction = twin.drop_fraction(now.step, 45, method.drop_fraction)
        parts = []
        for index, (weight, mask, gradient) in enumerate(
            zip(now.weights, now.masks, now.gradients, strict=True)
        ):
            rows = [array.reshape(len(array), -1) for array in (weight, mask, gradient)]
            gamma = method.gamma_sal if method.ablation and index != last else None
            support = twin.update(*rows, budget=budget[index], fraction=fraction, gamma=gamma)
            parts.append([part.reshape(weight.shape) for part in support])
        return plain.Change([kept for kept, _ in parts], [grown for _, grown in parts])

    data = batches(STEPS)
    losses = train(model, sparsifier, optimizer_for(optimizer, model), data)
    expected, masks = plain.train(other, masks, optimizer_for(optimizer, other), data, rule)
    assert losses == expected
    dead = 0
    for site in sparsifier.sites:
        assert (site.support.numpy() == masks[site.name]).all(), site.name
        dead += int((~site.support.flatten(1).any(1)).sum())
    assert (dead > 0) == method.ablation
    sparsifier.finalize()
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.one_in(3)
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("name", NETS)
def test_fan_ins_are_equal_after_every_update(name: str, distribution: str) -> None:
    method = gossamer.SRigL(
        density=0.3, distribution=distribution, gamma_sal=0.9, drop_fraction=0.8, update_interval=3
    )
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    shapes = [site.original_shape for site in sparsifier.sites]
    shares = method.budget(shapes)
    assert sparsifier.density == sum(shares) / sum(shape.numel() for shape in shapes)
    live = [torch.ones(shape[0], dtype=torch.bool) for shape in shapes]
    moved = 0

    def check(step: int) -> None:
        nonlocal moved
        for index, (site, share) in enumerate(zip(sparsifier.sites, shares, strict=True)):
            now = site.support.flatten(1).any(1)
            neurons = int(now.sum())
            assert _fan_ins(site.support) == {share // neurons}
            assert share - neurons < site.nonzeros <= share
            assert not (now & ~live[index]).any(), "an ablated neuron came back"
            moved += int((live[index] & ~now).sum())
            live[index] = now

    check(0)
    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=check)
    assert moved > 0
    assert live[-1].all(), "an output was ablated"
    assert sparsifier.revision == 14


def test_without_ablation_no_neuron_goes() -> None:
    method = gossamer.SRigL(density=0.2, ablation=False, drop_fraction=1.0)
    model = net("mlp")
    sparsifier = gossamer.Sparsifier(model, method, total_steps=20)
    counts = method.budget([site.original_shape for site in sparsifier.sites])

    def check(step: int) -> None:
        assert [site.nonzeros for site in sparsifier.sites] == counts
        assert all(site.support.flatten(1).any(1).all() for site in sparsifier.sites)

    train(model, sparsifier, optimizer_for("sgd", model), batches(20), after_step=check)


# Cost


def test_training_macs() -> None:
    """Section 4, as RigL: (3 f_S dT + 2 f_S + f_D) / (dT + 1); our interval is dT + 1."""
    interval = 6
    # 120 steps, updates until the last interval begins: 19 of 20 steps on the grid.
    method = gossamer.SRigL(density=0.2, update_interval=interval, t_end=1.0, ablation=False)
    bill = plain.training_macs(method, 120)
    (sparse,) = set(bill.forward)
    d_t = interval - 1
    mean = (3 * sparse * d_t + 2 * sparse + bill.dense_forward) / (d_t + 1)
    assert bill.total == pytest.approx(120 * mean - (bill.dense_forward - sparse), rel=1e-12)


def test_training_macs_follow_ablation() -> None:
    method = gossamer.SRigL(density=0.2, update_interval=4, gamma_sal=0.9)
    bill = plain.training_macs(method, 40)
    assert len(set(bill.forward)) > 1
    updates = range(4, 30, 4)
    assert bill.total == sum(3 * macs for macs in bill.forward) + sum(
        bill.dense_forward - bill.forward[step - 1] for step in updates
    )


# Digits


@pytest.mark.slow
def test_ablation_makes_up_for_small_fan_ins() -> None:
    """90 % sparsity, 3 seeds: about 98.0 and 96.8 %."""

    def accuracy(method: gossamer.Method) -> float:
        outcomes = [digits.train(method, seed, weight_decay=5e-4, norm=False) for seed in range(3)]
        return sum(outcome.accuracy for outcome in outcomes) / 3

    better = gossamer.SRigL(density=0.1, gamma_sal=0.95)
    other = gossamer.SRigL(density=0.1, ablation=False)
    assert accuracy(better) > accuracy(other) + 0.005


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"drop_fraction": 1.1}, r"drop_fraction=1\.1"),
        ({"t_end": 0.0}, r"t_end=0\.0"),
        ({"gamma_sal": 2.0}, r"gamma_sal=2\.0"),
        ({"update_interval": 0}, "update_interval=0"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.SRigL(**wrong)


def test_a_run_that_cannot_serve_it() -> None:
    method = gossamer.SRigL(update_interval=75)
    with pytest.raises(ValueError, match=r"update_interval=75 leaves no update before step 75"):
        gossamer.Sparsifier(nn.Linear(20, 9), method, total_steps=100)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    told = r"leaves 7 of 72 weights for 10 neurons in 2 layers.*give at least 0\.139"
    with pytest.raises(ValueError, match=told):
        gossamer.Sparsifier(model, gossamer.SRigL(density=0.1), total_steps=100)
