"""STR: soft threshold weight reparameterization, one learned threshold per layer.

A. Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020,
arXiv 2002.03231.

    W~ = sign(W) * relu(|W| - g(s)),   g = sigmoid
    dL/dW = G where |W| >= g(s), else 0
    dL/ds = -g'(s) * sum of sign(W) G over |W| >= g(s),   g'(s) = g(s) (1 - g(s))

Weight decay draws s from s_init < 0 towards 0, and so the threshold up: that is the pruning force.
The loss draws back. `gossamer.forecast` says how far the decay can reach.

Symbols: s_init -> `s_init`, G = dL/dW~; the decay lambda is the optimizer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.control import Targeted
from gossamer.forecast import warn_if_futile
from gossamer.method import Cost, Progress, check_choice, check_range
from gossamer.site import Site
from gossamer.sparse_weight import SoftThreshold

__all__ = ["STR"]


@dataclass(frozen=True, kw_only=True)
class STR(Targeted):
    """Learned soft thresholds; a weight below its threshold gets no gradient.

    Unless it is asked for, density results from `s_init` and the weight decay of the thresholds.

    Args:
        s_init: Raw threshold at the start, at most 0: how long training stays dense. The paper's
            value suits a Lambda of about 12 to 16 (`gossamer.forecast`), -100 one of about 5, and
            -5 one of about 2.
        granularity: "layer" (one threshold each, as in the paper) or "row" (one per output
            channel, which collapses more easily).
    """

    s_init: float = -3200.0
    granularity: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "s_init", -math.inf, 0)
        check_choice(self, "granularity", ("layer", "row"))

    @property
    def cost(self) -> Cost:
        """All three products are sparse: weights below the threshold get no gradient."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> SoftThreshold:
        """Thresholds at `sigmoid(s_init)`."""
        return SoftThreshold(weight, self.granularity, self.s_init)

    def remedy(self, progress: Progress) -> str:
        """The decay of the thresholds, or the target."""
        if self.target_density is not None:
            return super().remedy(progress)
        return (
            f"Weight decay draws thresholds up, from STR(s_init={self.s_init:g}): give them less "
            "(Sparsifier.parameter_groups, threshold_decay), a lower s_init, or a target_density"
        )

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool:
        """Warn when no sparsity can appear, or hold the target if there is one."""
        if self.target_density is None:
            warn_if_futile("STR", sites, progress, optimizer)
        return super().advance(sites, progress, optimizer)
