"""The layer budgets of a static mask, slow and plain; shares no code with the package.

Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134: ERK. Layer l with n_l weights gets

    d_l = min(1, eps r_l),   r_l = (sum of all dimensions) / (product of all dimensions)

with the one eps that makes sum d_l n_l the budget. Found here by bisection: the sum grows with eps.
ER counts only the first two dimensions in r_l; uniform gives every layer the same.
"""

from collections.abc import Sequence
from math import prod

Shapes = Sequence[Sequence[int]]


def densities(distribution: str, shapes: Shapes, density: float) -> list[float]:
    sizes = [prod(shape) for shape in shapes]
    if distribution == "uniform":
        raw = [1.0 for _ in shapes]
    elif distribution == "er":
        raw = [sum(shape[:2]) / prod(shape[:2]) for shape in shapes]
    else:
        raw = [sum(shape) / prod(shape) for shape in shapes]

    def kept(epsilon: float) -> float:
        return sum(min(1.0, epsilon * r) * n for r, n in zip(raw, sizes, strict=True))

    low, high = 0.0, 1.0 / min(raw)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < density * sum(sizes) else (low, middle)
    return [min(1.0, high * r) for r in raw]


def counts_fit(distribution: str, shapes: Shapes, density: float, counts: Sequence[int]) -> bool:
    """Whether whole counts meet the budget exactly, each within one weight of its share."""
    sizes = [prod(shape) for shape in shapes]
    shares = [d * n for d, n in zip(densities(distribution, shapes, density), sizes, strict=True)]
    near = all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))
    return near and sum(counts) == round(density * sum(sizes))
