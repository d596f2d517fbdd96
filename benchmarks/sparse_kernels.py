"""The sparse kernels, layer by layer, against the best dense fp32 engine.

    python benchmarks/sparse_kernels.py [--rounds 11] [--only conv3x3 linear ...] [--isa avx2]

Random weights and inputs, one thread, process CPU time, all variants of a layer in turns. A figure
is the dense time over the sparse time: the median over rounds of the ratio within a round, with
half the distance of the quartiles. Dense is the engine of the smallest median: PyTorch's own path
(MKL or oneDNN), and oneDNN with the weight packed beforehand, in NCHW and in channels_last.
Correctness is for tests/runtime; here outputs are only compared to 1e-3.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.runtime import kernels
from interleave import conditions, interleaved, ratio


class Shape(NamedTuple):
    """A layer and its input: batch x channels x size x size; a linear layer has size 1."""

    kind: str
    batch: int
    channels: int
    out: int
    size: int = 1
    kernel: int = 1
    stride: int = 1

    def __str__(self) -> str:
        text = f"{self.kind} {self.channels}->{self.out}"
        if self.size > 1:
            text += f" at {self.size}x{self.size}"
        return text + f"{' stride 2' * (self.stride == 2)}, batch {self.batch}"


SHAPES = (
    Shape("conv3x3", 1, 64, 64, 56, 3),
    Shape("conv3x3", 1, 128, 128, 28, 3),
    Shape("conv3x3", 1, 256, 256, 14, 3),
    Shape("conv3x3", 1, 512, 512, 7, 3),
    Shape("conv3x3", 8, 256, 256, 14, 3),
    Shape("conv3x3", 8, 512, 512, 7, 3),
    Shape("conv3x3", 8, 512, 512, 4, 3),
    Shape("conv3x3", 1, 128, 128, 56, 3, 2),
    Shape("conv1x1", 1, 64, 256, 56),
    Shape("conv1x1", 1, 256, 64, 56),
    Shape("conv1x1", 1, 128, 512, 28),
    Shape("conv1x1", 1, 512, 128, 28),
    Shape("conv1x1", 1, 256, 1024, 14),
    Shape("conv1x1", 1, 1024, 256, 14),
    Shape("conv1x1", 8, 512, 512, 14),
    Shape("conv1x1", 1, 2048, 512, 7),
    Shape("conv1x1", 1, 512, 1024, 28, 1, 2),
    *(Shape("linear", 1, size, size) for size in (1024, 2048, 4096)),
    *(Shape("linear", batch, size, size) for size in (1024, 2048) for batch in (8, 32)),
    *(Shape("linear", 128, size, size) for size in (1024, 2048, 4096)),
    Shape("linear", 256, 2048, 2048),
)


def unstructured(shape: Shape, density: float) -> Tensor:
    size = (shape.out, shape.channels, shape.kernel, shape.kernel)
    return torch.randn(size) * (torch.rand(size) < density)


def block16(shape: Shape, density: float) -> Tensor:
    rest = (shape.channels, shape.kernel, shape.kernel)
    mask = (torch.rand(-(-shape.out // 16), 1, *rest) < density).expand(-1, 16, *rest)
    return torch.randn(shape.out, *rest) * mask.reshape(-1, *rest)[: shape.out]


def n_of_m(shape: Shape, n: int, m: int) -> Tensor:
    scores = torch.rand(shape.out, shape.channels // m, m)
    mask = torch.zeros_like(scores).scatter_(2, scores.topk(n).indices, 1)
    return (torch.randn(scores.shape) * mask).view(shape.out, shape.channels, 1, 1)


def dense_engines(shape: Shape, x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    mkldnn = torch.ops.mkldnn
    if shape.size == 1:
        x, weight = x.flatten(1), weight.flatten(1)
        packed = mkldnn._reorder_linear_weight(weight, shape.batch)
        return {
            "torch": partial(F.linear, x, weight),
            "oneDNN": partial(mkldnn._linear_pointwise, x, packed, None, "none", [], ""),
        }
    stride, padding = [shape.stride] * 2, [shape.kernel // 2] * 2
    packed = mkldnn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1, list(x.shape))
    run = mkldnn._convolution_pointwise
    rest = (packed, None, padding, stride, [1, 1], 1, "none", [], "")
    return {
        "torch": partial(F.conv2d, x, weight, None, stride, padding),
        "oneDNN": partial(run, x, *rest),
        "oneDNN cl": partial(run, x.to(memory_format=torch.channels_last), *rest),
    }


def sparse_variants(shape: Shape) -> Iterator[tuple[str, Tensor, kernels.Format, kernels.Storage]]:
    few = shape.size == 1 and shape.batch <= 32
    for percent in (80, 90, 95):
        weight = unstructured(shape, 1 - percent / 100)
        yield f"{percent} %", weight, "rows", "float32"
        if few:
            yield f"{percent} % lanes", weight, "lanes", "float32"
    weight = block16(shape, 0.1)
    yield "90 % 16x1", weight, "block16", "float32"
    if few and shape.batch == 1:
        yield "90 % 16x1 bf16", weight, "block16", "bfloat16"
        yield "90 % 16x1 int8", weight, "block16", "int8"
    if shape.kernel == 1:
        for n, m in ((2, 4), (1, 4), (1, 8), (1, 16)):
            weight = n_of_m(shape, n, m)
            yield f"{n}:{m}", weight, "rows", "float32"
            if few:
                yield f"{n}:{m} lanes", weight, "lanes", "float32"


def measure(shape: Shape, rounds: int) -> None:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size)
    padding = (shape.kernel // 2,) * 2
    dense_weight = torch.randn(shape.out, shape.channels, shape.kernel, shape.kernel)
    variants = dense_engines(shape, x, dense_weight)
    dense = tuple(variants)
    macs = {}
    for name, weight, format, storage in sparse_variants(shape):
        stride = (shape.stride,) * 2
        packed = kernels.pack(
            weight, stride=stride, padding=padding, format=format, storage=storage
        )
        out = kernels.run(packed, x)
        wanted = F.conv2d(x, kernels.unpack(packed), None, stride, padding)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
        variants[name] = partial(kernels.run, packed, x, out=out)
        macs[name] = weight.count_nonzero().item() * shape.batch * out[0, 0].numel()
    start = time.process_time()
    variants[dense[0]]()
    calls = max(1, round(0.01 / (time.process_time() - start)))
    seconds = interleaved(variants, rounds=rounds, calls=calls, clock=time.process_time)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(dense, key=medians.__getitem__)
    others = ", ".join(f"{name} {medians[name] * 1e3:.3f} ms" for name in dense if name != best)
    print(f"\n{shape}: {best} {medians[best] * 1e3:.3f} ms ({others})")
    for name in macs:
        speedup, spread = ratio(seconds, best, name)
        rate = macs[name] / medians[name] / 1e9
        print(f"  {name:<16}{speedup:>7.2f}x +-{spread:<5.2f}{rate:>6.1f} G MAC/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="+", choices=sorted({shape.kind for shape in SHAPES}))
    parser.add_argument("--isa", choices=kernels.available_isas(), default=kernels.get_isa())
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kernels.set_isa(wanted.isa)
    print(f"{conditions()}, {wanted.isa}; G MAC/s count the non-zeros only")
    for shape in SHAPES:
        if not wanted.only or shape.kind in wanted.only:
            with torch.inference_mode():
                measure(shape, wanted.rounds)


if __name__ == "__main__":
    main()
