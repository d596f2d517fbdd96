"""RigL, slow and plain, from the equations; shares no code with the package.

U. Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134. One numpy array per layer; of
equal values the earlier one counts more.

    f(t) = a_T + (a_0 - a_T) (1 + cos(pi t / T_end)) / 2
    k = floor(f n) of a layer's n weights leave, smallest |w| first; k of the places that are not
    retained come in, largest |g| first
    A weight that left and came in again was never gone; what was empty starts at zero.
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


def drop_fraction(step: int, end: float, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(1, step / end))) / 2


def update(weights: Arrays, masks: Arrays, gradients: Arrays, fraction: float) -> Support:
    """Each layer by itself."""
    layers = [
        update_global([weight], [mask], [gradient], fraction)
        for weight, mask, gradient in zip(weights, masks, gradients, strict=True)
    ]
    return Support([layer.kept[0] for layer in layers], [layer.grown[0] for layer in layers])


def update_global(weights: Arrays, masks: Arrays, gradients: Arrays, fraction: float) -> Support:
    """All layers as one: places are pairs (layer, place)."""
    active = [(i, p) for i, mask in enumerate(masks) for p in np.flatnonzero(mask)]
    everywhere = [(i, p) for i, mask in enumerate(masks) for p in range(mask.size)]
    k = math.floor(fraction * len(active) + 1e-9)
    by_magnitude = sorted(active, key=lambda at: (-abs(weights[at[0]].flat[at[1]]), at))
    retained = set(by_magnitude[: len(active) - k])
    free = [at for at in everywhere if at not in retained]
    by_gradient = sorted(free, key=lambda at: (-abs(gradients[at[0]].flat[at[1]]), at))
    kept = [np.zeros(mask.shape, dtype=bool) for mask in masks]
    grown = [np.zeros(mask.shape, dtype=bool) for mask in masks]
    for layer, place in retained | set(by_gradient[:k]):
        target = kept if masks[layer].flat[place] else grown
        target[layer].flat[place] = True
    return Support(kept, grown)
