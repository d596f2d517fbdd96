"""Static sparse training: a random mask, drawn once, never changed.

The baseline that every dynamic method must beat.

    W_eff = W * M,   M ~ uniform over all masks with the layer's budget of ones

Symbols: density d -> `density`; layer budgets by ERK (Evci et al., 2020, arXiv 1911.11134).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.allocation import DISTRIBUTIONS
from gossamer.method import Cost, Method, allocate_density, check_choice, check_range
from gossamer.ops import random_mask
from gossamer.sparse_weight import Masked

__all__ = ["Static"]


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """A fixed random mask.

    Args:
        density: Kept fraction of all sparse weights, in (0, 1].
        distribution: How the budget is shared among layers: "erk", "er" or "uniform".
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks.
    """

    density: float = 0.1
    distribution: str = "erk"
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_range(self, "block", 1, math.inf, whole=True)

    @property
    def cost(self) -> Cost:
        """All three products are sparse."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer, summing to `round(density * all weights)`."""
        return allocate_density(self.distribution, shapes, self.density)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """A uniformly random mask with exactly `count` places."""
        return Masked(weight, random_mask(weight.shape, count, generator, self.block))
