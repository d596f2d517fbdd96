"""The full-width twin of a slim network: what a library that only masks would have delivered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.channels import Axis
from gossamer.shrink.plan import Plan

__all__ = ["expand", "scatter", "take"]


@torch.no_grad()
def expand(slim: nn.Module, full: nn.Module, plan: Plan) -> nn.Module:
    """Write the slim model's tensors into the full-width `full`, in place; returns `full`.

    Weights of removed channels are zero, on both sides, so the outputs are the same up to the
    order of summation. Norms of removed channels keep what `full` has for them: nothing reads it.

    Args:
        slim: A plain model, cut by `plan`.
        full: The same network before any cut, with any weights.
        plan: The kept positions.
    """
    theirs = slim.state_dict()
    for name, tensor in full.state_dict().items():
        layer = name.rpartition(".")[0]
        values = theirs[name]
        if tensor.shape == values.shape:
            tensor.copy_(values)
            continue
        if isinstance(full.get_submodule(layer), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            tensor.zero_()
        tensor[_positions(layer, tensor, plan)] = values.to(tensor.device)
    return full


def scatter(values: Tensor, shape: torch.Size, layer: str, plan: Plan) -> Tensor:
    """A tensor of the full network's `shape`, zero but at the positions `layer` kept."""
    full = values.new_zeros(shape)
    full[_positions(layer, full, plan)] = values
    return full


def take(values: Tensor, layer: str, plan: Plan) -> Tensor:
    """The part of the full network's tensor that `layer` kept."""
    return values[_positions(layer, values, plan)]


def _positions(layer: str, tensor: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """Index of the kept part: `(out, in, ...)` for weights, `(out,)` for what is per channel."""
    axes: tuple[Axis, ...] = ("out", "in") if tensor.dim() > 1 else ("out",)
    index = []
    for dim, axis in enumerate(axes):
        kept = plan.kept(layer, axis)
        if kept is None:
            kept = torch.arange(tensor.shape[dim])
        index.append(kept.to(tensor.device))
    return (index[0].unsqueeze(1), index[1]) if len(index) == 2 else (index[0],)
