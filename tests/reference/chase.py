"""Chase, slow and plain, from the equations; shares no code with the package.

L. Yin et al., "Dynamic Sparsity Is Channel-Level Sparsity Learner", NeurIPS 2023, arXiv 2305.19454.
Everything is a list of numpy arrays, one per layer; rankings sort one long concatenated array, and
equal values go by position: layer first, then index within the layer.

    b(t) = d + margin (1 + cos(pi t / T_A)) / 2              density ceiling of phase A
    f(t) = f_end + (f_0 - f_end) (1 + cos(pi t / T)) / 2     drop fraction of phase B
    S(t) = S_c (1 - (1 - (t - t_0) / (T_c - t_0))^3)         share of channels removed
    UMM(l, c) = (1 / n_c) sum_i |w_i|                        n_c counts every position, in all
                                                             layers that write channel c
    m_l = int(C_l (1 - S_c) beta)                            floor of layer l
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

Arrays = Sequence[np.ndarray]


# Schedules


def ceiling(step: int, phase_a: int, density: float, margin: float) -> float:
    if step >= phase_a:
        return density
    return min(1.0, density + margin * (1 + math.cos(math.pi * step / phase_a)) / 2)


def drop_fraction(step: int, total: int, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, step / total))) / 2


def channel_sparsity(step: int, start: int, end: int, final: float) -> float:
    if step >= end:
        return final
    progress = max(0, step - start) / (end - start)
    return final * (1 - (1 - progress) ** 3)


# Weights


class Support(NamedTuple):
    """What an update keeps and what it grows; weights that are not kept start at zero."""

    kept: list[np.ndarray]
    grown: list[np.ndarray]

    @property
    def mask(self) -> list[np.ndarray]:
        return [k | g for k, g in zip(self.kept, self.grown, strict=True)]


def _flat(arrays: Arrays) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def _like(flat: np.ndarray, arrays: Arrays) -> list[np.ndarray]:
    out, start = [], 0
    for array in arrays:
        out.append(flat[start : start + array.size].reshape(array.shape))
        start += array.size
    return out


def _largest(scores: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Which candidates are among the `count` of highest score; the earlier one wins a tie."""
    positions = np.flatnonzero(candidates)
    ranked = positions[np.argsort(-scores[positions], kind="stable")]
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[ranked[:count]] = True
    return chosen


def prune_and_grow(
    weights: Arrays, masks: Arrays, live: Arrays, growth: Arrays, keep: int, goal: int
) -> Support:
    """Keep the `keep` largest |w| of the support, grow to `goal` by `growth` on live positions."""
    kept = _largest(np.abs(_flat(weights)), _flat(masks), keep)
    candidates = _flat(live) & ~kept
    grown = _largest(_flat(growth), candidates, max(0, goal - int(kept.sum())))
    return Support(_like(kept, weights), _like(grown, weights))


def update(
    weights: Arrays,
    masks: Arrays,
    live: Arrays,
    gradients: Arrays,
    *,
    step: int,
    total: int,
    phase_a: int,
    original: int,
    density: float,
    margin: float,
    drop: tuple[float, float],
) -> Support:
    """The support after the update at `step`, with global ranking.

    `original` is N, the weights of the network before any removal.
    """
    budget = round(density * original)
    active = sum(int(mask.sum()) for mask in masks)
    keep = min(active, budget)
    if step <= phase_a:
        goal = round(ceiling(step, phase_a, density, margin) * original)
    else:
        keep -= math.ceil(drop_fraction(step, total, *drop) * keep)
        goal = budget
    return prune_and_grow(weights, masks, live, [abs(g) for g in gradients], keep, goal)


# Channels


def joined(layers: Arrays) -> np.ndarray:
    """Rows of all layers that write the same channels, side by side: `(channels, all inputs)`."""
    return np.concatenate([layer.reshape(len(layer), -1) for layer in layers], axis=1)


def umm(weight: np.ndarray, fan_in: int) -> np.ndarray:
    """Unmasked mean magnitude of every output channel of `weight: (out, in, *kernel)`."""
    return np.array([sum(abs(float(w)) for w in row.reshape(-1)) / fan_in for row in weight])


def masked_mean(weight: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.array(
        [
            sum(abs(float(w)) for w in row[on]) / on.sum() if on.any() else 0.0
            for row, on in zip(weight, mask.astype(bool), strict=True)
        ]
    )


def channel_density(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(len(mask), -1).mean(1)


def floor(channels: int, sparsity: float, beta: float, least: int) -> int:
    """m_l in exact arithmetic: 10 channels, S_c 0.9, beta 1 keep one channel, not none."""
    exact = channels * (1 - Fraction(str(sparsity))) * Fraction(str(beta))
    return min(channels, max(int(exact), least))


def live_target(channels: int, sparsity_now: float) -> int:
    return round((1 - sparsity_now) * channels)


def select(
    scores: Sequence[np.ndarray], live: Sequence[np.ndarray], floors: Sequence[int], target: int
) -> list[list[int]]:
    """Remove one channel at a time: the lowest of all layers that are above their floor."""
    live = [alive.copy() for alive in live]
    removed: list[list[int]] = [[] for _ in scores]
    while sum(int(alive.sum()) for alive in live) > target:
        best: tuple[float, int, int] | None = None
        for layer, (score, alive) in enumerate(zip(scores, live, strict=True)):
            if alive.sum() <= floors[layer]:
                continue
            for channel in np.flatnonzero(alive):
                candidate = (float(score[channel]), layer, int(channel))
                if best is None or candidate < best:
                    best = candidate
        if best is None:
            raise ValueError("every layer is on its floor")
        _, layer, channel = best
        live[layer][channel] = False
        removed[layer].append(channel)
    return [sorted(channels) for channels in removed]
