"""The full-width twin of a slim network: what a library that only masks would have delivered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        values = theirs[name]
        if tensor.shape == values.shape:
            tensor.copy_(values)
            continue
        layer = full.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.modules.batchnorm._NormBase):
            tensor.zero_()
        tensor[_positions(name, tensor, plan)] = values.to(tensor.device)
    return full


def scatter(values: Tensor, shape: torch.Size, name: str, plan: Plan) -> Tensor:
    """A tensor of the full network's `shape`, zero but at the positions that `name` kept."""
    full = values.new_zeros(shape)
    full[_positions(name, full, plan)] = values
    return full


def take(values: Tensor, name: str, plan: Plan) -> Tensor:
    """The part of the full network's tensor `name` that was kept."""
    return values[_positions(name, values, plan)]


def _positions(name: str, tensor: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """Index of the kept part, one tensor per dimension, shaped to broadcast."""
    index = []
    for dim, size in enumerate(tensor.shape):
        kept = plan.kept(name, dim)
        kept = torch.arange(size) if kept is None else kept
        index.append(kept.to(tensor.device).view([-1] + [1] * (tensor.dim() - dim - 1)))
    return tuple(index)
