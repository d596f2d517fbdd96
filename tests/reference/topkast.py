"""Top-KAST with gradient annealing, slow and plain, from the equations; shares no package code.

S. Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, arXiv 2106.03517;
A. Kundu et al., "AutoSparse", 2023, arXiv 2304.06941 for alpha. One layer, numpy.

    A = the largest |w|, B = the next largest as well; equal ones by index
    w~ = w on A, else 0;   dL/dw = G on A, alpha G on B without A, else 0
    penalty = c (1/2 sum_A w^2 + 1/2 sum_(B without A) w^2 / D)
    SGD:  m = momentum m + dL/dw;   w = w - lr m;   at a selection m = 0 off B
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Sets(NamedTuple):
    inner: np.ndarray
    outer: np.ndarray


def select(weight: np.ndarray, inner: int, outer: int) -> Sets:
    order = sorted(range(weight.size), key=lambda i: (-abs(weight.flat[i]), i))
    masks = []
    for count in (inner, outer):
        mask = np.zeros(weight.size, dtype=bool)
        mask[order[:count]] = True
        masks.append(mask.reshape(weight.shape))
    return Sets(*masks)


def gain(sets: Sets, alpha: float) -> np.ndarray:
    return np.where(sets.inner, 1.0, np.where(sets.outer, alpha, 0.0))


def penalty(weight: np.ndarray, sets: Sets, density: float) -> tuple[float, np.ndarray]:
    """Value and gradient, for c = 1."""
    value, gradient = 0.0, np.zeros_like(weight)
    for index, w in np.ndenumerate(weight):
        if sets.outer[index]:
            share = 1.0 if sets.inner[index] else 1 / density
            value += share * w * w / 2
            gradient[index] = share * w
    return value, gradient


def train(
    weight: np.ndarray,
    counts: tuple[int, int],
    loss_grad: Callable[[np.ndarray], np.ndarray],
    alphas: Sequence[float],
    *,
    interval: int,
    lr: float,
    momentum: float,
    coefficient: float,
) -> tuple[np.ndarray, Sets]:
    """W and its sets after SGD on a loss whose gradient with respect to W~ is `loss_grad(W~)`."""
    weight, m = weight.copy(), np.zeros_like(weight)
    sets = select(weight, *counts)
    for step, alpha in enumerate(alphas):
        if step and step % interval == 0:
            sets = select(weight, *counts)
            m[~sets.outer] = 0
        g = gain(sets, alpha) * loss_grad(np.where(sets.inner, weight, 0))
        g += coefficient * penalty(weight, sets, counts[0] / weight.size)[1]
        m = momentum * m + g
        weight = weight - lr * m
    return weight, sets
