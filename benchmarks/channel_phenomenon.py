"""Chase's observation: training that moves weights about makes channels uneven, a fixed mask not.

    python benchmarks/channel_phenomenon.py [--data digits] [--out runs/phenomenon]
        [--methods static set rigl chase] [--seeds 0 1 2] [--SETTING VALUE ...]

Trains the same network at the same density with each method, and draws the spread of channel
density over that of a random mask (the mean over the layers, a band from the lowest to the highest
seed), epoch by epoch. Chase runs without removing channels. A run that is there already is read.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import fmean

from gossamer.train.flags import parse
from gossamer.train.plots import figure, write_svg
from gossamer.train.run import train

MORE = {"chase": ["--channel_sparsity", "0"]}


def ratios(folder: Path) -> list[float]:
    """Mean over the layers of spread / random, per epoch; layers that are dense are left out."""
    with (folder / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    dense = {row["layer"] for row in rows if float(row["channel_spread_random"]) < 1e-6}
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["layer"] not in dense:
            ratio = float(row["channel_spread"]) / float(row["channel_spread_random"])
            found.setdefault(int(row["epoch"]), []).append(ratio)
    return [fmean(found[epoch]) for epoch in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/phenomenon"))
    parser.add_argument("--methods", nargs="+", default=["static", "set", "rigl", "chase"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen, settings = parser.parse_known_args()

    drawing = figure(6.5, 4.2)
    axes = drawing.subplots()
    for index, method in enumerate(chosen.methods):
        paths = []
        for seed in chosen.seeds:
            folder = chosen.out / f"{method}-s{seed}"
            words = ["--method", method, "--data", chosen.data, "--seed", str(seed)]
            words += ["--out", str(folder), "--cut", "end", *MORE.get(method, []), *settings]
            request = parse(words)
            train(request.config, request.method, resume=folder.exists())
            paths.append(ratios(folder))
        epochs = range(len(paths[0]))
        points = list(zip(*paths, strict=True))
        means = [fmean(point) for point in points]
        print(f"{method}: start {means[0]:.2f}, end {means[-1]:.2f}, highest {max(means):.2f}")
        axes.plot(epochs, means, color=f"C{index}", label=method)
        axes.fill_between(
            epochs,
            [min(point) for point in points],
            [max(point) for point in points],
            color=f"C{index}",
            alpha=0.15,
            linewidth=0,
        )
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="random mask")
    axes.set_xlabel("epoch")
    axes.set_ylabel("spread of channel density / random")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    write_svg(chosen.out / "channel-spread.svg", drawing)
    print(f"drawn to {chosen.out / 'channel-spread.svg'}")


if __name__ == "__main__":
    main()
