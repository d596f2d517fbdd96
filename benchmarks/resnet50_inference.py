"""ResNet-50 at 224 x 224, cut to half its channels: what that brings in which engine.

    python benchmarks/resnet50_inference.py                     # CPU, one thread, CPU time
    python benchmarks/resnet50_inference.py --device cuda       # batch 2, 32, 256
    python benchmarks/resnet50_inference.py --network resnet18 --batch 8 --engines eager,onnx

Three networks, in turns: dense; "inner", with the channels inside of the blocks halved, in
multiples of 16; and "skip", with the skip paths halved too. Values do not matter to the clock:
weights are random, and so are the channels that go. After each batch size the table, and what is
to be proved: on a CPU that ONNX Runtime's time falls as the FLOPs do (at most 0.08 above their
ratio) and that with the skip path cut the best engine has 1.7 times the throughput of dense in its
best; on a GPU which settings give 1.7 times.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

from gossamer.channels import find_groups
from gossamer.measure.bench import Bench, bench
from gossamer.measure.macs import align
from gossamer.narrow import narrowed
from gossamer.train.models import build_model

THROUGHPUT = 1.7
ABOVE_FLOPS = 0.08
BATCHES = {"cpu": [1, 8, 32], "cuda": [2, 32, 256]}
HALVES = ["fp16", "bf16", "compiled-fp16", "compiled-bf16", "graphs-fp16", "graphs-bf16"]


def networks(
    name: str, share: float, device: str
) -> tuple[dict[str, torch.nn.Module], torch.Tensor]:
    """The dense network, its two cuts, and two images."""
    torch.manual_seed(0)
    large = name.endswith("-imagenet")
    shape = (3, 224, 224) if large else (3, 32, 32)
    dense = build_model(name, num_classes=1000 if large else 10, in_shape=shape).eval()
    images = torch.randn(2, *shape)
    groups = find_groups(dense, images)
    models = {"dense": dense}
    for cut, residual in (("inner", False), ("skip", True)):
        models[cut] = narrowed(
            dense, images, share, residual=residual, multiple=16, groups=groups
        ).model
    return {cut: model.to(device) for cut, model in models.items()}, images.to(device)


def proofs(timed: Bench, device: str) -> list[str]:
    """What was to be shown at this batch size, and whether it was."""
    lines = []
    for row in timed.rows:
        if (row.engine, row.model) == ("onnx", "inner"):
            flops = timed.macs_ratio("inner")
            lines.append(
                f"{verdict(row.ratio.median <= flops + ABOVE_FLOPS)}: ONNX Runtime, inner: "
                f"{row.ratio.median:.3f} of the time, at most {flops:.3f} + {ABOVE_FLOPS}"
            )
        if device == "cuda" and row.model != "dense":
            gain = 1 / row.ratio.median
            lines.append(
                f"{verdict(gain >= THROUGHPUT)}: {row.engine}, {row.model}: {gain:.2f}x the "
                f"throughput of dense in {row.engine}"
            )
    for best in timed.best:
        if best.model != "dense":
            gain = 1 / best.ratio.median
            wanted = f"{verdict(gain >= THROUGHPUT)}: " if best.model == "skip" else ""
            lines.append(
                f"{wanted}{best.model} in its best engine ({best.engine}): {gain:.2f}x the "
                f"throughput of dense in its best ({best.first_engine})"
            )
    slower = ", ".join(f"{row.model} in {row.engine}" for row in timed.slower) or "none"
    return [*lines, f"slower than dense: {slower}"]


def verdict(met: bool) -> str:
    return "yes" if met else "no "


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50-imagenet")
    parser.add_argument("--channel_sparsity", type=float, default=0.5)
    parser.add_argument("--device", choices=tuple(BATCHES), default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 8 32; CUDA: 2 32 256")
    parser.add_argument("--engines", help=f"comma between; default on CUDA: {','.join(HALVES)}")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engines = options.engines.split(",") if options.engines else None
    if engines is None and options.device == "cuda":
        engines = HALVES
    models, images = networks(options.network, options.channel_sparsity, options.device)
    for batch in options.batch or BATCHES[options.device]:
        timed = bench(
            models,
            images,
            engines=engines,
            batches=[batch],
            rounds=options.rounds,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        where = timed.conditions[0]
        print(
            f"\n{options.network}, batch {batch}, {where.gpu or where.cpu}, {where.clock} time, "
            f"{where.threads} thread, torch {where.torch}, {where.rounds} rounds"
        )
        print(align(timed.table(), text_columns=2))
        print("\n".join([*map(str, timed.skipped), *proofs(timed, options.device)]), flush=True)
        if options.out is not None:
            append(options.out, timed)


def append(path: Path, timed: Bench) -> None:
    rows = timed.flat()
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
