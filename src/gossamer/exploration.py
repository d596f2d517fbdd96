"""Exploration: the moves of dynamic sparse training, on lists of tensors with one entry per layer.

    drop    the support keeps its largest |w|
    grow    empty places of the highest scores join it: |gradient|, |momentum|, random numbers

How many is a `Count`: a whole number counts over all layers, which then compete (global scope); a
sequence has a number for each layer. Counts are met exactly, and ties go to the lower (layer,
index), so that all ranks agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.ops import keep_largest
from gossamer.sharding import Crowd, placed

__all__ = [
    "SCOPES",
    "Count",
    "drop_smallest",
    "grow_largest",
    "prune_to",
    "random_scores",
    "select",
    "share",
    "sizes",
    "update_steps",
]

Count = int | Sequence[int]
SCOPES = ("layer", "global")


def select(scores: Sequence[Tensor], count: Count, among: Sequence[Tensor]) -> list[Tensor]:
    """Bool masks of the `count` highest scores where `among` is True.

    Args:
        scores: One tensor per layer, of one dtype.
        count: Over all layers together, or of each layer.
        among: Bool masks of the candidates.

    Raises:
        ValueError: More than there are candidates, or a score that is NaN.
    """
    if isinstance(count, int):
        return keep_largest(scores, count, among)
    return [
        keep_largest([score], wanted, [allowed])[0]
        for score, wanted, allowed in zip(scores, count, among, strict=True)
    ]


def drop_smallest(
    weights: Sequence[Tensor], supports: Sequence[Tensor], count: Count
) -> list[Tensor]:
    """What is left of the supports without their `count` smallest magnitudes."""
    active = sizes(supports)
    left: Count
    if isinstance(count, int):
        left = sum(active) - count
    else:
        left = [size - dropped for size, dropped in zip(active, count, strict=True)]
    return prune_to(weights, supports, left)


def prune_to(weights: Sequence[Tensor], supports: Sequence[Tensor], count: Count) -> list[Tensor]:
    """What is left of the supports when only their `count` largest magnitudes stay."""
    return select([weight.detach().abs() for weight in weights], count, supports)


def grow_largest(
    scores: Sequence[Tensor],
    count: Count,
    kept: Sequence[Tensor],
    supports: Sequence[Tensor],
    *,
    revive: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Grow the `count` highest scores; returns what each layer keeps and what it grows anew.

    Args:
        scores: How much a place is wanted, one tensor per layer.
        count: Places to grow, over all layers together or in each layer.
        kept: What the drop left of the supports.
        supports: As they were before the drop.
        revive: Whether a place that was just dropped competes too. If it wins it was never gone: it
            is among the kept, with its value and its optimizer state. Without, only places that
            were empty before the drop grow.
    """
    taken = kept if revive else supports
    grown = select(scores, count, [~mask for mask in taken])
    if not revive:
        return list(zip(kept, grown, strict=True))
    return [
        (left | (new & support), new & ~support)
        for left, new, support in zip(kept, grown, supports, strict=True)
    ]


def random_scores(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Uniform numbers in [0, 1) of the tensors' shapes: the same on every device and rank."""
    drawn = (torch.rand(tensor.shape, generator=generator).to(tensor.device) for tensor in tensors)
    return [placed(numbers, like=tensor) for numbers, tensor in zip(drawn, tensors, strict=True)]


def share(fraction: float, active: Sequence[int], scope: str) -> Count:
    """`fraction` of the active weights, rounded down: of each layer, or of all ("global")."""

    def part(size: int) -> int:
        return math.floor(fraction * size + 1e-9)  # 0.29 * 100 is a hair below 29

    return part(sum(active)) if scope == "global" else [part(size) for size in active]


def sizes(masks: Sequence[Tensor]) -> list[int]:
    """How many places of each mask are True."""
    return Crowd(masks).counts(masks)


def update_steps(interval: int | None, t_end: float, total_steps: int) -> range:
    """Steps after which supports change: every `interval` steps, before `t_end` of training.

    Args:
        interval: None: 100, or a twentieth of a run shorter than 2,000 steps.
        t_end: Fraction of training. 1 spares the last step, since what it grew would not train.
        total_steps: Of the run.

    Raises:
        ValueError: There is no such step.
    """
    every = interval or max(1, min(100, total_steps // 20))
    end = round(t_end * total_steps)
    steps = range(every, end, every)
    if not steps:
        raise ValueError(
            f"update_interval={every} leaves no update before step {end} ({t_end} of "
            f"{total_steps} steps): train longer or give a smaller one"
        )
    return steps
