"""SR-STE, slow and plain, from the equations; shares no code with the package.

A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021, arXiv 2102.04010. Arrays are numpy, weights `(out, in, *kernel)`.

    E_i = 1 for the N largest |w| of every M consecutive inputs; of equals, the first
    W <- W - gamma (g(E * W) + lambda (1 - E) * W)
    SAD_{i:j} = || E_i - E_j ||_1
"""

import itertools
from collections.abc import Sequence

import numpy as np


def mask(weight: np.ndarray, n: int, m: int, *, dense_tail: bool = False) -> np.ndarray:
    """One group after the other; the last of a row may be shorter."""
    kept = np.zeros(weight.shape, dtype=bool)
    positions = itertools.product(*(range(size) for size in weight.shape[2:]))
    for kernel in positions:
        for out in range(weight.shape[0]):
            for first in range(0, weight.shape[1], m):
                group = range(first, min(first + m, weight.shape[1]))
                ranked = sorted(group, key=lambda i: (-abs(weight[(out, i, *kernel)]), i))
                count = len(group) if dense_tail and len(group) < m else n
                for i in ranked[:count]:
                    kept[(out, i, *kernel)] = True
    return kept


def forward(weights: Sequence[np.ndarray], x: np.ndarray, n: int, m: int) -> list[np.ndarray]:
    """Activations of a bias-free ReLU network with N:M weights; the last layer is linear."""
    activations = [x]
    for layer, weight in enumerate(weights):
        x = x @ (mask(weight, n, m) * weight).T
        if layer < len(weights) - 1:
            x = np.maximum(x, 0)
        activations.append(x)
    return activations


def gradients(
    weights: Sequence[np.ndarray], x: np.ndarray, target: np.ndarray, n: int, m: int
) -> list[np.ndarray]:
    """Straight-through gradients of 1/2 sum (y - target)^2: as if E were not there."""
    activations = forward(weights, x, n, m)
    delta = activations[-1] - target
    found = []
    for layer in reversed(range(len(weights))):
        found.insert(0, delta.T @ activations[layer])
        weight = weights[layer]
        delta = (delta @ (mask(weight, n, m) * weight)) * (activations[layer] > 0)
    return found


def step(
    weights: Sequence[np.ndarray],
    x: np.ndarray,
    target: np.ndarray,
    n: int,
    m: int,
    *,
    lr: float,
    lam: float,
    decoupled: bool = False,
) -> list[np.ndarray]:
    """One SGD step without momentum; decoupled: the decay comes after it, by the same mask."""
    updated = []
    for weight, gradient in zip(weights, gradients(weights, x, target, n, m), strict=True):
        pruned = ~mask(weight, n, m)
        if decoupled:
            moved = weight - lr * gradient
            updated.append(np.where(pruned, moved * (1 - lr * lam), moved))
        else:
            updated.append(weight - lr * (gradient + lam * pruned * weight))
    return updated


def sad(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> int:
    return sum(int(np.abs(x.astype(int) - y.astype(int)).sum()) for x, y in zip(a, b, strict=True))
