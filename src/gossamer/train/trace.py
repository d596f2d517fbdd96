"""The losses of a dense run, for methods that compare theirs with them while they train."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

from gossamer.reading import reading
from gossamer.train.config import TrainConfig, read_yaml
from gossamer.train.folder import RunFolder

__all__ = ["dense_losses"]

# What may differ between the two runs: it changes no loss of a dense network, or only by chance.
_FREE = {"method", "threshold_decay", "threshold_clip", "seed", "cut", "include", "exclude"}
_FREE |= {"keep_channels", "precision", "channels_last", "threads", "device", "baseline", "out"}


def dense_losses(path: Path, config: TrainConfig, share: float) -> tuple[float, ...]:
    """Training losses of the dense network of another run, one per epoch.

    Args:
        path: Folder of that run, made with `baseline`.
        config: Settings of this run; those that shape the loss must be the same.
        share: Fraction of training to give the losses of, a whole number of epochs.

    Raises:
        ValueError: The runs differ, or the epochs are not there.
        OSError: There is no such run.
    """
    folder = RunFolder(path)
    metrics = folder.metrics("dense")
    if not folder.config.exists() or not metrics.exists():
        raise FileNotFoundError(
            f"{path} holds no run with a dense twin ({metrics.name}): make one with "
            "gossamer train --baseline"
        )
    theirs = read_yaml(folder.config)
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        here = list(value) if isinstance(value, tuple) else value
        there = theirs.get(field.name)
        if field.name not in _FREE and there != here:
            raise ValueError(
                f"{folder.config} says {field.name}: {there}, and here it is {here}: losses are "
                "compared epoch by epoch, so take a dense run with the settings of this one"
            )
    epochs = round(share * config.epochs)
    if epochs < 1 or abs(epochs - share * config.epochs) > 1e-6:
        raise ValueError(
            f"tune_end={share} of {config.epochs} epochs is {share * config.epochs:.4g} epochs, "
            f"and a trace has whole ones: give tune_end={max(epochs, 1) / config.epochs:.6g}"
        )
    remedy = "make the dense run again with gossamer train --baseline"
    with reading(str(metrics), remedy), metrics.open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    if len(losses) < epochs:
        raise ValueError(
            f"{metrics} has {len(losses)} epochs, and {epochs} are needed: finish that run with "
            f"gossamer train --resume --out {path}"
        )
    return tuple(losses[:epochs])
