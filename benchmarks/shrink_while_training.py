"""What cutting channels during training saves: wall time of a Chase run over its dense twin.

    python benchmarks/shrink_while_training.py [--threads 2] [--steps 200] [--repeats 2]

Real training steps on random images: ResNet-18 (CIFAR stem) and VGG-19, batch 32, bf16 autocast,
channels_last, SGD. Chase at channel sparsity 0.5, cubic removal done by 80 % of training in 10
cuts, widths in multiples of 16. `beta` is min_channel_factor: 1 removes evenly, the paper's 0.2
takes late channels first, which saves fewer MACs. Dense and Chase runs alternate; the ratio is the
median over repeats. With one thread the clock is process CPU time, equal to wall time when the
machine is idle and is not distorted when it is not; with more it is wall time. Also the time of
one cut of a ResNet-50, verification included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import gossamer
from gossamer.train.models import build_model
from interleave import conditions

BATCH = 32
SHAPE = (3, 32, 32)


def chase(steps: int, beta: float) -> gossamer.Chase:
    interval = max(1, round(0.8 * steps) // 10)  # ten cuts, and as many support updates
    return gossamer.Chase(
        density=0.1,
        channel_sparsity=0.5,
        min_channel_factor=beta,
        channel_multiple=16,
        update_interval=interval,
        channel_interval=interval,
    )


def train(name: str, steps: int, method: gossamer.Chase | None) -> tuple[float, list[int]]:
    """Seconds of a run, and the widths it ends with."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, in_shape=SHAPE)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, *SHAPE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    sparsifier = None
    if method is not None:
        sparsifier = gossamer.Sparsifier(model, method, total_steps=steps, example=images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    clock = choose_clock()
    for timed in range(-2, steps):
        if timed == 0:
            start = clock()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if sparsifier is not None and timed >= 0:
            sparsifier.step(optimizer)
        optimizer.zero_grad()
    seconds = clock() - start
    pools = [] if sparsifier is None else sparsifier.pools
    return seconds, [pool.group.channels for pool in pools]


def compare(name: str, steps: int, repeats: int) -> None:
    runs = {"dense": None, "beta 1": chase(steps, 1.0), "beta 0.2": chase(steps, 0.2)}
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    widths: dict[str, list[int]] = {}
    for repeat in range(repeats):
        for run in list(runs) if repeat % 2 else list(runs)[::-1]:
            spent, widths[run] = train(name, steps, runs[run])
            seconds[run].append(spent)
    for run in list(runs)[1:]:
        ratios = [one / dense for one, dense in zip(seconds[run], seconds["dense"], strict=True)]
        each = ", ".join(f"{value:.2f}" for value in ratios)
        print(f"{name}, {run}: {statistics.median(ratios):.2f} of dense time ({each})")
        print(f"    final widths {widths[run]}")


def choose_clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def time_cuts(repeats: int) -> None:
    """Milliseconds that a removal event with its cut takes in a ResNet-50 (CIFAR stem)."""
    torch.manual_seed(0)
    model = build_model("resnet50", num_classes=100, in_shape=SHAPE)
    images, labels = torch.randn(4, *SHAPE), torch.randint(0, 100, (4,))
    method = gossamer.Chase(
        channel_sparsity=0.5, update_interval=2, channel_interval=2, min_channel_factor=1.0
    )
    sparsifier = gossamer.Sparsifier(model, method, total_steps=10 * repeats, example=images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    clock = choose_clock()
    events = method.removal_steps(10 * repeats)
    spent = []
    for step in range(1, events[-2] + 1):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        start = clock()
        sparsifier.step(optimizer)
        if step in events:
            spent.append(clock() - start)
        optimizer.zero_grad()
    print(
        f"resnet50: a removal with its verified cut takes {statistics.median(spent) * 1e3:.0f} ms "
        f"(median of {len(spent)}, slowest {max(spent) * 1e3:.0f} ms)"
    )


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["resnet18", "vgg19", "cut"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(conditions())
    for name in ("resnet18", "vgg19"):
        if name in options.only:
            compare(name, options.steps, options.repeats)
    if "cut" in options.only:
        time_cuts(5)


if __name__ == "__main__":
    main()
