"""Models in engines: every model in every engine at every batch size, all in turns.

All that is timed at one batch size takes turns in the same rounds, so any two of them compare: a
model with another in the same engine, and each model in the engine that suits it best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gossamer.example import Example, batch_size, example_tensors, map_tensors
from gossamer.measure.engines import Engine, Prepared, find_engine
from gossamer.measure.latency import (
    Clock,
    Conditions,
    LatencyComparison,
    Quartiles,
    compare_latency,
    read_clock,
)
from gossamer.measure.macs import account

__all__ = ["Bench", "Best", "Skipped", "Timed", "bench", "default_engines", "with_batch"]


@dataclass(frozen=True)
class Timed:
    """A model in an engine at a batch size.

    milliseconds: per call; ratio: to the first model in the same engine; below 1 is faster.
    error: of the outputs, see `Prepared`.
    """

    batch: int
    engine: str
    model: str
    milliseconds: Quartiles
    ratio: Quartiles
    error: float


@dataclass(frozen=True)
class Best:
    """A model in the engine that is fastest for it, at a batch size.

    ratio: to the first model in the engine that is fastest for that one, `first_engine`.
    """

    batch: int
    model: str
    engine: str
    first_engine: str
    milliseconds: float
    ratio: Quartiles


@dataclass(frozen=True)
class Skipped:
    """What was not timed, and why. None: at every batch size, for every model."""

    engine: str
    batch: int | None
    model: str | None
    reason: str

    def __str__(self) -> str:
        """One line."""
        where = [self.engine, self.model, self.batch and f"batch {self.batch}"]
        return f"{', '.join(str(part) for part in where if part)}: {self.reason}"


@dataclass(frozen=True)
class Bench:
    """What was timed.

    macs: MACs of one example, by model; ratios are to the first.
    conditions: of the timing; one for each batch size.
    """

    macs: Mapping[str, int]
    rows: tuple[Timed, ...]
    best: tuple[Best, ...]
    skipped: tuple[Skipped, ...]
    conditions: tuple[Conditions, ...]

    @property
    def first(self) -> str:
        """The model that ratios are to."""
        return next(iter(self.macs))

    def macs_ratio(self, model: str) -> float:
        """MACs of a model over those of the first."""
        return self.macs[model] / self.macs[self.first] if self.macs[self.first] else 1.0

    @property
    def slower(self) -> tuple[Timed, ...]:
        """Rows of models with fewer MACs than the first that took longer, beyond the spread."""
        return tuple(
            row for row in self.rows if row.ratio.low > 1 and self.macs_ratio(row.model) < 1
        )

    def table(self) -> list[tuple[str, ...]]:
        """Lines of cells, a line per engine, batch size and model; the head first."""
        ratio = f"time / {self.first}"
        lines: list[tuple[str, ...]] = [
            ("engine", "model", "batch", "ms", ratio, "quartiles", "MACs")
        ]
        for row in self.rows:
            low, middle, high = row.ratio
            spread = "" if row.model == self.first else f"{low:.3f} - {high:.3f}"
            lines.append(
                (
                    row.engine,
                    row.model,
                    f"{row.batch}",
                    f"{row.milliseconds.median:.4g}",
                    f"{middle:.3f}",
                    spread,
                    f"{self.macs_ratio(row.model):.3f}",
                )
            )
        return lines

    def flat(self) -> list[dict[str, Any]]:
        """A row of plain values for each one timed, as a CSV file holds them."""
        where = asdict(self.conditions[0]) if self.conditions else {}
        kept = ("device", "gpu", "cpu", "threads", "torch", "rounds", "clock")
        return [
            {
                "engine": row.engine,
                "model": row.model,
                "batch": row.batch,
                "ms": row.milliseconds.median,
                "ms_low": row.milliseconds.low,
                "ms_high": row.milliseconds.high,
                "ratio": row.ratio.median,
                "ratio_low": row.ratio.low,
                "ratio_high": row.ratio.high,
                "macs_executed": self.macs[row.model],
                "macs_ratio": self.macs_ratio(row.model),
                "output_error": row.error,
                **{key: where[key] for key in kept},
            }
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        best = [asdict(row) | {"ratio": row.ratio._asdict()} for row in self.best]
        return {
            "first": self.first,
            "macs_executed": dict(self.macs),
            "rows": self.flat(),
            "best": best,
            "skipped": [asdict(skip) for skip in self.skipped],
            "conditions": [asdict(conditions) for conditions in self.conditions],
        }


def default_engines(device: torch.device) -> tuple[str, ...]:
    """The engines worth timing on a device when none are named."""
    if device.type == "cuda":
        return ("eager", "fp16", "bf16", "compiled-fp16", "compiled-bf16", "graphs-fp16")
    return ("eager", "channels_last", "bf16", "frozen", "frozen-bf16", "onnx")


def bench(
    models: Mapping[str, nn.Module],
    example: Example,
    *,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int = 1,
    rounds: int = 9,
    min_round_ms: float = 20.0,
    clock: Clock | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Time models in engines; ratios are to the first model.

    Args:
        models: Plain models by name, all on the device of the example; they are not changed.
        example: An input that all of them accept; its samples are repeated to each batch size.
        engines: Names of `ENGINES`; None: `default_engines`.
        batches: Batch sizes.
        threads: Within operators.
        rounds: Times that each is measured.
        min_round_ms: Milliseconds that each runs in each round, at least.
        clock: None: "cpu" for one thread on a CPU, else "wall".
        say: Gets a line about each thing that is begun.

    Raises:
        ValueError: No such engine, a number out of range, or none of the engines runs the first
            model; says why.
    """
    if not models or not batches or min(batches) < 1 or threads < 1:
        raise ValueError(
            f"got {len(models)} models, batches={tuple(batches)}, threads={threads}; wanted at "
            "least one model, one batch size of 1 or more, and one thread"
        )
    device = example_tensors(example)[0].device
    if clock is None:
        clock = "cpu" if device.type == "cpu" and threads == 1 else "wall"
    read_clock(clock, device, threads)
    skipped: list[Skipped] = []
    wanted = []
    for name in dict.fromkeys(default_engines(device) if engines is None else engines):
        engine = find_engine(name)
        if reason := engine.missing(example):
            skipped.append(Skipped(name, None, None, reason))
        else:
            wanted.append(engine)
    one = with_batch(example, 1)
    macs = {name: account(model, one).macs_executed for name, model in models.items()}
    rows: list[Timed] = []
    best: list[Best] = []
    conditions = []
    for batch in dict.fromkeys(batches):
        inputs = with_batch(example, batch)
        ready, failed = _ready(models, wanted, inputs, threads, say)
        skipped += failed
        if not ready:
            continue
        say(f"batch {batch}: timing {len(ready)} in turns")
        times = compare_latency(
            {_key(*which): prepared.call for which, prepared in ready.items()},
            inputs,
            rounds=rounds,
            min_round_ms=min_round_ms,
            threads=threads,
            clock=clock,
        )
        rows += _rows(times, ready, batch)
        best += _best(times, ready, batch)
        conditions.append(times.conditions)
    if not rows:
        raise ValueError(
            f"none of the engines runs {next(iter(models))}: {'; '.join(map(str, skipped))}"
        )
    return Bench(macs, tuple(rows), tuple(best), tuple(skipped), tuple(conditions))


def with_batch(example: Example, batch: int) -> Example:
    """The example with its samples repeated, or left out, to a batch of that size."""
    size = batch_size(example)
    changed: Example = map_tensors(
        example,
        lambda x: (
            x[torch.arange(batch, device=x.device) % size] if x.dim() and len(x) == size else x
        ),
    )
    return changed


_Ready = dict[tuple[str, str], Prepared]  # by engine and model


def _ready(
    models: Mapping[str, nn.Module],
    engines: Sequence[Engine],
    example: Example,
    threads: int,
    say: Callable[[str], None],
) -> tuple[_Ready, list[Skipped]]:
    """Every model in every engine that runs it; an engine needs the first, to compare with."""
    ready: _Ready = {}
    skipped = []
    batch = batch_size(example)
    for engine in engines:
        for position, (name, model) in enumerate(models.items()):
            say(f"batch {batch}: {name} in {engine.name}")
            try:
                ready[engine.name, name] = engine.prepare(model, example, threads)
            except ValueError as error:
                skipped.append(Skipped(engine.name, batch, name, str(error)))
                if position == 0:
                    break
    return ready, skipped


def _rows(times: LatencyComparison, ready: _Ready, batch: int) -> Iterator[Timed]:
    first = next(iter(ready))[1]
    for (engine, model), prepared in ready.items():
        own, base = _key(engine, model), _key(engine, first)
        ratio = times.ratio(own, base)
        yield Timed(batch, engine, model, times[own].milliseconds, ratio, prepared.error)


def _best(times: LatencyComparison, ready: _Ready, batch: int) -> Iterator[Best]:
    fastest: dict[str, str] = {}
    for engine, model in ready:
        taken = times[_key(engine, model)].milliseconds.median
        if model not in fastest or taken < times[_key(fastest[model], model)].milliseconds.median:
            fastest[model] = engine
    first, base = next(iter(fastest.items()))
    for model, engine in fastest.items():
        key = _key(engine, model)
        milliseconds = times[key].milliseconds.median
        ratio = times.ratio(key, _key(base, first))
        yield Best(batch, model, engine, base, milliseconds, ratio)


def _key(engine: str, model: str) -> str:
    return f"{engine}\n{model}"  # no name holds a line break
