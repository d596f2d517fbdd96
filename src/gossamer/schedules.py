"""Schedules: pure functions from a fraction of training in [0, 1] to a float.

Outside [0, 1] the fraction is clamped, so a schedule keeps its last value.
"""

from __future__ import annotations

import math

__all__ = ["cosine", "cubic", "linear"]


def linear(fraction: float, start: float, end: float) -> float:
    """Straight line from `start` to `end`."""
    return start + (end - start) * _clamp(fraction)


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`: slow, fast, slow."""
    return end + (start - end) * (1 + math.cos(math.pi * _clamp(fraction))) / 2


def cubic(fraction: float, start: float, end: float) -> float:
    """Cubic of gradual pruning, `end + (start - end) * (1 - fraction)^3`: most change early."""
    return end + (start - end) * (1 - _clamp(fraction)) ** 3


def _clamp(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
