"""How a budget of weights is shared among layers: uniform, ER, ERK.

`allocate` returns whole numbers of weights that sum to the budget exactly.

Sources: ER from SET (Mocanu et al., 2018), ERK from RigL (Evci et al., 2020): a layer's density is
proportional to the sum of its tensor's dimensions over their product; layers that would exceed
density 1 become dense and the rest is solved again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["DISTRIBUTIONS", "allocate", "apportion", "er", "erk", "uniform"]

Shapes = Sequence[Sequence[int]]


def uniform(shapes: Shapes, density: float) -> list[float]:
    """The same density for every layer."""
    return [density for _ in shapes]


def er(shapes: Shapes, density: float) -> list[float]:
    """Erdos-Renyi densities: proportional to `(out + in) / (out * in)`, kernels ignored."""
    return _proportional(shapes, density, lambda shape: sum(shape[:2]) / math.prod(shape[:2]))


def erk(shapes: Shapes, density: float) -> list[float]:
    """Erdos-Renyi-kernel densities: proportional to the sum of all dimensions over the product."""
    return _proportional(shapes, density, lambda shape: sum(shape) / math.prod(shape))


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], list[float]]] = {
    "uniform": uniform,
    "er": er,
    "erk": erk,
}


def allocate(
    distribution: str,
    shapes: Shapes,
    budget: int,
    *,
    at_least: Sequence[int] | None = None,
    at_most: Sequence[int] | None = None,
) -> list[int]:
    """Weights per layer, summing to `budget` exactly.

    Args:
        distribution: A key of `DISTRIBUTIONS`.
        shapes: Weight shapes, `(out, in, *kernel)`.
        budget: Weights over all layers.
        at_least: Lower bound per layer; by default 1.
        at_most: Upper bound per layer; by default all of its weights.

    Raises:
        ValueError: An unknown distribution, or a budget that the bounds cannot meet.
    """
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(sorted(DISTRIBUTIONS))
        raise ValueError(f"unknown distribution {distribution!r}: choose one of {known}")
    sizes = [math.prod(shape) for shape in shapes]
    low = [1] * len(sizes) if at_least is None else at_least
    high = sizes if at_most is None else at_most
    if not sum(low) <= budget <= sum(high):
        raise ValueError(
            f"a budget of {budget} weights for {len(sizes)} layers cannot be met: they need at "
            f"least {sum(low)} and hold at most {sum(high)}, densities "
            f"{sum(low) / sum(sizes):.3g} to {sum(high) / sum(sizes):.3g}"
        )
    densities = DISTRIBUTIONS[distribution](shapes, budget / sum(sizes))
    shares = [density * size for density, size in zip(densities, sizes, strict=True)]
    return apportion(shares, budget, low, high)


def apportion(
    shares: Sequence[float], total: int, at_least: Sequence[int], at_most: Sequence[int]
) -> list[int]:
    """Whole numbers within bounds, near `shares`, that sum to `total` exactly.

    What bounds keep from one layer is spread evenly over those that can take it. The bounds must
    leave room: `sum(at_least) <= total <= sum(at_most)`.
    """
    assert sum(at_least) <= total <= sum(at_most), (at_least, total, at_most)
    counts = [
        min(max(math.floor(share), least), most)
        for share, least, most in zip(shares, at_least, at_most, strict=True)
    ]
    # Largest remainder first; further rounds only when bounds held some layers back.
    while (rest := total - sum(counts)) != 0:
        sign = 1 if rest > 0 else -1
        bounds = at_most if rest > 0 else at_least
        movable = [index for index, count in enumerate(counts) if count != bounds[index]]
        movable.sort(key=lambda index: -sign * (shares[index] - counts[index]))
        step = max(1, abs(rest) // len(movable))
        for index in movable:
            if (rest := total - sum(counts)) == 0:
                break
            counts[index] += sign * min(step, abs(rest), abs(bounds[index] - counts[index]))
    return counts


def _proportional(
    shapes: Shapes, density: float, raw_density: Callable[[Sequence[int]], float]
) -> list[float]:
    """`min(1, epsilon * raw)` with epsilon such that the densities meet the budget."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [raw_density(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[index] for index in dense)
        open_layers = [index for index in range(len(sizes)) if index not in dense]
        weight = sum(raw[index] * sizes[index] for index in open_layers)
        epsilon = budget / weight if weight else 0.0
        highest = max((raw[index] for index in open_layers), default=0.0)
        if epsilon * highest <= 1.0:
            return [1.0 if index in dense else epsilon * raw[index] for index in range(len(sizes))]
        dense.update(index for index in open_layers if raw[index] == highest)
