"""SET: sparse evolutionary training; drops the weights nearest to zero, grows at random.

D. C. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 2018, arXiv 1707.04780.

    every dT steps, in each layer:
        drop the share zeta of the positive weights, those nearest to 0,
        and the share zeta of the negative weights, those nearest to 0
        grow as many at random places that were empty, at zero

Symbols: zeta -> `drop_fraction`; dT (an epoch in the paper) -> `update_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.allocation import DISTRIBUTIONS
from gossamer.exploration import (
    SCOPES,
    drop_smallest,
    grow_largest,
    random_scores,
    share,
    sizes,
    update_steps,
)
from gossamer.method import (
    Cost,
    Method,
    Progress,
    SupportChange,
    allocate_density,
    check_choice,
    check_range,
)
from gossamer.ops import random_mask
from gossamer.schedules import cosine
from gossamer.site import Site
from gossamer.sparse_weight import Masked

__all__ = ["SET", "evolve"]

DROPS = ("signed", "magnitude")


def evolve(
    weights: Sequence[Tensor],
    supports: Sequence[Tensor],
    scores: Sequence[Tensor],
    fraction: float,
    *,
    signed: bool,
) -> list[tuple[Tensor, Tensor]]:
    """One update of layers that compete with each other: what each keeps, and what it grows.

    No more is dropped than there are empty places to grow in, so that a dense layer stays as it is.

    Args:
        weights: `(out, in, *kernel)` each.
        supports: Bool masks.
        scores: Where to grow: the empty places of the highest.
        fraction: Share of the support to drop.
        signed: Drop this share of the positive and of the negative weights, each nearest to 0; a
            weight of exactly 0 counts as positive. Otherwise drop the smallest magnitudes.
    """
    active = sum(sizes(supports))
    empty = sum(support.numel() for support in supports) - active
    fraction = min(fraction, empty / max(1, active))
    sides = [list(supports)]
    if signed:
        negative = [weight.detach() < 0 for weight in weights]
        sides = [
            [support & ~below for support, below in zip(supports, negative, strict=True)],
            [support & below for support, below in zip(supports, negative, strict=True)],
        ]
    kept = [torch.zeros_like(support) for support in supports]
    for side in sides:
        left = drop_smallest(weights, side, share(fraction, sizes(side), "global"))
        for mask, more in zip(kept, left, strict=True):
            mask |= more
    return grow_largest(scores, active - sum(sizes(kept)), kept, supports, revive=False)


@dataclass(frozen=True, kw_only=True)
class SET(Method):
    """Drop the weights nearest to zero, grow at random.

    Args:
        density: Kept fraction of all sparse weights, in (0, 1].
        distribution: Layer densities: "er" (as in the paper), "erk" or "uniform".
        update_interval: Steps between updates; None: 100, or a twentieth of a run shorter than
            2,000 steps. The paper: the steps of an epoch. ITOP: 1500 at batch 128.
        drop: "signed" drops its share of the positive and of the negative weights; "magnitude" the
            smallest |w|, as SET is run in later papers.
        drop_fraction: Share of the support that an update drops. ITOP: 0.5.
        drop_fraction_end: Where a cosine until `t_end` takes that share; None: it stays. ITOP:
            0.005.
        t_end: Fraction of training after which the support stays as it is.
        scope: "layer" keeps each layer's count; "global" ranks and grows over all layers together,
            so that counts move between layers.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks. Above 1 it needs
            drop="magnitude": a block has no sign.
    """

    density: float = 0.1
    distribution: str = "er"
    update_interval: int | None = None
    drop: str = "signed"
    drop_fraction: float = 0.3
    drop_fraction_end: float | None = None
    t_end: float = 1.0
    scope: str = "layer"
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_choice(self, "drop", DROPS)
        check_range(self, "drop_fraction", 0, 1)
        check_range(self, "t_end", 0, 1, open_low=True)
        check_choice(self, "scope", SCOPES)
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)
        if self.drop_fraction_end is not None:
            check_range(self, "drop_fraction_end", 0, 1)
        check_range(self, "block", 1, math.inf, whole=True)
        if self.block > 1 and self.drop == "signed":
            raise ValueError(
                f'SET: drop="signed" drops by sign, and a block of {self.block} weights has none: '
                'give drop="magnitude"'
            )

    @property
    def cost(self) -> Cost:
        """All three products are sparse, in every step."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer, summing to `round(density * all weights)`."""
        return allocate_density(self.distribution, shapes, self.density)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """A uniformly random mask with exactly `count` places."""
        return Masked(weight, random_mask(weight.shape, count, generator, self.block))

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when the run is over before the first update."""
        update_steps(self.update_interval, self.t_end, total_steps)

    def updates_at(self, progress: Progress) -> bool:
        """Every interval before `t_end`."""
        step, total = progress
        return step in update_steps(self.update_interval, self.t_end, total)

    def drop_rate(self, progress: Progress) -> float:
        """Share of the support that an update after this step drops."""
        fraction = progress.step / (self.t_end * progress.total_steps)
        end = self.drop_fraction if self.drop_fraction_end is None else self.drop_fraction_end
        return cosine(fraction, self.drop_fraction, end)

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Drop what is nearest to zero, grow as many elsewhere."""
        weights = [site.weight if self.block == 1 else site.magnitude for site in sites]
        scores = random_scores(weights, generator)
        supports = [site.places for site in sites]
        rate, signed = self.drop_rate(progress), self.drop == "signed"
        if self.scope == "global":
            changes = evolve(weights, supports, scores, rate, signed=signed)
        else:
            changes = [
                evolve([weight], [support], [score], rate, signed=signed)[0]
                for weight, support, score in zip(weights, supports, scores, strict=True)
            ]
        return [SupportChange(*change) for change in changes]
