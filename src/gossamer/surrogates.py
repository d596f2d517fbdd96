"""Step functions with the papers' gradients: thresholds on weights that can be trained.

A threshold selects weights by a step, whose derivative is zero wherever it exists. Each function
here computes its paper's forward exactly and puts its paper's gradient in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.ops import pooled, spread

__all__ = ["block_margin", "long_tailed_step", "soft_threshold"]

# Weights per tile of a backward on the CPU: temporaries then stay in the second-level cache and in
# the allocator's hands. On whole tensors, page faults take most of the time (ResNet-18: 60 ms
# instead of 16).
_TILE = 1 << 17

# A forward here ends with an operation in place, which saves a tensor, but not in a graph:
# torch.compile of PyTorch 2.11 gives gradients of zero where it does.

# `x > this` is `x >= 0`, but for denormal numbers.
_JUST_BELOW_ZERO = -torch.finfo(torch.float32).tiny


def long_tailed_step(weight: Tensor, threshold: Tensor, block: int = 1) -> Tensor:
    """`W * S(|W| - t)`: the weights above their threshold, with the long-tailed gradient of DST.

        S(q) = 1 if q > 0 else 0
        H(q) = 2 - 4 |q| if |q| <= 0.4,  0.4 if 0.4 < |q| <= 1,  0 otherwise;  stands for dS/dq

        dL/dW =      G * (S(q) + |W| * H(q))      with q = |W| - t, G = dL/d(effective weight)
        dL/dt = -sum G * W * H(q)                 over the weights that share the threshold

    J. Liu et al., ICLR 2020, arXiv 2005.06870; H is taken over there from Xu & Cheung, BMVC 2019.
    The backward needs the two arguments and nothing else.

    With `block`, so many consecutive rows B at one position have one step, ours:

        q = mean_B |W| - mean_B t
        dL/dW = G * S(q) + sign(W) * H(q) * sum_B (G * W) / |B|
        dL/dt =                  -sum H(q) * sum_B (G * W) / |B|

    Args:
        weight: `(out, in, *kernel)`.
        threshold: As many dimensions, each of the weight's size or 1.
        block: Rows that have one step.

    Returns:
        The effective weight. A weight whose magnitude equals its threshold is 0.
    """
    if block > 1:
        return weight * spread(_gate(block_margin(weight.abs(), threshold, block)), block)
    effective: Tensor = _LongTailedStep.apply(weight, threshold)  # type: ignore[no-untyped-call]
    return effective


def block_margin(magnitude: Tensor, threshold: Tensor, block: int) -> Tensor:
    """`mean_B |W| - mean_B t`, `(out / block, in, *kernel)`: how far each block lies above the
    thresholds of its rows, which may be one for all.
    """
    per_row = threshold.expand(magnitude.shape[0], *threshold.shape[1:])
    return pooled(magnitude, block).div(block) - pooled(per_row, block).div(block)


def _gate(distance: Tensor) -> Tensor:
    """S(q), with H(q) as its derivative."""
    kept: Tensor = _LongTailedGate.apply(distance)  # type: ignore[no-untyped-call]
    return kept


class _LongTailedGate(torch.autograd.Function):
    @staticmethod
    def forward(distance: Tensor) -> Tensor:
        kept = distance.clone().gt_(0)
        return kept.clone() if torch.compiler.is_compiling() else kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (distance,) = ctx.saved_tensors
        size: Tensor = distance.abs()
        near = size.clone().le_(1)
        return size.clamp_(max=0.4).sub_(0.5).mul_(near).mul_(grad).mul_(-4)


class _LongTailedStep(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, threshold: Tensor) -> Tensor:
        # Compared in place, into floats: a bool mask takes ten times as long on a CPU.
        kept = weight.abs().gt_(threshold)
        return kept * weight if torch.compiler.is_compiling() else kept.mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, threshold = ctx.saved_tensors
        if weight.is_cpu and not torch.compiler.is_compiling():
            return _tiled_gradients(weight, threshold, grad)
        return _long_tailed_gradients(weight, threshold, grad)


def _long_tailed_gradients(
    weight: Tensor, threshold: Tensor, grad: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `long_tailed_step` with respect to weight (in `out` if given) and threshold."""
    magnitude = weight.abs()
    distance = magnitude - threshold
    # Not `magnitude > threshold`, as in the forward: torch.compile would save that mask.
    kept = distance.clone().gt_(0)
    near = distance.abs_().clone().le_(1)
    # min(|q|, 0.4) - 0.5 is -H/4 up to |q| = 1, in two passes; powers of 2 round nothing.
    tail = distance.clamp_(max=0.4).sub_(0.5).mul_(near).mul_(grad)
    grad_threshold = (tail * weight).sum_to_size(threshold.shape).mul_(4)
    return torch.addcmul(kept.mul_(grad), tail, magnitude, value=-4, out=out), grad_threshold


def _tiled_gradients(weight: Tensor, threshold: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same, over tiles of rows."""
    rows = max(1, _TILE // max(1, weight[:1].numel()))
    per_row = threshold.expand(weight.shape[0], *threshold.shape[1:])
    grad_weight = torch.empty_like(weight)
    tiles = zip(*(torch.split(x, rows) for x in (weight, per_row, grad, grad_weight)), strict=True)
    grads = [_long_tailed_gradients(*tile)[1] for tile in tiles]
    return grad_weight, torch.cat(grads).sum_to_size(threshold.shape)


def soft_threshold(weight: Tensor, s: Tensor, alpha: Tensor, cut: Tensor | None = None) -> Tensor:
    """`sign(W) * relu(|W| - t)`, `t = sigmoid(s)`, with an annealed gradient below the threshold.

        h' = 1 where |W| >= t, else alpha
        dL/dW = G * h'                                    with G = dL/d(effective weight)
        dL/ds = -t (1 - t) * sum sign(W) * G * h'         over the weights that share the threshold

    alpha = 0 is STR (A. Kusupati et al., ICML 2020, arXiv 2002.03231), alpha > 0 AutoSparse
    (A. Kundu et al., 2023, arXiv 2304.06941). A weight that is exactly 0 gets its gradient too, all
    of it where t = 0; autograd through `sign` and `abs` would leave it dead for ever.

    Args:
        weight: `(out, in, *kernel)`.
        s: Raw thresholds, as many dimensions, each of the weight's size or 1.
        alpha: 0-d, of the weight's dtype; a tensor, so that a new value compiles nothing anew.
        cut: 0-d; weights with `|W| - t` below it get no gradient at all.

    Returns:
        The effective weight. A weight whose magnitude equals its threshold is 0.
    """
    effective: Tensor = _SoftThreshold.apply(weight, s, alpha, cut)  # type: ignore[no-untyped-call]
    return effective


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, s: Tensor, alpha: Tensor, cut: Tensor | None) -> Tensor:
        size = weight.abs().sub_(s.sigmoid()).relu_()
        return size.copysign(weight) if torch.compiler.is_compiling() else size.copysign_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, s, alpha, cut = ctx.saved_tensors
        threshold = s.sigmoid()
        if not weight.is_cpu or torch.compiler.is_compiling():
            grad_weight, pull = _soft_gradients(alpha, cut, weight, threshold, grad)
        else:
            rows = max(1, _TILE // max(1, weight[:1].numel()))
            per_row = threshold.expand(weight.shape[0], *threshold.shape[1:])
            grad_weight = torch.empty_like(weight)
            tensors = (weight, per_row, grad, grad_weight)
            tiles = zip(*(torch.split(x, rows) for x in tensors), strict=True)
            pulls = [_soft_gradients(alpha, cut, *tile)[1] for tile in tiles]
            pull = torch.cat(pulls).sum_to_size(s.shape)
        return grad_weight, pull * threshold * (threshold - 1), None, None


def _soft_gradients(
    alpha: Tensor,
    cut: Tensor | None,
    weight: Tensor,
    threshold: Tensor,
    grad: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`G * h'` (in `out` if given), and the sum of `sign(W) * G * h'` per threshold."""
    distance = weight.abs().sub_(threshold)
    above = torch.ops.aten.threshold_backward(grad, distance, _JUST_BELOW_ZERO)
    # lerp leaves the gradient above the threshold bit for bit as it is.
    passed = torch.lerp(above, grad, alpha, out=out)
    if cut is not None:
        passed.mul_(distance.ge_(cut))
    return passed, distance.copy_(weight).sign_().mul_(passed).sum_to_size(threshold.shape)
