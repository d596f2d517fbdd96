"""DST: dynamic sparse training with trainable thresholds.

J. Liu, Z. Xu, R. Shi, R. C. C. Cheung, H. K. H. So, "Dynamic Sparse Training: Find Efficient Sparse
Network From Scratch With Trainable Masked Layers", ICLR 2020, arXiv 2005.06870.

    W_eff = W * S(|W| - t),   S(q) = 1 if q > 0 else 0
    loss  = task + alpha sum_layers sum_i exp(-t_i)
    dS/dq is replaced by H(q) = 2 - 4 |q| up to 0.4, 0.4 up to 1, 0 beyond   (`surrogates`)
    a layer that keeps less than 1 % of its weights starts again at t = 0

Symbols: W -> latent weight, t_i -> `threshold`, one per row (neuron, filter, unit of a gate),
alpha -> `alpha`, 1 % -> `reset_below`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.control import Targeted
from gossamer.method import Cost, Progress, check_choice, check_range
from gossamer.ops import spread
from gossamer.sharding import whole
from gossamer.site import Place, Site
from gossamer.sparse_weight import LearnedThreshold, threshold_shape
from gossamer.surrogates import block_margin, long_tailed_step

__all__ = ["DST", "Thresholded", "threshold_penalty"]

GRANULARITIES = ("row", "layer", "weight")

# Below this exp(-t) goes on as its tangent. Task gradients end at t = -1, so no run that learns
# comes here; one that was thrown here is drawn back, not to 1e15 in a step, and nothing overflows.
_TANGENT_BELOW = -10.0


def threshold_penalty(threshold: Tensor) -> Tensor:
    """R(t) = sum exp(-t), 0-d; the tangent at -10 for thresholds below."""
    bounded = threshold.clamp(min=_TANGENT_BELOW)
    return (torch.exp(-bounded) * (1 + (bounded - threshold))).sum()


class Thresholded(LearnedThreshold):
    """Effective weight = latent weight where its magnitude exceeds a trainable threshold.

    The latent weight lives on below the threshold, and may come back.

    Attributes:
        threshold: `(out, 1, ...)`, `(1, 1, ...)` or the weight's shape; starts at 0.
        block: Consecutive rows that are kept or pruned together, at one position: where the mean of
            their magnitudes exceeds that of their thresholds.
        resets: 0-d, how often the layer was set back to threshold 0, since it was made or resumed.
    """

    resets: Tensor

    def __init__(self, weight: Tensor, granularity: str, block: int = 1) -> None:
        super().__init__()
        self.block = block
        self.threshold = nn.Parameter(weight.new_zeros(threshold_shape(weight, granularity)))
        resets = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.register_buffer("resets", resets, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """`weight * S(|weight| - threshold)`."""
        return long_tailed_step(weight, self.threshold, self.block)

    def support(self, weight: Tensor) -> Tensor:
        """Where the magnitude exceeds the threshold."""
        if self.block > 1:
            return spread(self.kept(weight) > 0, self.block)
        return weight.abs() > self.threshold

    def kept(self, weight: Tensor) -> Tensor:
        """1 for every weight, or block, above its threshold, else 0: floats, as in the forward; a
        bool support takes four times as long.
        """
        magnitude = weight.abs()
        if self.block > 1:
            return block_margin(magnitude, self.threshold, self.block).gt_(0)
        return magnitude.gt_(self.threshold)

    def figures(self) -> dict[str, Tensor]:
        """Thresholds."""
        return {"threshold": self.threshold}

    @property
    def raw(self) -> nn.Parameter:
        """The threshold itself."""
        return self.threshold

    def reach(self, magnitude: Tensor) -> Tensor:
        """The magnitude itself."""
        return magnitude


@dataclass(frozen=True, kw_only=True)
class DST(Targeted):
    """Magnitude pruning with trained thresholds; training finds each layer's density.

    Args:
        alpha: Weight of the penalty that raises thresholds; the one knob for sparsity. The paper
            has 5e-6 for CIFAR-10 networks at lr 0.1, 5e-4 for LeNets at lr 0.01. Not used with a
            `target_density`.
        granularity: One threshold per "row" (neuron or filter), "layer" or "weight".
        reset_below: A layer that keeps less than this share of its weights starts again at
            threshold 0, its optimizer state cleared; 0 never resets. Not used with a
            `target_density`, which leaves every layer a share.
        clamp: Keep thresholds from going below 0, where they prune nothing.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md).
    """

    alpha: float = 5e-6
    granularity: str = "row"
    reset_below: float = 0.01
    clamp: bool = False
    block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", 0, math.inf)
        check_choice(self, "granularity", GRANULARITIES)
        check_range(self, "reset_below", 0, 1)
        check_range(self, "block", 1, math.inf, whole=True)

    @property
    def cost(self) -> Cost:
        """The weight gradient is dense: masked weights and thresholds learn from all of it."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=False)

    @property
    def recurrent(self) -> bool:
        """Every gate matrix has thresholds of its own."""
        return True

    def unfit(self, place: Place) -> str | None:
        """A weight of zeros stays dense: below its threshold with no gradient, it would stay 0."""
        reason = "is all zeros, to which DST passes no gradient"
        return None if whole(place.weight.any()) else reason

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Thresholded:
        """Thresholds of 0."""
        return Thresholded(weight, self.granularity, self.block)

    def remedy(self, progress: Progress) -> str:
        """The penalty, or the target."""
        if self.target_density is not None:
            return super().remedy(progress)
        return (
            f"The penalty, DST(alpha={self.alpha:g}), raises thresholds, and reset_below="
            f"{self.reset_below:g} did not catch it: give a smaller alpha, reset_below=0.01, or a "
            "target_density"
        )

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """`alpha * sum(exp(-t))` over all thresholds; none with a target density."""
        if self.target_density is not None:
            return None
        # FSDP may have gathered the thresholds of some layers and not of others.
        penalties = [whole(threshold_penalty(_threshold(site))) for site in sites]
        return self.alpha * torch.stack(penalties).sum()

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool:
        """Clamp thresholds if asked to, and set collapsed layers back to 0, without a host sync."""
        for site in sites:
            threshold = _threshold(site)
            if self.clamp:
                threshold.clamp_(min=0)
            if self.reset_below > 0 and self.target_density is None:
                kept = _thresholded(site).kept(site.weight).mean(dtype=torch.float32)
                collapsed = kept < self.reset_below
                state = {} if optimizer is None else optimizer.state.get(threshold, {})
                for tensor in (threshold, *state.values()):
                    if isinstance(tensor, Tensor) and tensor.shape == threshold.shape:
                        tensor.masked_fill_(collapsed, 0)
                _thresholded(site).resets.add_(whole(collapsed))
        if progress.step == progress.total_steps:
            self._warn_of_resets(sites)
        return super().advance(sites, progress, optimizer)

    def _warn_of_resets(self, sites: Sequence[Site]) -> None:
        """Warn of layers that were reset again and again: the density they end at is chance."""
        times = {site.name: int(_thresholded(site).resets) for site in sites}
        sawing = [f"{name} ({count} times)" for name, count in times.items() if count > 1]
        if sawing:
            warnings.warn(
                f"DST(alpha={self.alpha:g}) took layers below reset_below={self.reset_below:g} "
                f"again and again, and they started anew at threshold 0: {', '.join(sawing)}. "
                "Where their densities stand at the end is chance: give a smaller alpha, or a "
                "target_density",
                stacklevel=5,  # the caller of Sparsifier.step
            )


def _thresholded(site: Site) -> Thresholded:
    assert isinstance(site.sparse, Thresholded)
    return site.sparse


def _threshold(site: Site) -> nn.Parameter:
    return _thresholded(site).threshold
