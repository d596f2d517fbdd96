"""What methods cost in training: a sparse step over a dense one, a threshold, an N:M mask.

    python benchmarks/overhead.py [--threads 1] [--rounds 15] [--only resnet18 compiled ...]

`lenet` and `resnet18-64` measure masks between two updates, `resnet18` every method that computes
its weights anew in each step, `compiled` the same inside torch.compile, `threshold` the exact
global threshold over ResNet-50's weights, and `mask` their N:M masks.

Ratios are medians over interleaved rounds in one process. With one thread the clock is process CPU
time, which other work on the machine does not distort; with more it is wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.ops import kth_largest, n_of_m
from gossamer.train.models import build_model
from interleave import conditions, interleaved, ratio

# Chase without an update due: the steps between updates are what training consists of.
MASK = gossamer.Chase(density=0.1, channel_sparsity=0.0, update_interval=500_000)

LEARNED: dict[str, gossamer.Method] = {
    "str": gossamer.STR(s_init=-5.0),
    "autosparse": gossamer.AutoSparse(alpha_reset=1.0),
    "dst": gossamer.DST(),
    "sr-ste": gossamer.SRSTE(),
}
VARIANTS: dict[str, gossamer.Method] = {
    "str, held to a density": gossamer.STR(s_init=-5.0, target_density=0.1),
    "autosparse, backward sparsity 0.5": gossamer.AutoSparse(
        alpha_reset=1.0, backward_sparsity=0.5
    ),
    "dst, held to a density": gossamer.DST(target_density=0.1),
    "ste": gossamer.SRSTE(lam=0.0),
    "sr-ste, decoupled": gossamer.SRSTE(lam=1e-3, mode="decoupled"),
    "sr-ste, new mask every 10 steps": gossamer.SRSTE(refresh_interval=10),
    "topkast": gossamer.TopKAST(density=0.1),
}
STEPS = 1_000_000

Clock = Callable[[], float]


def training_step(
    model_name: str,
    shape: tuple[int, int, int],
    batch: int,
    method: gossamer.Method | None,
    *,
    bf16: bool,
    compiled: bool = False,
) -> Callable[[], object]:
    """One SGD step with momentum and weight decay on random data."""
    torch.manual_seed(0)
    model = build_model(model_name, num_classes=10, in_shape=shape)
    images = torch.randn(batch, *shape)
    labels = torch.randint(0, 10, (batch,))
    if bf16:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    sparsifier = None
    if method is not None:
        sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    forward: Callable[[Tensor], Tensor] = (
        torch.compile(model, fullgraph=True) if compiled else model
    )

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(images), labels)
        if sparsifier is not None:
            loss = loss + sparsifier.penalty()
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step(optimizer)
        optimizer.zero_grad()

    return step


def compare_steps(
    name: str,
    shape: tuple[int, int, int],
    batch: int,
    methods: Mapping[str, gossamer.Method],
    *,
    bf16: bool,
    rounds: int,
    calls: int,
    clock: Clock,
    compiled: bool = False,
) -> None:
    """Print the step of every method over the dense step; all are interleaved."""
    torch.compiler.reset()
    steps = {
        label: training_step(name, shape, batch, method, bf16=bf16, compiled=compiled)
        for label, method in [("dense", None), *methods.items()]
    }
    seconds = interleaved(steps, rounds=rounds, calls=calls, clock=clock)
    kind = "bf16 channels_last" if bf16 else "fp32"
    for label in methods:
        middle, spread = ratio(seconds, label, "dense")
        print(
            f"{name} batch {batch} {kind}{' compiled' * compiled}: {label} / dense step "
            f"{middle:.3f} +- {spread:.3f}"
        )


def compare_threshold(rounds: int) -> None:
    """Print the time of the exact threshold of 23.6 M weights, beside `torch.kthvalue`."""
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
        ours = statistics.median(seconds["ours"])
        middle, spread = ratio(seconds, "kthvalue", "ours")
        print(
            f"exact threshold, {total / 1e6:.1f} M weights, keep {share:.0%}, 1 thread: "
            f"{ours * 1e3:.0f} ms, torch.kthvalue takes {middle:.1f} +- {spread:.1f} times as long"
        )


def compare_masks(rounds: int, clock: Clock) -> None:
    """Print the time of N:M masks of ResNet-50, beside those by sorting."""
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


def main() -> None:
    sections = ["lenet", "resnet18-64", "resnet18", "compiled", "threshold", "mask"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=sections, default=sections)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds
    clock = time.process_time if options.threads == 1 else time.perf_counter
    image = (3, 32, 32)
    print(conditions())
    if "lenet" in options.only:
        compare_steps(
            "lenet-300-100",
            (1, 28, 28),
            128,
            {"mask": MASK},
            bf16=False,
            rounds=2 * rounds,
            calls=100,
            clock=clock,
        )
    if "resnet18-64" in options.only:
        compare_steps(
            "resnet18", image, 64, {"mask": MASK}, bf16=True, rounds=rounds, calls=2, clock=clock
        )
    if "resnet18" in options.only:
        compare_steps(
            "resnet18",
            image,
            32,
            LEARNED | VARIANTS,
            bf16=True,
            rounds=rounds,
            calls=1,
            clock=clock,
        )
    if "compiled" in options.only:
        compare_steps(
            "resnet18",
            image,
            32,
            LEARNED,
            bf16=True,
            rounds=rounds,
            calls=2,
            clock=clock,
            compiled=True,
        )
    if "threshold" in options.only:
        compare_threshold(max(5, rounds // 2))
    if "mask" in options.only:
        compare_masks(rounds, clock)


if __name__ == "__main__":
    main()
