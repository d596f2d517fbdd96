"""RigL: rigging the lottery; drops by magnitude, grows by gradient.

U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134.
S. Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in
Sparse Training", ICML 2021, arXiv 2102.02887: ITOP, the same with other settings.

    every dT steps while t < T_end, in each layer of n active weights:
        k = floor(f(t) n),   f(t) = alpha_end + (alpha - alpha_end) (1 + cos(pi t / T_end)) / 2
        drop the k smallest |w|
        grow the k largest |dL/dw| among all places not kept, those just dropped included

Symbols: dT -> `update_interval`, T_end -> `t_end` times the steps of the run, alpha ->
`drop_fraction`, alpha_end -> `drop_fraction_end` (0 in RigL).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.allocation import DISTRIBUTIONS
from gossamer.exploration import (
    SCOPES,
    drop_smallest,
    grow_largest,
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

__all__ = ["RigL"]


@dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """Drop the smallest weights, grow where the gradient is largest.

    Args:
        density: Kept fraction of all sparse weights, in (0, 1].
        distribution: Layer densities: "erk", "uniform" or "er". The paper's uniform leaves the
            first layer dense: exclude it from the Sparsifier.
        update_interval: Steps between updates; None: 100, or a twentieth of a run shorter than
            2,000 steps. ITOP: 4000 at batch 128.
        drop_fraction: Share of the support that an update drops at the start; a cosine until
            `t_end` ... ITOP: 0.5.
        drop_fraction_end: ... takes it to this. ITOP: 0.005.
        t_end: Fraction of training after which the support stays as it is. ITOP: 1.
        scope: "layer" keeps each layer's count; "global" ranks the weights and the gradients of all
            layers together, so that counts move between layers.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks.
    """

    density: float = 0.1
    distribution: str = "erk"
    update_interval: int | None = None
    drop_fraction: float = 0.3
    drop_fraction_end: float = 0.0
    t_end: float = 0.75
    scope: str = "layer"
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)
        check_range(self, "drop_fraction", 0, 1)
        check_range(self, "drop_fraction_end", 0, 1)
        check_range(self, "t_end", 0, 1, open_low=True)
        check_choice(self, "scope", SCOPES)
        check_range(self, "block", 1, math.inf, whole=True)

    @property
    def cost(self) -> Cost:
        """All three products are sparse; an update adds one dense weight gradient."""
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

    def wants_dense_grad(self, progress: Progress) -> bool:
        """Growth ranks the gradient of the update's own step."""
        return self.updates_at(progress)

    def drop_rate(self, progress: Progress) -> float:
        """f(t): share of the support that an update after this step drops."""
        fraction = progress.step / (self.t_end * progress.total_steps)
        return cosine(fraction, self.drop_fraction, self.drop_fraction_end)

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Drop the smallest magnitudes, grow as many of the largest gradients."""
        supports = [site.places for site in sites]
        moved = share(self.drop_rate(progress), sizes(supports), self.scope)
        kept = drop_smallest([site.magnitude for site in sites], supports, moved)
        gradients = [site.gradient_magnitude for site in sites]
        changes = grow_largest(gradients, moved, kept, supports, revive=True)
        return [SupportChange(*change) for change in changes]
