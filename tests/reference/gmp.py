"""Gradual magnitude pruning, slow and plain, from the equations; shares no code with the package.

M. Zhu, S. Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878. One numpy array per layer.

    s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (n dT))^3,   t in {t_0, t_0 + dT, ..., t_0 + n dT}
    the smallest |w| are masked; of equal ones the later goes first
"""

from collections.abc import Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


def sparsity(step: int, start: int, end: int, first: float, last: float) -> float:
    if step <= start:
        return first
    if step >= end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


def prune(weights: Arrays, masks: Arrays, counts: Sequence[int]) -> list[np.ndarray]:
    """Masks that keep the `counts[l]` largest weights of the support of each layer."""
    kept = []
    for weight, mask, count in zip(weights, masks, counts, strict=True):
        order = sorted(np.flatnonzero(mask), key=lambda i, weight=weight: (-abs(weight.flat[i]), i))
        new = np.zeros(weight.size, dtype=bool)
        new[order[:count]] = True
        kept.append(new.reshape(weight.shape))
    return kept


def prune_global(weights: Arrays, masks: Arrays, count: int) -> list[np.ndarray]:
    """The same with one ranking of all layers, laid end to end."""
    flat = np.concatenate([weight.ravel() for weight in weights])
    support = np.concatenate([mask.ravel() for mask in masks])
    (kept,) = prune([flat], [support], [count])
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [
        part.reshape(weight.shape)
        for part, weight in zip(np.split(kept, ends), weights, strict=True)
    ]
