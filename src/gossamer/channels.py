"""Channel groups: which slices of which tensors must be cut together.

`provenance` finds out which places of a network's parameters hang together; this room says it in
the words of layers: what computes a channel, what it passes, what reads it, or why it must stay.
Cutting, verifying and rolling back are not its business.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.example import Example, call_arguments, first_samples, map_tensors
from gossamer.provenance import Atom, AtomClass, trace

__all__ = ["Axis", "Change", "ChannelGroup", "Cut", "Resize", "Setting", "Slice", "find_groups"]

Axis = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Where a group's channels lie in one parameter or buffer.

    `index: (channels, per_channel)` int64; row c holds the positions of channel c along dimension
    `dim` of `tensor` (one position, height * width of them behind a flatten, or all rows of an
    attention head). `axis`: whether those positions are computed or read.
    """

    tensor: str
    dim: int
    axis: Axis
    index: Tensor

    @property
    def layer(self) -> str:
        """Name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Cut:
    """One tensor keeps the positions `keep: (n,)` int64, sorted, of the `width` along `dim`."""

    tensor: str
    dim: int
    keep: Tensor
    width: int


@dataclass(frozen=True)
class Setting:
    """One number of a module goes from `before` to `after`."""

    module: str
    attribute: str
    before: int
    after: int


Change = Cut | Setting


@dataclass(frozen=True)
class Resize:
    """A number in the user's own module that spells a width, as `num_heads` does.

    It falls by `per_channel` with every channel that is cut.
    """

    module: str
    attribute: str
    per_channel: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are cut together; one channel may be a whole attention head.

    Attributes:
        name: Layer that produces them (the first, if several do).
        channels: How many there are.
        producers: Slices of the weights that compute them.
        carriers: Slices of what they pass through: biases, norms, depthwise weights.
        consumers: Slices of the weights that read them.
        locked: Why they must not be cut; empty when they may.
        resizes: Numbers in the user's modules that change with them.
    """

    name: str
    channels: int
    producers: tuple[Slice, ...]
    carriers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    locked: str = ""
    resizes: tuple[Resize, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices of the group."""
        return (*self.producers, *self.carriers, *self.consumers)

    @property
    def internal(self) -> bool:
        """One producer and one consumer: not on a skip path, not branching."""
        return len(self.producers) == 1 and len(self.consumers) == 1

    @property
    def width(self) -> int:
        """Output rows of the first producer that the channels take."""
        return self.producers[0].index.numel() if self.producers else 0

    def unit(self, block: int) -> int | None:
        """How many neighbouring channels go together, so that every producer loses its outputs in
        whole blocks: `block` of them, or fewer where a channel has several; None where no number
        of channels does that.
        """
        for size in range(1, block + 1):
            if self.channels % size == 0 and all(
                _in_blocks(part.index.reshape(-1, size * part.index.shape[1]), block)
                for part in self.producers
            ):
                return size
        return None

    def after(self, changes: Sequence[Change]) -> ChannelGroup:
        """The group once the cuts are made together: removed channels gone, the rest renumbered."""
        if not self.slices:
            return self
        rank = {}
        for cut in changes:
            if isinstance(cut, Setting):
                continue
            rank[cut.tensor, cut.dim] = torch.full((cut.width,), -1)
            rank[cut.tensor, cut.dim][cut.keep] = torch.arange(len(cut.keep))
        moved = [
            replace(part, index=rank[part.tensor, part.dim][part.index])
            if (part.tensor, part.dim) in rank
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


def _in_blocks(index: Tensor, block: int) -> bool:
    """Whether every row of `index: (units, positions)` is made of whole blocks of positions."""
    if index.shape[1] % block:
        return False
    blocks = index.sort(1).values.reshape(-1, block)
    whole = blocks[:, -1] - blocks[:, 0] == block - 1  # positions are distinct
    return bool((whole & (blocks[:, 0] % block == 0)).all())


def find_groups(model: nn.Module, example: Example) -> list[ChannelGroup]:
    """All channel groups of `model`, each named by its first producer, in the model's order.

    The model is traced as a copy on the CPU, in eval mode; it is not changed. Layers that the
    example does not reach have a locked group too.

    Raises:
        ValueError: The model cannot be run on the example; names the module.
    """
    call_arguments(example)  # a wrong type is the caller's slip, not the model's
    order = {name: place for place, name in enumerate(_tensor_names(model))}
    classes = _trace(copy.deepcopy(model).cpu(), example)
    alike: dict[object, list[AtomClass]] = {}
    for found in classes:
        # Channels of one group have equally many positions in the same tensors.
        signature = tuple(
            tuple(sorted(_counts(side).items())) for side in (found.made, found.carried, found.read)
        )
        alike.setdefault((signature, found.locked), []).append(found)
    groups = [_group(members, order) for members in alike.values()]
    groups = _named(sorted(groups, key=lambda group: order[group.producers[0].tensor]))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    reached = {id(tensors[part.tensor]) for group in groups for part in group.slices}
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and id(module.weight) not in reached and _wide(module):
            groups.append(
                ChannelGroup(name, 0, (), (), (), "the example's output does not depend on it")
            )
    return groups


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _wide(module: nn.Module) -> bool:
    assert isinstance(module.weight, Tensor)
    groups = getattr(module, "groups", 1)
    return module.weight.shape[0] > 1 and groups == 1


def _tensor_names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


def _trace(model: nn.Module, example: Example) -> list[AtomClass]:
    running: list[str] = []
    kinds = {name: f"{name} ({type(module).__name__})" for name, module in model.named_modules()}

    def watch(name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: object) -> None:
            running.append(name)

        def leave(*_: object) -> None:
            running.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def where() -> str:
        return kinds[running[-1]] if running and running[-1] else ""

    sample = map_tensors(first_samples(example, 2), lambda tensor: tensor.cpu())
    hooks = [hook for name, module in model.named_modules() for hook in watch(name, module)]
    try:
        with torch.random.fork_rng(devices=[]):
            return trace(model, sample, where)
    except Exception as error:
        raise ValueError(_cannot_trace(model, running, error)) from error
    finally:
        for hook in hooks:
            hook.remove()


def _cannot_trace(model: nn.Module, running: list[str], error: Exception) -> str:
    where = running[-1] if running else ""
    place = f"module {where!r}" if where else f"the forward of {type(model).__name__}"
    reason = str(error).strip().split("\n")[0]
    return (
        f"the channels cannot be traced: {place} failed on the example "
        f"({type(error).__name__}: {reason}). Give an example the model accepts, on its device; "
        "if the model's forward depends on data, train it without channel removal"
    )


def _counts(atoms: Iterable[Atom]) -> dict[tuple[str, int], int]:
    counts: dict[tuple[str, int], int] = {}
    for atom in atoms:
        counts[atom.tensor, atom.dim] = counts.get((atom.tensor, atom.dim), 0) + 1
    return counts


def _group(members: Sequence[AtomClass], order: dict[str, int]) -> ChannelGroup:
    def slices(side: str, axis: Axis) -> tuple[Slice, ...]:
        rows: dict[tuple[str, int], list[list[int]]] = {}
        for member in members:
            own: dict[tuple[str, int], list[int]] = {}
            for atom in getattr(member, side):
                own.setdefault((atom.tensor, atom.dim), []).append(atom.position)
            for place, positions in own.items():
                rows.setdefault(place, []).append(sorted(positions))
        places = sorted(rows, key=lambda place: (order[place[0]], place[1]))
        return tuple(Slice(*place, axis, torch.tensor(rows[place])) for place in places)

    members = sorted(members, key=lambda member: (order[member.made[0].tensor], member.made[0]))
    group = ChannelGroup(
        "",
        len(members),
        slices("made", "out"),
        slices("carried", "out"),
        slices("read", "in"),
        members[0].locked,
    )
    if group.locked:
        return group
    if not group.consumers:
        return replace(group, locked="no layer reads them")
    if group.channels == 1:
        return replace(group, locked="they can only go all together")
    return group


def _named(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Groups with a name each: that of the first producer, and its rows where it has several."""
    bases = [group.producers[0].tensor.removesuffix(".weight") for group in groups]
    named: list[ChannelGroup] = []
    for group, base in zip(groups, bases, strict=True):
        if bases.count(base) > 1:
            rows = group.producers[0].index
            base = f"{base}[{int(rows.min())}:{int(rows.max()) + 1}]"
        while any(base == other.name for other in named):
            base += "'"
        named.append(replace(group, name=base))
    return named
