"""Slicing: make tensors physically smaller, inside the same Parameter objects.

Weights (parametrized or not), their SparseWeight's state, gradients and optimizer state are sliced
along, and the numbers that spell a layer's widths follow, so optimizers, LR schedulers and hooks
stay valid. Every cut returns what undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gossamer.channels import Change, ChannelGroup, Cut, Setting
from gossamer.shrink.attention import SlimMultiheadAttention

__all__ = ["Refusal", "Undo", "apply_cuts", "cuts_for", "size_of"]

Undo = Callable[[], None]


class Refusal(ValueError):
    """A layer that exists in no such width."""


def size_of(model: nn.Module, tensor: str, dim: int) -> int:
    """Size of a parameter or buffer along a dimension, by its full name in the plain model."""
    module, name = _owner(model, tensor)
    (owner, key), *_ = _held(module, name)
    value = _tensor(owner, key)
    if value is None or value.dim() <= dim:
        raise AttributeError(f"{type(model).__name__} has no tensor {tensor!r}")
    return value.shape[dim]


def cuts_for(
    model: nn.Module, removals: Iterable[tuple[ChannelGroup, Sequence[int] | Tensor]]
) -> list[Change]:
    """What removes the given channels of each group: a cut per tensor and dimension, settings."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    fewer: dict[tuple[str, str], int] = {}
    for group, channels in removals:
        rows = torch.as_tensor(channels, dtype=torch.int64)
        if len(rows):
            for part in group.slices:
                gone.setdefault((part.tensor, part.dim), []).append(part.index[rows].flatten())
            for resize in group.resizes:
                place = resize.module, resize.attribute
                fewer[place] = fewer.get(place, 0) + resize.per_channel * len(rows)
    changes: list[Change] = []
    for (tensor, dim), positions in gone.items():
        size = size_of(model, tensor, dim)
        keep = torch.ones(size, dtype=torch.bool)
        keep[torch.cat(positions)] = False
        if not keep.any():
            raise ValueError(f"{tensor} would lose all of its {size} channels")
        changes.append(Cut(tensor, dim, keep.nonzero().squeeze(1), size))
    for (module, attribute), less in fewer.items():
        before = getattr(model.get_submodule(module), attribute)
        changes.append(Setting(module, attribute, before, before - less))
    return changes


def apply_cuts(
    model: nn.Module, changes: Sequence[Change], optimizer: torch.optim.Optimizer | None = None
) -> Undo:
    """Make the cuts in place; returns a function that takes all of them back.

    Raises:
        Refusal: A layer that exists in no such width.
        ValueError: Optimizer state whose shape is neither the parameter's nor 0-d.
            Nothing is changed then.
    """
    undo: list[Undo] = []

    def take_back() -> None:
        while undo:
            undo.pop()()

    try:
        for change in changes:
            if isinstance(change, Setting):
                _set(model.get_submodule(change.module), change.attribute, change.after, undo)
                continue
            module, name = _owner(model, change.tensor)
            for owner, key in _held(module, name):
                _cut_tensor(change, owner, key, owner is not module, optimizer, undo)
            _respell(module, name, change, undo)
    except Exception:
        take_back()
        raise
    return take_back


def _owner(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    layer, _, name = tensor.rpartition(".")
    return model.get_submodule(layer), name


def _held(module: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Where the tensor really is: behind a parametrization with what belongs to it."""
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
        parametrized = parametrizations[name]
        assert isinstance(parametrized, ParametrizationList)
        return [
            (owner, key)
            for owner in parametrized.modules()
            for key in (*owner._parameters, *owner._buffers)
        ]
    return [(module, name)]


def _tensor(owner: nn.Module, key: str) -> Tensor | None:
    parameter = owner._parameters.get(key)
    return owner._buffers.get(key) if parameter is None else parameter


def _set(module: nn.Module, attribute: str, value: object, undo: list[Undo]) -> None:
    before = getattr(module, attribute)
    undo.append(lambda: setattr(module, attribute, before))
    setattr(module, attribute, value)


def _respell(module: nn.Module, name: str, cut: Cut, undo: list[Undo]) -> None:
    """Numbers in PyTorch's own layers that repeat the size of a weight."""
    size, weight = len(cut.keep), name == "weight"

    def scaled(attribute: str) -> int:
        value = getattr(module, attribute) * size
        if value % cut.width:
            raise Refusal(f"{cut.tensor} would not hold whole {attribute}")
        return int(value // cut.width)

    spelled: dict[str, object] = {}
    if isinstance(module, nn.MultiheadAttention) and name in ("in_proj_weight", "q_proj_weight"):
        if module.bias_k is not None or module.add_zero_attn:
            raise Refusal("attention with bias_k or add_zero_attn keeps its heads")
        spelled["num_heads"] = scaled("num_heads")
        spelled["_qkv_same_embed_dim"] = False  # keeps PyTorch's fused fast path away
        spelled["__class__"] = SlimMultiheadAttention
    elif isinstance(module, nn.modules.conv._ConvNd) and weight and module.groups > 1:
        for attribute in ("groups", "in_channels", "out_channels"):
            spelled[attribute] = scaled(attribute)
    elif isinstance(module, nn.modules.conv._ConvNd) and weight:
        out = cut.dim == int(module.transposed)
        spelled["out_channels" if out else "in_channels"] = size
    elif isinstance(module, nn.Linear) and weight:
        spelled["in_features" if cut.dim else "out_features"] = size
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        spelled["num_features"] = size
    elif isinstance(module, nn.Embedding) and weight:
        spelled["embedding_dim" if cut.dim else "num_embeddings"] = size
    elif isinstance(module, nn.PReLU):
        spelled["num_parameters"] = size
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and cut.dim == 1:
        if name.startswith("weight_hh"):
            spelled["hidden_size"] = size
        elif name in ("weight_ih", "weight_ih_l0"):
            spelled["input_size"] = size
    elif type(module).__module__ == "transformers.pytorch_utils" and weight:  # its Conv1D
        spelled["nf" if cut.dim else "nx"] = size
    for attribute, value in spelled.items():
        _set(module, attribute, value, undo)


def _cut_tensor(
    cut: Cut,
    owner: nn.Module,
    key: str,
    broadcasts: bool,
    optimizer: torch.optim.Optimizer | None,
    undo: list[Undo],
) -> None:
    """`broadcasts`: the tensor belongs to a SparseWeight: as wide as the weight, or of size 1."""
    tensor, dim = _tensor(owner, key), cut.dim
    if tensor is None or tensor.dim() <= dim or (broadcasts and tensor.shape[dim] == 1):
        return
    keep = cut.keep.to(tensor.device)
    if isinstance(tensor, nn.Parameter):
        undo.append(lambda: _tell_compiler(owner, key))
        _cut_parameter(cut.tensor, tensor, dim, keep, optimizer, undo)
        _tell_compiler(owner, key)
    else:
        undo.append(_buffer_setter(owner, key, tensor))
        owner._buffers[key] = _take(tensor, dim, keep)


def _buffer_setter(owner: nn.Module, key: str, value: Tensor) -> Undo:
    def restore() -> None:
        owner._buffers[key] = value

    return restore


def _cut_parameter(
    name: str,
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
                    f"{name}: optimizer state {key!r} of shape {tuple(value.shape)} for a weight "
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


def _tell_compiler(owner: nn.Module, key: str) -> None:
    """torch.compile, in PyTorch 2.8 to 2.11 at least, looks at a parameter's shape again only when
    the dictionary that holds it has changed.
    """
    parameter = owner._parameters[key]
    owner._parameters[key] = None
    owner._parameters[key] = parameter


def _take(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Rows `keep` along `dim`, in the tensor's memory format."""
    taken = tensor.index_select(dim, keep)
    if tensor.dim() == 4 and not tensor.is_contiguous():
        return taken.contiguous(memory_format=torch.channels_last)
    return taken
