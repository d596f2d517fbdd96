"""Which channels go: those of the lowest score, so many that a target is met.

By number, as in Chase: the lowest over all layers, until so many are left. By price: blocks of a
layer's lowest channels, until what is left costs no more than it may; a block's score may then be
weighed against what its removal saves.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["select_blocks", "select_channels"]


def select_channels(
    scores: Sequence[Tensor],
    live: Sequence[Tensor],
    *,
    floors: Sequence[int],
    live_target: int,
    multiples: Sequence[int] | None = None,
) -> list[Tensor]:
    """Channels to remove from each pool so that `live_target` are left over all pools.

    The live channel of lowest score goes first, ties by (pool, channel); a pool on its floor loses
    no more. With `multiples` every width that shrinks becomes a multiple of its pool's, and the
    total comes as close to the target as that allows.

    Args:
        scores: One `(channels,)` tensor per pool.
        live: One `(channels,)` bool tensor per pool; only live channels count and may go.
        floors: Channels each pool keeps at least.
        live_target: Channels to leave over all pools.
        multiples: What each pool's width is rounded to; None: any width will do.

    Returns:
        Sorted int64 indices per pool.
    """
    ranked = _ranked(scores, live)
    current = [len(channels) for channels in ranked]
    widths = list(current)
    surplus = sum(widths) - live_target
    for _, pool in sorted((value, pool) for pool, row in enumerate(ranked) for value, _ in row):
        if surplus <= 0:
            break
        if widths[pool] > floors[pool]:
            widths[pool] -= 1
            surplus -= 1
    if multiples is not None:
        widths = _rounded(widths, current, floors, multiples)
    return _lowest(ranked, widths)


def select_blocks(
    scores: Sequence[Tensor],
    live: Sequence[Tensor],
    *,
    ladders: Sequence[Sequence[int]],
    enough: Callable[[Sequence[int]], bool],
    done: Callable[[Sequence[int]], bool],
    grains: Sequence[int] | None = None,
    price: Callable[[Sequence[int]], float] | None = None,
) -> list[Tensor]:
    """Channels to remove from each pool until the widths that are left are narrow `enough`.

    A block is what lies between a pool's width and the next of its ladder: its lowest channels.
    The block of lowest mean score goes first, ties by pool; with `price`, the block of lowest
    score per price saved at the present widths. A width at which nothing is saved is passed over
    for the next that saves something; a pool without one stays as it is. A block that would
    finish, and more, waits for the last removal, and there it is only as large as it must be.

    Args:
        scores: One `(channels,)` tensor per pool.
        live: One `(channels,)` bool tensor per pool; only live channels count and may go.
        ladders: Widths that each pool may have.
        enough: Whether the network of these widths is narrow enough for now.
        done: Whether it is for good.
        grains: At the last removal: what the last block is a multiple of, per pool.
        price: Of the network of these widths; None: every channel counts the same.

    Returns:
        Sorted int64 indices per pool.
    """
    ranked = _ranked(scores, live)
    widths = [len(row) for row in ranked]
    totals = [_running_sums(row) for row in ranked]
    rungs = [sorted(ladder, reverse=True) for ladder in ladders]

    def narrowed(pool: int, width: int) -> list[int]:
        return [*widths[:pool], width, *widths[pool + 1 :]]

    def offer(pool: int) -> tuple[float, int, int] | None:
        """The pool's next block: what it is worth, the pool, and the width it leaves."""
        channels = len(ranked[pool])
        now = price(widths) if price is not None else 0.0
        for width in rungs[pool]:
            if width < widths[pool]:
                saved = float(widths[pool] - width)
                if price is not None:
                    saved = now - price(narrowed(pool, width))
                if saved > 1e-9 * now:  # and not by rounding
                    lost = totals[pool][channels - width] - totals[pool][channels - widths[pool]]
                    return lost / saved, pool, width
        return None

    taken = 0
    offers = [(*found, taken) for pool in range(len(widths)) if (found := offer(pool)) is not None]
    heapq.heapify(offers)
    while offers and not enough(widths):
        _, pool, width, made = heapq.heappop(offers)
        if price is None or made == taken:
            if done(narrowed(pool, width)):
                if grains is None:
                    continue
                between = range(widths[pool] - 1, width, -1)
                finer = (w for w in between if w % grains[pool] == 0 and done(narrowed(pool, w)))
                width = next(finer, width)
            widths[pool] = width
            taken += 1
        # Others have shrunk since it was made, or the pool has: what it saves is another now.
        if (found := offer(pool)) is not None:
            heapq.heappush(offers, (*found, taken))
    return _lowest(ranked, widths)


def _ranked(scores: Sequence[Tensor], live: Sequence[Tensor]) -> list[list[tuple[float, int]]]:
    """Per pool (score, channel) of the live channels, lowest first."""
    return [
        sorted((value, channel) for channel, value in enumerate(score.tolist()) if alive[channel])
        for score, alive in zip(scores, (mask.tolist() for mask in live), strict=True)
    ]


def _running_sums(row: Sequence[tuple[float, int]]) -> list[float]:
    """Sum of the lowest 0, 1, 2, ... scores."""
    sums = [0.0]
    for value, _ in row:
        sums.append(sums[-1] + value)
    return sums


def _lowest(ranked: Sequence[Sequence[tuple[float, int]]], widths: Sequence[int]) -> list[Tensor]:
    """The channels that go when each pool keeps its `widths` highest."""
    return [
        torch.tensor(sorted(channel for _, channel in row[: len(row) - width]), dtype=torch.int64)
        for row, width in zip(ranked, widths, strict=True)
    ]


def _rounded(
    widths: Sequence[int],
    current: Sequence[int],
    floors: Sequence[int],
    multiples: Sequence[int],
) -> list[int]:
    """Widths in multiples, none above `current`; their sum is as near as can be to that given."""
    low = [
        width if width == now else max(floor, width - width % multiple)
        for width, now, floor, multiple in zip(widths, current, floors, multiples, strict=True)
    ]
    rest = sum(widths) - sum(low)
    for pool in sorted(range(len(low)), key=lambda pool: low[pool] - widths[pool]):
        step = min(multiples[pool], current[pool] - low[pool])
        if step and 2 * rest >= step:
            low[pool] += step
            rest -= step
    return low
