"""Widths: which numbers of channels hardware likes.

Kernels work in blocks of 8 or 16 channels: 35 of them can take 1.7 times as long as 32.
"""

from __future__ import annotations

import math

__all__ = ["block", "steps"]


def block(channels: int, per_channel: int = 1, multiple: int | None = None) -> int:
    """Channels to remove at a time, so that widths stay multiples.

    Args:
        channels: Of the full layer.
        per_channel: Positions that each of them takes in it: 64 in an attention head of 64.
        multiple: Of positions; None: 16, or 8 in layers below 64, or 1 below 16, where one block
            of 8 would be half of the layer or more.
    """
    width = channels * per_channel
    if multiple is None:
        multiple = 16 if width >= 64 else 8 if width >= 16 else 1
    return multiple // math.gcd(multiple, per_channel)


def steps(channels: int, size: int, least: int = 1) -> list[int]:
    """Widths that a layer may have, widest first: its own, and multiples of `size` from `least`."""
    return [channels, *(w for w in range((channels - 1) // size * size, 0, -size) if w >= least)]
