"""Forecast: what weight decay alone will do to soft thresholds, told before training.

STR and AutoSparse learn `t = sigmoid(s)`, with s far below zero at first. Their pruning force is
the weight decay of s, which draws s towards 0 and t towards 1/2; the loss draws back. How far the
decay reaches hangs on one number. Where that is small, nothing is ever pruned:

    Lambda = decay * sum(lr) / (1 - momentum)          SGD; without the divisor for AdamW's decay
    s_end  = s_init * exp(-Lambda),   t_end = sigmoid(s_end)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from gossamer.method import Progress
from gossamer.ops import kth_largest
from gossamer.sharding import whole
from gossamer.site import Site
from gossamer.sparse_weight import SoftThreshold

__all__ = [
    "Forecast",
    "forecast",
    "forecastable",
    "implied_threshold",
    "onset_step",
    "warn_if_futile",
]

_NOTHING = 0.01  # a share of weights below this is no sparsity
_OUT_OF_REACH = 1e-3  # below this threshold the loss does not move s either: g' is about t


def implied_threshold(decay: float, lrs: Iterable[float], momentum: float, s_init: float) -> float:
    """`t_end`, the threshold that weight decay alone leads to.

    Args:
        decay: Weight decay of the thresholds.
        lrs: Learning rate of every step.
        momentum: Of SGD; 0 for decoupled decay (AdamW).
        s_init: Raw threshold at the start.
    """
    return _sigmoid(s_init * math.exp(-decay * math.fsum(lrs) / (1 - momentum)))


def onset_step(
    decay: float, lrs: Iterable[float], momentum: float, s_init: float, threshold: float
) -> int | None:
    """First step after which decay alone has brought the threshold above `threshold`, or None.

    Arguments as for `implied_threshold`; `threshold` lies in (0, 1/2).
    """
    if not 0 < threshold < 0.5:
        raise ValueError(f"threshold={threshold}: decay leads to 1/2 at most, give one in (0, 1/2)")
    goal = _logit(threshold)
    for step, total in enumerate(accumulate(lrs), 1):
        if s_init * math.exp(-decay * total / (1 - momentum)) > goal:
            return step
    return None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the decay of the thresholds implies, with the loss left aside.

    Attributes:
        decay_sum: Lambda of the steps to come.
        s_start: Mean raw threshold now.
        s_end: The same, by decay alone, at the end.
        sparsity_start: Share of today's weights that today's thresholds prune.
        sparsity_end: Share of today's weights that the thresholds at the end would prune.
        median_weight: Median magnitude of today's weights.
    """

    decay_sum: float
    s_start: float
    s_end: float
    sparsity_start: float
    sparsity_end: float
    median_weight: float

    @property
    def threshold_end(self) -> float:
        """`sigmoid(s_end)`."""
        return _sigmoid(self.s_end)

    @property
    def futile(self) -> bool:
        """Whether next to nothing can be pruned, by decay or by the loss."""
        sparsity = max(self.sparsity_start, self.sparsity_end)
        return sparsity < _NOTHING and self.threshold_end < _OUT_OF_REACH

    def __str__(self) -> str:
        told = (
            f"Lambda = decay * sum(lr) / (1 - momentum) = {self.decay_sum:.3g}: decay alone takes "
            f"s from {self.s_start:.4g} to {self.s_end:.4g} and the threshold to "
            f"{self.threshold_end:.3g}, above {self.sparsity_end:.1%} of today's weights (median "
            f"|w| {self.median_weight:.3g})"
        )
        if not self.futile:
            return told
        # From here to the median, which prunes half the weights if the loss does not draw back.
        goal = _logit(min(max(self.median_weight, 1e-30), 0.49))
        needed = math.log(self.s_start / goal)
        closer = f"start nearer to 0, at s_init={goal * math.exp(self.decay_sum):.2g} or above"
        if self.decay_sum == 0:
            return f"{told}. Give the thresholds weight decay, or {closer}"
        return (
            f"{told}. Give the thresholds {needed / self.decay_sum:.2g} times the weight decay or "
            f"more, or {closer}"
        )


def forecast(
    sites: Sequence[Site], optimizer: torch.optim.Optimizer, lrs: Iterable[float]
) -> Forecast:
    """What the schedule implies for the thresholds of STR or AutoSparse; warns if it is nothing.

    With a `target_density` thresholds do not follow their decay, and this says nothing.

    Args:
        sites: Of the Sparsifier.
        optimizer: That will train the thresholds; their decay and momentum are read from it.
        lrs: Learning rate of every step to come.

    Raises:
        ValueError: The sites have no soft thresholds, the optimizer lacks them, or its decay
            follows no formula (Adam's coupled decay).
    """
    rate = _decay_rate(sites, optimizer)
    if rate is None:
        raise ValueError(
            f"{type(optimizer).__name__} scales weight decay by its gradients, so that no formula "
            "says where it leads: use SGD, or decoupled decay as in AdamW"
        )
    found = _predict(sites, rate * math.fsum(lrs))
    if found.futile:
        warnings.warn(f"no sparsity can appear. {found}", stacklevel=2)
    return found


def forecastable(sites: Sequence[Site]) -> bool:
    """Whether all sites have soft thresholds, so that `forecast` has something to say."""
    return all(isinstance(site.sparse, SoftThreshold) for site in sites)


def _decay_rate(sites: Sequence[Site], optimizer: torch.optim.Optimizer) -> float | None:
    """Lambda per unit of summed learning rate, of the thresholds' group; None if unknown."""
    group = _group(sites, optimizer)
    decay = float(group.get("weight_decay", 0.0))
    if isinstance(optimizer, torch.optim.SGD):
        momentum = float(group["momentum"])
        dampening = float(group["dampening"]) if momentum else 0.0  # SGD's own reading
        return decay * (1 - dampening) / (1 - momentum)
    return decay if decay == 0 or group.get("decoupled_weight_decay") else None


def warn_if_futile(
    name: str, sites: Sequence[Site], progress: Progress, optimizer: torch.optim.Optimizer | None
) -> None:
    """Warn, after the first step and at half time, when no sparsity can appear any more.

    The schedule is not known here. What bounds it is, at first, the rate that the optimizer was
    made with and what a scheduler has left in it; at half time the rate of that step.
    """
    step, total = progress
    if step not in (1, total // 2) or optimizer is None:
        return
    rate = _decay_rate(sites, optimizer)
    if rate is None:
        return
    group = _group(sites, optimizer)
    rates = [group["lr"]]
    if step == 1:
        rates += [group.get("initial_lr"), group.get("max_lr"), optimizer.defaults.get("lr")]
    highest = max(float(lr) for lr in rates if lr is not None)
    found = _predict(sites, rate * highest * (total - step))
    if found.futile:
        warnings.warn(
            f"{name}: no sparsity can appear in the {total - step} steps to come, even at a "
            f"learning rate of {highest:.3g} all the way. {found}",
            stacklevel=5,  # the caller of Sparsifier.step
        )


@torch.no_grad()
def _predict(sites: Sequence[Site], decay_sum: float) -> Forecast:
    """The forecast for a given Lambda."""
    soft = _soft(sites)
    shrunk = math.exp(-decay_sum)
    magnitudes = [site.weight.detach().abs() for site in sites]
    total = sum(magnitude.numel() for magnitude in magnitudes)

    def sparsity(factor: float) -> float:
        within = (
            whole((magnitude <= (sparse.s * factor).sigmoid()).count_nonzero())
            for magnitude, sparse in zip(magnitudes, soft, strict=True)
        )
        return sum(int(count) for count in within) / total

    s_start = float(torch.cat([whole(sparse.s).flatten() for sparse in soft]).mean())
    return Forecast(
        decay_sum=decay_sum,
        s_start=s_start,
        s_end=s_start * shrunk,
        sparsity_start=sparsity(1.0),
        sparsity_end=sparsity(shrunk),
        median_weight=kth_largest(magnitudes, (total + 1) // 2),
    )


def _soft(sites: Sequence[Site]) -> list[SoftThreshold]:
    soft = [site.sparse for site in sites if isinstance(site.sparse, SoftThreshold)]
    if len(soft) < len(sites) or not soft:
        raise ValueError(
            "only STR and AutoSparse have soft thresholds: pass the sites of a Sparsifier with one "
            "of them"
        )
    return soft


def _group(sites: Sequence[Site], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's group that holds the thresholds."""
    first = _soft(sites)[0].s
    for group in optimizer.param_groups:
        if any(parameter is first for parameter in group["params"]):
            return group
    raise ValueError(
        f"{type(optimizer).__name__} lacks the thresholds: build it from "
        "sparsifier.parameter_groups() or model.parameters(), after the Sparsifier"
    )


def _sigmoid(x: float) -> float:
    # exp of the negative magnitude never overflows.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
