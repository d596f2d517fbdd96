"""ERK's worked numbers, exact sums and bounds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gossamer.allocation import DISTRIBUTIONS, allocate, apportion, er, erk, uniform
from gossamer.train.models import build_model

TINY = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (10, 32)]


def _sizes(shapes) -> list[int]:
    return [math.prod(shape) for shape in shapes]


def _epsilon(shapes, densities) -> float:
    """The common factor of all layers that are not dense."""
    factors = [
        density * math.prod(shape) / sum(shape)
        for shape, density in zip(shapes, densities, strict=True)
        if density < 1
    ]
    assert max(factors) == pytest.approx(min(factors), rel=1e-12)
    return factors[0]


def test_erk_tiny() -> None:
    densities = erk(TINY, 0.2)
    assert densities == pytest.approx([0.73187, 0.24216, 0.10897, 1.0], abs=5e-6)
    assert densities[3] == 1.0
    assert _epsilon(TINY, densities) == pytest.approx(9.29901, abs=5e-6)


def test_erk_tiny_at_one_half() -> None:
    densities = erk(TINY, 0.5)
    assert densities == pytest.approx([1.0, 0.80977, 0.36440, 1.0], abs=5e-6)
    assert densities[0] == densities[3] == 1.0


@pytest.mark.parametrize("function", [erk, er, uniform])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_densities_meet_the_budget(function, density: float) -> None:
    densities = function(TINY, density)
    assert all(0 < d <= 1 for d in densities)
    kept = sum(d * size for d, size in zip(densities, _sizes(TINY), strict=True))
    assert kept == pytest.approx(density * sum(_sizes(TINY)), rel=1e-9)


def test_er_ignores_the_kernel() -> None:
    shapes = [(8, 4, 3, 3), (8, 4), (8, 4, 1, 7)]
    assert len(set(er(shapes, 0.2))) == 1
    densities = er([(10, 20, 3, 3), (40, 10, 3, 3)], 0.1)
    assert densities[0] / densities[1] == pytest.approx((30 / 200) / (50 / 400))


def test_erk_of_equal_layers_is_uniform() -> None:
    assert erk([(6, 5)] * 4, 0.3) == pytest.approx([0.3] * 4)


class _Layers:
    """Shapes and output positions of every conv and linear layer, from a run on `meta`."""

    def __init__(self, name: str, classes: int, pixels: int) -> None:
        with torch.device("meta"):
            model = build_model(name, num_classes=classes, in_shape=(3, pixels, pixels))
        self.names: list[str] = []
        self.shapes: list[torch.Size] = []
        self.positions: list[int] = []
        with self._watching(model), torch.no_grad():
            model.eval()(torch.empty(1, 3, pixels, pixels, device="meta"))

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        def seen(name: str):
            def hook(module: nn.Module, _inputs, output) -> None:
                self.names.append(name)
                self.shapes.append(module.weight.shape)
                self.positions.append(output.numel() // module.weight.shape[0])

            return hook

        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(seen(name))
        yield

    @property
    def macs(self) -> list[int]:
        return [p * n for p, n in zip(self.positions, _sizes(self.shapes), strict=True)]

    def flops_ratio(self, densities) -> float:
        kept = sum(d * macs for d, macs in zip(densities, self.macs, strict=True))
        return kept / sum(self.macs)


def test_erk_resnet50_imagenet() -> None:
    layers = _Layers("resnet50-imagenet", 1000, 224)
    assert sum(_sizes(layers.shapes)) == 25_502_912
    assert 2 * sum(layers.macs) == 8_178_368_512
    tenth, fifth = erk(layers.shapes, 0.1), erk(layers.shapes, 0.2)
    assert _epsilon(layers.shapes, tenth) == pytest.approx(48.7861, abs=5e-5)
    assert _epsilon(layers.shapes, fifth) == pytest.approx(99.5612, abs=5e-5)
    assert layers.flops_ratio(tenth) == pytest.approx(0.2418, abs=5e-5)
    assert layers.flops_ratio(fifth) == pytest.approx(0.4138, abs=5e-5)
    assert tenth.count(1.0) == 1
    assert fifth.count(1.0) == 8
    table = {
        "conv1": (0.4200, 0.8572),
        "layer1.0.conv1": (1, 1),
        "layer1.0.conv2": (0.1773, 0.3619),
        "layer1.2.conv2": (0.1773, 0.3619),
        "layer1.0.conv3": (0.9588, 1),
        "layer1.0.shortcut.0": (0.9588, 1),
        "layer1.1.conv1": (0.9588, 1),
        "layer2.0.conv1": (0.5747, 1),
        "layer2.0.conv2": (0.0867, 0.1769),
        "layer2.3.conv3": (0.4779, 0.9753),
        "layer2.1.conv1": (0.4779, 0.9753),
        "layer2.0.shortcut.0": (0.2866, 0.5849),
        "layer3.0.conv1": (0.2866, 0.5849),
        "layer3.4.conv2": (0.0428, 0.0874),
        "layer3.5.conv3": (0.2386, 0.4869),
        "layer3.1.conv1": (0.2386, 0.4869),
        "layer3.0.shortcut.0": (0.1431, 0.2921),
        "layer4.0.conv1": (0.1431, 0.2921),
        "layer4.1.conv2": (0.0213, 0.0435),
        "layer4.2.conv3": (0.1192, 0.2433),
        "layer4.1.conv1": (0.1192, 0.2433),
        "layer4.0.shortcut.0": (0.0715, 0.1459),
        "fc": (0.0726, 0.1482),
    }
    for name, expected in table.items():
        at = layers.names.index(name)
        assert (tenth[at], fifth[at]) == pytest.approx(expected, abs=5e-5), name


@pytest.mark.parametrize(
    ("name", "weights", "epsilons", "ratios"),
    [
        ("resnet50", 23_652_032, (46.0726, 93.9522), (0.2247, 0.3851)),
        ("vgg19", 20_070_080, (185.7137, 377.8701), (0.2180, 0.4028)),
    ],
)
def test_erk_cifar100(name: str, weights: int, epsilons, ratios) -> None:
    layers = _Layers(name, 100, 32)
    assert sum(_sizes(layers.shapes)) == weights
    for density, epsilon, ratio in zip((0.1, 0.2), epsilons, ratios, strict=True):
        densities = erk(layers.shapes, density)
        assert _epsilon(layers.shapes, densities) == pytest.approx(epsilon, abs=5e-5)
        assert layers.flops_ratio(densities) == pytest.approx(ratio, abs=5e-5)
    if name == "vgg19":
        tenth = erk(layers.shapes, 0.1)
        assert tenth[0] == tenth[-1] == 1.0
        assert tenth.count(1.0) == 2
        widest = [d for d, s in zip(tenth, layers.shapes, strict=True) if s[:2] == (512, 512)]
        assert widest == pytest.approx([0.0811] * 7, abs=5e-5)


# The networks of the papers on MNIST and CIFAR-10: shapes and output positions, front to back

_Sizes = list[tuple[tuple[int, ...], int]]


def _vgg16() -> _Sizes:
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    pixels = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    convs = [
        ((outputs, inputs, 3, 3), side * side)
        for outputs, inputs, side in zip(widths, [3, *widths], pixels, strict=False)
    ]
    return [*convs, ((512, 512), 1), ((10, 512), 1)]


def _resnet20() -> _Sizes:
    """Identity shortcuts."""
    rows: _Sizes = [((16, 3, 3, 3), 1024)]
    inputs = 16
    for width, positions in ((16, 1024), (32, 256), (64, 64)):
        for _ in range(6):
            rows.append(((width, inputs, 3, 3), positions))
            inputs = width
    return [*rows, ((10, 64), 1)]


def _wide(depth: int, factor: int) -> _Sizes:
    """WRN on CIFAR-10; a shortcut of 1 x 1 in the first block of each stage."""
    rows: _Sizes = [((16, 3, 3, 3), 1024)]
    inputs = 16
    for width, positions in ((16 * factor, 1024), (32 * factor, 256), (64 * factor, 64)):
        rows.append(((width, inputs, 1, 1), positions))
        for _ in range((depth - 4) // 3):
            rows.append(((width, inputs, 3, 3), positions))
            inputs = width
    return [*rows, ((10, inputs), 1)]


PAPER_NETS: dict[str, _Sizes] = {
    "lenet-300-100": [((300, 784), 1), ((100, 300), 1), ((10, 100), 1)],
    "lenet-5": [((20, 1, 5, 5), 576), ((50, 20, 5, 5), 64), ((500, 800), 1), ((10, 500), 1)],
    "vgg16": _vgg16(),
    "resnet20": _resnet20(),
    "wrn-16-8": _wide(16, 8),
    "wrn-28-8": _wide(28, 8),
}


@pytest.mark.parametrize(
    ("name", "weights", "flops"),
    [
        ("lenet-300-100", 266_200, 0.5324e6),
        ("lenet-5", 430_500, 4.586e6),
        ("vgg16", 14_977_728, 626.93e6),
        ("resnet20", 268_336, 81.10e6),
        ("wrn-16-8", 10_954_160, 3096.3e6),
        ("wrn-28-8", 23_340_464, 6720.2e6),
    ],
)
def test_the_papers_networks(name: str, weights: int, flops: float) -> None:
    """dst.md 5.2 and 5.9."""
    rows = PAPER_NETS[name]
    assert sum(math.prod(shape) for shape, _ in rows) == weights
    counted = 2 * sum(math.prod(shape) * positions for shape, positions in rows)
    assert counted == pytest.approx(flops, rel=5e-5)


@pytest.mark.parametrize(
    ("name", "density", "expected"),
    [
        ("lenet-300-100", 0.1, [0.0796, 0.2302, 1]),
        ("lenet-300-100", 0.05, [0.0385, 0.1113, 0.9185]),
        ("lenet-300-100", 0.02, [0.0154, 0.0445, 0.3674]),
        ("lenet-5", 0.1, [1, 0.0871, 0.0884, 1]),
        ("lenet-5", 0.05, [0.7261, 0.0375, 0.0381, 1]),
        (
            "vgg16",
            0.1,
            [1, 0.6043, 0.4465, 0.2954, 0.2199, 0.146, 0.146, 0.1091, *[0.0726] * 5, 0.6494, 1],
        ),
        (
            "vgg16",
            0.05,
            [1, 0.3008, 0.2222, 0.147, 0.1094, 0.0727, 0.0727, 0.0543, *[0.0361] * 5, 0.3232, 1],
        ),
        (
            "resnet20",
            0.1,
            [1, *[0.3026] * 6, 0.215, *[0.1394] * 5, 0.1015, *[0.0667] * 5, 1],
        ),
        (
            "resnet20",
            0.05,
            [0.5174, *[0.1475] * 6, 0.1048, *[0.0679] * 5, 0.0495, *[0.0325] * 5, 1],
        ),
        (
            "wrn-16-8",
            0.1,
            [
                *[1, 1, 1, 0.2501, 0.2501, 0.2501],
                *[1, 0.1862, 0.1236, 0.1236, 0.1236],
                *[0.827, 0.0924, 0.0615, 0.0615, 0.0615],
                1,
            ],
        ),
    ],
)
def test_erk_of_the_papers_networks(name: str, density: float, expected: list[float]) -> None:
    """dst.md 5.8."""
    shapes = [shape for shape, _ in PAPER_NETS[name]]
    assert erk(shapes, density) == pytest.approx(expected, abs=5e-5)


def test_erk_epsilons_and_counts() -> None:
    """dst.md 5.8."""
    for name, epsilon in (("lenet-300-100", 17.264), ("vgg16", 166.249), ("resnet20", 18.349)):
        shapes = [shape for shape, _ in PAPER_NETS[name]]
        assert _epsilon(shapes, erk(shapes, 0.1)) == pytest.approx(epsilon, abs=5e-4)
    shapes = [shape for shape, _ in PAPER_NETS["lenet-300-100"]]
    assert allocate("erk", shapes, 26_620) == [18714, 6906, 1000]


@pytest.mark.parametrize(
    ("name", "factor"), [("vgg16", 0.2204), ("resnet20", 0.1857), ("wrn-16-8", 0.1647)]
)
def test_erk_factors_of_the_papers_networks(name: str, factor: float) -> None:
    """dst.md 5.9: MACs at density 0.1 over the dense ones."""
    rows = PAPER_NETS[name]
    densities = erk([shape for shape, _ in rows], 0.1)
    macs = [math.prod(shape) * positions for shape, positions in rows]
    kept = sum(density * size for density, size in zip(densities, macs, strict=True))
    assert kept / sum(macs) == pytest.approx(factor, abs=5e-5)


# Whole numbers


def test_apportion_by_largest_remainder_and_spills_evenly() -> None:
    none, free = [0, 0, 0], [99, 99, 99]
    assert apportion([3.6, 3.5, 2.9], 10, none, free) == [4, 3, 3]
    assert apportion([24.0, 3.0, 3.0], 30, none, [12, 99, 99]) == [12, 9, 9]
    assert apportion([9.0, 1.0, 0.0], 10, [0, 0, 4], free) == [6, 0, 4]
    assert apportion([0.0, 0.0, 0.0], 7, none, [2, 99, 99]) == [2, 3, 2]


def test_allocate_rounds_to_the_nearest_whole() -> None:
    budget = round(0.2 * sum(_sizes(TINY)))
    counts = allocate("erk", TINY, budget)
    exact = [d * n for d, n in zip(erk(TINY, 0.2), _sizes(TINY), strict=True)]
    assert sum(counts) == budget
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_allocate_random(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    shapes = []
    for _ in range(number(1, 12)):
        kernel = [(), (1, 1), (3, 3), (7,)][number(0, 3)]
        shapes.append((number(1, 40), number(1, 40), *kernel))
    sizes = _sizes(shapes)
    distribution = sorted(DISTRIBUTIONS)[seed % 3]
    for budget in {len(sizes), number(len(sizes), sum(sizes)), sum(sizes) - 1, sum(sizes)}:
        if budget < len(sizes):
            continue
        counts = allocate(distribution, shapes, budget)
        assert sum(counts) == budget
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
        assert counts == allocate(distribution, shapes, budget)

    low = [number(0, size) for size in sizes]
    high = [number(least, size) for least, size in zip(low, sizes, strict=True)]
    for budget in {sum(low), number(sum(low), sum(high)), sum(high)}:
        counts = allocate(distribution, shapes, budget, at_least=low, at_most=high)
        assert sum(counts) == budget
        assert all(
            least <= count <= most for least, count, most in zip(low, counts, high, strict=True)
        )
        assert all(type(count) is int for count in counts)


def test_allocate_without_bounds_in_the_way_follows_the_distribution() -> None:
    shapes = [(30, 40), (50, 20), (10, 80)]
    budget = 700
    free = allocate("erk", shapes, budget)
    exact = [d * n for d, n in zip(erk(shapes, budget / 3000), _sizes(shapes), strict=True)]
    assert all(abs(count - share) < 1 for count, share in zip(free, exact, strict=True))
    # A bound that holds one layer back leaves the others at their shares, up to what it takes.
    held = allocate("erk", shapes, budget, at_least=[0, 0, 0], at_most=[100, 1000, 800])
    assert held[0] == 100
    assert sum(held) == budget


@pytest.mark.parametrize("budget", [0, 3, sum(_sizes(TINY)) + 1, -5])
def test_a_budget_out_of_reach(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"budget of {budget} weights for 4 layers") as error:
        allocate("erk", TINY, budget)
    assert f"at least 4 and hold at most {sum(_sizes(TINY))}" in str(error.value)


def test_a_budget_that_bounds_cannot_meet() -> None:
    with pytest.raises(ValueError, match="at least 30 and hold at most 60"):
        allocate("uniform", [(10, 10)] * 3, 29, at_least=[10] * 3, at_most=[20] * 3)
    with pytest.raises(ValueError, match="61"):
        allocate("uniform", [(10, 10)] * 3, 61, at_least=[10] * 3, at_most=[20] * 3)


def test_unknown_distribution() -> None:
    with pytest.raises(ValueError, match=r"'erkk'.*er, erk, uniform"):
        allocate("erkk", TINY, 100)
