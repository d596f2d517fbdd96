"""SparseWeight: the map from a latent weight to the effective weight a layer computes with.

A SparseWeight is a parametrization (`torch.nn.utils.parametrize`): autograd differentiates it, its
thresholds are ordinary parameters and its masks ordinary buffers, so optimizers, DDP, AMP, EMA,
`torch.compile` and `state_dict` need no special case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Masked", "SparseWeight", "threshold_shape"]


class SparseWeight(nn.Module, ABC):
    """`effective = forward(latent)`, and where the effective weight may be non-zero.

    Every tensor a SparseWeight registers is 0-d or has as many dimensions as the weight, each of
    the weight's size or 1. That one rule lets a cut slice any method's state.
    """

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Effective weight of the latent `weight: (out, in, *kernel)`, same shape."""

    @abstractmethod
    def support(self, weight: Tensor) -> Tensor:
        """Bool tensor of the weight's shape: where the effective weight may be non-zero."""


def threshold_shape(weight: Tensor, granularity: str) -> tuple[int, ...]:
    """Shape of thresholds for `weight: (out, in, *kernel)`: one per "layer", "row" or "weight"."""
    shapes = {
        "layer": (1,) * weight.dim(),
        "row": (weight.shape[0], *(1,) * (weight.dim() - 1)),
        "weight": tuple(weight.shape),
    }
    return shapes[granularity]


class Masked(SparseWeight):
    """Effective weight = latent weight where `mask` is 1.

    While a Sparsifier trains the model it keeps the latent weight exactly zero off the support
    (`kept_zero`), so the forward pass multiplies nothing: a mask costs one in-place product with
    the gradient. A copy of the module (an EMA copy, say) is kept zero by nobody, and multiplies.

    Attributes:
        mask: `(out, in, *kernel)` 0 or 1, float in the weight's dtype and memory format (a bool
            mask costs 2.5 times as much to multiply by).
        live_out: `(out, 1, ...)` bool, False for removed channels.
        live_in: `(1, in, 1, ...)` bool, False for inputs whose channel was removed.
    """

    mask: Tensor
    live_out: Tensor
    live_in: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__()
        if mask.shape != weight.shape:
            raise ValueError(f"mask of shape {tuple(mask.shape)} for weight {tuple(weight.shape)}")
        ones = [1] * (weight.dim() - 1)
        device = weight.device
        self.register_buffer("mask", torch.empty_like(weight, requires_grad=False).copy_(mask))
        self.register_buffer(
            "live_out", torch.ones(weight.shape[0], *ones, dtype=torch.bool, device=device)
        )
        self.register_buffer(
            "live_in", torch.ones(1, weight.shape[1], *ones[1:], dtype=torch.bool, device=device)
        )
        self.kept_zero = False
        self.wants_dense_gradient = False
        self.dense_gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` itself while it is kept zero off the support, else `weight * mask`."""
        return weight if self.kept_zero else weight * self.mask

    def support(self, weight: Tensor) -> Tensor:
        """Where the mask is 1; an averaged mask (EMA of buffers) counts from one half up."""
        return self.mask > 0.5

    @property
    def live(self) -> Tensor:
        """Bool tensor of the weight's shape: positions outside removed channels."""
        return (self.live_out & self.live_in).expand_as(self.mask)

    @property
    def live_shape(self) -> tuple[int, ...]:
        """The weight's shape without removed channels."""
        out, inputs = int(self.live_out.sum()), int(self.live_in.sum())
        return (out, inputs, *self.mask.shape[2:])

    def mask_gradient(self, weight: Tensor) -> None:
        """Post-accumulate hook on the latent parameter: `grad *= mask`, in place.

        It runs before DDP reduces and outside any compiled graph, so a step that also needs the
        dense gradient (`wants_dense_gradient`) neither recompiles nor changes what clipping and
        the optimizer see: the dense gradient is set aside, summed over accumulated micro-batches.
        """
        assert weight.grad is not None
        if self.wants_dense_gradient:
            if self.dense_gradient is None:
                self.dense_gradient = weight.grad.clone()
            else:
                # On the support `.grad` already is the sum of all micro-batches so far.
                self.dense_gradient = torch.where(
                    self.mask > 0.5, weight.grad, self.dense_gradient + weight.grad
                )
        weight.grad.mul_(self.mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> Masked:
        """A copy multiplies by its mask, since no Sparsifier keeps its latent weight zero."""
        copy = Masked(self.mask, self.mask)
        memo[id(self)] = copy
        copy.live_out.copy_(self.live_out)
        copy.live_in.copy_(self.live_in)
        copy.train(self.training)
        return copy


def zero_after_load(parametrized: ParametrizationList, _: object) -> None:
    """Load hook: a loaded latent weight is brought to the promise that `kept_zero` makes."""
    sparse = parametrized[0]
    if isinstance(sparse, Masked) and sparse.kept_zero:
        with torch.no_grad():
            parametrized.original.mul_(sparse.mask)
