"""Interleaved timing of several variants, for the benchmarks: ratios, not milliseconds."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every variant in each round; the order alternates from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:
        variants[name]()  # warm-up
    for number in range(rounds):
        for name in list(variants) if number % 2 else list(variants)[::-1]:
            start = clock()
            for _ in range(calls):
                variants[name]()
            seconds[name].append((clock() - start) / calls)
    return seconds


def ratio(seconds: Mapping[str, list[float]], variant: str, baseline: str) -> tuple[float, float]:
    """Median over rounds of variant / baseline in one round, and half the quartile distance."""
    pairs = zip(seconds[variant], seconds[baseline], strict=True)
    ratios = sorted(one / other for one, other in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


def conditions() -> str:
    """The machine and settings a ratio was measured under."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = f"{len(names)} x {names[0]}"
    load = os.getloadavg()[0]
    return (
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {load:.1f}"
    )
