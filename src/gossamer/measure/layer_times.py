"""Time as a function of widths: how long each layer takes when it is narrower than it is.

A layer is taken out of the network, given the shapes it meets there, and timed at a few widths of
its inputs and outputs; between these, time is bilinear in both, which is exact for a machine that
takes `a + b in + c out + d in out`, and close where it works in blocks of 8 or 16.

The clock: CPU time where PyTorch has one thread, so that a busy machine counts little; wall time
elsewhere. Whatever is compared is timed in turns, and the quickest rounds count, because everything
that disturbs a measurement makes it longer; of several estimates their mean scattered least.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.example import Example, evaluating, example_tensors, map_tensors, run
from gossamer.measure.latency import Clock, read_clock
from gossamer.widths import block

__all__ = [
    "Call",
    "Stopwatch",
    "Surface",
    "clock_of",
    "grid",
    "in_turns",
    "layer_calls",
    "layer_widths",
    "time_layer",
]

# Milliseconds per call of each model on its example, measured in turns.
Stopwatch = Callable[[Sequence[tuple[nn.Module, Example]]], list[float]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TIMED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


# ---------------------------------------------------------------------- the clock


def in_turns(
    *,
    training: bool = False,
    rounds: int = 9,
    least_rounds: int = 3,
    round_ms: float = 1.0,
    seconds: float = 0.5,
) -> Stopwatch:
    """A stopwatch for PyTorch modules on this machine.

    Args:
        training: Time forward and backward in train mode instead of inference in eval mode.
        rounds: Times each model is measured; the mean of the quickest third counts.
        least_rounds: As many at least, when `seconds` are over.
        round_ms: Milliseconds that each model runs in a round, at least.
        seconds: After which no further round begins.
    """

    def measure(runs: Sequence[tuple[nn.Module, Example]]) -> list[float]:
        device = example_tensors(runs[0][1])[0].device
        once = _train_once if training else _infer_once
        timed = [partial(_milliseconds, partial(once, *pair), device) for pair in runs]
        models = [model for model, _ in runs]
        grad = torch.enable_grad() if training else torch.inference_mode()
        with evaluating(*models), grad:
            for model in models:
                model.train(training)
            repeats = []
            for call in timed:
                call(1)  # the first call allocates and chooses kernels
                repeats.append(max(1, math.ceil(round_ms / call(1))))
            times: list[list[float]] = [[] for _ in runs]
            end = time.monotonic() + seconds
            for turn in range(rounds):
                if turn >= least_rounds and time.monotonic() > end:
                    break
                for index in list(range(len(runs)))[:: -1 if turn % 2 else 1]:
                    times[index].append(timed[index](repeats[index]) / repeats[index])
        return [_quickest_third(own) for own in times]

    return measure


def _quickest_third(times: Sequence[float]) -> float:
    quickest = sorted(times)[: math.ceil(len(times) / 3)]
    return sum(quickest) / len(quickest)


def clock_of(device: torch.device) -> Clock:
    """The clock that is read: "cpu" where one thread does all the work, else "wall"."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _milliseconds(once: Callable[[], None], device: torch.device, repeats: int) -> float:
    clock = clock_of(device)
    start = read_clock(clock, device)
    for _ in range(repeats):
        once()
    # No clock may say that something takes no time.
    return max(1e3 * (read_clock(clock, device) - start), 1e-6)


def _infer_once(model: nn.Module, example: Example) -> None:
    run(model, example)


def _train_once(model: nn.Module, example: Example) -> None:
    model.zero_grad()
    loss = sum(tensor.float().sum() for tensor in _floating(run(model, example)))
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]


def _floating(output: object) -> list[Tensor]:
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            found.append(tensor)
        return tensor

    map_tensors(output, look)
    return found


# ---------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Call:
    """One call of a weighted layer in the network's forward pass.

    Attributes:
        layer: Its name.
        kind: What is the same for layers that take the same time at the same widths.
        shape: Of its input, with the channels as -1.
        channels_last: Whether its input is in that memory format.
        positions: Output positions of the whole batch: rows, or pixels.
    """

    layer: str
    kind: tuple[object, ...]
    shape: tuple[int, ...]
    channels_last: bool
    positions: int


@torch.no_grad()
def layer_calls(model: nn.Module, example: Example) -> list[Call]:
    """The calls of all linear, convolution and transposed convolution layers, in order."""
    calls: list[Call] = []

    def note(name: str, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        dim = -1 if isinstance(module, nn.Linear) else 1
        shape = list(x.shape)
        shape[dim] = -1
        last = x.dim() == 4 and not x.is_contiguous()
        last = last and x.is_contiguous(memory_format=torch.channels_last)
        kind = (*_signature(module), tuple(shape), x.dtype, x.device, last)
        calls.append(Call(name, kind, tuple(shape), last, output.numel() // output.shape[dim]))

    hooks = [
        module.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, _TIMED)
    ]
    try:
        with evaluating(model):
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _signature(module: nn.Module) -> tuple[object, ...]:
    """What a layer's time depends on besides its widths and its input's shape."""
    assert isinstance(module, _TIMED)
    common = (module.weight.dtype, module.bias is None)
    if isinstance(module, nn.Linear):
        return ("linear", *common)
    padding = (*module.output_padding, module.padding_mode, str(module.padding))
    sizes = (module.kernel_size, module.stride, module.dilation, *padding)
    groups = "each" if _apart(module) else module.groups
    return (isinstance(module, _TRANSPOSED), *common, sizes, groups)


def _apart(module: nn.Module) -> bool:
    """Whether every input channel is filtered on its own."""
    c_in, _, groups = layer_widths(module)
    return groups == c_in > 1


def layer_widths(module: nn.Module) -> tuple[int, int, int]:
    """Input channels, output channels and groups of a layer that can be timed."""
    assert isinstance(module, _TIMED)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1
    return module.in_channels, module.out_channels, module.groups


def _of_width(module: nn.Module, c_in: int, c_out: int, groups: int) -> nn.Module:
    """A layer like `module` with other widths and weights of its own."""
    assert isinstance(module, _TIMED)
    options: dict[str, Any] = {
        "bias": module.bias is not None,
        "device": module.weight.device,
        "dtype": module.weight.dtype,
    }
    if isinstance(module, nn.Linear):
        return nn.Linear(c_in, c_out, **options)
    # The plain class: a subclass of the user's may be made with other arguments.
    base: Any = next(cls for cls in _TIMED if isinstance(module, cls))
    if isinstance(module, _TRANSPOSED):
        options["output_padding"] = module.output_padding
    assert isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
    layer: nn.Module = base(
        c_in,
        c_out,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=groups,
        padding_mode=module.padding_mode,
        **options,
    )
    return layer


@dataclass(frozen=True)
class Surface:
    """Milliseconds over a grid of input widths `c_in` and output widths `c_out`, ascending.

    `ms[i][j]` was measured at `c_in[i]`, `c_out[j]`. An axis of one width stays as it is.
    """

    c_in: tuple[int, ...]
    c_out: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def __call__(self, c_in: float, c_out: float) -> float:
        """Time at these widths: bilinear between the grid's, linear below them, never negative."""
        i, u = _place(self.c_in, c_in)
        j, v = _place(self.c_out, c_out)
        low, high = self.ms[i], self.ms[min(i + 1, len(self.ms) - 1)]
        k = min(j + 1, len(low) - 1)
        time = (1 - u) * ((1 - v) * low[j] + v * low[k]) + u * ((1 - v) * high[j] + v * high[k])
        return max(time, 0.0)


def _place(grid: Sequence[int], width: float) -> tuple[int, float]:
    """The interval of the grid to take a width from, and where in it the width lies."""
    if len(grid) == 1:
        return 0, 0.0
    index = min(max(bisect_right(grid, width) - 1, 0), len(grid) - 2)
    return index, (width - grid[index]) / (grid[index + 1] - grid[index])


def grid(full: int, groups: int = 1) -> tuple[int, ...]:
    """Widths to time a layer at: its own, and such as hardware likes near quarters of it."""
    size = math.lcm(block(full), groups)
    near = (max(1, round(full * quarter / 4 / size)) * size for quarter in (1, 2, 3))
    least = math.lcm(min(8, max(1, full // 2)), groups)  # below a quarter it is mostly overhead
    return tuple(sorted({width for width in (least, *near) if width < full} | {full}))


def time_layer(
    module: nn.Module,
    call: Call,
    widths_in: Iterable[int],
    widths_out: Iterable[int],
    stopwatch: Stopwatch,
    *,
    training: bool = False,
) -> Surface:
    """Time one layer at all combinations of input and output widths, in turns.

    Of a layer that works channel by channel the two are one: pass its widths as `widths_out`.
    """
    c_in, c_out = tuple(sorted(widths_in)), tuple(sorted(widths_out))
    full_in, full_out, groups = layer_widths(module)
    runs: list[tuple[nn.Module, Example]] = []
    inputs: dict[int, Tensor] = {}
    apart = _apart(module)
    for one in c_in:
        for other in c_out:
            this_in = other * full_in // full_out if apart else one
            if this_in not in inputs:
                inputs[this_in] = _input(module, call, this_in, training)
            layer = _of_width(module, this_in, other, this_in if apart else groups)
            if call.channels_last:
                layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            runs.append((layer, inputs[this_in]))
    times = iter(stopwatch(runs))
    return Surface(c_in, c_out, tuple(tuple(next(times) for _ in c_out) for _ in c_in))


def _input(module: nn.Module, call: Call, channels: int, training: bool) -> Tensor:
    shape = [channels if size == -1 else size for size in call.shape]
    weight = module.weight
    assert isinstance(weight, Tensor)
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    if call.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(training)
