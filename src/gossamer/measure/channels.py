"""Channel statistics: how unevenly a sparse layer's weights are spread over its output channels.

S. Liu et al., "Chase" (NeurIPS 2023, arXiv 2305.19454) rests on an observation: training that moves
weights about leaves some channels far sparser than others, so that they can go at little cost. A
mask that was drawn at random and stayed shows no such thing. Both are measured here.

A channel's density is the mean of its mask, its UMM (unmasked mean magnitude) the mean of |w| over
all its places, zeros included. For either, with n places a channel, N = channels * n in the layer:

    spread   the coefficient of variation over channels: standard deviation / mean
    random   what is to be expected of the same values at random places,
             sqrt(S^2 / n * (1 - n / N)) / mean,   S^2 = their variance, divided by N - 1
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["ChannelStats", "Uneven", "channel_stats", "held_by_sparsest"]


@dataclass(frozen=True)
class Uneven:
    """How unevenly something lies over the channels of a layer.

    Attributes:
        spread: Coefficient of variation over channels.
        random: The same to be expected of a random order.
        below_half: Share of the channels that have less than half of the layer's mean.
        below_mean: Share of the channels that have less than the mean.
    """

    spread: float
    random: float
    below_half: float
    below_mean: float


@dataclass(frozen=True)
class ChannelStats:
    """Of one layer.

    Attributes:
        channels: Output channels.
        empty: Those without a weight.
        density: Of the layer.
        by_density: Of the channels' densities.
        by_umm: Of the channels' unmasked mean magnitudes.
    """

    channels: int
    empty: int
    density: float
    by_density: Uneven
    by_umm: Uneven


@torch.no_grad()
def channel_stats(weight: Tensor, support: Tensor | None = None) -> ChannelStats:
    """Statistics over the output channels of a layer.

    Args:
        weight: Effective weight, `(out, in, *kernel)`.
        support: Bool mask of the same shape; None: where the weight is not zero.

    Raises:
        ValueError: The shapes differ, or there is nothing to compare.
    """
    if support is None:
        support = weight != 0
    if support.shape != weight.shape or weight.dim() < 2:
        raise ValueError(
            f"got a weight of shape {tuple(weight.shape)} and a support of "
            f"{tuple(support.shape)}: give both as (out, in, *kernel)"
        )
    mask = support.flatten(1).double()
    rows = mask.sum(1)
    return ChannelStats(
        channels=len(mask),
        empty=int((rows == 0).sum()),
        density=float(mask.mean()),
        by_density=_uneven(mask),
        by_umm=_uneven(weight.detach().flatten(1).double().abs()),
    )


def held_by_sparsest(supports: Iterable[Tensor], share: float) -> tuple[float, float]:
    """What share of the weights the sparsest channels hold: here, and in a random mask.

    Channels compete within their layer; a fraction of a channel counts as such.

    Args:
        supports: Bool masks, `(out, in, *kernel)`, one per layer.
        share: Of each layer's channels, in [0, 1].

    Returns:
        The share of all weights here, and, for masks drawn at random with each layer's count, the
        normal approximation of its expectation.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: give a value in [0, 1]")
    held = expected = total = 0.0
    for support in supports:
        rows = support.flatten(1).sum(1).double().sort().values
        weights = float(rows.sum())
        if weights == 0:
            continue
        whole = min(int(share * len(rows)), len(rows) - 1)
        held += float(rows[:whole].sum() + (share * len(rows) - whole) * rows[whole])
        expected += weights * _lowest_of_normal(share, _random_spread(support.flatten(1).double()))
        total += weights
    if total == 0:
        raise ValueError("the supports hold no weight: there is nothing to share out")
    return held / total, expected / total


def _uneven(values: Tensor) -> Uneven:
    """Of the row means of `values: (channels, n)`, none of them negative."""
    means = values.mean(1)
    mean = means.mean()
    if mean == 0:
        return Uneven(0.0, 0.0, 0.0, 0.0)
    # A row that has exactly half is not below half; sums of floats are off by a hair.
    hair = 1e-9 * mean
    return Uneven(
        spread=float(means.std(correction=0) / mean),
        random=_random_spread(values),
        below_half=float((means < mean / 2 - hair).double().mean()),
        below_mean=float((means < mean - hair).double().mean()),
    )


def _random_spread(values: Tensor) -> float:
    total, places = values.numel(), values.shape[1]
    mean = float(values.mean())
    if total < 2 or mean == 0:
        return 0.0
    variance = float(values.var()) / places * (1 - places / total)
    return math.sqrt(variance) / mean


def _lowest_of_normal(share: float, spread: float) -> float:
    """Mean over the lowest `share` of a normal distribution of mean 1, times that share."""
    if share in (0.0, 1.0) or spread == 0:
        return share
    normal = NormalDist()
    return share - spread * normal.pdf(normal.inv_cdf(share))
