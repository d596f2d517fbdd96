"""SET, slow and plain, from the rules; shares no code with the package.

D. C. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 2018, arXiv 1707.04780. One numpy
array per layer. Of equal weights the later one leaves first.

    the share zeta of the positive weights leaves, nearest to 0 first, and that of the negative ones
    (or, unsigned, of all weights by magnitude); a zero is positive
    as many places that were empty come in, highest random number first
    zeta is cut to what the empty places can take in
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


def update(weights: Arrays, masks: Arrays, numbers: Arrays, zeta: float, signed: bool) -> Support:
    """Each layer by itself; `numbers`: random, one per place."""
    layers = [
        update_global([weight], [mask], [number], zeta, signed)
        for weight, mask, number in zip(weights, masks, numbers, strict=True)
    ]
    return Support([layer.kept[0] for layer in layers], [layer.grown[0] for layer in layers])


def update_global(
    weights: Arrays, masks: Arrays, numbers: Arrays, zeta: float, signed: bool
) -> Support:
    """All layers as one: places are pairs (layer, place)."""
    active = [(i, p) for i, mask in enumerate(masks) for p in np.flatnonzero(mask)]
    empty = [(i, p) for i, mask in enumerate(masks) for p in np.flatnonzero(~mask)]
    zeta = min(zeta, len(empty) / len(active))
    value = {(i, p): float(weights[i].flat[p]) for i, p in active}
    if signed:
        groups = [[at for at in active if value[at] >= 0], [at for at in active if value[at] < 0]]
    else:
        groups = [active]
    staying = set()
    for group in groups:
        far_first = sorted(group, key=lambda at: (-abs(value[at]), at))
        staying |= set(far_first[: len(group) - math.floor(zeta * len(group) + 1e-9)])
    by_number = sorted(empty, key=lambda at: (-numbers[at[0]].flat[at[1]], at))
    kept = [np.zeros(mask.shape, dtype=bool) for mask in masks]
    grown = [np.zeros(mask.shape, dtype=bool) for mask in masks]
    for layer, place in staying:
        kept[layer].flat[place] = True
    for layer, place in by_number[: len(active) - len(staying)]:
        grown[layer].flat[place] = True
    return Support(kept, grown)
