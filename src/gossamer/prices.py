"""Prices: what a network costs as a function of its channel groups' widths.

    MACs          sum over the weights of  positions x size,  as `gossamer.measure.account` counts
    bytes         of the safetensors file that `gossamer.save` writes
    parameters    elements of all parameters

Every dimension of every tensor is affine in the widths of the groups, because each channel takes
equally many positions of it: behind a flatten as on a skip path, in norms as in attention heads.
How many, a really cut copy tells, so nothing about layer types is written down here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from gossamer.channels import ChannelGroup
from gossamer.example import Example
from gossamer.measure.macs import account
from gossamer.method import Price
from gossamer.shrink.slice import apply_cuts, cuts_for, size_of

__all__ = ["Affine", "Bytes", "Macs", "Parameters", "affine", "cut_to"]


def cut_to(model: nn.Module, groups: Sequence[ChannelGroup], widths: Sequence[int]) -> nn.Module:
    """A copy of `model` in which each group is as wide as `widths` says; the last channels stay.

    What it computes is of no use: it is there to be counted and timed.
    """
    slim = copy.deepcopy(model)
    gone = [(g, range(g.channels - width)) for g, width in zip(groups, widths, strict=True)]
    apply_cuts(slim, cuts_for(slim, gone))
    return slim


class Affine:
    """Numbers that are affine in the groups' widths.

    `full: (n,)` float64 at full width; `slopes: (n, groups)` what each channel of a group adds.
    """

    def __init__(self, full: Sequence[float], slopes: Tensor, channels: Sequence[int]) -> None:
        self.full = torch.tensor(full, dtype=torch.float64)
        self.slopes = slopes
        self.channels = torch.tensor(channels, dtype=torch.float64)

    def __call__(self, widths: Sequence[int]) -> Tensor:
        """`(n,)` float64 at these widths."""
        gone = self.channels - torch.tensor(widths, dtype=torch.float64)
        return self.full - self.slopes @ gone


def affine(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    read: Callable[[nn.Module], Sequence[float]],
) -> Affine:
    """How what `read` reads off a model follows from the groups' widths; cuts a copy to find out.

    A group of one channel is never cut, and counts as fixed.
    """
    trial = copy.deepcopy(model)
    full = torch.tensor(read(trial), dtype=torch.float64)
    slopes = torch.zeros(len(full), len(groups), dtype=torch.float64)
    for column, group in enumerate(groups):
        if group.channels > 1:
            undo = apply_cuts(trial, cuts_for(trial, [(group, [0])]))
            slopes[:, column] = full - torch.tensor(read(trial), dtype=torch.float64)
            undo()
    return Affine(full.tolist(), slopes, [group.channels for group in groups])


class _Tensors:
    """Sizes of all tensors of the state dict as functions of the widths."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        state = _state(model)
        self.names = list(state)
        self._most = max(tensor.dim() for tensor in state.values())
        self._dims = affine(model, groups, self._read)

    def __call__(self, widths: Sequence[int]) -> Tensor:
        """`(tensors,)` float64: elements of each."""
        return self._dims(widths).view(len(self.names), self._most).prod(1)

    def _read(self, model: nn.Module) -> list[float]:
        shapes = [tuple(tensor.shape) for tensor in _state(model).values()]
        return [float(n) for shape in shapes for n in (*shape, *[1] * (self._most - len(shape)))]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


class Macs(Price):
    """MACs that dense-format hardware executes for one example; exact.

    Args:
        model: The network, full width, not sparsified.
        groups: Its channel groups, in the order in which widths are given.
        example: An input it accepts.
        without: Layers whose weights are not counted.
    """

    unit = "MACs"

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        example: Example,
        *,
        without: Container[str] = (),
    ) -> None:
        self._tensors = _Tensors(model, groups)
        rows = account(model, example)
        positions = {row.name: row.positions for row in rows.layers if row.name not in without}
        names = [name.removesuffix(".weight") for name in self._tensors.names]
        self._positions = torch.tensor([float(positions.get(name, 0)) for name in names]).double()
        # Attention scores and the like belong to no weight; there are as many per head.
        self._other: Callable[[Sequence[int]], Tensor] | None = None
        if rows.other_macs:
            self._other = affine(model, groups, lambda cut: [account(cut, example).other_macs])
        self._dense = self([group.channels for group in groups])

    @property
    def dense(self) -> float:
        """MACs of the full network."""
        return self._dense

    def __call__(self, widths: Sequence[int]) -> float:
        """MACs at these widths."""
        other = float(self._other(widths)) if self._other is not None else 0.0
        return float(self._positions @ self._tensors(widths)) + other


class Bytes(Price):
    """Bytes of the file that `gossamer.save` writes: of its tensors exactly, of its header at most.

    The header lists what is kept, by number; counted is the longest number of each layer.

    Args:
        model: The network, full width, not sparsified.
        groups: Its channel groups, in the order in which widths are given.
    """

    unit = "bytes"

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self._tensors = _Tensors(model, groups)
        state = _state(model)
        self._item = torch.tensor([float(t.element_size()) for t in state.values()]).double()
        self._header = _header(state)
        self._lists = _Lists(model, groups)
        self._dense = self([group.channels for group in groups])

    @property
    def dense(self) -> float:
        """Bytes of the full network's file."""
        return self._dense

    def __call__(self, widths: Sequence[int]) -> float:
        """Bytes at these widths."""
        return float(self._item @ self._tensors(widths)) + self._header + self._lists(widths)


class Parameters(Price):
    """Elements of all parameters, buffers left out; exact.

    Args:
        model: The network, full width, not sparsified.
        groups: Its channel groups, in the order in which widths are given.
    """

    unit = "parameters"

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self._tensors = _Tensors(model, groups)
        counted = {name for name, _ in model.named_parameters()}
        self._counted = torch.tensor([float(n in counted) for n in self._tensors.names]).double()
        self._dense = self([group.channels for group in groups])

    @property
    def dense(self) -> float:
        """Parameters of the full network."""
        return self._dense

    def __call__(self, widths: Sequence[int]) -> float:
        """Parameters at these widths."""
        return float(self._counted @ self._tensors(widths))


class _Lists:
    """Characters of the plan's lists of kept positions: one for all places that keep the same."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        parts = [(column, part) for column, group in enumerate(groups) for part in group.slices]
        tables: dict[tuple[str, int], list[tuple[int, list[list[int]]]]] = {}
        for column, part in parts:
            tables.setdefault((part.tensor, part.dim), []).append((column, part.index.tolist()))
        alike: dict[str, list[tuple[str, int]]] = {}
        for place, table in tables.items():
            alike.setdefault(f"{size_of(model, *place)} {table}", []).append(place)
        places = list(alike.values())
        full = [float(size_of(model, *same[0])) for same in places]
        slopes = torch.zeros(len(places), len(groups), dtype=torch.float64)
        for row, same in enumerate(places):
            for column, index in tables[same[0]]:
                slopes[row, column] = len(index[0])
        self._kept = Affine(full, slopes, [group.channels for group in groups])
        rows = [sum(len(name) + len(_PLACE) for name, _ in same) + len(_ROW) for same in places]
        self._row = torch.tensor(rows, dtype=torch.float64)
        self._number = torch.tensor([len(f"{int(size) - 1},") for size in full]).double()

    def __call__(self, widths: Sequence[int]) -> float:
        kept = self._kept(widths)
        return float(((self._row + self._number * kept) * (kept < self._kept.full)).sum())


# As they are in the header: JSON within JSON.
_ROW = r"{\"of\":100000,\"kept\":[],\"places\":[]},"
_PLACE = r"[\"\",0],"
# Beside the tensors and the plan `gossamer train` writes how to build the network, some 150 bytes.
_OTHER_METADATA = 256


def _header(state: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors header with an empty plan, at most."""
    rows, offset = {}, 0
    for name, tensor in state.items():
        end = offset + tensor.numel() * tensor.element_size()
        rows[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    alignment = 8 + 7  # its length in front, and padding
    return len(json.dumps(rows, separators=(",", ":"))) + alignment + _OTHER_METADATA
