"""Provenance: which slices of which parameters every value inside a network hangs on.

The network runs once, and every ATen operation of that run is written down. Then the operations are
gone through again with labels in place of values. A label is an atom: one index along one dimension
of one parameter or buffer. In a narrower network a value exists exactly if all its atoms do, so

    moving data (view, permute, cat, split, index) moves its labels alike;
    an elementwise operation joins the labels of its operands, element by element;
    a product with a weight consumes the labels along the summed dimension, joined with the
        weight's own atoms there, and hands out the atoms of the weight's other dimension;
    whatever else sums over labelled values (attention, means) joins all that it sums.

Joined atoms can only be cut together. An operation that is not known locks what enters it. Nothing
here has to be believed: what is cut is verified by running the model (`gossamer.shrink`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gossamer.example import Example, example_tensors
from gossamer.recording import READS, Call, needed_calls, record, storage_of

__all__ = ["Atom", "AtomClass", "trace"]

_INPUT = ""  # stands for the inputs where parameters have a name
_NO_ATOM = -1  # label of a value whose place in the tensor no parameter decides: padding, an input


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations by name, without overload. A track is what one tensor of labels is called here.
_SAME = _words("clone detach alias lift_fresh _to_copy contiguous")
_MOVES = _words(
    "permute transpose transpose_ t t_ expand squeeze unsqueeze slice select split "
    "split_with_sizes unsafe_split unsafe_chunk unbind repeat flip roll index index_select narrow "
    "diagonal pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold"
)
_VIEWS = _words("view _unsafe_view reshape _reshape_alias")
_REDUCTIONS = _words(
    "mean sum amax amin max min var std var_mean prod norm linalg_vector_norm logsumexp argmax "
    "argmin any all _softmax _log_softmax _safe_softmax cumsum cumprod sort topk median"
)
_PLANES = re.compile(r"(pool|upsample_\w+|_upsample_\w+|reflection_pad|replication_pad)([123])d")
_POINTWISE = _words(  # beside those that PyTorch tags as such
    "hardswish hardswish_ _prelu_kernel copy_ fill_ zero_ log_sigmoid_forward native_dropout "
    "masked_fill_ clamp_ sigmoid_"
)
_FRESH = _words(  # tensors whose values hang on no other tensor's
    "zeros_like ones_like full_like rand_like randn_like empty_like new_zeros new_ones new_full "
    "new_empty"
)
_PRODUCTS = _words("mm bmm addmm baddbmm mv addmv dot")
_LAYER_NORMS = _words("native_layer_norm _fused_rms_norm")
_BATCH_NORMS = _words(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm"
)


class Atom(NamedTuple):
    """Index `position` along dimension `dim` of the parameter or buffer `tensor`."""

    tensor: str
    dim: int
    position: int


@dataclass(frozen=True, eq=False)
class AtomClass:
    """Atoms that can only be cut together, in the order of the model's tensors.

    Attributes:
        made: They lie in weights that compute one value per position: a layer's output rows.
        read: They lie in weights that take one value per position: a layer's input columns.
        carried: Those the values only pass: biases, norms, depthwise weights, tables.
        locked: Why they must stay; empty when nothing speaks against cutting them.
    """

    made: tuple[Atom, ...]
    read: tuple[Atom, ...]
    carried: tuple[Atom, ...]
    locked: str


def trace(model: nn.Module, example: Example, running: Callable[[], str]) -> list[AtomClass]:
    """The classes of atoms that some layer of `model` computes, as one run in eval mode shows.

    Args:
        model: A copy: it runs on slower code paths that are easier to follow.
        example: An input of the model.
        running: Tells, at any time, the name of the module that is running.

    Raises:
        Exception: Whatever the model raises on the example.
    """
    calls, output = record(model, example, running)
    labels = _Labels(model, example_tensors(example))
    live = needed_calls(calls, output)
    for place, call in enumerate(calls):
        labels.watch(call)
        if place in live:
            labels.follow(call)
    for tensor in output:
        for track in labels.of(tensor):
            labels.lock(track, "they are an output of the model")
    labels.tie_recurrent(model)
    return labels.classes()


# ------------------------------------------------------------------ following


class _Labels:
    """Tracks of every tensor of the run, and which atoms have been joined.

    A tensor has one track per thing its places hang on: a weight has one for its rows and one for
    its columns. A track is `(*shape,)` int64, expanded where it does not vary, so that it costs
    nothing there.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor]) -> None:
        self._parent: list[int] = []
        self._tracks: dict[int, tuple[Tensor, ...]] = {}
        self._data = {id(tensor) for tensor in inputs}  # what hangs on the inputs
        self._floats = {id(tensor) for tensor in inputs if tensor.is_floating_point()}
        self._forked = ""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._written: dict[int, Tensor] = {}  # labels of memory that is filled in pieces
        self._made: set[int] = set()
        self._read: set[int] = set()
        self._makers: set[int] = set()  # roots of classes with something in _made
        self._locked: dict[int, str] = {}
        self._first: dict[tuple[str, int], int] = {}
        self._starts: list[int] = []
        self._places: list[tuple[str, int]] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._tracks[id(tensor)] = self._number(name, tensor, range(tensor.dim()))
        for tensor in inputs:
            # Channels come first or last; batch and pixels are nobody's width.
            dims = {1, tensor.dim() - 1} if tensor.dim() in (2, 3) else {1}
            self._tracks[id(tensor)] = tracks = self._number(_INPUT, tensor, dims)
            for track in tracks:
                self.lock(track, "values of the input meet them")

    def _number(self, name: str, tensor: Tensor, dims: Iterable[int]) -> tuple[Tensor, ...]:
        """A track with new atoms for each dimension that is one."""
        tracks = []
        for dim in dims:
            if dim < tensor.dim() and tensor.shape[dim] > 1 and tensor.numel():
                first, size = len(self._parent), tensor.shape[dim]
                self._first[name, dim] = first
                self._places.append((name, dim))
                self._parent.extend(range(first, first + size))
                self._starts.append(first)
                tracks.append(_spread(torch.arange(first, first + size), dim, tensor.shape))
        return tuple(tracks)

    def of(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tracks of a tensor."""
        found = self._tracks.get(id(tensor), ())
        if not found and (written := self._written.get(storage_of(tensor))) is not None:
            place = tensor.shape, tensor.stride(), tensor.storage_offset()
            return (_steady(written.as_strided(*place).clone()),)
        return found

    def tie_recurrent(self, model: nn.Module) -> None:
        """Unit j of every layer and direction of a recurrent module: there is one hidden_size."""
        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase):
                hidden = [
                    self._first[f"{name}.{weight}".lstrip("."), 1]
                    for weight in module._flat_weights_names
                    if weight.startswith("weight_hh") and module.hidden_size > 1
                ]
                for first in hidden[1:]:
                    for unit in range(module.hidden_size):
                        self._unite(hidden[0] + unit, first + unit)

    def classes(self) -> list[AtomClass]:
        """The classes with something in them that a layer computes."""
        self._settle()
        members: dict[int, list[int]] = {}
        for atom in range(len(self._parent)):
            if (root := self._find(atom)) in self._makers:
                members.setdefault(root, []).append(atom)
        found = []
        for atoms in members.values():
            reasons = [self._locked[atom] for atom in atoms if atom in self._locked]
            made, read = self._made.intersection(atoms), self._read.intersection(atoms)
            passed = [atom for atom in atoms if atom not in made and atom not in read]
            sides = (self._named(made), self._named(read), self._named(passed))
            found.append(AtomClass(*sides, locked=reasons[0] if reasons else ""))
        return found

    def _named(self, numbers: Iterable[int]) -> tuple[Atom, ...]:
        """The atoms of these numbers, without those of the inputs."""
        named = []
        for number in sorted(numbers):
            place = bisect_right(self._starts, number) - 1
            tensor, dim = self._places[place]
            if tensor != _INPUT:
                named.append(Atom(tensor, dim, number - self._starts[place]))
        return tuple(named)

    # -------------------------------------------------------------- joining

    def _find(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def _unite(self, one: int, other: int) -> None:
        one, other = self._find(one), self._find(other)
        if one != other:
            low, high = min(one, other), max(one, other)
            self._parent[high] = low
            if high in self._makers:
                self._makers.add(low)

    def _join(self, one: Tensor, other: Tensor) -> None:
        """Join two tracks element by element; they broadcast."""
        one, other = _thin(one, other)
        known = (one != _NO_ATOM) & (other != _NO_ATOM)
        if not known.all():
            self.lock(torch.maximum(one, other)[~known], "they meet values of a fixed width")
        pairs = torch.stack([one[known], other[known]])
        pairs = pairs[:, pairs[0] != pairs[1]]
        for pair in torch.unique(pairs, dim=1).t().tolist():
            self._unite(*pair)

    def _mix(self, track: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Join all labels along `dims`; the track that is left, of size 1 there."""
        for dim in dims:
            if track.stride(dim) == 0:
                track = track.narrow(dim, 0, 1)
                continue
            first = track.narrow(dim, 0, 1)
            self._join(track, first)
            track = first
        if not _varies(track):
            self.lock(track, reason)
        return track

    def _merge(self, tracks: Iterable[Tensor], shape: torch.Size) -> tuple[Tensor, ...]:
        """The tracks of a tensor whose elements hang on all of these."""
        merged: list[Tensor] = []
        for track in tracks:
            track = track.expand(shape)
            if not _varies(track):
                self.lock(track, "all others are computed with one of them")
                continue
            apart = []
            for other in merged:
                if _varies(other) & _varies(track):
                    few, track = sorted((other, track), key=lambda t: len(_varies(t)))
                    if _varies(few) < _varies(track) and not self._is_made(few):
                        self._pending.append((few, track))
                    else:
                        self._join(track, few)
                else:
                    apart.append(other)
            merged = [*apart, track]
        return tuple(merged)

    def _settle(self) -> None:
        """Join tables that are spread over more than they vary with, where a whole line of them
        turned out to hang on one class: a scale per attention head with its head. Others are
        shared by classes that go one by one, as rotary positions are by all heads.
        """
        joined = True
        while joined:
            joined = False
            for table, track in self._pending:
                table, track = _thin(table, track)
                dims = sorted(_varies(table))
                lines = track.movedim(dims, list(range(len(dims)))).flatten(len(dims))
                heads = _head(table, set(range(table.dim())) - set(dims)).flatten().tolist()
                for atom, line in zip(heads, lines.flatten(0, len(dims) - 1), strict=True):
                    roots = {self._find(label) for label in _atoms(line)}
                    if atom != _NO_ATOM and len(roots) == 1 and self._find(atom) not in roots:
                        self._unite(atom, roots.pop())
                        joined = True

    def lock(self, track: Tensor, reason: str) -> None:
        """These atoms must stay; the first reason counts."""
        for atom in _atoms(track):
            self._locked.setdefault(atom, reason)

    def _mark(self, marked: set[int], track: Tensor) -> None:
        marked.update(_atoms(track))
        if marked is self._read and self._forked:
            self.lock(track, self._forked)
        if marked is self._made:
            self._makers.update(map(self._find, _atoms(track)))

    def _is_made(self, track: Tensor) -> bool:
        return any(self._find(atom) in self._makers for atom in _atoms(track))

    # -------------------------------------------------------------- operations

    def watch(self, call: Call) -> None:
        """Note what hangs on the inputs, and whether the model looks at a computed value."""
        if call.name not in _FRESH:
            for known in (self._data, self._floats):
                if any(id(tensor) in known for tensor in call.inputs):
                    known.update(id(tensor) for tensor in call.outputs)
        if call.name == "embedding":
            self._floats.update(id(tensor) for tensor in call.outputs)
        if call.name in READS and id(call.args[0]) in self._floats and not self._forked:
            self._forked = f"{call.place} looks at a value, and may go another way for another"

    def follow(self, call: Call) -> None:
        """Label what came out of a call by what went in."""
        name = call.name
        if name in _FRESH or not any(self.of(tensor) for tensor in call.inputs):
            return
        if name in _SAME:
            self._set(call, self.of(call.args[0]))
        elif name in _VIEWS:
            tracks = self.of(call.args[0])
            self._set(call, [_steady(track.reshape(call.shape)) for track in tracks])
        elif name in _MOVES:
            self._move(call)
        elif name in ("cat", "stack"):
            self._concatenate(call)
        elif name == "copy_" and _is_part(call.args[0]):
            self._write(call)
        elif torch.Tag.pointwise in call.function.tags or name in _POINTWISE:
            self._pointwise(call)
        elif name in _REDUCTIONS:
            self._reduce(call)
        elif name in _PRODUCTS:
            self._product(call)
        elif name == "convolution":
            self._convolve(call)
        elif name in _BATCH_NORMS:
            self._batch_norm(call)
        elif name in _LAYER_NORMS or name == "native_group_norm":
            self._norm(call)
        elif name == "embedding":
            self._embed(call)
        elif name == "glu":
            self._gate(call)
        elif name == "constant_pad_nd":
            self._pad(call)
        elif planes := _PLANES.search(name):
            self._per_plane(call, int(planes[2]))
        else:
            self._lock_inputs(call, f"{call.at} is not known to keep them apart")

    def _set(self, call: Call, tracks: Iterable[Tensor]) -> None:
        tracks = tuple(tracks)
        self._tracks[id(call.result)] = tracks

    def _lock_inputs(self, call: Call, reason: str) -> None:
        for tensor in call.inputs:
            for track in self.of(tensor):
                self.lock(track, reason)

    def _move(self, call: Call) -> None:
        source, *rest = call.args
        function = call.function
        if call.name.endswith("_"):
            function = getattr(torch.ops.aten, call.name[:-1])
        found: list[list[Tensor]] = [[] for _ in call.outputs]
        for track in self.of(source):
            moved = function(track, *rest, **call.kwargs)
            moved = [moved] if isinstance(moved, Tensor) else moved
            for tracks, part in zip(found, moved, strict=True):
                tracks.append(_steady(part))
        for output, tracks in zip(call.outputs, found, strict=True):
            self._tracks[id(output)] = tuple(tracks)

    def _concatenate(self, call: Call) -> None:
        shape = call.shape
        dim = call.argument("dim") or 0
        dim %= len(shape)
        parts = [part for part in call.args[0] if part.dim() == len(shape) or call.name == "stack"]
        tracks = [self.of(part) for part in parts]
        sizes = [part.shape for part in parts]
        if call.name == "stack":
            tracks = [tuple(track.unsqueeze(dim) for track in own) for own in tracks]
            sizes = [torch.Size((*size[:dim], 1, *size[dim:])) for size in sizes]
        # Tracks of different parts that vary along the same dimensions become one.
        slots: list[dict[int, Tensor]] = []
        for place, own in enumerate(tracks):
            for track in own:
                along = _varies(track)
                for slot in slots:
                    theirs = set().union(*map(_varies, slot.values()))
                    if place not in slot and (along & theirs or along | theirs <= {dim}):
                        slot[place] = track
                        break
                else:
                    slots.append({place: track})
        whole = []
        for slot in slots:
            ends = [track.narrow(dim, 0, 1) for track in slot.values()]
            if any(map(_varies, ends)):  # the other dimensions must stay equal
                for end in ends[1:]:
                    self._join(ends[0], end)
            blank = torch.full((1,) * len(shape), _NO_ATOM)
            filled = [
                slot[place].expand(size) if place in slot else blank.expand(size)
                for place, size in enumerate(sizes)
            ]
            narrow = list(_thin(*filled, keep={dim}, broadcast=False))
            whole.append(_steady(torch.cat(narrow, dim)).expand(shape))
        self._set(call, whole)

    def _write(self, call: Call) -> None:
        """`copy_` into a part of a tensor, as when something is put together piece by piece."""
        target, source = call.args[:2]
        tracks = self.of(source)
        fresh = storage_of(target) in self._written or not self.of(target)
        if not fresh or len(tracks) != 1:
            self._lock_inputs(call, f"{call.at} overwrites a part of a tensor")
            return
        memory = target.untyped_storage()
        size = memory.nbytes() // target.element_size()
        whole = self._written.setdefault(storage_of(target), torch.full((size,), _NO_ATOM))
        place = target.shape, target.stride(), target.storage_offset()
        whole.as_strided(*place).copy_(tracks[0].expand(target.shape))

    def _pointwise(self, call: Call) -> None:
        shape = call.shape
        tracks = [track for tensor in call.inputs for track in self.of(tensor)]
        merged = self._merge(tracks, shape)
        self._set(call, merged)
        for output in call.outputs[1:]:
            self._tracks[id(output)] = merged

    def _reduce(self, call: Call) -> None:
        source = call.args[0]
        dims = call.argument("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(source.dim()))
        dims = sorted(dim % max(1, source.dim()) for dim in dims)
        tracks = []
        for track in self.of(source):
            summed = _varies(track) & set(dims)
            if summed:
                track = self._mix(track, summed, f"{call.at} mixes all of them")
            for dim in dims:
                track = track.narrow(dim, 0, 1)
            if _varies(track):
                tracks.append(track)
        for output in call.outputs:
            if output.dim() == source.dim():
                self._tracks[id(output)] = tuple(track.expand(output.shape) for track in tracks)
            else:
                kept = [track.squeeze(tuple(dims)) for track in tracks]
                self._tracks[id(output)] = tuple(track.expand(output.shape) for track in kept)

    def _per_plane(self, call: Call, spatial: int) -> None:
        source, shape = call.args[0], call.shape
        first = source.dim() - spatial
        tracks = []
        for track in self.of(source):
            if _varies(track) & set(range(first, source.dim())):
                self.lock(track, f"{call.at} mixes them")
            else:
                tracks.append(_head(track, range(first, source.dim())).expand(shape))
        for output in call.outputs:
            self._tracks[id(output)] = tuple(tracks)

    def _pad(self, call: Call) -> None:
        source, pads = call.args[0], call.args[1]
        padded = {source.dim() - 1 - place // 2 for place, size in enumerate(pads) if size}
        tracks = []
        for track in self.of(source):
            if _varies(track) & padded:
                tracks.append(_steady(torch.constant_pad_nd(track, pads, _NO_ATOM)))
            else:
                tracks.append(_head(track, padded).expand(call.shape))
        self._set(call, tracks)

    def _gate(self, call: Call) -> None:
        dim = call.argument("dim")
        dim = -1 if dim is None else dim
        halves = [half for track in self.of(call.args[0]) for half in track.chunk(2, dim)]
        self._set(call, self._merge(halves, call.shape))

    def _embed(self, call: Call) -> None:
        weight, shape = call.args[0], call.shape
        rows = [track[0] for track in self.of(weight) if _varies(track) == {1}]
        for row in rows:
            self._mark(self._made, row)
        self._set(call, [row.expand(shape) for row in rows])

    def _norm(self, call: Call) -> None:
        source = call.args[0]
        if call.name == "native_group_norm":
            dims = {1}
        else:
            dims = set(range(source.dim() - len(call.args[1]), source.dim()))
        for track in self.of(source):
            if _varies(track) & dims:
                self.lock(track, f"{call.at} takes its mean over them")
        self._set(call, self.of(source))

    def _batch_norm(self, call: Call) -> None:
        source, *own = call.args[:5]
        shape = source.shape
        tracks = [*self.of(source)]
        for tensor in own:
            if tensor is not None:
                tracks += [_spread(track, 1, shape) for track in self.of(tensor)]
        self._set(call, self._merge(tracks, shape))

    def _convolve(self, call: Call) -> None:
        source, weight, bias, *_ = call.args
        transposed, groups = call.args[6], call.args[8]
        shape = call.shape
        entering = []
        for track in self.of(source):
            if 1 in _varies(track):
                others = _varies(track) - {1}
                entering.append(_line(self._mix(track, others, f"{call.at} mixes them"), 1))
            else:
                self.lock(track, f"{call.at} mixes them")
        rows = [_line(track, 0) for track in self.of(weight) if 0 in _varies(track)]
        columns = [_line(track, 1) for track in self.of(weight) if 1 in _varies(track)]
        if groups == 1:
            into, out = (rows, columns) if transposed else (columns, rows)
            self._consume(entering, into, call)
            for line in out:
                self._mark(self._made, line)
        else:
            out = self._convolve_groups(call, entering, rows, columns, groups, transposed)
        if bias is not None:
            out = [*out, *self.of(bias)]
        self._set(call, self._merge([_spread(line, 1, shape) for line in out], shape))

    def _convolve_groups(
        self,
        call: Call,
        entering: list[Tensor],
        rows: list[Tensor],
        columns: list[Tensor],
        groups: int,
        transposed: bool,
    ) -> list[Tensor]:
        """Whole groups of channels go: what enters a group, its weights, and what leaves it."""
        for line in columns:
            self.lock(line, f"{call.at} has them in each of its {groups} groups")
        if not entering or not rows:
            for line in (*rows, *entering):
                self.lock(line, f"{call.at} joins them to values of a fixed width")
            return []
        whole = entering[0].view(groups, -1)[:, :1]
        for line in (*entering, *rows):
            self._join(line.view(groups, -1), whole)
        if not transposed:
            return rows
        channels = call.shape[1]
        return [whole.expand(groups, channels // groups).reshape(-1)]

    def _consume(self, entering: list[Tensor], into: list[Tensor], call: Call) -> None:
        """A weight reads what enters: joined with the weight's atoms there, and used up."""
        computed = [track for track in entering if self._is_made(track)]
        for track in entering:
            if computed and not any(track is other for other in computed):
                self.lock(track, f"{call.at} mixes them")
                continue
            for line in into:
                self._join(track, line)
            if not into:
                self.lock(track, f"{call.at} joins them to values of a fixed width")
        for line in into:
            self._mark(self._read, line)

    def _product(self, call: Call) -> None:
        tensors = [arg for arg in call.args if isinstance(arg, Tensor)]
        one, other = tensors[-2:]
        left, right = list(self.of(one)), list(self.of(other))
        shape = call.shape
        if other.dim() == 1:  # (m, k) times (k,)
            right, shape = [track.unsqueeze(-1) for track in right], torch.Size((*shape, 1))
        if one.dim() == 1:
            left, shape = [track.unsqueeze(0) for track in left], torch.Size((1, *shape))
        fixed = (id(one) not in self._data, id(other) not in self._data)
        if any(fixed):
            tracks = self._weigh(call, left, right, swapped=fixed == (True, False))
        else:
            tracks = self._attend(call, left, right)
        tracks = list(self._merge(tracks, shape))
        if one.dim() == 1:
            tracks = [track.squeeze(0) for track in tracks]
        if other.dim() == 1:
            tracks = [track.squeeze(-1) for track in tracks]
        if len(tensors) == 3:
            added = [track.expand(call.shape) for track in self.of(tensors[0])]
            tracks = list(self._merge([*tracks, *added], call.shape))
        self._set(call, tracks)

    def _weigh(
        self, call: Call, left: list[Tensor], right: list[Tensor], swapped: bool
    ) -> list[Tensor]:
        """A weight on the right, or on the left where `swapped`: it reads the summed dimension."""
        if swapped:
            left = [track.mT for track in left]
            right = [track.mT for track in right]
            left, right = right, left
        # now (..., m, k) values times (..., k, n) weight
        entering = [track for track in left if track.dim() - 1 in _varies(track)]
        into = [track for track in right if track.dim() - 2 in _varies(track)]
        lines = [self._mix(track, [-1], f"{call.at} mixes them").mT for track in into]
        self._consume(entering, lines, call)
        passing = [_head(track, [-1]) for track in left if track.dim() - 1 not in _varies(track)]
        leaving = [_head(track, [-2]) for track in right if track.dim() - 2 not in _varies(track)]
        for track in leaving:
            if track.dim() - 1 in _varies(track):
                self._mark(self._made, track)
        tracks = [*passing, *leaving]
        return [track.mT for track in tracks] if swapped else tracks

    def _attend(self, call: Call, left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        """Two computed factors: all that is summed goes together, with what is made of it."""
        tracks = []
        summed: list[Tensor] = []
        for track in left:
            if track.dim() - 1 in _varies(track):
                track = self._mix(track, [-1], f"{call.at} mixes all of them")
                summed.append(track)
            tracks.append(_head(track, [-1]))
        lone = len(summed)
        for track in right:
            if track.dim() - 2 in _varies(track):
                track = self._mix(track, [-2], f"{call.at} mixes all of them")
                for other in summed[:lone]:
                    self._join(track, other)
                summed.append(track)
            tracks.append(_head(track, [-2]))
        if summed and lone in (0, len(summed)):
            for track in summed:
                self.lock(track, f"{call.at} joins them to values of a fixed width")
        return [track for track in tracks if _varies(track)]


# ------------------------------------------------------------------ tracks


def _varies(track: Tensor) -> set[int]:
    """Dimensions along which a track is not expanded."""
    shape, stride = track.shape, track.stride()
    return {dim for dim in range(track.dim()) if shape[dim] > 1 and stride[dim] != 0}


def _atoms(track: Tensor) -> list[int]:
    """The different labels of a track."""
    (track,) = _thin(track)
    return [atom for atom in torch.unique(track).tolist() if atom != _NO_ATOM]


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a part of its memory."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _head(track: Tensor, dims: Iterable[int]) -> Tensor:
    """The first index along `dims`, of size 1."""
    for dim in dims:
        track = track.narrow(dim, 0, 1)
    return track


def _line(track: Tensor, dim: int) -> Tensor:
    """The labels along one dimension, at the first index of all others."""
    others = [other for other in range(track.dim()) if other != dim]
    return _head(track, others).reshape(-1)


def _spread(line: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Labels along one dimension of a tensor of that shape."""
    size = [1] * len(shape)
    size[dim] = len(line)
    return line.view(size).expand(shape)


def _thin(*tracks: Tensor, keep: Iterable[int] = (), broadcast: bool = True) -> tuple[Tensor, ...]:
    """The tracks, of size 1 along dimensions in which none of them varies."""
    if broadcast:
        tracks = torch.broadcast_tensors(*tracks)  # type: ignore[no-untyped-call]
    varying = set(keep).union(*map(_varies, tracks))
    dims = [dim for dim in range(tracks[0].dim()) if dim not in varying]
    return tuple(_head(track, [dim for dim in dims if track.shape[dim]]) for track in tracks)


def _steady(track: Tensor) -> Tensor:
    """The track, expanded again along dimensions in which moving it has spelt it out."""
    shape = track.shape
    for dim in _varies(track):
        first = track.narrow(dim, 0, 1)
        if torch.equal(track, first.expand(track.shape)):
            track = first
    return track.expand(shape)
