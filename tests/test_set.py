"""SET: its updates by hand and beside the twin, where it grows, and what it costs."""

import pytest
import torch
from torch import Tensor, nn

import gossamer
import plain
import resnet50
from gossamer.methods.set import evolve
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import set as twin

STEPS = 60
ITOP = {"drop": "magnitude", "drop_fraction": 0.5, "drop_fraction_end": 0.005}


def _progress(step: int, total: int = 1000) -> gossamer.Progress:
    return gossamer.Progress(step, total)


def _evolve(
    weight: Tensor, fraction: float, *, signed: bool, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """One layer whose support is where it is not zero."""
    scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    ((kept, grown),) = evolve([weight], [weight != 0], [scores], fraction, signed=signed)
    return kept, grown


# Schedules


def test_drop_rate() -> None:
    """zeta stays as in the paper; with an end it follows a cosine (5.10 for ITOP)."""
    assert {gossamer.SET().drop_rate(_progress(step)) for step in range(1001)} == {0.3}
    got = [gossamer.SET(**ITOP).drop_rate(_progress(step)) for step in (0, 250, 500, 750, 1000)]
    assert got == pytest.approx([0.5, 0.4275, 0.2525, 0.0775, 0.005], abs=5e-5)


@pytest.mark.parametrize(
    ("options", "total", "steps"),
    [
        ({"update_interval": 10}, 100, range(10, 100, 10)),  # the last step moves nothing
        ({"update_interval": 10, "t_end": 0.5}, 100, range(10, 50, 10)),
        ({}, 10_000, range(100, 10_000, 100)),
        ({}, 500, range(25, 500, 25)),
    ],
    ids=str,
)
def test_updates_without_dense_gradients(options: dict[str, float], total: int, steps) -> None:
    method = gossamer.SET(**options)
    assert [s for s in range(total + 1) if method.updates_at(_progress(s, total))] == [*steps]
    assert not any(method.wants_dense_grad(_progress(s, total)) for s in range(total + 1))


# One update by hand


@pytest.mark.parametrize(
    ("signed", "expected"), [(True, [-0.7, 0.02, 0.04]), (False, [0.02, 0.04, 0.5])]
)
def test_a_third_by_hand(signed: bool, expected: list[float]) -> None:
    """Signed, two of six positive weights and one of three negative ones."""
    weight = torch.tensor(
        [[0.9, -0.9, 0.02, 0, 0.5], [-0.7, 0.04, 0.8, 0, -0.8], [0.6, 0, 0, 0, 0]]
    )
    kept, grown = _evolve(weight, 1 / 3, signed=signed)
    assert sorted(weight[(weight != 0) & ~kept].tolist()) == pytest.approx(expected)
    assert int(grown.sum()) == 3
    assert not (grown & (weight != 0)).any()


def test_weights_of_exactly_zero_leave_first() -> None:
    weight = torch.tensor([[0.0, 0.5, 0.1, -0.4], [0.3, 0.0, 0.0, 0.7]])
    support = torch.tensor([[True] * 4, [True, False, False, True]])
    ((kept, grown),) = evolve([weight], [support], [torch.rand(2, 4)], 0.2, signed=True)
    assert (support & ~kept).flatten().nonzero().tolist() == [[0]]
    assert int(grown.sum()) == 1


@pytest.mark.parametrize("signed", [True, False])
def test_no_more_is_dropped_than_has_room(signed: bool) -> None:
    torch.manual_seed(0)
    full = torch.randn(8, 10)
    kept, grown = _evolve(full, 0.9, signed=signed)
    assert kept.all()
    assert not grown.any()
    nearly = full.clone()
    nearly.view(-1)[:7] = 0
    kept, grown = _evolve(nearly, 0.9, signed=signed)
    assert int(grown.sum()) == (6 if signed else 7)  # each side rounds down
    assert int((kept | grown).sum()) == 73


def test_every_empty_place_is_equally_likely() -> None:
    weight = torch.zeros(10, 20)
    weight[:, :5] = torch.randn(10, 5)
    hits = torch.zeros(10, 20)
    for seed in range(200):
        _, grown = _evolve(weight, 0.6, signed=False, seed=seed)
        assert int(grown.sum()) == 30
        hits += grown
    assert not hits[:, :5].any()
    # Binomial(200, 30 / 150): mean 40, standard deviation 5.7.
    assert float((hits[:, 5:] - 40).abs().max()) < 5 * 5.7


# Training


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg", {}),
        ("mlp", {"update_interval": 4, "distribution": "uniform", "t_end": 0.7}),
        ("mobilenet", {"scope": "global"}),
        ("mlp", {**ITOP, "scope": "global"}),
        ("conv_flatten_linear", ITOP),
    ],
    ids=["layer", "uniform", "global", "global-unsigned", "itop"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str) -> None:
    method = gossamer.SET(density=0.2, **options)
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    start = {site.name: site.support.numpy() for site in sparsifier.sites}
    interval = method.update_interval or 3
    update = twin.update if method.scope == "layer" else twin.update_global

    def rule(now: plain.Moment) -> plain.Change | None:
        if now.step % interval or now.step >= method.t_end * STEPS:
            return None
        generator = sparsifier._generator(f"update/{now.step}")
        numbers = [torch.rand(mask.shape, generator=generator).numpy() for mask in now.masks]
        zeta = method.drop_rate(_progress(now.step, STEPS))
        signed = method.drop == "signed"
        return plain.Change(*update(now.weights, now.masks, numbers, zeta, signed))

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
    method = gossamer.SET(density=0.13, scope=scope, update_interval=3)
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=30)
    start = [site.nonzeros for site in sparsifier.sites]
    before = [site.support.clone() for site in sparsifier.sites]
    optimizer = optimizer_for("adam", model)
    grown = 0

    def check(step: int) -> None:
        nonlocal grown
        counts = [site.nonzeros for site in sparsifier.sites]
        assert sum(counts) == sum(start)
        if scope == "layer":
            assert counts == start
        for index, site in enumerate(sparsifier.sites):
            assert site.masked.dense_gradient is None
            new = site.support & ~before[index]
            assert not site.weight.detach()[new].any()
            assert not optimizer.state[site.weight]["exp_avg"][new].any()
            grown += int(new.sum())
            before[index] = site.support.clone()

    train(model, sparsifier, optimizer, batches(30), after_step=check)
    assert grown > 20
    assert sparsifier.revision == 9


# Cost


def test_training_macs() -> None:
    """Section 4: 3 f_S, in every step."""
    bill = plain.training_macs(gossamer.SET(update_interval=5), 50)
    (sparse,) = set(bill.forward)
    assert bill.total == 50 * 3 * sparse


@pytest.mark.parametrize(("density", "factor"), [(0.2, 0.4138), (0.1, 0.2418), (0.05, 0.1217)])
def test_macs_of_resnet50(density: float, factor: float) -> None:
    """5.9, ERK."""
    method = gossamer.SET(density=density, distribution="erk")
    got = resnet50.factors(method, total_steps=32_000, counted=101)
    assert got == pytest.approx((factor, factor), abs=5e-5)


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, r"density=0\.0"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"update_interval": 0}, "update_interval=0"),
        ({"drop": "sign"}, "drop='sign'.*did you mean 'signed'"),
        ({"drop_fraction": 1.1}, r"drop_fraction=1\.1"),
        ({"drop_fraction_end": -0.1}, r"drop_fraction_end=-0\.1"),
        ({"t_end": 0.0}, r"t_end=0\.0"),
        ({"scope": "local"}, "scope='local'"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.SET(**wrong)


def test_a_run_that_is_over_before_the_first_update() -> None:
    method = gossamer.SET(update_interval=100)
    with pytest.raises(ValueError, match=r"update_interval=100 leaves no update before step 100"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
