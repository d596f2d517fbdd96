"""Channel groups: which slices of which layers must be cut together.

The only file that imports torch_pruning. Its dependency graph, traced through autograd, says which
layers share a channel; this adapter turns a traced group into plain index tables, or into a reason
why the channels must stay. Cutting, verifying and rolling back are not its business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gossamer.example import Example, call_arguments, run

__all__ = ["Axis", "ChannelGroup", "Cut", "Slice", "find_groups", "is_depthwise"]

Axis = Literal["out", "in"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Slice:
    """Where a group's channels lie in one layer.

    `index: (channels, per_channel)` int64; row c holds the positions of channel c along `axis`
    of layer `layer` (one position, or height * width of them behind a flatten).
    """

    layer: str
    axis: Axis
    index: Tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """One layer keeps the positions `keep: (n,)` int64, sorted, of the `width` along `axis`."""

    layer: str
    axis: Axis
    keep: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are cut together.

    Attributes:
        name: Layer that produces them (the first, if several do).
        channels: How many there are.
        producers: Output slices of the layers that compute them.
        carriers: Output slices of per-channel layers they pass through: norms, depthwise.
        consumers: Input slices of the layers that read them.
        locked: Why they must not be cut; empty when they may.
    """

    name: str
    channels: int
    producers: tuple[Slice, ...]
    carriers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    locked: str = ""

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices of the group."""
        return (*self.producers, *self.carriers, *self.consumers)

    @property
    def internal(self) -> bool:
        """One producer and one consumer: not on a skip path, not branching."""
        return len(self.producers) == 1 and len(self.consumers) == 1

    def after(self, cuts: Sequence[Cut]) -> ChannelGroup:
        """The group once `cuts` are made together: removed channels gone, positions renumbered."""
        if not self.slices:
            return self
        rank = {}
        for cut in cuts:
            rank[cut.layer, cut.axis] = torch.full((cut.width,), -1)
            rank[cut.layer, cut.axis][cut.keep] = torch.arange(len(cut.keep))
        moved = [
            replace(part, index=rank[part.layer, part.axis][part.index])
            if (part.layer, part.axis) in rank
            else part
            for part in self.slices
        ]
        there = torch.stack([(part.index >= 0).all(1) for part in moved]).all(0)
        moved = [replace(part, index=part.index[there]) for part in moved]
        first, last = len(self.producers), len(self.producers) + len(self.carriers)
        return replace(
            self,
            channels=int(there.sum()),
            producers=tuple(moved[:first]),
            carriers=tuple(moved[first:last]),
            consumers=tuple(moved[last:]),
        )


def find_groups(model: nn.Module, example: Example) -> list[ChannelGroup]:
    """All channel groups of `model`, each named by its first producer, in module order.

    The model is traced as a copy in eval mode; it is not changed.

    Raises:
        ValueError: The model cannot be run or traced on the example; names the module.
    """
    # A copy, with every parameter trainable: the graph is read off autograd's nodes.
    traced = copy.deepcopy(model).eval()
    for parameter in traced.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    call_arguments(example)  # a wrong type is the caller's slip, not the model's
    graph = _trace(traced, example)
    names = {module: name for name, module in traced.named_modules()}
    groups: list[ChannelGroup] = []
    grouped: set[str] = set()
    for module, name in names.items():
        if isinstance(module, _WEIGHTED) and not is_depthwise(module) and name not in grouped:
            group = _group(graph, module, name, names)
            grouped.update(part.layer for part in group.producers)
            groups.append(group)
    return groups


def _trace(model: nn.Module, example: Example) -> Any:
    running: list[str] = []

    def watch(name: str, module: nn.Module) -> list[Any]:
        def enter(*_: Any) -> None:
            running.append(name)

        def leave(*_: Any) -> None:
            running.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    hooks = [hook for name, module in model.named_modules() for hook in watch(name, module)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=devices):
            output = run(model, example)
            running.clear()
            for hook in hooks:
                hook.remove()
            # torch_pruning takes a mapping as keywords and anything else as positional inputs.
            inputs = (example,) if isinstance(example, Tensor) else example
            del output
            return tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    except Exception as error:
        raise ValueError(_cannot_trace(model, running, error)) from error


def _cannot_trace(model: nn.Module, running: list[str], error: Exception) -> str:
    where = running[-1] if running else ""
    place = f"module {where!r}" if where else f"the forward of {type(model).__name__}"
    reason = str(error).strip().split("\n")[0]
    return (
        f"the channels cannot be traced: {place} failed on the example "
        f"({type(error).__name__}: {reason}). Give an example the model accepts, on its device; "
        "if the model's forward depends on data, train it without channel removal"
    )


def _group(graph: Any, root: nn.Module, name: str, names: Mapping[nn.Module, str]) -> ChannelGroup:
    if root not in graph.module2node:
        return _locked(name, "the example's output does not depend on it")
    pruner = graph.get_pruner_of_module(root)
    channels = pruner.get_out_channels(root)
    try:
        traced = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(channels)))
    except Exception as error:  # whatever torch_pruning raises, it cannot follow these channels
        return _locked(name, f"they cannot be followed ({type(error).__name__}: {error})")
    producers: list[Slice] = []
    carriers: list[Slice] = []
    consumers: list[Slice] = []
    reason = ""
    for item in traced:
        module = item.dep.target.module
        if item.dep.target.type == tp.ops.OPTYPE.OUTPUT:
            reason = reason or "they are an output of the model"
        layer = names.get(module)
        if layer is None:
            if isinstance(module, nn.Parameter):
                reason = reason or "a parameter outside any layer spans them"
            continue
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        kind = f"{layer} ({type(module).__name__})"
        if isinstance(module, (*_NORMS, *_WEIGHTED)):
            if isinstance(module, _CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
                reason = reason or f"{kind} is a grouped convolution"
            index = _table(item.idxs, item.root_idxs, channels)
            if index is None or int(index.max()) >= _width(module, out):
                reason = reason or f"their places in {kind} do not line up"
                continue
            if isinstance(module, _NORMS) or is_depthwise(module):
                carriers.append(Slice(layer, "out", index))
            elif out:
                producers.append(Slice(layer, "out", index))
            else:
                consumers.append(Slice(layer, "in", index))
        else:
            reason = reason or f"{kind} cannot be cut exactly"
    if not consumers:
        reason = reason or "no layer reads them"
    return ChannelGroup(
        name, channels, tuple(producers), tuple(carriers), tuple(consumers), locked=reason
    )


def _width(module: nn.Module, out: bool) -> int:
    """Width of a layer's weight along its output or input dimension."""
    if isinstance(module, _NORMS):
        return module.num_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if out or is_depthwise(module) else 1]


def _table(positions: Sequence[int], roots: Sequence[int], channels: int) -> Tensor | None:
    """`(channels, per_channel)`, or None when the channels do not have equally many positions."""
    rows: list[list[int]] = [[] for _ in range(channels)]
    for position, root in zip(positions, roots, strict=True):
        rows[root].append(position)
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        return None
    return torch.tensor(rows)


def _locked(name: str, reason: str) -> ChannelGroup:
    return ChannelGroup(name, 0, (), (), (), locked=reason)


def is_depthwise(module: nn.Module) -> bool:
    """Whether every channel of a convolution is filtered on its own."""
    return (
        isinstance(module, _CONVOLUTIONS)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )
