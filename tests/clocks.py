"""Stopwatches that make a time up from the layers' widths: no test may hang on a machine."""

import math
from collections.abc import Sequence

from torch import nn

from gossamer.example import Example
from gossamer.measure.layer_times import layer_calls, layer_widths


class FakeClock:
    """Milliseconds as if channels were worked on in blocks, and networks cost more than layers.

    blocks: channels that take as long as one of them.
    volume: milliseconds per element that a layer of a whole network writes.
    overhead: milliseconds of a whole network.
    scale: what everything is multiplied with; `whole` for networks alone.
    noise: share by which readings scatter, in a fixed order.
    """

    def __init__(
        self,
        blocks: int = 1,
        volume: float = 0.0,
        overhead: float = 0.0,
        scale: float = 1.0,
        whole: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        self.blocks, self.volume, self.overhead = blocks, volume, overhead
        self.scale, self.whole, self.noise = scale, whole, noise
        self.readings = 0

    def __call__(self, runs: Sequence[tuple[nn.Module, Example]]) -> list[float]:
        return [self.time(*pair) for pair in runs]

    def time(self, model: nn.Module, example: Example) -> float:
        ms, volume, layers = 0.0, 0.0, 0
        for call in layer_calls(model, example):
            layer = model.get_submodule(call.layer)
            c_in, c_out, groups = layer_widths(layer)
            kernel = math.prod(getattr(layer, "kernel_size", ()))
            products = self._blocked(c_in // groups) * self._blocked(c_out)
            ms += 1e-6 * call.positions * kernel * products
            volume += call.positions * c_out
            layers += 1
        if layers > 1:
            ms = self.whole * (ms + self.volume * volume + self.overhead)
        self.readings += 1
        wobble = 1 + self.noise * math.sin(7.0 * self.readings)
        return self.scale * wobble * ms

    def _blocked(self, channels: int) -> int:
        return math.ceil(channels / self.blocks) * self.blocks


def never(runs: Sequence[tuple[nn.Module, Example]]) -> list[float]:
    raise AssertionError("nothing was to be measured")
