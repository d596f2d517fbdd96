"""What N:M costs in training: the mask, and a step of SR-STE over a dense one.

    python benchmarks/n_of_m.py [--threads 1] [--rounds 15] [--batch 32] [--only mask step]

The mask is that of ResNet-50's 25 million weights. Ratios are medians over interleaved rounds in
one process. With one thread the clock is process CPU time, with more it is wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.ops import n_of_m
from gossamer.train.models import build_model
from interleave import conditions, interleaved, ratio

METHODS = {
    "sr-ste": gossamer.SRSTE(),
    "ste": gossamer.SRSTE(lam=0.0),
    "decoupled": gossamer.SRSTE(lam=1e-3, mode="decoupled"),
    "new mask every 10 steps": gossamer.SRSTE(refresh_interval=10),
}


def compare_masks(rounds: int, clock: Callable[[], float]) -> None:
    torch.manual_seed(0)
    model = build_model("resnet50-imagenet", num_classes=1000, in_shape=(3, 224, 224))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=memory_format)
        weights = [
            module.weight.detach()
            for module in model.modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.shape[1] % 8 == 0
        ]
        masks = [torch.empty_like(weight) for weight in weights]

        def mask(n: int, m: int, weights=weights, masks=masks) -> None:
            for weight, out in zip(weights, masks, strict=True):
                n_of_m(weight, n, m, out=out)

        seconds = interleaved(
            {
                "2:4": lambda mask=mask: mask(2, 4),
                "4:8": lambda mask=mask: mask(4, 8),
                "topk": lambda weights=weights: [
                    w.abs().flatten(1).unflatten(1, (-1, 4)).topk(2, dim=2) for w in weights
                ],
            },
            rounds=rounds,
            clock=clock,
        )
        total = sum(weight.numel() for weight in weights) / 1e6
        times = ", ".join(f"{k} {statistics.median(v) * 1e3:.0f} ms" for k, v in seconds.items())
        print(f"mask of {total:.1f} M weights, {memory_format}: {times}")


def training_step(method: gossamer.Method | None, batch: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, in_shape=(3, 32, 32))
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    sparsifier = None
    if method is not None:
        sparsifier = gossamer.Sparsifier(model, method, total_steps=1_000_000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        if sparsifier is not None:
            loss = loss + sparsifier.penalty()
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step(optimizer)
        optimizer.zero_grad()

    return step


def compare_steps(batch: int, rounds: int, clock: Callable[[], float]) -> None:
    steps = {name: training_step(method, batch) for name, method in METHODS.items()}
    seconds = interleaved(
        {"dense": training_step(None, batch), **steps}, rounds=rounds, calls=2, clock=clock
    )
    for name in METHODS:
        middle, spread = ratio(seconds, name, "dense")
        print(
            f"resnet18 batch {batch} bf16 channels_last: {name} / dense step "
            f"{middle:.3f} +- {spread:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=["mask", "step"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    print(conditions())
    if "mask" in options.only:
        compare_masks(options.rounds, clock)
    if "step" in options.only:
        compare_steps(options.batch, options.rounds, clock)


if __name__ == "__main__":
    main()
