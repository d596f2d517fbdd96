"""GMP: gradual magnitude pruning.

M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", 2017, arXiv 1710.01878.

    every dT steps from t_0 to t_f the smallest |w| go, until the share s(t) of the weights is gone
        s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_f - t_0))^3

Symbols: 1 - s_f -> `density`, 1 - s_i -> `initial_density`, t_0 -> `prune_start`, t_f ->
`prune_end`, dT -> `update_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.exploration import SCOPES, Count, prune_to, sizes, update_steps
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
from gossamer.schedules import cubic, window
from gossamer.site import Site
from gossamer.sparse_weight import Masked

__all__ = ["GMP"]


@dataclass(frozen=True, kw_only=True)
class GMP(Method):
    """Gradual magnitude pruning: dense at the start, a little sparser at every update.

    Args:
        density: Final kept fraction of all sparse weights, in (0, 1].
        initial_density: Kept fraction at the start, at random; 1 starts dense.
        scope: "layer" prunes each layer to its share by `distribution`; "global" ranks the weights
            of all layers together.
        distribution: Layer densities: "uniform", "erk" or "er"; under "global" at the start only.
        update_interval: Steps between prunings; None: 100, or a twentieth of a run shorter than
            2,000 steps.
        prune_start: Start of the schedule, as a fraction of training.
        prune_end: Its end, when exactly `density` is reached; the support then stays as it is.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks.
    """

    density: float = 0.1
    initial_density: float = 1.0
    scope: str = "layer"
    distribution: str = "uniform"
    update_interval: int | None = None
    prune_start: float = 0.0
    prune_end: float = 0.75
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_range(self, "initial_density", 0, 1, open_low=True)
        check_choice(self, "scope", SCOPES)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_range(self, "prune_start", 0, 1)
        check_range(self, "prune_end", 0, 1)
        check_range(self, "block", 1, math.inf, whole=True)
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)
        if self.initial_density < self.density:
            raise ValueError(
                f"GMP: initial_density={self.initial_density} is below density={self.density}, and "
                "pruning takes weights away: give a larger initial_density"
            )
        if self.prune_end <= self.prune_start:
            raise ValueError(
                f"GMP: prune_end={self.prune_end} leaves no time to prune: give a value above "
                f"prune_start={self.prune_start}"
            )

    @property
    def cost(self) -> Cost:
        """All three products are sparse, at the density of the moment."""
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
                f"GMP: update_interval={interval} is longer than the {end - start} steps in which "
                "weights are pruned, and would take all of them at once: give a smaller one"
            )

    def updates_at(self, progress: Progress) -> bool:
        """Every interval between start and end of the schedule, and at its end."""
        step, total = progress
        start, end = self._window(total)
        return step == end or (step > start and step in self._grid(total))

    def density_at(self, progress: Progress) -> float:
        """1 - s(t): kept fraction that the schedule wants after this step."""
        start, end = self._window(progress.total_steps)
        fraction = (progress.step - start) / (end - start)
        return cubic(fraction, self.initial_density, self.density)

    def remedy(self, progress: Progress) -> str:
        """The schedule, with what it asks for now."""
        wanted = self.density_at(progress)
        return f"The schedule asks for a density of {wanted:.3g} now. {super().remedy(progress)}"

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Keep the largest magnitudes, as many as the schedule leaves."""
        shapes = [site.original_places for site in sites]
        supports = [site.places for site in sites]
        total = round(self.density_at(progress) * sum(shape.numel() for shape in shapes))
        count: Count = total
        if self.scope == "layer":
            count = allocate(self.distribution, shapes, total, at_most=sizes(supports))
        kept = prune_to([site.magnitude for site in sites], supports, count)
        return [SupportChange(mask, torch.zeros_like(mask)) for mask in kept]

    def _window(self, total_steps: int) -> tuple[int, int]:
        return window(self.prune_start, self.prune_end, total_steps)

    def _grid(self, total_steps: int) -> range:
        return update_steps(self.update_interval, self.prune_end, total_steps)
