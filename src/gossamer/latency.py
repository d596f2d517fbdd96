"""Latency at any widths, on the machine at hand: measured at a few widths, known at all.

    ms(widths) = a L + b V + c M + d

L: times of the linear and convolution layers, each timed alone at a few widths (`layer_times`).
V: elements that these layers write: norms, activations, pooling and additions go with them.
M: MACs of what cannot be timed alone: attention, recurrent layers. d: what no width changes.
a, b, c, d >= 0 are fitted to whole networks, really cut to four widths and timed in turns.

Widths are worth having when nothing wider is as fast: hardware works in blocks, and often 40
channels take as long as 48.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import Example, batch_size, example_tensors
from gossamer.measure.layer_times import (
    Call,
    Stopwatch,
    Surface,
    clock_of,
    grid,
    in_turns,
    layer_calls,
    layer_widths,
    time_layer,
)
from gossamer.measure.macs import align
from gossamer.method import Price
from gossamer.prices import Macs, affine, cut_to
from gossamer.reading import reading, short
from gossamer.shrink.verify import probe, try_cuts
from gossamer.widths import block, steps

__all__ = ["LatencyTable", "Milliseconds", "Readings", "latency"]

_SHARES = (1.0, 0.75, 0.5, 0.25)  # of all channels, in the networks that are timed whole
_SAME = 1 - 1e-9  # times that differ by rounding are the same
_REMEMBERED = 3  # checks: one alone scatters, and those of wider networks are out of date


def latency(
    model: nn.Module,
    example: Example,
    *,
    training: bool = False,
    groups: Sequence[ChannelGroup] | None = None,
    stopwatch: Stopwatch | None = None,
    readings: Readings | None = None,
) -> LatencyTable:
    """Measure what the network takes at any widths of its layers, here and now.

    Takes some seconds. What the times hold for is what is passed: the example's batch, device and
    memory format, the model's dtype, the present number of threads. On one CPU thread the clock is
    CPU time, else wall time.

    Args:
        model: A plain model, on the device to measure on; it is not changed.
        example: An input it accepts, as large as the batch that matters.
        training: Time a training step (forward and backward) instead of inference.
        groups: The channels that may be cut; None: all that can be cut exactly.
        stopwatch: Takes pairs of a module and its example and returns the milliseconds of each,
            measured in turns; None: PyTorch as it is. For another engine, export in here.
        readings: Of the same network, to use instead of measuring again.

    Raises:
        ValueError: The model cannot be traced, has no channels that can be cut, or `readings` are
            of another network.
    """
    if groups is None:
        tried = try_cuts(model, find_groups(model, example), probe(model, example))
        groups = [g for g in tried.groups if not g.locked and g.name not in tried.refused]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no channels that can be cut, so its latency has nothing "
            "to follow: gossamer.shrink(model, example).table() says why"
        )
    return LatencyTable(
        model,
        groups,
        example,
        stopwatch=stopwatch,
        training=training,
        readings=readings,
    )


@dataclass(frozen=True, kw_only=True)
class Readings:
    """Everything that was measured, as plain data.

    Attributes:
        surfaces: Of the layers that are not alike, in order.
        whole: Milliseconds of the network at each of the shares 1, 3/4, 1/2, 1/4 of its channels.
        conditions: What the times hold for.
    """

    surfaces: tuple[Surface, ...]
    whole: tuple[float, ...]
    conditions: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Readings:
        """What `to_dict` returned. Raises ValueError when `data` is anything else."""
        what = "these are no readings of gossamer.latency: the data"
        with reading(what, "pass what Readings.to_dict() returned"):
            surfaces = tuple(
                Surface(
                    tuple(map(int, row["c_in"])),
                    tuple(map(int, row["c_out"])),
                    tuple(tuple(map(float, line)) for line in row["ms"]),
                )
                for row in data["surfaces"]
            )
            whole = tuple(map(float, data["whole"]))
            for surface in surfaces:
                for widths in (surface.c_in, surface.c_out):
                    if not widths or any(a >= b for a, b in pairwise((0, *widths))):
                        raise ValueError(f"widths {short(widths)}, wanted ascending ones above 0")
                if [len(line) for line in surface.ms] != [len(surface.c_out)] * len(surface.c_in):
                    raise ValueError("times of a layer that are not one for each of its widths")
            times = [ms for surface in surfaces for line in surface.ms for ms in line]
            slowest = max(*times, *whole)
            if not all(ms >= 0 for ms in times) or min(whole) <= 0 or not slowest < math.inf:
                raise ValueError("times that are not above 0 and finite")
            return cls(surfaces=surfaces, whole=whole, conditions=dict(data["conditions"]))


class LatencyTable:
    """Milliseconds of a network at any widths of its channel groups; made by `gossamer.latency`.

    Attributes:
        groups: The channel groups that widths are given for, in order.
        readings: What was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        example: Example,
        *,
        stopwatch: Stopwatch | None,
        training: bool,
        readings: Readings | None,
    ) -> None:
        self.groups = tuple(groups)
        self._model = copy.deepcopy(model)
        self._example = example
        # Layers are many and only have to be right on average; networks are compared to 1 %.
        self._rough = stopwatch or in_turns(training=training)
        self._careful = stopwatch or in_turns(
            training=training, rounds=40, least_rounds=9, round_ms=5.0, seconds=3.0
        )
        self._calls = layer_calls(self._model, example)
        modules = dict(self._model.named_modules())
        self._full = [layer_widths(modules[call.layer]) for call in self._calls]

        def read(cut: nn.Module) -> list[float]:
            widths = (layer_widths(cut.get_submodule(call.layer))[:2] for call in self._calls)
            return [float(width) for pair in widths for width in pair]

        self._widths = affine(self._model, groups, read)
        self._positions = torch.tensor([call.positions for call in self._calls]).double()
        timed = {call.layer for call in self._calls}
        self._untimed = Macs(self._model, groups, example, without=timed)
        self._surface, kinds = self._kinds()
        self.readings = self._measured(kinds, training) if readings is None else readings
        self._check(kinds)
        self._factors = self._fit()

    # ------------------------------------------------------------------ what a user asks

    @property
    def dense(self) -> float:
        """Milliseconds of the full network."""
        return self.readings.whole[0]

    def __call__(self, widths: Sequence[int]) -> float:
        """Milliseconds at these widths, one for each of `groups`."""
        return _dot(self._factors, self._features(widths))

    def alone(self, group: int) -> list[tuple[int, float]]:
        """Widths of one group, the others full, with the network's milliseconds; widest first."""
        widths = [other.channels for other in self.groups]
        return [
            (width, self([*widths[:group], width, *widths[group + 1 :]]))
            for width in _steps(self.groups[group])
        ]

    def table(self) -> str:
        """As text: per group, the network's time at each width; in brackets what nobody wants."""
        lines = [("channels of", "full", "milliseconds of the network when cut alone")]
        for index, group in enumerate(self.groups):
            cells, best = [], float("inf")
            for width, ms in self.alone(index):
                cell = f"{width}: {ms:.4g}"
                cells.append(cell if ms < best * _SAME else f"({cell})")
                best = min(best, ms)
            shown = cells if len(cells) <= 9 else [*cells[:4], "...", *cells[-4:]]
            lines.append((group.name, str(group.channels), "  ".join(shown)))
        conditions = ", ".join(f"{key} {value}" for key, value in self.readings.conditions.items())
        return (
            f"{align(lines, text_columns=3)}\n"
            f"full network {self.dense:.4g} ms; a width in brackets is no faster than a wider one\n"
            f"{conditions}"
        )

    def ratio(self, widths: Sequence[int]) -> float:
        """Time of the network really cut to these widths over that of the full one, in turns."""
        return self.compare(cut_to(self._model, self.groups, widths))

    def compare(self, slim: nn.Module) -> float:
        """Time of a slim network over that of the full one, in turns."""
        with _own_numbers(self._example):
            full, cut = self._careful([(self._model, self._example), (slim, self._example)])
        return cut / full

    def with_readings(self, readings: Readings) -> LatencyTable:
        """The same network with readings that were taken earlier, or by another process."""
        other = copy.copy(self)
        other.readings = readings
        other._check(self._kinds()[1])
        other._factors = other._fit()
        return other

    # ------------------------------------------------------------------ how it knows

    def _kinds(self) -> tuple[list[int], list[tuple[Call, tuple[int, ...], tuple[int, ...]]]]:
        """Which surface each call reads, and what is to be timed for each: a call, its widths."""
        moves = self._widths.slopes.any(1).view(-1, 2).tolist()
        kinds: dict[tuple[object, ...], int] = {}
        found: list[tuple[Call, tuple[int, ...], tuple[int, ...]]] = []
        index = []
        for call, (c_in, c_out, groups), (in_moves, out_moves) in zip(
            self._calls, self._full, moves, strict=True
        ):
            key = (call.kind, c_in, c_out, in_moves, out_moves)
            if key not in kinds:
                kinds[key] = len(found)
                apart = groups == c_in > 1
                over_in = grid(c_in, groups) if in_moves and not apart else (c_in,)
                over_out = grid(c_out, 1 if apart else groups) if out_moves else (c_out,)
                found.append((call, over_in, over_out))
            index.append(kinds[key])
        return index, found

    def _measured(
        self, kinds: Sequence[tuple[Call, tuple[int, ...], tuple[int, ...]]], training: bool
    ) -> Readings:
        device = example_tensors(self._example)[0].device
        with _own_numbers(self._example):
            surfaces = [
                time_layer(
                    self._model.get_submodule(call.layer),
                    call,
                    over_in,
                    over_out,
                    self._rough,
                    training=training,
                )
                for call, over_in, over_out in kinds
            ]
            models = [cut_to(self._model, self.groups, widths) for widths in self._probes()]
            whole = self._careful([(model, self._example) for model in models])
        dtypes = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        conditions = {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "batch": batch_size(self._example),
            "dtype": "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
            "timed": "training step" if training else "inference",
            "clock": clock_of(device),
        }
        return Readings(surfaces=tuple(surfaces), whole=tuple(whole), conditions=conditions)

    def _probes(self) -> list[list[int]]:
        """Widths of the networks that are timed whole."""
        return [[_nearest(group, share) for group in self.groups] for share in _SHARES]

    def _features(self, widths: Sequence[int]) -> list[float]:
        """L, V, M and 1."""
        pairs = self._widths(widths).view(-1, 2)
        surfaces = self.readings.surfaces
        layers = sum(
            surfaces[index](c_in, c_out)
            for index, (c_in, c_out) in zip(self._surface, pairs.tolist(), strict=True)
        )
        volume = float(self._positions @ pairs[:, 1]) if self._calls else 0.0
        return [layers, volume, self._untimed(widths), 1.0]

    def _fit(self) -> list[float]:
        """The factors a, b, c, d: not negative, of least relative error, exact for the full net."""
        whole = self.readings.whole
        features = [self._features(widths) for widths in self._probes()]
        scale = [max(column) for column in zip(*features, strict=True)]
        useful = [index for index in range(4) if scale[index] > 0]
        columns = {
            index: [row[index] / scale[index] / ms for row, ms in zip(features, whole, strict=True)]
            for index in useful
        }
        best, least = [0.0] * 4, float("inf")
        # Least squares without negative factors: the best of all subsets that come out positive.
        for size in range(1, len(useful) + 1):
            for chosen in combinations(useful, size):
                found = _least_squares([columns[index] for index in chosen])
                if found is not None and min(found) >= 0 and (error := found.pop()) < least - 1e-12:
                    best, least = [0.0] * 4, error
                    for index, factor in zip(chosen, found, strict=True):
                        best[index] = factor / scale[index]
        exact = whole[0] / _dot(best, features[0])
        return [factor * exact for factor in best]

    def _check(self, kinds: Sequence[tuple[Call, tuple[int, ...], tuple[int, ...]]]) -> None:
        grids = [(surface.c_in, surface.c_out) for surface in self.readings.surfaces]
        if grids != [(c_in, c_out) for _, c_in, c_out in kinds] or len(self.readings.whole) != 4:
            raise ValueError(
                f"the readings are of another network: {len(grids)} kinds of layers there, "
                f"{len(kinds)} here, or other widths; measure this one with gossamer.latency"
            )


class Milliseconds(Price):
    """Latency of the network as a function of its pools' widths.

    The table is right to some percent. `check` makes it right where training is: it times the
    network really cut, in turns with the full one, and scales what the table says from then on.

    Args:
        table: Of the network.
        names: Groups that widths are given for, in order; the others stay full.

    Attributes:
        measured: What was measured last, scaled to the dense network's time at the start: machines
            are quicker at one time than at another, and a ratio is not.
    """

    unit = "ms"

    def __init__(self, table: LatencyTable, names: Sequence[str]) -> None:
        own = {group.name: index for index, group in enumerate(table.groups)}
        missing = [name for name in names if name not in own]
        if missing:
            raise ValueError(
                f"the latency table knows nothing of the channels of {', '.join(missing[:3])}: "
                "make it with gossamer.latency(model, example) from the same model"
            )
        self.table = table
        self.measured = table.dense
        self._recent: list[float] = []
        self._index = [own[name] for name in names]
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def dense(self) -> float:
        """Milliseconds of the full network."""
        return self.table.dense

    def __call__(self, widths: Sequence[int]) -> float:
        """Milliseconds at these widths."""
        key = tuple(widths)
        if key not in self._known:
            self._known[key] = self.table(self._all(widths))
        return self.factor * self._known[key]

    def check(
        self,
        widths: Sequence[int],
        share: Callable[[Callable[[], float]], float] = lambda measure: measure(),
    ) -> float:
        """Time the network really cut to these widths; prices are scaled to agree from now on.

        Args:
            widths: One per pool.
            share: Calls what measures, and returns the same to all processes.

        Returns:
            The measured time over the one that was predicted.
        """
        self.measured = self.dense * share(lambda: self.table.ratio(self._all(widths)))
        off = self.measured / self(widths)
        self._recent = [*self._recent, off * self.factor][-_REMEMBERED:]
        return off

    def slower(self) -> list[str]:
        """Pools of which no narrower width makes the full network faster, in words."""
        found = []
        for index in self._index:
            (channels, full), *narrower = self.table.alone(index)
            if narrower and min(ms for _, ms in narrower) >= full * _SAME:
                width, ms = min(narrower, key=lambda row: row[1])
                found.append(
                    f"{self.table.groups[index].name} {channels} to {width} would take {ms:.4g} "
                    f"ms, and uncut it is {full:.4g} ms"
                )
        return found

    @property
    def factor(self) -> float:
        """What the table is scaled with: the median of what the last checks found."""
        return median(self._recent) if self._recent else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        readings = self.table.readings.to_dict()
        return {"readings": readings, "recent": self._recent, "measured": self.measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        table = self.table.with_readings(Readings.from_dict(state["readings"]))
        recent = [float(factor) for factor in state["recent"]]
        measured = float(state["measured"])
        if not all(0 < number < math.inf for number in (*recent, measured)):
            raise ValueError("times that are not above 0 and finite")
        self.table, self._recent, self.measured, self._known = table, recent, measured, {}

    def _all(self, widths: Sequence[int]) -> list[int]:
        everything = [group.channels for group in self.table.groups]
        for index, width in zip(self._index, widths, strict=True):
            everything[index] = width
        return everything


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _least_squares(columns: Sequence[Sequence[float]]) -> list[float] | None:
    """Factors whose sum of columns is nearest to 1 everywhere, and last the squared error.

    None where the columns depend on each other. By hand, because LAPACK rounds differently from
    one memory address to the next, and a resumed run must decide the same.
    """
    size = len(columns)
    rows = [[*(_dot(one, other) for other in columns), sum(one)] for one in columns]
    for pivot in range(size):
        largest = max(range(pivot, size), key=lambda row: abs(rows[row][pivot]))
        rows[pivot], rows[largest] = rows[largest], rows[pivot]
        if abs(rows[pivot][pivot]) < 1e-12:
            return None
        for row in range(size):
            if row != pivot:
                share = rows[row][pivot] / rows[pivot][pivot]
                rows[row] = [a - share * b for a, b in zip(rows[row], rows[pivot], strict=True)]
    factors = [rows[index][size] / rows[index][index] for index in range(size)]
    error = sum((_dot(factors, values) - 1) ** 2 for values in zip(*columns, strict=True))
    return [*factors, error]


def _steps(group: ChannelGroup) -> list[int]:
    per_channel = group.producers[0].index.shape[1]
    return steps(group.channels, block(group.channels, per_channel))


def _nearest(group: ChannelGroup, share: float) -> int:
    return min(_steps(group), key=lambda width: abs(width - share * group.channels))


def _own_numbers(example: Example) -> Any:
    """Random numbers for weights and inputs that are only timed: not the user's."""
    devices = {t.device.index or 0 for t in example_tensors(example) if t.is_cuda}
    return torch.random.fork_rng(devices=sorted(devices))
