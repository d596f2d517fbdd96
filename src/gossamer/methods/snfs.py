"""SNFS: sparse networks from scratch, by sparse momentum.

T. Dettmers, L. Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing
Performance", 2019, arXiv 1907.04840.

    every step:       M = beta M + (1 - beta) G         G = dL/dw, dense
    every dT steps:   s_l = mean |M| of the active weights of layer l, over the sum of all layers
        drop    in each layer the ceil(p_l n_l) smallest |w|
        grow    s_l of all that was dropped in layer l, where |M| of its empty places is largest
        p_l = min(p, sparsity of l) where l is denser than 0.8 and s_l above average, else p
        p(t) = p_end + (p_0 - p_end) (1 + cos(pi t / T)) / 2

Symbols: beta -> `smoothing`, p_0 -> `drop_fraction`, p_end -> `drop_fraction_end`, dT (an epoch in
the paper) -> `update_interval`, T -> `t_end` times the steps of the run; n_l -> active weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.allocation import DISTRIBUTIONS, apportion
from gossamer.exploration import (
    SCOPES,
    Count,
    drop_smallest,
    grow_largest,
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
from gossamer.sharding import whole
from gossamer.site import Site
from gossamer.sparse_weight import Masked

__all__ = ["SNFS", "Remembering", "drop_counts", "growth_counts", "momentum_shares"]

_DENSE = 0.8  # a layer above this density that still gains weights drops no more than it lacks


def momentum_shares(momenta: Sequence[Tensor], supports: Sequence[Tensor]) -> list[float]:
    """s_l: mean |momentum| on each layer's support, over the sum of all layers.

    Equal shares while all momenta are zero.
    """
    means = [
        float(whole((momentum.abs() * support).sum(dtype=torch.float64))) / max(1, active)
        for momentum, support, active in zip(momenta, supports, sizes(supports), strict=True)
    ]
    total = math.fsum(means)
    return [mean / total if total else 1 / len(means) for mean in means]


def drop_counts(
    rate: float, active: Sequence[int], weights: Sequence[int], shares: Sequence[float]
) -> list[int]:
    """Weights that each layer drops, rounded up.

    Args:
        rate: p.
        active: n_l, weights on the support of each layer.
        weights: All weights of each layer.
        shares: s_l.
    """
    counts = []
    for kept, total, gain in zip(active, weights, shares, strict=True):
        sparsity = 1 - kept / total
        filling = sparsity < 1 - _DENSE and gain > 1 / len(shares)
        counts.append(math.ceil((min(rate, sparsity) if filling else rate) * kept - 1e-9))
    return counts


def growth_counts(
    shares: Sequence[float], dropped: Sequence[int], active: Sequence[int], weights: Sequence[int]
) -> list[int]:
    """Weights that each layer grows, as many as all dropped together.

    What a layer has no room for goes evenly to the others; none is left without weights.
    """
    total = sum(dropped)
    held = [kept - gone for kept, gone in zip(active, dropped, strict=True)]
    return apportion(
        [part * total for part in shares],
        total,
        at_least=[int(left == 0) for left in held],
        at_most=[size - left for size, left in zip(weights, held, strict=True)],
    )


class Remembering(Masked):
    """Masked, beside a running mean of the dense gradient.

    The optimizer's own momentum is zero off the support, and not every optimizer has one.

    Attributes:
        momentum: M, `(out, in, *kernel)`, in the weight's dtype and memory format.
    """

    momentum: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__(weight, mask)
        self.register_buffer("momentum", torch.zeros_like(weight, requires_grad=False))

    def remember(self, smoothing: float) -> None:
        """Take the step's dense gradient into the mean, once; without one nothing changes."""
        if self.dense_gradient is not None:
            self.momentum.lerp_(self.dense_gradient, 1 - smoothing)
            self.dense_gradient = None


@dataclass(frozen=True, kw_only=True)
class SNFS(Method):
    """Drop by magnitude, grow by momentum, and let layers of large momentum gain weights.

    Args:
        density: Kept fraction of all sparse weights, in (0, 1].
        distribution: Layer densities at the start: "uniform" (as in the paper), "erk" or "er".
        update_interval: Steps between updates; None: 100, or a twentieth of a run shorter than
            2,000 steps. The paper: the steps of an epoch.
        smoothing: Share of the momentum that a step leaves; 1 minus it is the gradient's.
        drop_fraction: Share of each layer that an update drops at the start; a cosine until `t_end`
            ...
        drop_fraction_end: ... takes it to this.
        t_end: Fraction of training after which the support stays as it is.
        scope: "layer" drops in each layer and shares growth out by mean momentum; "global" ranks
            the weights and then the momenta of all layers together.
    """

    density: float = 0.1
    distribution: str = "uniform"
    update_interval: int | None = None
    smoothing: float = 0.9
    drop_fraction: float = 0.5
    drop_fraction_end: float = 0.005
    t_end: float = 1.0
    scope: str = "layer"

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_choice(self, "scope", SCOPES)
        for name in ("drop_fraction", "drop_fraction_end"):
            check_range(self, name, 0, 1)
        check_range(self, "t_end", 0, 1, open_low=True)
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"SNFS: smoothing={self.smoothing} leaves nothing for the gradient, or is no "
                "share: give a value in [0, 1)"
            )

    @property
    def cost(self) -> Cost:
        """Forward and input gradient are sparse; for the weight gradient see `wants_dense_grad`."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer at the start, summing to `round(density * all weights)`."""
        return allocate_density(self.distribution, shapes, self.density)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Remembering:
        """A uniformly random mask with exactly `count` ones."""
        return Remembering(weight, random_mask(weight.shape, count, generator))

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when the run is over before the first update."""
        self._steps(total_steps)

    def updates_at(self, progress: Progress) -> bool:
        """Every interval before `t_end`."""
        return progress.step in self._steps(progress.total_steps)

    def wants_dense_grad(self, progress: Progress) -> bool:
        """In every step until the last update: the momentum is that of all weights."""
        return progress.step <= self._steps(progress.total_steps)[-1]

    def drop_rate(self, progress: Progress) -> float:
        """p(t): share of each layer that an update after this step drops."""
        fraction = progress.step / (self.t_end * progress.total_steps)
        return cosine(fraction, self.drop_fraction, self.drop_fraction_end)

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Drop the smallest magnitudes; grow the largest momenta, in the layers that gain most."""
        self._remember(sites)
        supports = [site.support for site in sites]
        momenta = [_remembering(site).momentum.abs() for site in sites]
        active = sizes(supports)
        rate = self.drop_rate(progress)
        dropped: Count
        grown: Count
        if self.scope == "global":
            dropped = grown = math.ceil(rate * sum(active) - 1e-9)
        else:
            weights = [support.numel() for support in supports]
            shares = momentum_shares(momenta, supports)
            dropped = drop_counts(rate, active, weights, shares)
            grown = growth_counts(shares, dropped, active, weights)
        kept = drop_smallest([site.weight for site in sites], supports, dropped)
        changes = grow_largest(momenta, grown, kept, supports, revive=True)
        return [SupportChange(*change) for change in changes]

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Take the gradient of a step without an update into the momentum."""
        self._remember(sites)

    def _remember(self, sites: Sequence[Site]) -> None:
        for site in sites:
            _remembering(site).remember(self.smoothing)

    def _steps(self, total_steps: int) -> range:
        return update_steps(self.update_interval, self.t_end, total_steps)


def _remembering(site: Site) -> Remembering:
    assert isinstance(site.sparse, Remembering)
    return site.sparse
