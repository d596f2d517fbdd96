"""Sparse momentum, slow and plain, from the rules; shares no code with the package.

T. Dettmers, L. Zettlemoyer, "Sparse Networks from Scratch", 2019, arXiv 1907.04840. One numpy array
per layer; of equal values the earlier one counts more.

    M = b M + (1 - b) g                            every step, at every place
    s_l = mean |M| on the support / sum of these   before anything leaves
    d_l = ceil(p_l n_l) weights leave layer l, smallest |w| first;  p_l = min(p, share of empty
          places) if less than a fifth is empty and s_l is above average, else p
    s_l of all that left come into layer l, largest |M| of what is not retained first; whole numbers
    by largest remainder, and what a full layer cannot take one by one to the others in turn
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


def remember(momenta: Arrays, gradients: Arrays, smoothing: float) -> list[np.ndarray]:
    return [
        smoothing * momentum + (1 - smoothing) * gradient
        for momentum, gradient in zip(momenta, gradients, strict=True)
    ]


def drop_fraction(step: int, end: float, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(1, step / end))) / 2


def shares(momenta: Arrays, masks: Arrays) -> list[float]:
    means = [
        float(np.abs(momentum[mask]).sum()) / max(1, int(mask.sum()))
        for momentum, mask in zip(momenta, masks, strict=True)
    ]
    return [mean / sum(means) for mean in means]


def dropped(masks: Arrays, parts: Sequence[float], rate: float) -> list[int]:
    counts = []
    for mask, part in zip(masks, parts, strict=True):
        empty = 1 - mask.sum() / mask.size
        p = min(rate, empty) if empty < 0.2 and part > 1 / len(masks) else rate
        counts.append(math.ceil(p * mask.sum() - 1e-9))
    return counts


def regrown(masks: Arrays, parts: Sequence[float], leaving: Sequence[int]) -> list[int]:
    """How many each layer takes in."""
    total = sum(leaving)
    held = [int(mask.sum()) - gone for mask, gone in zip(masks, leaving, strict=True)]
    room = [mask.size - left for mask, left in zip(masks, held, strict=True)]
    counts = [
        min(max(math.floor(part * total), int(left == 0)), most)
        for part, left, most in zip(parts, held, room, strict=True)
    ]
    while sum(counts) < total:
        waiting = [i for i in range(len(masks)) if counts[i] < room[i]]
        waiting.sort(key=lambda i: counts[i] - parts[i] * total)
        each = max(1, (total - sum(counts)) // len(waiting))
        for i in waiting:
            counts[i] += min(each, room[i] - counts[i], total - sum(counts))
    return counts


def move(
    weights: Arrays, masks: Arrays, momenta: Arrays, leaving: Sequence[int], coming: Sequence[int]
) -> Support:
    """`leaving[l]` weights leave layer l, `coming[l]` come in."""
    kept, grown = [], []
    for weight, mask, momentum, out, into in zip(
        weights, masks, momenta, leaving, coming, strict=True
    ):
        active = np.flatnonzero(mask)
        by_magnitude = sorted(active, key=lambda p, w=weight: (-abs(w.flat[p]), p))
        retained = set(by_magnitude[: len(active) - out])
        free = [p for p in range(mask.size) if p not in retained]
        chosen = sorted(free, key=lambda p, m=momentum: (-abs(m.flat[p]), p))[:into]
        there = np.zeros(mask.size, dtype=bool)
        there[[*retained, *chosen]] = True
        there = there.reshape(mask.shape)
        kept.append(there & mask)
        grown.append(there & ~mask)
    return Support(kept, grown)


def update(weights: Arrays, masks: Arrays, momenta: Arrays, rate: float) -> Support:
    parts = shares(momenta, masks)
    leaving = dropped(masks, parts, rate)
    return move(weights, masks, momenta, leaving, regrown(masks, parts, leaving))


def update_global(weights: Arrays, masks: Arrays, momenta: Arrays, rate: float) -> Support:
    """One ranking of all layers, laid end to end."""

    def joined(arrays: Arrays) -> list[np.ndarray]:
        return [np.concatenate([array.ravel() for array in arrays])]

    count = [math.ceil(rate * sum(int(mask.sum()) for mask in masks) - 1e-9)]
    whole = move(joined(weights), joined(masks), joined(momenta), count, count)
    ends = np.cumsum([mask.size for mask in masks])[:-1]

    def apart(flat: np.ndarray) -> list[np.ndarray]:
        pieces = np.split(flat, ends)
        return [piece.reshape(mask.shape) for piece, mask in zip(pieces, masks, strict=True)]

    return Support(apart(whole.kept[0]), apart(whole.grown[0]))
