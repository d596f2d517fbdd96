"""What masks cost: a masked training step over a dense one, and the exact global threshold.

    python benchmarks/overhead.py [--threads 1] [--rounds 15] [--only lenet resnet18 threshold]

Ratios are medians over interleaved rounds in one process. With one thread the clock is process CPU
time, which other work on the machine does not distort; with more it is wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import gossamer
from gossamer.ops import kth_largest
from gossamer.train.models import build_model
from interleave import conditions, interleaved, ratio


def training_step(
    model_name: str, shape: tuple[int, int, int], batch: int, *, masked: bool, bf16: bool
) -> Callable[[], object]:
    """One SGD step with momentum and weight decay on random data, dense or with a static mask."""
    torch.manual_seed(0)
    model = build_model(model_name, num_classes=10, in_shape=shape)
    images = torch.randn(batch, *shape)
    labels = torch.randint(0, 10, (batch,))
    if bf16:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    sparsifier = None
    if masked:
        # Chase without an update due: the steps between updates are what training consists of.
        method = gossamer.Chase(density=0.1, channel_sparsity=0.0, update_interval=500_000)
        sparsifier = gossamer.Sparsifier(model, method, total_steps=1_000_000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step(optimizer)
        optimizer.zero_grad()

    return step


def compare_step(
    name: str, shape: tuple[int, int, int], batch: int, *, bf16: bool, rounds: int, calls: int
) -> None:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = interleaved(
        {
            "dense": training_step(name, shape, batch, masked=False, bf16=bf16),
            "masked": training_step(name, shape, batch, masked=True, bf16=bf16),
        },
        rounds=rounds,
        calls=calls,
        clock=clock,
    )
    middle, spread = ratio(seconds, "masked", "dense")
    kind = "bf16 channels_last" if bf16 else "fp32"
    print(f"{name} batch {batch} {kind}: masked / dense step {middle:.3f} +- {spread:.3f}")


def compare_threshold(rounds: int) -> None:
    torch.manual_seed(0)
    shapes = [(512, 512, 3, 3)] * 4 + [(256, 256, 3, 3)] * 8 + [(2048, 512)] * 6 + [(1024, 512)] * 6
    scores = [torch.randn(shape).abs() for shape in shapes]
    total = sum(score.numel() for score in scores)
    torch.set_num_threads(1)
    for share in (0.5, 0.1, 0.02):
        k = int(share * total)
        seconds = interleaved(
            {
                "ours": lambda k=k: kth_largest(scores, k),
                "kthvalue": lambda k=k: torch.cat([score.flatten() for score in scores]).kthvalue(
                    total - k + 1
                ),
            },
            rounds=rounds,
            clock=time.process_time,
        )
        ours = sorted(seconds["ours"])[rounds // 2]
        middle, spread = ratio(seconds, "kthvalue", "ours")
        print(
            f"exact threshold, {total / 1e6:.1f} M weights, keep {share:.0%}, 1 thread: "
            f"{ours * 1e3:.0f} ms, torch.kthvalue takes {middle:.1f} +- {spread:.1f} times as long"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=["lenet", "resnet18", "threshold"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(conditions())
    if "lenet" in options.only:
        compare_step(
            "lenet-300-100", (1, 28, 28), 128, bf16=False, rounds=2 * options.rounds, calls=100
        )
    if "resnet18" in options.only:
        compare_step("resnet18", (3, 32, 32), 64, bf16=True, rounds=options.rounds, calls=2)
    if "threshold" in options.only:
        compare_threshold(max(5, options.rounds // 2))


if __name__ == "__main__":
    main()
