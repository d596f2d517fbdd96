"""Why DST breaks at a target density of 0.01 on digits, and what mends it.

    python benchmarks/thresholds.py [--seeds 0 1 2] [--density 0.01]

The DST run of recipes/digits-choose.yaml as a loop, with the thresholds' gradients as they are,
clipped to a norm of 0.1, or zero, which leaves thresholds to the controller. Prints per run: test
accuracy, the largest threshold and the largest latent weight at the end. 20 to 30 s a run.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.train.data import Batches, load_data
from gossamer.train.models import build_model

EPOCHS, WARMUP, LR = 30, 2, 0.1
CLIPPED = {"as they are": math.inf, "clipped to 0.1": 0.1, "zero": 0.0}


def run(density: float, seed: int, norm: float) -> tuple[float, float, float]:
    data = load_data("digits", seed=seed)
    scale = {"mean": data.mean, "std": data.std}
    torch.manual_seed(seed)
    model = build_model("vgg-small", num_classes=10, in_shape=data.in_shape)
    batches = Batches(data.train, batch_size=64, shuffle=True, seed=seed, drop_last=True, **scale)
    steps, warmup = EPOCHS * len(batches), WARMUP * len(batches)
    method = gossamer.DST(target_density=density)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=steps, seed=seed)
    thresholds = sparsifier.parameter_groups()[1]["params"]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            if norm < math.inf:
                nn.utils.clip_grad_norm_(thresholds, norm)
            optimizer.step()
            sparsifier.step(optimizer)
            scheduler.step()
            optimizer.zero_grad()
    highest = max(float(t.detach().abs().max()) for t in thresholds)
    largest = max(float(site.weight.detach().abs().max()) for site in sparsifier.sites)
    model.eval()
    images, labels = next(iter(Batches(data.test, batch_size=len(data.test), **scale)))
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean()
    return float(right), highest, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("gradients of thresholds | seed | accuracy | largest threshold | largest weight")
    for name, norm in CLIPPED.items():
        for seed in chosen.seeds:
            accuracy, highest, largest = run(chosen.density, seed, norm)
            print(f"{name} | {seed} | {accuracy:.1%} | {highest:.2f} | {largest:.2f}", flush=True)


if __name__ == "__main__":
    main()
