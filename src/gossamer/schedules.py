"""Schedules: pure functions from a fraction of training in [0, 1] to a float.

Outside [0, 1] the fraction is clamped, so a schedule keeps its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["DECAYS", "anneal", "cosine", "cubic", "linear", "sigmoid", "sigmoid_cosine", "window"]


def linear(fraction: float, start: float, end: float) -> float:
    """Straight line from `start` to `end`."""
    return start + (end - start) * _clamp(fraction)


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`: slow, fast, slow."""
    return end + (start - end) * (1 + math.cos(math.pi * _clamp(fraction))) / 2


def cubic(fraction: float, start: float, end: float) -> float:
    """Cubic of gradual pruning, `end + (start - end) * (1 - fraction)^3`: most change early."""
    return end + (start - end) * (1 - _clamp(fraction)) ** 3


def sigmoid(fraction: float, start: float, end: float) -> float:
    """Logistic curve over [-6, 6]: flat, steep at the half, flat. It misses both ends by 0.25 %."""
    share = 1 / (1 + math.exp(12 * _clamp(fraction) - 6))
    return end + (start - end) * share


def sigmoid_cosine(fraction: float, start: float, end: float) -> float:
    """Whichever of `sigmoid` and `cosine` is nearer to `start`: AutoSparse's decay."""
    nearer = max if start >= end else min
    return nearer(sigmoid(fraction, start, end), cosine(fraction, start, end))


def anneal(schedule: str, fraction: float, start: float, *, end: float, reset: float) -> float:
    """Annealing factor: from `start` towards 0, and exactly 0 from `end` or `reset` on.

    Args:
        schedule: A key of `DECAYS`.
        fraction: Of training.
        start: Value at fraction 0.
        end: Fraction at which the decay is over.
        reset: Fraction at which the factor drops to 0, wherever the decay stands.
    """
    return 0.0 if fraction >= min(end, reset) else DECAYS[schedule](fraction / end, start, 0.0)


DECAYS: dict[str, Callable[[float, float, float], float]] = {
    "none": lambda fraction, start, end: start,
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_cosine": sigmoid_cosine,
}


def window(start: float, end: float, total_steps: int) -> tuple[int, int]:
    """Steps between which something happens, at least one apart, from fractions of training."""
    first = min(round(start * total_steps), total_steps - 1)
    return first, max(first + 1, round(end * total_steps))


def _clamp(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
