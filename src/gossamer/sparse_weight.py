"""SparseWeight: the map from a latent weight to the effective weight a layer computes with.

A SparseWeight is a parametrization (`torch.nn.utils.parametrize`): autograd differentiates it, its
thresholds are ordinary parameters and its masks ordinary buffers, so optimizers, DDP, AMP, EMA,
`torch.compile` and `state_dict` need no special case.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gossamer.ops import n_of_m, pooled, straight_through
from gossamer.sharding import is_sharded, local, placed, strip, whole
from gossamer.surrogates import soft_threshold

__all__ = [
    "LearnedThreshold",
    "Masked",
    "NOfM",
    "SoftThreshold",
    "SparseWeight",
    "threshold_shape",
]


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

    def learns(self, weight: Tensor) -> Tensor:
        """Bool tensor of the weight's shape: which weights need their gradient in a step."""
        return self.support(weight)

    def figures(self) -> dict[str, Tensor]:
        """What to watch beside the support, by name: thresholds, and 0-d annealing factors."""
        return {}

    @property
    def keeps_count(self) -> bool:
        """Whether the support always has as many weights, so that it cannot collapse."""
        return False

    def shard(self, weight: Tensor) -> None:
        """Keep of every mask the part that belongs to this process's part of `weight`."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.shape == weight.shape:
                setattr(self, name, placed(buffer, like=weight))


def for_forward(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask for a forward pass that computes with `weight`.

    FSDP gathers weights, and not masks: what another process holds of one is fetched, as bools.
    """
    if is_sharded(mask) and not is_sharded(weight):
        return whole(mask > 0.5).to(weight.dtype)
    return mask


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
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} for weight {tuple(weight.shape)}: give one of "
                "the weight's shape"
            )
        ones = [1] * (weight.dim() - 1)
        device = weight.device
        mask = placed(mask.to(device), like=weight)
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
        # What `mask_gradient` left: the gradient and its version. A list, because assigning to an
        # attribute of a module costs as much as the product itself in a small layer.
        self._left: list[Any] = []

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` itself while it is kept zero off the support, else `weight * mask`.

        In eval mode always the latter: the weights may be an average that was swapped in.
        """
        if self.kept_zero and self.training:
            return weight
        return weight * for_forward(self.mask, weight)

    def support(self, weight: Tensor) -> Tensor:
        """Where the mask is 1; an averaged mask (EMA of buffers) counts from one half up."""
        return self.mask > 0.5

    @property
    def live(self) -> Tensor:
        """Bool tensor of the weight's shape: positions outside removed channels."""
        return placed((self.live_out & self.live_in).expand(self.mask.shape), like=self.mask)

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
        gradient = weight.grad
        assert gradient is not None
        if self.wants_dense_gradient:
            if self.dense_gradient is None:
                self.dense_gradient = gradient.clone()
            else:
                # On the support `.grad` already is the sum of all micro-batches so far.
                self.dense_gradient = torch.where(
                    self.mask > 0.5, gradient, self.dense_gradient + gradient
                )
        gradient.mul_(self.mask)
        self._left[:] = weakref.ref(gradient), gradient._version

    def gradient_changed(self, weight: Tensor) -> bool:
        """Whether `weight.grad` is not, or no longer, what `mask_gradient` left.

        Writes through `weight.grad.data` leave no trace and are not seen; write to `weight.grad`.
        """
        gradient = weight.grad
        if gradient is None or not self._left:
            return gradient is not None
        masked, version = self._left
        return masked() is not gradient or gradient._version != version

    def __deepcopy__(self, memo: dict[int, Any]) -> Masked:
        """A copy multiplies by its mask, since no Sparsifier keeps its latent weight zero."""
        copy = type(self)(self.mask, self.mask)
        memo[id(self)] = copy
        for name, buffer in self.named_buffers():
            copy.get_buffer(name).copy_(buffer)
        copy.train(self.training)
        return copy


def zero_after_load(parametrized: ParametrizationList, _: object) -> None:
    """Load hook: a loaded latent weight is brought to the promise that `kept_zero` makes."""
    sparse = parametrized[0]
    if isinstance(sparse, Masked) and sparse.kept_zero:
        with torch.no_grad():
            parametrized.original.mul_(sparse.mask)


class NOfM(SparseWeight):
    """Effective weight = latent weight where it is among the `n` largest of its `m`; the gradient
    goes straight through to all of the latent weight.

    The mask of a forward pass depends on the last optimizer step alone, so a method computes it
    once per step (`refresh`) and not in every forward pass. A copy of the module (an EMA copy, say)
    is refreshed by nobody, and computes its mask from its own weight each time.

    Attributes:
        mask: `(out, in, *kernel)` 0 or 1, in the weight's dtype and memory format.
        lam: 0-d; how strongly the method draws pruned weights to zero at this step.
    """

    mask: Tensor
    lam: Tensor

    def __init__(self, weight: Tensor, n: int, m: int, *, dense_tail: bool = False) -> None:
        super().__init__()
        self.n, self.m, self.dense_tail = n, m, dense_tail
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))
        self.register_buffer("lam", weight.new_zeros((), requires_grad=False))
        self.kept_fresh = False

    def forward(self, weight: Tensor) -> Tensor:
        """`weight * mask`, straight through."""
        if not self.kept_fresh:
            return straight_through(weight, self._pattern(weight))
        return straight_through(weight, for_forward(self.mask, weight))

    def support(self, weight: Tensor) -> Tensor:
        """Where the mask is 1."""
        return self.mask > 0.5 if self.kept_fresh else self._pattern(weight)

    def figures(self) -> dict[str, Tensor]:
        """`lam`."""
        return {"lam": self.lam}

    @property
    def keeps_count(self) -> bool:
        """`n` of every `m`."""
        return True

    def refresh(self, weight: Tensor) -> None:
        """Take the mask from the latent weight as it is now."""
        n_of_m(weight, self.n, self.m, dense_tail=self.dense_tail, out=self.mask)
        self.kept_fresh = True

    def open(self) -> None:
        """Prune nothing until the next refresh."""
        self.mask.fill_(1)
        self.kept_fresh = True

    def _pattern(self, weight: Tensor) -> Tensor:
        return n_of_m(weight, self.n, self.m, dense_tail=self.dense_tail)

    def __deepcopy__(self, memo: dict[int, Any]) -> NOfM:
        """A copy computes its own masks, since nobody refreshes it."""
        copy = NOfM(self.mask, self.n, self.m, dense_tail=self.dense_tail)
        memo[id(self)] = copy
        copy.mask.copy_(self.mask)
        copy.lam.copy_(self.lam)
        copy.train(self.training)
        return copy


class LearnedThreshold(SparseWeight):
    """Effective weights are 0 where the magnitude does not exceed a trainable threshold.

    Attributes:
        block: Consecutive rows that are kept or pruned together, at one position.
    """

    block: int = 1

    @property
    @abstractmethod
    def raw(self) -> nn.Parameter:
        """What is trained: the thresholds, or what they are computed from."""

    @abstractmethod
    def reach(self, magnitude: Tensor) -> Tensor:
        """`raw` at which a weight of this magnitude is pruned; may work in place."""

    def margin(self, weight: Tensor, index: Tensor | None = None) -> Tensor:
        """How far `raw` may rise until each weight, or block of them, is pruned, in 32 bits or
        more.

        Args:
            weight: `(out, in, *kernel)`.
            index: `(n,)` positions to look at in this process's part of the weight (or of its
                blocks), flattened; None for all.
        """
        like, raw = weight, self.raw.detach()
        if self.block > 1:
            weight = pooled(weight.detach().abs(), self.block) / self.block
            raw = pooled(raw, self.block) / self.block if len(raw) > 1 else raw
        if index is not None:
            raw = local(raw) if len(raw) == len(weight) else whole(raw)
            weight = local(weight)
            weight, raw = weight.take(index), raw.expand_as(weight).take(index)
        magnitude = weight.detach().abs()
        if magnitude.element_size() < 4:
            magnitude = magnitude.float()
        margin = self.reach(magnitude).sub_(raw)
        return margin if index is None else strip(margin, like)


class SoftThreshold(LearnedThreshold):
    """Effective weight = `sign(W) * relu(|W| - sigmoid(s))`, its threshold learned.

    Attributes:
        s: Raw thresholds, `(1, 1, ...)` or `(out, 1, ...)`.
        alpha: 0-d; share of the gradient that weights below their threshold get.
        cut: 0-d; weights whose distance `|W| - sigmoid(s)` lies below it get none. Used only if
            `backward_sparse`, which a module keeps for life: it decides what is compiled.
    """

    alpha: Tensor
    cut: Tensor

    def __init__(
        self, weight: Tensor, granularity: str, s_init: float, *, backward_sparse: bool = False
    ) -> None:
        super().__init__()
        self.s = nn.Parameter(weight.new_full(threshold_shape(weight, granularity), s_init))
        self.register_buffer("alpha", weight.new_zeros(()))
        self.backward_sparse = backward_sparse
        if backward_sparse:
            self.register_buffer("cut", weight.new_full((), -math.inf))

    def forward(self, weight: Tensor) -> Tensor:
        """`weight`, nearer to zero by its threshold, and zero within it."""
        return soft_threshold(
            weight, self.s, self.alpha, self.cut if self.backward_sparse else None
        )

    def support(self, weight: Tensor) -> Tensor:
        """Where the magnitude is above the threshold."""
        return weight.abs() > self.threshold

    def learns(self, weight: Tensor) -> Tensor:
        """What lies above the cut while there is one, else the support."""
        if self.backward_sparse and bool(self.cut.isfinite()):
            return weight.abs() - self.threshold >= self.cut
        return self.support(weight)

    @property
    def threshold(self) -> Tensor:
        """`sigmoid(s)`, of the shape of `s`."""
        return self.s.sigmoid()

    def figures(self) -> dict[str, Tensor]:
        """Thresholds and `alpha`."""
        return {"threshold": self.threshold, "alpha": self.alpha}

    @property
    def raw(self) -> nn.Parameter:
        """`s`."""
        return self.s

    def reach(self, magnitude: Tensor) -> Tensor:
        """`logit(|W|)`; no threshold reaches magnitudes of 1 and more, which count as 1 - 1e-6."""
        return magnitude.clamp_(1e-30, 1 - 1e-6).logit_()
