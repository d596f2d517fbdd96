"""Whole networks with zeros: compile_sparse against the fastest dense engines, end to end.

    python benchmarks/sparse_networks.py                            # one thread, CPU time
    python benchmarks/sparse_networks.py --networks resnet50 --batch 1 --layers
    python benchmarks/sparse_networks.py --threads 2                # wall clock: an idle machine

Random masks on random weights: values do not matter to the clock. "uniform" is the same density in
every layer but the first, "erk" spreads the same budget over all of them; depthwise weights stay.
"cut" has half of the channels inside of its blocks cut, in multiples of 16, and that density of the
rest. All engines and variants of a network take turns; a gain is the median over the rounds of
(time of ONNX Runtime, dense / time) in the same round. With --layers, where a target is missed,
every layer's gain over its own fastest dense form is printed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.allocation import allocate
from gossamer.measure.bench import with_batch
from gossamer.measure.engines import find_engine
from gossamer.measure.latency import LatencyComparison, compare_latency
from gossamer.measure.macs import account, align
from gossamer.narrow import narrowed
from gossamer.runtime import Compiled, compile_sparse
from gossamer.train.models import build_model

DENSE = ("eager", "frozen", "onnx")  # the last one is what gains are to
# Gains over ONNX Runtime that are aimed at, by network, density and distribution.
TARGETS = {
    ("resnet50", 0.1, "uniform"): 2.0,
    ("resnet50", 0.05, "erk"): 2.0,
    ("resnet50", 0.1, "erk"): 1.4,
    ("resnet18", 0.05, "uniform"): 3.0,
    ("vgg19", 0.05, "uniform"): 3.0,
}
TARGET_BATCHES = (1, 8)


class Block(nn.Module):
    """Attention and an MLP behind norms, each with its residual sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """DeiT-tiny's sizes: 224 x 224 in patches of 16, 12 blocks of width 192."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.places = nn.Parameter(0.02 * torch.randn(1, 196, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def _built(name: str, size: int, classes: int) -> nn.Module:
    return build_model(name, num_classes=classes, in_shape=(3, size, size))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the size of the images
    "resnet18": (lambda: _built("resnet18", 32, 10), 32),
    "vgg19": (lambda: _built("vgg19", 32, 10), 32),
    "resnet50": (lambda: _built("resnet50-imagenet", 224, 1000), 224),
    "mobilenetv1": (lambda: _built("mobilenetv1", 224, 1000), 224),
    "vit": (Vit, 224),
}


@dataclass(frozen=True)
class Variant:
    """A network with zeros."""

    density: float
    distribution: str
    cut: bool = False

    def __str__(self) -> str:
        return f"{100 * (1 - self.density):g} % {'cut' if self.cut else self.distribution}"


VARIANTS = [
    *(Variant(density, kind) for kind in ("uniform", "erk") for density in (0.2, 0.1, 0.05)),
    Variant(0.1, "uniform", cut=True),
]


def sparse(model: nn.Module, variant: Variant) -> nn.Module:
    """A copy with random zeros."""
    model = copy.deepcopy(model)
    weights = [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1
    ]
    if variant.distribution == "uniform":
        weights = weights[1:]
    shapes = [tuple(weight.shape) for weight in weights]
    budget = round(variant.density * sum(map(math.prod, shapes)))
    for weight, kept in zip(weights, allocate(variant.distribution, shapes, budget), strict=True):
        mask = torch.zeros(weight.numel())
        mask[torch.randperm(weight.numel())[:kept]] = 1
        weight.data *= mask.view_as(weight)
    return model


def timed(
    name: str, batch: int, variants: list[Variant], options: argparse.Namespace
) -> tuple[LatencyComparison, dict[Variant, Compiled], dict[Variant, float]]:
    """All of a network's engines and variants in turns; and each one's share of the MACs."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    dense, images = build().eval(), torch.randn(2, 3, size, size)
    example = with_batch(images, batch)
    calls: dict[str, Callable[..., object]] = {}
    for engine in DENSE:
        say(f"{name}, batch {batch}: {engine}")
        calls[engine] = find_engine(engine).prepare(dense, example, options.threads).call
    half = narrowed(dense, images, 0.5, multiple=16).model if name != "vit" else None
    whole = account(dense, images).macs_executed
    compiled: dict[Variant, Compiled] = {}
    shares: dict[Variant, float] = {}
    for variant in variants:
        if variant.cut and half is None:
            continue
        say(f"{name}, batch {batch}: {variant}")
        model = sparse(half if variant.cut and half is not None else dense, variant)
        shares[variant] = account(model, images).macs_sparse / whole
        compiled[variant] = compile_sparse(model, example)
        calls[str(variant)] = compiled[variant].model
    found = compare_latency(
        calls,
        example,
        rounds=options.rounds,
        threads=options.threads,
        clock="cpu" if options.threads == 1 else "wall",
    )
    return found, compiled, shares


def rows(
    name: str,
    batch: int,
    found: LatencyComparison,
    compiled: dict[Variant, Compiled],
    shares: dict[Variant, float],
) -> Iterator[dict[str, object]]:
    """A row of plain values for each one timed."""
    for model in found.models:
        variant = next((v for v in compiled if str(v) == model.name), None)
        gain = found.ratio(DENSE[-1], model.name)
        target = None
        if variant is not None and not variant.cut and batch in TARGET_BATCHES:
            target = TARGETS.get((name, variant.density, variant.distribution))
        yield {
            "network": name,
            "batch": batch,
            "threads": found.conditions.threads,
            "variant": model.name if variant else f"dense, {model.name}",
            "macs": f"{shares[variant]:.3f}" if variant else "1",
            "ms": f"{model.milliseconds.median:.4g}",
            "gain": f"{gain.median:.2f}",
            "gain_low": f"{gain.low:.2f}",
            "gain_high": f"{gain.high:.2f}",
            "over_best_dense": f"{_over_best(found, model.name):.2f}",
            "target": "" if target is None else f"{target:g}",
            "met": "" if target is None else "yes" if gain.median >= target else "no",
            "error": f"{compiled[variant].error:.1g}" if variant else "",
        }


def _over_best(found: LatencyComparison, name: str) -> float:
    best = min(DENSE, key=lambda engine: found[engine].milliseconds.median)
    return found.ratio(best, name).median


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", nargs="+", help='such as "90 %% uniform"; default: all')
    parser.add_argument("--layers", action="store_true", help="layer by layer where one is missed")
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants = [v for v in VARIANTS if options.variants is None or str(v) in options.variants]
    for name in options.networks:
        for batch in options.batch:
            found, compiled, shares = timed(name, batch, variants, options)
            lines = list(rows(name, batch, found, compiled, shares))
            where = found.conditions
            print(f"\n{name}, batch {batch}; {where.cpu}, {where.threads} thread(s), {where.clock}")
            cells = [tuple(lines[0])] + [tuple(map(str, line.values())) for line in lines]
            print(align(cells, text_columns=1), flush=True)
            missed = [
                v for v in compiled if ("no", str(v)) in [(r["met"], r["variant"]) for r in lines]
            ]
            for variant in missed if options.layers else []:
                print(f"\n{name}, batch {batch}, {variant}\n{compiled[variant].table()}")
            if options.out is not None:
                append(options.out, lines)


def append(path: Path, lines: list[dict[str, object]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
