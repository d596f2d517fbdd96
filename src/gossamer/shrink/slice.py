"""Slicing: make layers physically smaller, inside the same Parameter objects.

One row per layer type says which tensors and attributes span an axis. Parametrized weights, their
SparseWeight's state, gradients and optimizer state are sliced along, so optimizers, LR schedulers
and hooks stay valid. Every cut returns what undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gossamer.channels import Axis, ChannelGroup, Cut, is_depthwise

__all__ = ["Undo", "apply_cuts", "axis_size", "cuts_for"]

Undo = Callable[[], None]


class _Span(NamedTuple):
    """Tensors of a layer that span an axis, with the dimension, and the attributes that tell it."""

    tensors: tuple[tuple[str, int], ...]
    attributes: tuple[str, ...]


_WEIGHT_OUT = (("weight", 0), ("bias", 0))
_NORM = (*_WEIGHT_OUT, ("running_mean", 0), ("running_var", 0))


def _span(layer: str, module: nn.Module, axis: Axis) -> _Span:
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and axis == "out":
        return _Span(_NORM, ("num_features",))
    if isinstance(module, nn.Linear):
        if axis == "out":
            return _Span(_WEIGHT_OUT, ("out_features",))
        return _Span((("weight", 1),), ("in_features",))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if is_depthwise(module) and axis == "out":
            return _Span(_WEIGHT_OUT, ("in_channels", "out_channels", "groups"))
        if module.groups == 1:
            if axis == "out":
                return _Span(_WEIGHT_OUT, ("out_channels",))
            return _Span((("weight", 1),), ("in_channels",))
    raise ValueError(
        f"{layer} ({type(module).__name__}) cannot be cut along its {axis}put channels: "
        "linear, ungrouped and depthwise convolution and batch norm can"
    )


def axis_size(layer: str, module: nn.Module, axis: Axis) -> int:
    """Width of a layer along an axis."""
    return int(getattr(module, _span(layer, module, axis).attributes[0]))


def cuts_for(
    model: nn.Module, removals: Iterable[tuple[ChannelGroup, Sequence[int] | Tensor]]
) -> list[Cut]:
    """The cuts that remove the given channels of each group, one per layer and axis."""
    gone: dict[tuple[str, Axis], list[Tensor]] = {}
    for group, channels in removals:
        rows = torch.as_tensor(channels, dtype=torch.int64)
        if len(rows):
            for part in group.slices:
                gone.setdefault((part.layer, part.axis), []).append(part.index[rows].flatten())
    cuts = []
    for (layer, axis), positions in gone.items():
        width = axis_size(layer, model.get_submodule(layer), axis)
        keep = torch.ones(width, dtype=torch.bool)
        keep[torch.cat(positions)] = False
        if not keep.any():
            raise ValueError(f"{layer} would lose all of its {width} {axis}put channels")
        cuts.append(Cut(layer, axis, keep.nonzero().squeeze(1), width))
    return cuts


def apply_cuts(
    model: nn.Module, cuts: Sequence[Cut], optimizer: torch.optim.Optimizer | None = None
) -> Undo:
    """Make the cuts in place; returns a function that takes all of them back.

    Raises:
        ValueError: A layer that cannot be cut, or optimizer state whose shape is neither the
            parameter's nor 0-d. Nothing is changed then.
    """
    undo: list[Undo] = []

    def take_back() -> None:
        while undo:
            undo.pop()()

    try:
        for cut in cuts:
            module = model.get_submodule(cut.layer)
            span = _span(cut.layer, module, cut.axis)
            for name, dim in span.tensors:
                _cut_tensor(cut.layer, module, name, dim, cut.keep, optimizer, undo)
            for attribute in span.attributes:
                undo.append(_setter(module, attribute, getattr(module, attribute)))
                setattr(module, attribute, len(cut.keep))
    except Exception:
        take_back()
        raise
    return take_back


def _setter(module: nn.Module, attribute: str, value: int) -> Undo:
    return lambda: setattr(module, attribute, value)


def _cut_tensor(
    layer: str,
    module: nn.Module,
    name: str,
    dim: int,
    keep: Tensor,
    optimizer: torch.optim.Optimizer | None,
    undo: list[Undo],
) -> None:
    owners: list[tuple[nn.Module, str]] = [(module, name)]
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
        parametrized = parametrizations[name]
        assert isinstance(parametrized, ParametrizationList)
        # A SparseWeight's tensors broadcast against the weight: same dimension, or size 1.
        owners = [
            (owner, key)
            for owner in parametrized.modules()
            for key in (*owner._parameters, *owner._buffers)
        ]
    for owner, key in owners:
        tensor: Tensor | None = owner._parameters.get(key)
        if tensor is None:
            tensor = owner._buffers.get(key)
        if tensor is None or tensor.dim() <= dim or (len(owners) > 1 and tensor.shape[dim] == 1):
            continue
        where = keep.to(tensor.device)
        if isinstance(tensor, nn.Parameter):
            _cut_parameter(layer, tensor, dim, where, optimizer, undo)
        else:
            undo.append(_buffer_setter(owner, key, tensor))
            owner._buffers[key] = _take(tensor, dim, where)


def _buffer_setter(owner: nn.Module, key: str, value: Tensor) -> Undo:
    def restore() -> None:
        owner._buffers[key] = value

    return restore


def _cut_parameter(
    layer: str,
    parameter: nn.Parameter,
    dim: int,
    keep: Tensor,
    optimizer: torch.optim.Optimizer | None,
    undo: list[Undo],
) -> None:
    shape, data, grad = parameter.shape, parameter.data, parameter.grad
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    sliced = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.shape != shape:
                raise ValueError(
                    f"{layer}: optimizer state {key!r} of shape {tuple(value.shape)} for a weight "
                    f"of shape {tuple(shape)} cannot be cut: use an optimizer whose state has the "
                    'shape of the weight, or cut at the end (Sparsifier(..., cut="end"))'
                )
            sliced[key] = value

    def restore() -> None:
        replace_data(parameter, data)
        parameter.grad = grad
        state.update(sliced)

    undo.append(restore)
    replace_data(parameter, _take(data, dim, keep))
    parameter.grad = None if grad is None else _take(grad, dim, keep)
    state.update({key: _take(value, dim, keep) for key, value in sliced.items()})


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give `parameter` data of another shape, hooks kept.

    A gradient accumulator that a living graph (the loss of the last step) still holds expects the
    old shape. PyTorch drops it when the dtype changes, hence the detour.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def _take(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Rows `keep` along `dim`, in the tensor's memory format."""
    taken = tensor.index_select(dim, keep)
    if tensor.dim() == 4 and not tensor.is_contiguous():
        return taken.contiguous(memory_format=torch.channels_last)
    return taken
