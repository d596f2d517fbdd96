"""MEST, slow and plain, from its rules; shares no code with the package.

G. Yuan et al., "MEST", NeurIPS 2021, arXiv 2110.14032. One numpy array per layer; of equal values
the earlier one counts more. At an update, in each layer:

    keep the largest |w| + lambda |g| of the support, so many that the lower sparsity is met
    grow empty places at random, so many that the upper sparsity is met; they start at zero

    EM:    lower = s + p, upper = s;   EM&S:  lower = s, upper = s - p
    p of EM and EM&S is halved once, then 0; p of the vanilla method, which has EM's bounds, stays
"""

from typing import NamedTuple

import numpy as np


class Support(NamedTuple):
    """Weights that stay as they are, and weights that start at zero."""

    kept: np.ndarray
    grown: np.ndarray


def sparsities(s: float, p: float, soft: bool) -> tuple[float, float]:
    """What an update prunes to, and what it grows to."""
    return (s, s - p) if soft else (s + p, s)


def mutation(share: float, p: float, elastic: bool, halve: float, stop: float) -> float:
    """p at this share of training."""
    if share >= stop:
        return 0.0
    return p / 2 if elastic and share >= halve else p


def _largest(scores: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    order = sorted(np.flatnonzero(candidates), key=lambda i: (-scores.flat[i], i))
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


def update(
    weight: np.ndarray,
    mask: np.ndarray,
    gradient: np.ndarray,
    drawn: np.ndarray,
    *,
    keep: int,
    goal: int,
    lam: float = 0.0,
) -> Support:
    """One layer (or all, laid end to end); the empty places of largest `drawn` numbers grow."""
    kept = _largest(abs(weight) + lam * abs(gradient), mask, keep)
    return Support(kept, _largest(drawn, ~kept, goal - int(kept.sum())))
