"""GraNet: gradual pruning with zero-cost neuroregeneration.

S. Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS
2021, arXiv 2106.10404.

    every dT steps
    1  until t_f:  keep the largest |w| over all layers, as many as the cubic leaves,
                   s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_f - t_0))^3
    2  in each layer:  drop the share r(t) of the survivors of smallest |w|,
                       grow as many empty places of largest |dL/dw|
                   r(t) = r_T + (r_0 - r_T) (1 + cos(pi t / T)) / 2

Symbols: 1 - s_f -> `density`, 1 - s_i -> `initial_density`, t_0 -> `prune_start`, t_f ->
`prune_end`, dT -> `update_interval`, r_0 -> `drop_fraction`, r_T -> `drop_fraction_end`, T -> steps
of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.exploration import (
    SCOPES,
    Count,
    drop_smallest,
    grow_largest,
    prune_to,
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
from gossamer.schedules import cosine, cubic, window
from gossamer.site import Site
from gossamer.sparse_weight import Masked

__all__ = ["GraNet"]


@dataclass(frozen=True, kw_only=True)
class GraNet(Method):
    """Gradual magnitude pruning that regrows a falling share of the weights at every update.

    Args:
        density: Final kept fraction of all sparse weights, in (0, 1].
        initial_density: Kept fraction at the start, at random: 1 starts dense, less (the paper has
            0.5) trains sparse throughout.
        scope: "global" prunes with one ranking of all layers; "layer" prunes each layer to its
            share by `distribution`. Regeneration stays within each layer.
        distribution: Layer densities: "erk", "er" or "uniform"; under "global" at the start only.
        update_interval: Steps between updates; None: 1000, or a twentieth of the run and at most
            100 when the run is shorter than 20,000 steps.
        prune_start: Start of the updates, as a fraction of training.
        prune_end: Fraction at which exactly `density` is reached; only regeneration goes on.
        drop_fraction: Share of a layer that is regenerated at the start of training; a cosine over
            the run ...
        drop_fraction_end: ... takes it to this.
        t_end: Fraction of training after which the support stays as it is. 1 spares the last step
            alone, since what it grew would not train.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks.
    """

    density: float = 0.1
    initial_density: float = 1.0
    scope: str = "global"
    distribution: str = "erk"
    update_interval: int | None = None
    prune_start: float = 0.0
    prune_end: float = 0.5
    drop_fraction: float = 0.5
    drop_fraction_end: float = 0.005
    t_end: float = 1.0
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_range(self, "initial_density", 0, 1, open_low=True)
        check_choice(self, "scope", SCOPES)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        for name in ("prune_start", "prune_end", "drop_fraction", "drop_fraction_end", "t_end"):
            check_range(self, name, 0, 1)
        check_range(self, "block", 1, math.inf, whole=True)
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)
        if self.initial_density < self.density:
            raise ValueError(
                f"GraNet: initial_density={self.initial_density} is below density={self.density}, "
                "and pruning takes weights away: give a larger initial_density"
            )
        if not self.prune_start < self.prune_end <= self.t_end:
            raise ValueError(
                f"GraNet: weights are pruned from {self.prune_start} to {self.prune_end} of "
                f"training and updates end at {self.t_end}: give prune_start < prune_end <= t_end"
            )

    @property
    def cost(self) -> Cost:
        """All three products are sparse; an update adds one dense weight gradient."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer at the start, summing to `round(initial_density * all weights)`."""
        allocate_density(self.distribution, shapes, self.density)  # the end must be reachable too
        return allocate_density(self.distribution, shapes, self.initial_density)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """A uniformly random mask with exactly `count` places."""
        return Masked(weight, random_mask(weight.shape, count, generator, self.block))

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when all weights would go at once."""
        start, end = self._window(total_steps)
        interval = self._grid(total_steps).step
        if interval > end - start:
            raise ValueError(
                f"GraNet: update_interval={interval} is longer than the {end - start} steps in "
                "which weights are pruned, and would take all of them at once: give a smaller one"
            )

    def updates_at(self, progress: Progress) -> bool:
        """Every interval after the start, and at the end of pruning."""
        step, total = progress
        start, end = self._window(total)
        return step == end or (step > start and step in self._grid(total))

    def wants_dense_grad(self, progress: Progress) -> bool:
        """Growth ranks the gradient of the update's own step."""
        return self.updates_at(progress)

    def density_at(self, progress: Progress) -> float:
        """1 - s(t): kept fraction that the schedule wants after this step."""
        start, end = self._window(progress.total_steps)
        fraction = (progress.step - start) / (end - start)
        return cubic(fraction, self.initial_density, self.density)

    def drop_rate(self, progress: Progress) -> float:
        """r(t): share of each layer that an update drops and grows."""
        return cosine(progress.fraction, self.drop_fraction, self.drop_fraction_end)

    def remedy(self, progress: Progress) -> str:
        """The schedule, with what it asks for now."""
        wanted = self.density_at(progress)
        return f"The schedule asks for a density of {wanted:.3g} now. {super().remedy(progress)}"

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Prune to the schedule, then drop and grow within each layer."""
        shapes = [site.original_places for site in sites]
        supports = [site.places for site in sites]
        total = round(self.density_at(progress) * sum(shape.numel() for shape in shapes))
        count: Count = total
        if self.scope == "layer":
            count = allocate(self.distribution, shapes, total, at_most=sizes(supports))
        magnitudes = [site.magnitude for site in sites]
        survivors = prune_to(magnitudes, supports, count)
        moved = share(self.drop_rate(progress), sizes(survivors), "layer")
        kept = drop_smallest(magnitudes, survivors, moved)
        gradients = [site.gradient_magnitude for site in sites]
        changes = grow_largest(gradients, moved, kept, survivors, revive=True)
        return [SupportChange(*change) for change in changes]

    def _window(self, total_steps: int) -> tuple[int, int]:
        return window(self.prune_start, self.prune_end, total_steps)

    def _grid(self, total_steps: int) -> range:
        adapted = 1000 if total_steps >= 20_000 else max(1, min(100, total_steps // 20))
        return update_steps(self.update_interval or adapted, self.t_end, total_steps)
