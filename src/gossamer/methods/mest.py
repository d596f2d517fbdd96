"""MEST: sparse training in bounded memory, with elastic mutation and a soft memory bound.

G. Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge",
NeurIPS 2021, arXiv 2110.14032.

    every dT steps, in each layer
        keep the weights of largest |w| + lambda |dL/dw|   down to the lower density
        grow empty places at random, at zero               up to the upper density

    variant    lower     upper     p(t)
    vanilla    d - p     d         p
    EM         d - p     d         p, then p / 2, then 0
    EM&S       d         d + p     p, then p / 2, then 0

Symbols: d -> `density`, p -> `mutation` (a share of all weights), lambda -> `gradient_weight`,
dT -> `update_interval`; p is halved at `halve_at` and 0 from `t_end` on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.exploration import SCOPES, Count, random_scores, select, sizes, update_steps
from gossamer.method import (
    Cost,
    Method,
    Progress,
    SupportChange,
    allocate_density,
    check_choice,
    check_range,
)
from gossamer.ops import keep_largest, pooled, spread
from gossamer.site import Site
from gossamer.sparse_weight import Masked

__all__ = ["MEST"]

VARIANTS = ("vanilla", "em", "ems")


@dataclass(frozen=True, kw_only=True)
class MEST(Method):
    """Prune by magnitude, grow at random, between two bounds that draw together.

    Args:
        density: Final kept fraction of all sparse weights, in (0, 1].
        variant: "vanilla" exchanges the same number of weights at every update; "em" (elastic
            mutation) fewer and fewer; "ems" (EM&S, soft memory bound) holds them above `density`
            until the last stage, so that new weights train beside those they may replace.
        mutation: p at the start: weights that an update exchanges, as a share of all weights; None:
            a fifth of `density`.
        halve_at: Fraction of training from which "em" and "ems" go on with half of it.
        t_end: Fraction of training at which p becomes 0 and the support stays as it is.
        update_interval: Steps between updates; None: a 32nd of the run.
        gradient_weight: lambda, weight of the gradient in the score; 0 ranks magnitudes alone.
        distribution: Layer densities: "uniform", "erk" or "er".
        scope: "layer" keeps each layer at its share; "global" ranks and grows over all layers.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks.
    """

    density: float = 0.1
    variant: str = "em"
    mutation: float | None = None
    halve_at: float = 0.5625
    t_end: float = 0.75
    update_interval: int | None = None
    gradient_weight: float = 0.0
    distribution: str = "uniform"
    scope: str = "layer"
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "variant", VARIANTS)
        check_range(self, "halve_at", 0, 1)
        check_range(self, "t_end", 0, 1)
        check_range(self, "gradient_weight", 0, math.inf)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_choice(self, "scope", SCOPES)
        check_range(self, "block", 1, math.inf, whole=True)
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)
        if self.mutation is not None:
            check_range(self, "mutation", 0, 1)
        if self.t_end < self.halve_at:
            raise ValueError(
                f"MEST: t_end={self.t_end} comes before halve_at={self.halve_at}: give "
                "an earlier halve_at too"
            )
        if self.variant == "ems" and self.density + self._mutation > 1:
            raise ValueError(
                f"MEST: density={self.density} and mutation={self._mutation:g} above it are more "
                "than all weights: give a smaller mutation"
            )
        if self.variant != "ems" and self.density <= self._mutation:
            raise ValueError(
                f"MEST: mutation={self._mutation:g} exchanges all weights of density="
                f"{self.density}: give a smaller mutation"
            )

    @property
    def cost(self) -> Cost:
        """All three products are sparse; no update needs a dense gradient."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer at the start: those of `density`, or with "ems" of the soft bound."""
        lower, upper = self._bounds(self._mutation)
        allocate_density(self.distribution, shapes, lower)  # it must be reachable too
        return allocate_density(self.distribution, shapes, upper)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """The `count` places of largest magnitude of the initial weight."""
        magnitude = pooled(weight.detach().abs(), self.block)
        return Masked(weight, spread(keep_largest([magnitude], count)[0], self.block))

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when the run is over before the first update."""
        self._grid(total_steps)

    def updates_at(self, progress: Progress) -> bool:
        """Every interval before `t_end`; "ems" also there, to come down to the density."""
        step, total = progress
        last = self.variant == "ems" and step == round(self.t_end * total)
        return last or step in self._grid(total)

    def mutation_at(self, progress: Progress) -> float:
        """p(t): share of all weights that an update after this step exchanges."""
        step, total = progress
        if step >= round(self.t_end * total):
            return 0.0
        halved = self.variant != "vanilla" and step >= round(self.halve_at * total)
        return self._mutation / 2 if halved else self._mutation

    def bounds(self, progress: Progress) -> tuple[float, float]:
        """Densities that an update after this step prunes to and grows to."""
        return self._bounds(self.mutation_at(progress))

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Prune to the lower bound, then grow at random to the upper one."""
        shapes = [site.original_places for site in sites]
        original = sum(shape.numel() for shape in shapes)
        lower, upper = (round(bound * original) for bound in self.bounds(progress))
        supports = [site.places for site in sites]
        keep: Count = lower
        if self.scope == "layer":
            keep = allocate(self.distribution, shapes, lower, at_most=sizes(supports))
        ranked = [self.score(site) for site in sites]
        kept = select(ranked, keep, supports)
        held = sizes(kept)
        grow: Count = upper - lower
        if self.scope == "layer":
            goals = allocate(self.distribution, shapes, upper, at_least=held)
            grow = [goal - have for goal, have in zip(goals, held, strict=True)]
        scores = random_scores(ranked, generator)
        grown = select(scores, grow, [~mask for mask in kept])
        return [SupportChange(*change) for change in zip(kept, grown, strict=True)]

    def score(self, site: Site) -> Tensor:
        """`|w| + lambda |dL/dw|`, summed over each place: the gradient as the optimizer saw it.

        Where it overflowed (in a step that GradScaler skipped) the magnitude alone counts.
        """
        score = site.magnitude
        gradient = site.weight.grad
        if self.gradient_weight == 0 or gradient is None:
            return score
        size = gradient.detach().abs().nan_to_num_(nan=0.0, posinf=0.0)
        return score.add_(pooled(size, self.block), alpha=self.gradient_weight)

    @property
    def _mutation(self) -> float:
        return 0.2 * self.density if self.mutation is None else self.mutation

    def _bounds(self, mutation: float) -> tuple[float, float]:
        if self.variant == "ems":
            return self.density, self.density + mutation
        return self.density - mutation, self.density

    def _grid(self, total_steps: int) -> range:
        adapted = max(1, total_steps // 32)
        return update_steps(self.update_interval or adapted, self.t_end, total_steps)
