"""MEST: its bounds, its training beside the twin, random growth, and its costs."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gossamer
import plain
from gossamer.allocation import allocate
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import mest as twin

STEPS = 64
VARIANTS = ("vanilla", "em", "ems")
HAND = [0.9, -0.8, 0.5, -0.4, 0.3, -0.2, 0.1, 0.05, -0.02, 0.01]


def _progress(step: int, total: int = 160) -> gossamer.Progress:
    return gossamer.Progress(step, total)


# Worked numbers


@pytest.mark.parametrize(
    ("variant", "density", "mutation", "lower", "upper"),
    [
        ("em", 0.1, None, (0.92, 0.91, 0.90), (0.90,) * 3),
        ("em", 0.05, None, (0.96, 0.955, 0.95), (0.95,) * 3),
        ("ems", 0.1, 0.05, (0.90,) * 3, (0.85, 0.875, 0.90)),
        ("ems", 0.1, None, (0.90,) * 3, (0.88, 0.89, 0.90)),
        ("vanilla", 0.1, None, (0.92, 0.92, 0.90), (0.90,) * 3),
    ],
)
def test_published_bounds(variant: str, density: float, mutation, lower, upper) -> None:
    """Sparsities from epochs 0, 90 and 120 of 160, an update every 5 epochs."""
    method = gossamer.MEST(density=density, variant=variant, mutation=mutation)
    stages = [(0, 89), (90, 119), (120, 160)]
    for stage, low, high in zip(stages, lower, upper, strict=True):
        for step in stage:
            bounds = [1 - bound for bound in method.bounds(_progress(step))]
            assert bounds == pytest.approx([low, high])
            p = twin.mutation(step / 160, method._mutation, variant != "vanilla", 0.5625, 0.75)
            expected = twin.sparsities(1 - density, p, variant == "ems")
            assert bounds == pytest.approx(expected)
    steps = [step for step in range(161) if step and method.updates_at(_progress(step))]
    assert steps == [*range(5, 120, 5), *[120] * (variant == "ems")]
    assert not any(method.wants_dense_grad(_progress(step)) for step in range(161))


def _hand(variant: str) -> tuple[gossamer.MEST, gossamer.Sparsifier]:
    layer = nn.Linear(10, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([HAND], dtype=torch.float64))
    method = gossamer.MEST(density=0.4, variant=variant, mutation=0.2, update_interval=1)
    return method, gossamer.Sparsifier(layer, method, total_steps=16)


@pytest.mark.parametrize(
    ("variant", "start", "kept", "active"), [("em", 4, 2, 4), ("ems", 6, 4, 6)]
)
def test_by_hand(variant: str, start: int, kept: int, active: int) -> None:
    """s = 0.6, p = 0.2: EM keeps {0, 1} and grows to 4; EM&S keeps {0..3} and grows to 6."""
    method, sparsifier = _hand(variant)
    (site,) = sparsifier.sites
    assert site.support.flatten().nonzero().flatten().tolist() == list(range(start))
    generator = torch.Generator().manual_seed(0)
    (change,) = method.update(sparsifier.sites, _progress(1, 16), generator)
    assert change.kept.flatten().nonzero().flatten().tolist() == list(range(kept))
    assert int((change.kept | change.grown).sum()) == active
    assert not (change.kept & change.grown).any()
    if variant == "ems":
        (change,) = method.update(sparsifier.sites, _progress(12, 16), generator)
        assert change.kept.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3]
        assert not change.grown.any()


def test_growth_is_uniform_over_the_empty_places() -> None:
    method, sparsifier = _hand("em")
    hits = torch.zeros(10)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        (change,) = method.update(sparsifier.sites, _progress(1, 16), generator)
        hits += change.grown.flatten()
    # 2 of 8 places: binomial(400, 1/4), standard deviation 8.7. Just dropped ones compete too.
    assert hits[:2].tolist() == [0, 0]
    assert (hits[2:] - 100).abs().max() < 5 * 8.7


def test_the_gradient_counts_in_the_score() -> None:
    _, sparsifier = _hand("em")
    (site,) = sparsifier.sites
    method = gossamer.MEST(density=0.4, mutation=0.2, gradient_weight=0.5)
    assert torch.equal(method.score(site), site.weight.abs())  # no gradient yet
    site.weight.grad = torch.zeros(1, 10, dtype=torch.float64)
    site.weight.grad[0, 3] = -2.0
    assert method.score(site)[0, 3].item() == pytest.approx(1.4)
    (change,) = method.update(sparsifier.sites, _progress(1, 16), torch.Generator())
    assert change.kept.flatten().nonzero().flatten().tolist() == [0, 3]
    site.weight.grad[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert method.score(site)[0, :3].tolist() == [0.9, 0.8, 0.5]
    assert torch.equal(gossamer.MEST().score(site), site.weight.abs())


# Training


def _drawn(sparsifier: gossamer.Sparsifier, step: int) -> list[np.ndarray]:
    """The random numbers of an update: the seed's, one tensor per layer."""
    generator = sparsifier._generator(f"update/{step}")
    return [torch.rand(site.weight.shape, generator=generator).numpy() for site in sparsifier.sites]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def _apart(flat: np.ndarray, like: list[np.ndarray]) -> list[np.ndarray]:
    ends = np.cumsum([array.size for array in like])[:-1]
    return [p.reshape(a.shape) for p, a in zip(np.split(flat, ends), like, strict=True)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"gradient_weight": 0.1}),
        ("mobilenet", {"distribution": "erk", "mutation": 0.15}),
        ("vgg", {"scope": "global", "update_interval": 7}),
    ],
    ids=["layer", "layer-erk", "global"],
)
def test_training_equals_the_twin(name: str, options: dict, optimizer: str, variant: str) -> None:
    method = gossamer.MEST(density=0.2, variant=variant, **options)
    soft, interval = variant == "ems", method.update_interval or 2
    model, other = net(name), net(name)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    masks = {site.name: site.support.numpy() for site in sparsifier.sites}
    shapes = [site.original_shape for site in sparsifier.sites]
    total = sum(shape.numel() for shape in shapes)
    p_start = 0.2 * 0.2 if method.mutation is None else method.mutation

    def rule(now: plain.Moment) -> plain.Change | None:
        if (now.step % interval or now.step >= 48) and not (soft and now.step == 48):
            return None
        p = twin.mutation(now.step / STEPS, p_start, variant != "vanilla", 0.5625, 0.75)
        lower, upper = (round((1 - s) * total) for s in twin.sparsities(0.8, p, soft))
        drawn = _drawn(sparsifier, now.step)
        # The optimizer has seen the gradient of the support alone.
        seen = [g * m for g, m in zip(now.gradients, now.masks, strict=True)]
        layers = (now.weights, now.masks, seen, drawn)
        lam = method.gradient_weight
        if method.scope == "global":
            flat = [_joined(list(arrays)) for arrays in layers]
            support = twin.update(*flat, keep=lower, goal=upper, lam=lam)
            return plain.Change(*(_apart(part, now.weights) for part in support))
        before = [int(mask.sum()) for mask in now.masks]
        keep = allocate(method.distribution, shapes, lower, at_most=before)
        goal = allocate(method.distribution, shapes, upper, at_least=keep)
        parts = [
            twin.update(*arrays, keep=least, goal=most, lam=lam)
            for *arrays, least, most in zip(*layers, keep, goal, strict=True)
        ]
        return plain.Change([part.kept for part in parts], [part.grown for part in parts])

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
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETS)
def test_counts_are_exact(name: str, variant: str, scope: str) -> None:
    method = gossamer.MEST(
        density=0.13, variant=variant, mutation=0.06, scope=scope, update_interval=4
    )
    model = net(name)
    dense = [layer.detach().abs() for layer in _weights(model)]
    sparsifier = gossamer.Sparsifier(model, method, total_steps=32)
    total = sum(site.original_numel for site in sparsifier.sites)
    start = 0.19 if variant == "ems" else 0.13
    assert sum(site.nonzeros for site in sparsifier.sites) == round(start * total)
    for site, magnitude in zip(sparsifier.sites, dense, strict=True):
        assert magnitude[site.support].min() >= magnitude[~site.support].max()
    before = [site.support.clone() for site in sparsifier.sites]
    moved = [0] * 33

    def check(step: int) -> None:
        upper = method.bounds(_progress(step - step % 4, 32))[1]
        assert sum(site.nonzeros for site in sparsifier.sites) == round(upper * total)
        for index, site in enumerate(sparsifier.sites):
            new = site.support & ~before[index]
            assert not site.weight.detach()[new].any()
            moved[step] += int((site.support ^ before[index]).sum())
            before[index] = site.support.clone()
            assert site.masked.dense_gradient is None

    train(model, sparsifier, optimizer_for("adam", model), batches(32), after_step=check)
    last = [4, 8, 12, 16, 20, *[24] * (variant == "ems")]
    assert [step for step in range(33) if moved[step]] == last
    assert sparsifier.density == round(0.13 * total) / total


def _weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() > 1]


# Cost


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_macs(variant: str) -> None:
    """3 f_S, of the soft bound while it holds; never a dense gradient."""
    steps = 160
    bill = plain.training_macs(gossamer.MEST(variant=variant, mutation=0.05), steps)
    assert bill.total == sum(3 * macs for macs in bill.forward)
    mean = 0.1 + (0.05 * 0.5625 + 0.025 * 0.1875 if variant == "ems" else 0)
    # One step more at each higher bound, and whole weights.
    assert bill.total / (3 * bill.dense_forward * steps) == pytest.approx(mean, abs=4e-4)
    assert bill.forward[-1] == round(0.1 * bill.dense_forward)


# Refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"variant": "em&s"}, "variant='em&s'"),
        ({"density": 0.1, "mutation": 0.1}, r"mutation=0\.1 exchanges all weights"),
        ({"density": 0.9, "mutation": 0.2, "variant": "ems"}, "more than all weights"),
        ({"mutation": -0.1}, r"mutation=-0\.1"),
        ({"t_end": 0.3}, r"t_end=0\.3 comes before halve_at=0\.5625"),
        ({"gradient_weight": -1.0}, r"gradient_weight=-1\.0"),
        ({"scope": "local"}, "scope='local'"),
        ({"distribution": "erdos"}, "distribution='erdos'"),
        ({"update_interval": 0}, "update_interval=0"),
    ],
)
def test_wrong_hyperparameters(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gossamer.MEST(**wrong)


def test_a_run_that_cannot_serve_it() -> None:
    method = gossamer.MEST(update_interval=100)
    with pytest.raises(ValueError, match=r"update_interval=100 leaves no update before step 75"):
        gossamer.Sparsifier(nn.Linear(9, 9), method, total_steps=100)
    small = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"density=0\.008 is below the reachable minimum"):
        gossamer.Sparsifier(small, gossamer.MEST(density=0.01), total_steps=100)
