"""What weighing a channel's score against what its removal saves brings, at the same budget.

    python benchmarks/cost_aware.py --data FOLDER [--unit macs] [--shares 0.5 0.25 0.125]
        [--scores channel macs latency] [--seeds 0 1 2] [--out FOLDER] [--SETTING VALUE ...]

Chase trains the same network to the same budget (a share of the dense network's MACs, or of its
milliseconds) with the paper's raw score, where every channel counts the same, and with scores
weighed against MACs or measured time. Every run cuts down to the budget, so what differs is the
accuracy, and where the channels went. Accuracies are on the test images after the last epoch:
nothing is selected. A run that is there already is read.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer.measure import account
from gossamer.train.config import TrainConfig
from gossamer.train.data import load_data
from gossamer.train.flags import parse
from gossamer.train.models import build_model
from gossamer.train.run import train


def dense_price(config: TrainConfig, unit: str) -> float:
    """MACs or milliseconds of the full network."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data = load_data(config.data, val_fraction=0.1, seed=0, image_size=config.image_size)
    model = build_model(
        config.model, num_classes=data.num_classes, in_shape=data.in_shape, width=config.width
    )
    example = torch.randn(config.latency_batch, *data.in_shape)
    if unit == "macs":
        return float(account(model, example).macs_executed)
    return gossamer.latency(model, example).dense


def show(rows: list[dict[str, Any]]) -> str:
    accuracies = [100 * row["slim"]["accuracy"] for row in rows]
    macs = [row["slim"]["macs_executed"] / row["sparse"]["macs_executed"] for row in rows]
    times = [row["latency"]["ratio"]["slim"] for row in rows]
    spread = statistics.stdev(accuracies) if len(rows) > 1 else 0.0
    return (
        f"accuracy {statistics.mean(accuracies):.2f} +- {spread:.2f} %, "
        f"MACs {statistics.mean(macs):.3f}, time {statistics.mean(times):.3f}, channels removed "
        f"{statistics.mean(row['slim']['channel_sparsity'] for row in rows):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--unit", choices=("macs", "latency"), default="macs")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--scores", nargs="+", default=["channel", "macs", "latency"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/cost-aware"))
    chosen, settings = parser.parse_known_args()
    common = ["--method", "chase", "--data", chosen.data, *settings]
    setting = {"macs": "max_macs", "latency": "max_latency_ms"}[chosen.unit]

    # Measured once: runs that are there already had that budget.
    file = chosen.out / f"dense-{chosen.unit}.txt"
    if not file.exists():
        chosen.out.mkdir(parents=True, exist_ok=True)
        file.write_text(repr(dense_price(parse(common).config, chosen.unit)))
    dense = float(file.read_text())
    print(f"dense: {dense:,.6g} {'MACs' if chosen.unit == 'macs' else 'ms'}", flush=True)
    for share in chosen.shares:
        for score in chosen.scores:
            rows = []
            for seed in chosen.seeds:
                folder = chosen.out / f"{chosen.unit}-{share}-{score}-s{seed}"
                words = [*common, f"--{setting}", repr(share * dense), "--channel_score_per", score]
                words += ["--seed", str(seed), "--out", str(folder)]
                request = parse(words)
                rows.append(train(request.config, request.method, resume=folder.exists()))
            print(f"{chosen.unit} at {share}, score per {score}: {show(rows)}", flush=True)


if __name__ == "__main__":
    main()
