"""Time models against each other: interleaved rounds, ratios, and the conditions beside them.

A time taken alone says little on a shared machine: the clock, the caches and the neighbours change
between two measurements by more than the models differ. So the models take turns, and a ratio is
the median over the rounds of (time of the model / time of the first model in the same round).
Zeros alone change none of these times: dense-format hardware multiplies by them too.

Two clocks. "wall" is what a user waits for. "cpu" is what the process computes: with one thread the
same on an idle machine, and not disturbed by whoever else wants the cores. Neighbours still share
caches and memory, so ratios move by a few per cent with either.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.example import batch_size, call_arguments, evaluating, example_tensors
from gossamer.measure.macs import align

__all__ = [
    "Clock",
    "Conditions",
    "LatencyComparison",
    "ModelLatency",
    "Quartiles",
    "compare_latency",
    "read_clock",
    "using_threads",
]

Clock = Literal["wall", "cpu"]


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile over the rounds."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Conditions:
    """What the times depend on besides the models.

    device: as torch names it; gpu: its name, None on CPU; cpu: model name of the processor.
    threads: of torch, within one operator.
    dtype: of the models' parameters and the example's inputs, the floating-point ones.
    batch: dimension 0 of the example.
    memory_format: of the example's first image-like (4-D or 5-D) input.
    mode: "eager", "compiled" (torch.compile) or "callable" (anything that is no module).
    torch: version.
    rounds: how often each model was measured; warmup: calls of each model before that.
    min_round_ms: how long each model runs in a round, at least.
    clock: "wall" or "cpu" (time of the process on the processor).
    """

    device: str
    gpu: str | None
    cpu: str
    threads: int
    dtype: str
    batch: int
    memory_format: str
    mode: str
    torch: str
    rounds: int
    warmup: int
    min_round_ms: float
    clock: Clock


@dataclass(frozen=True)
class ModelLatency:
    """One model's times.

    milliseconds: per call, over the rounds.
    ratio: to the first model in the same round; below 1 is faster.
    repeats: calls in each round.
    rounds: milliseconds per call, round by round.
    """

    name: str
    milliseconds: Quartiles
    ratio: Quartiles
    repeats: int
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class LatencyComparison:
    """The models in the order given (ratios are to the first), and the conditions."""

    models: tuple[ModelLatency, ...]
    conditions: Conditions

    def __getitem__(self, name: str) -> ModelLatency:
        """Return the model of that name."""
        return {model.name: model for model in self.models}[name]

    def ratio(self, name: str, to: str) -> Quartiles:
        """Return time of `name` / time of `to` in the same round: any two models compare."""
        pairs = zip(self[name].rounds, self[to].rounds, strict=True)
        return _quartiles([this / base for this, base in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        models = [
            {
                "name": model.name,
                "milliseconds": model.milliseconds._asdict(),
                "ratio": model.ratio._asdict(),
                "repeats": model.repeats,
            }
            for model in self.models
        ]
        return {"models": models, "conditions": asdict(self.conditions)}

    def table(self) -> str:
        """Return the comparison as plain text: one line per model, then the conditions."""
        first = self.models[0].name
        rows = [("model", "ms per call", "quartiles", f"time / {first}", "quartiles", "calls")]
        for model in self.models:
            times, ratio = model.milliseconds, model.ratio
            rows.append(
                (
                    model.name,
                    f"{times.median:.4g}",
                    f"{times.low:.4g} - {times.high:.4g}",
                    f"{ratio.median:.3f}",
                    f"{ratio.low:.3f} - {ratio.high:.3f}",
                    f"{model.repeats}",
                )
            )
        conditions = (
            f"{key} {value}" for key, value in asdict(self.conditions).items() if value is not None
        )
        return f"{align(rows)}\n{', '.join(conditions)}"


def compare_latency(
    models: Mapping[str, nn.Module | Callable[..., object]],
    example: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    rounds: int = 15,
    warmup: int = 3,
    min_round_ms: float = 20.0,
    threads: int | None = None,
    clock: Clock = "wall",
) -> LatencyComparison:
    """Time the models on one example, in turns; ratios are to the first model.

    Each round runs every model, often enough to last `min_round_ms`; every other round runs them
    in reverse, so that no model is always the first. Modules run in eval mode; nothing is
    changed in them. On CUDA the device is waited for before a clock is read.

    Args:
        models: modules or callables by name, all on the device of the example. Callables are for
            other engines (an ONNX Runtime session) and get the same inputs.
        example: a tensor, a tuple of positional inputs or a mapping of keyword inputs, with the
            batch in dimension 0 of its first tensor.
        rounds: times each model is measured.
        warmup: calls of each model before anything is timed.
        min_round_ms: milliseconds that each model runs in each round, at least.
        threads: torch threads during the comparison; None leaves them as they are. More than one
            only on an idle machine: waiting for a busy core swamps the difference between models.
        clock: "wall", or "cpu" for one thread on a machine that others use too.

    Raises:
        TypeError: the example is no tensor, tuple or mapping, or a model cannot be called.
        ValueError: there is no model, the example has no batch, models and example are on several
            devices, a number is out of range, or the CPU clock would not see the whole work.
    """
    _check(models, rounds=rounds, warmup=warmup, min_round_ms=min_round_ms, threads=threads)
    args, kwargs = call_arguments(example)
    batch = batch_size(example)
    device = _common_device(models, example)
    read_clock(clock, device, threads)

    def milliseconds(model: Callable[..., object], clock: Clock, repeats: int) -> float:
        start = read_clock(clock, device)
        for _ in range(repeats):
            model(*args, **kwargs)
        return 1e3 * (read_clock(clock, device) - start)

    with torch.inference_mode(), evaluating(*models.values()), using_threads(threads):
        repeats = {}
        for name, model in models.items():
            milliseconds(model, "wall", warmup)
            # By the wall clock: one that stands still while a callable waits would never end.
            repeats[name] = _calibrate(partial(milliseconds, model, "wall"), min_round_ms)
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds):
            for name in list(models)[:: -1 if turn % 2 else 1]:
                spent = milliseconds(models[name], clock, repeats[name])
                times[name].append(spent / repeats[name])
        conditions = Conditions(
            device=str(device),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            cpu=_cpu(),
            threads=torch.get_num_threads(),
            dtype=_dtype(models, example),
            batch=batch,
            memory_format=_memory_format(example),
            mode="/".join(sorted({_mode(model) for model in models.values()})),
            torch=str(torch.__version__),
            rounds=rounds,
            warmup=warmup,
            min_round_ms=min_round_ms,
            clock=clock,
        )
    first = next(iter(times.values()))
    return LatencyComparison(
        models=tuple(
            ModelLatency(
                name=name,
                milliseconds=_quartiles(own),
                ratio=_quartiles([this / base for this, base in zip(own, first, strict=True)]),
                repeats=repeats[name],
                rounds=tuple(own),
            )
            for name, own in times.items()
        ),
        conditions=conditions,
    )


# Running


def _check(
    models: Mapping[str, object],
    *,
    rounds: int,
    warmup: int,
    min_round_ms: float,
    threads: int | None,
) -> None:
    if not models:
        raise ValueError("got no model; pass {name: model}, the one to compare with first")
    for name, model in models.items():
        if not callable(model):
            raise TypeError(
                f"model {name!r} is a {type(model).__name__}, which cannot be called; pass a "
                "module or a function of the example's inputs"
            )
    if rounds < 1 or warmup < 0 or min_round_ms <= 0 or (threads is not None and threads < 1):
        raise ValueError(
            f"got rounds={rounds}, warmup={warmup}, min_round_ms={min_round_ms}, "
            f"threads={threads}; pass at least 1, 0, more than 0, and at least 1 or None"
        )


def _calibrate(milliseconds: Callable[[int], float], target: float) -> int:
    """Return the number of calls that last `target` milliseconds."""
    repeats = 1
    # The faster of two: an interruption makes a quick model look slow, and its rounds too short.
    while (taken := min(milliseconds(repeats), milliseconds(repeats))) < target / 4:
        repeats *= 2
    return max(1, math.ceil(repeats * target / taken))


def read_clock(clock: Clock, device: torch.device, threads: int | None = None) -> float:
    """Return the seconds on the clock, once the device has done what it was given.

    Raises:
        ValueError: the CPU clock on another device, or with several `threads` (None: those that
            torch has now): it would add up the time that they spend waiting for each other.
    """
    if clock == "cpu":
        if device.type != "cpu":
            raise ValueError(f'clock="cpu" does not see what {device} does: pass clock="wall"')
        if (threads or torch.get_num_threads()) > 1:
            raise ValueError(
                f'clock="cpu" adds up {threads or torch.get_num_threads()} threads, their waiting '
                'too: pass threads=1, or clock="wall" on an idle machine'
            )
        return time.process_time()
    if clock != "wall":
        raise ValueError(f'got clock={clock!r}; wanted "wall" or "cpu"')
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads within operators; None leaves them as they are."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _quartiles(values: list[float]) -> Quartiles:
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return Quartiles(*torch.tensor(values, dtype=torch.float64).quantile(quartiles).tolist())


# Conditions


def _tensors(model: object) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _common_device(models: Mapping[str, object], example: object) -> torch.device:
    """Return the one device of all models and inputs; ValueError when there are several."""
    devices = {"the example": {tensor.device for tensor in example_tensors(example)}}
    for name, model in models.items():
        devices[name] = {tensor.device for tensor in _tensors(model)}
    found = set().union(*devices.values())
    if len(found) > 1:
        where = "; ".join(
            f"{name} on {', '.join(sorted(map(str, own)))}" for name, own in devices.items() if own
        )
        raise ValueError(f"times compare only on one device, got {where}: move all to one device")
    return found.pop()


def _dtype(models: Mapping[str, object], example: object) -> str:
    tensors = [*example_tensors(example), *(t for m in models.values() for t in _tensors(m))]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def _memory_format(example: object) -> str:
    for x in example_tensors(example):
        if x.dim() in (4, 5):
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            if not x.is_contiguous() and x.is_contiguous(memory_format=last):
                return "channels_last"
            break
    return "contiguous"


def _mode(model: object) -> str:
    if not isinstance(model, nn.Module):
        return "callable"
    # By name: importing the class costs a second that an eager comparison need not pay.
    compiled = type(model).__name__ == "OptimizedModule" or model._compiled_call_impl is not None
    return "compiled" if compiled else "eager"


def _cpu() -> str:
    """Return the processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
