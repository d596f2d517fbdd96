"""Control: learned thresholds that end at a density that was asked for.

A controller takes the place of the pruning force (the decay or the penalty that draws thresholds
up). It has a planned density for every moment of training. After every step it looks where the
loss has taken the thresholds, and shifts all of them by one amount, up or down, such that the
planned number of weights lies above:

    plan(f) = d + (1 - d) (1 - f / r)^3,     d once f, the fraction of training, has reached r

The loss keeps its say on what it is for: which layer, or row, has the higher threshold. A layer
never falls below a tenth of the planned density, since one that is empty learns nothing any more.

In large networks a look takes in every so-manieth weight, others each time; the last one all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.method import Method, Progress, check_range
from gossamer.ops import kth_largest
from gossamer.schedules import cubic
from gossamer.sharding import Crowd, local
from gossamer.site import Site
from gossamer.sparse_weight import LearnedThreshold

__all__ = ["LAYER_FLOOR", "Targeted", "looked_at", "planned_density", "threshold_shifts"]

_SAMPLE = 1 << 18  # weights per look; at a density of 1 % that is one of 2 % more or less
LAYER_FLOOR = 0.1  # density of a layer, at least, as a share of the density of all


@dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """A method with learned thresholds. Training starts dense, and finds its density or is told.

    Args:
        target_density: Density to end at. A controller then shifts all thresholds by one amount
            after every step, in place of the force that raises them. None: density results from
            the other settings.
        target_reached: Fraction of training at which the target is reached; it is held from there.
        control_interval: Steps between shifts.
    """

    target_density: float | None = None
    target_reached: float = 0.75
    control_interval: int = 1

    def __post_init__(self) -> None:
        if self.target_density is not None:
            check_range(self, "target_density", 0, 1, open_low=True)
        check_range(self, "target_reached", 0, 1, open_low=True)
        check_range(self, "control_interval", 1, math.inf, whole=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """All places: training starts dense."""
        return [shape.numel() for shape in shapes]

    def remedy(self, progress: Progress) -> str:
        """The target."""
        return (
            f"{type(self).__name__}(target_density={self.target_density}) shifts all thresholds: "
            "ask for a higher target_density, or exclude the layer"
        )

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool:
        """Hold the target, if there is one."""
        step, total = progress
        last = step == total
        if self.target_density is not None and (step % self.control_interval == 0 or last):
            planned = planned_density(progress.fraction, self.target_density, self.target_reached)
            learned = [_learned(site) for site in sites]
            places = [s.weight if s.block == 1 else s.weight[:: s.block] for s in sites]
            index = looked_at(places, step, total)
            margins = [
                sparse.margin(site.weight, positions)
                for sparse, site, positions in zip(learned, sites, index, strict=True)
            ]
            for sparse, shift in zip(learned, threshold_shifts(margins, planned), strict=True):
                sparse.raw.add_(shift)
            if last:
                _warn_if_missed(type(self).__name__, sites, self.target_density)
        return progress.look_due() or last


def planned_density(fraction: float, target: float, reached: float) -> float:
    """Density at a fraction of training: 1 at first, `target` from the fraction `reached` on."""
    return cubic(fraction / reached, 1.0, target)


def looked_at(weights: Sequence[Tensor], step: int, total_steps: int) -> list[Tensor | None]:
    """Positions that the look after this step takes in, in this process's part of each weight,
    flattened; None for all.
    """
    stride = max(1, sum(weight.numel() for weight in weights) // _SAMPLE)
    if stride == 1 or step == total_steps:
        return [None] * len(weights)
    counts = [local(weight).numel() for weight in weights]
    return [
        torch.arange(step % max(1, min(stride, count)), count, stride, device=weight.device)
        for weight, count in zip(weights, counts, strict=True)
    ]


def threshold_shifts(margins: Sequence[Tensor], density: float) -> list[float]:
    """What to add to the thresholds of each layer so that the share `density` of all weights stays.

    All layers get the same shift, but for those that it would take below their floor.

    Args:
        margins: One tensor per layer: how far its weights, or the same share of each layer's, lie
            above their thresholds, on the scale on which thresholds are shifted.
        density: Share to leave, rounded to a whole number of weights.
    """
    sizes = [margin.numel() for margin in margins]
    floors = [min(size, max(1, math.ceil(LAYER_FLOOR * density * size))) for size in sizes]
    count = round(density * sum(sizes))
    shifts = [0.0] * len(margins)
    free = list(range(len(margins)))
    while free:
        left = max(count - sum(floors) + sum(floors[layer] for layer in free), 0)
        shift = _shift([margins[layer] for layer in free], left)
        above = Crowd(margins).counts([margins[layer] > shift for layer in free])
        for layer in free:
            shifts[layer] = shift
        short = [layer for layer, kept in zip(free, above, strict=True) if kept < floors[layer]]
        if not short:
            break
        for layer in short:
            shifts[layer] = _shift([margins[layer]], floors[layer])
        free = [layer for layer in free if layer not in short]
    return shifts


def _shift(margins: Sequence[Tensor], count: int) -> float:
    """The shift that leaves exactly `count` weights above, ties aside; 0 where all may stay.

    Half-way between two weights, so that none comes to lie on its threshold, where rounding would
    decide about it.
    """
    if count >= sum(margin.numel() for margin in margins):
        return 0.0
    first_out = kth_largest(margins, count + 1)
    return (first_out + kth_largest(margins, count)) / 2 if count else first_out


def _learned(site: Site) -> LearnedThreshold:
    assert isinstance(site.sparse, LearnedThreshold)
    return site.sparse


def _warn_if_missed(name: str, sites: Sequence[Site], target: float) -> None:
    """Warn when a run has ended more than 1 % off its target density (and more than 3 places)."""
    kept = sum(site.nonzeros for site in sites)
    total = sum(site.weight.numel() for site in sites)
    if abs(kept - target * total) > max(0.01 * target * total, 3 * sites[0].block):
        warnings.warn(
            f"{name}: target_density={target} was asked for, and training ends at "
            f"{kept / total:.4g}: weights have outgrown what thresholds can reach. Give the "
            "weights more decay, reach the target later, or ask for a higher density",
            stacklevel=6,  # the caller of Sparsifier.step
        )
