"""SRigL, slow and plain, from the equations; shares no code with the package.

M. Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, arXiv 2305.02299.
One layer is a numpy array (neurons, inputs); lists of places are sorted one by one, and of equal
values the earlier one counts more.

    f(t) = (alpha / 2) (1 + cos(pi t / T_end)),  K = floor(f(t) nnz)
    kept: all but the K smallest |w|;  wanted: the K largest |g| outside, in live neurons
    a live neuron with fewer than max(1, gamma k) of both together is ablated; its weights go
    k' = floor(B / neurons left);  each of these grows its largest |g| until it has k'
    A weight that left and came in again was never gone; what was empty starts at zero.
"""

import math
from typing import NamedTuple

import numpy as np

Place = tuple[int, int]


class Support(NamedTuple):
    """Weights that stay as they are, and weights that start at zero."""

    kept: np.ndarray
    grown: np.ndarray


def drop_fraction(step: int, end: float, alpha: float) -> float:
    return alpha / 2 * (1 + math.cos(math.pi * step / end))


def fan_in(budget: int, neurons: int) -> int:
    return budget // neurons


def _ordered(places: set[Place], values: np.ndarray) -> list[Place]:
    return sorted(places, key=lambda place: (-abs(float(values[place])), place))


def ablated(salient: dict[int, int], k: int, gamma: float, budget: int, inputs: int) -> set[int]:
    """Neurons to ablate; so many stay that their inputs can hold the budget."""
    few = [row for row, count in salient.items() if count < max(1, gamma * k)]
    room = len(salient) - max(1, -(-budget // inputs))
    order = sorted(few, key=lambda row: (salient[row], -row))
    return set(order[: max(0, room)])


def update(
    weight: np.ndarray,
    mask: np.ndarray,
    gradient: np.ndarray,
    *,
    budget: int,
    fraction: float,
    gamma: float | None,
) -> Support:
    active = {(int(i), int(j)) for i, j in np.argwhere(mask)}
    live = {i for i, _ in active}
    k = len(active) // len(live)
    moved = math.floor(fraction * len(active) + 1e-9)
    kept = set(_ordered(active, weight)[: len(active) - moved])
    places = {(i, j) for i in live for j in range(weight.shape[1])}
    if gamma is not None:
        wanted = set(_ordered(places - kept, gradient)[:moved])
        salient = {row: sum(i == row for i, _ in kept | wanted) for row in sorted(live)}
        live -= ablated(salient, k, gamma, budget, weight.shape[1])
    held = {place for place in kept if place[0] in live}
    grown: set[Place] = set()
    for row in live:
        own = {place for place in held if place[0] == row}
        free = {(row, j) for j in range(weight.shape[1])} - own
        grown |= set(_ordered(free, gradient)[: fan_in(budget, len(live)) - len(own)])
    support = Support(np.zeros(weight.shape, dtype=bool), np.zeros(weight.shape, dtype=bool))
    for place in held | grown:
        (support.kept if place in active else support.grown)[place] = True
    return support
