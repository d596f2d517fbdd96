"""GraNet, slow and plain, from the equations; shares no code with the package.

S. Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS
2021, arXiv 2106.10404. One numpy array per layer; of equal values the earlier one counts more.

    1  keep the K(t) largest |w| of all layers,  K(t) = (1 - s(t)) N
       s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_f - t_0))^3
    2  in each layer: floor(r(t) n_l) of the n_l survivors leave, smallest |w| first; as many of the
       places that are empty now come in, largest |g| first
       r(t) = r_T + (r_0 - r_T) (1 + cos(pi t / T)) / 2
    A survivor that left and came in again was never gone; what was empty starts at zero.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Arrays = Sequence[np.ndarray]


class Support(NamedTuple):
    """Per layer: weights that stay as they are, and weights that start at zero."""

    kept: list[np.ndarray]
    grown: list[np.ndarray]


def sparsity(step: int, start: int, end: int, first: float, last: float) -> float:
    if step <= start:
        return first
    if step >= end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


def regenerated(step: int, total: int, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * step / total)) / 2


def prune(weights: Arrays, masks: Arrays, count: int) -> list[np.ndarray]:
    """One list of (|w|, layer, place) over the network, sorted; the first `count` stay."""
    places = [
        (-abs(float(weight.flat[place])), layer, place)
        for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True))
        for place in np.flatnonzero(mask)
    ]
    kept = [np.zeros(mask.shape, dtype=bool) for mask in masks]
    for _, layer, place in sorted(places)[:count]:
        kept[layer].flat[place] = True
    return kept


def regenerate(weight: np.ndarray, mask: np.ndarray, gradient: np.ndarray, rate: float) -> Support:
    """Step 2 for one layer; both lists of the result have one entry."""
    survivors = sorted(np.flatnonzero(mask), key=lambda i: (-abs(weight.flat[i]), i))
    moved = math.floor(rate * len(survivors) + 1e-9)
    staying = set(survivors[: len(survivors) - moved])
    empty = [i for i in range(weight.size) if i not in staying]
    chosen = sorted(empty, key=lambda i: (-abs(gradient.flat[i]), i))[:moved]
    kept, grown = np.zeros(weight.size, dtype=bool), np.zeros(weight.size, dtype=bool)
    for place in staying | set(chosen):
        (kept if mask.flat[place] else grown)[place] = True
    return Support([kept.reshape(weight.shape)], [grown.reshape(weight.shape)])


def update(weights: Arrays, masks: Arrays, gradients: Arrays, count: int, rate: float) -> Support:
    """One whole update: `count` weights over all layers, the share `rate` of each regenerated."""
    survivors = prune(weights, masks, count)
    layers = [regenerate(*layer, rate) for layer in zip(weights, survivors, gradients, strict=True)]
    return Support([layer.kept[0] for layer in layers], [layer.grown[0] for layer in layers])
