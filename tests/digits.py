"""The setup in which the notes on learned thresholds were measured: a small MLP on digits.

64-256-256-10 with batch norm, He's initialisation (which decides how many weights a threshold
finds below it), 40 epochs of SGD with a cosine to 0, batch 64, label smoothing 0.1; weight decay
strong enough that thresholds move in so short a run.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.measure.macs import account
from gossamer.train.work import Work

EPOCHS, BATCH = 40, 64
PER_EPOCH = 23  # steps; the last batch is a small one


class Outcome(NamedTuple):
    """What a run came to.

    density, accuracy: at the end.
    revived: share of the weights that were masked after epoch 5 and are active at the end.
    flips: weights that an epoch ended with masked and the next one active, summed over epochs.
    macs: of training, relative to dense training.
    """

    density: float
    accuracy: float
    revived: float
    flips: int
    macs: float
    sparsifier: gossamer.Sparsifier


def mlp(norm: bool = True, he: bool = True) -> nn.Sequential:
    widths = [64, 256, 256]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *[nn.BatchNorm1d(outputs)] * norm, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
    for layer in model:
        if he and isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return model


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised images and labels: 1437 to train on, 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images.astype("float32"), labels, test_size=360, random_state=0, stratify=labels
    )
    mean, std = x.mean(0), x.std(0) + 1e-3
    return (
        torch.tensor((x - mean) / std),
        torch.tensor(y),
        torch.tensor((x_test - mean) / std),
        torch.tensor(y_test),
    )


def train(
    method: gossamer.Method,
    seed: int,
    *,
    weight_decay: float = 1.5e-2,
    threshold_decay: float | None = None,
    lr: float = 0.1,
    momentum: float = 0.875,
    norm: bool = True,
    he: bool = True,
) -> Outcome:
    x, y, x_test, y_test = data()
    torch.manual_seed(seed)
    model = mlp(norm, he)
    steps = EPOCHS * PER_EPOCH
    sparsifier = gossamer.Sparsifier(model, method, total_steps=steps, seed=seed)
    apart = {} if threshold_decay is None else {"weight_decay": threshold_decay}
    optimizer = torch.optim.SGD(
        sparsifier.parameter_groups(**apart), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    work = Work(model, x[:2], sparsifier)
    supports = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            work.add(len(batch))
            loss = F.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
            (loss + sparsifier.penalty()).backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            schedule.step()
        supports.append(torch.cat([site.support.flatten() for site in sparsifier.sites]))
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
    masked = ~supports[4]
    return Outcome(
        sparsifier.density,
        accuracy,
        int((masked & supports[-1]).sum()) / max(1, int(masked.sum())),
        sum(int((~before & after).sum()) for before, after in pairwise(supports)),
        work.total / (3 * account(model, x[:2]).macs_executed * len(x) * EPOCHS),
        sparsifier,
    )
