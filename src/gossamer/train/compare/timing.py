"""Latency of the trained networks: after all training, in one process, one network after another.

A time taken while other cells train is noise. Here each slim network takes turns with the dense
one of the same class, and all are timed in one sitting, so that one set of conditions holds for
the whole table. The dense network has fresh weights: what it computes does not change its time.
The dense twins are timed against it as well: how far they are from 1 says how far to trust a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from gossamer.measure.latency import compare_latency
from gossamer.reading import read_json
from gossamer.shrink.file import load
from gossamer.train.compare.cell import DENSE, Cell
from gossamer.train.models import build_model
from gossamer.train.narrowing import digest

__all__ = ["dense_ratio", "stored", "time_cells"]


def stored(file: Path, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """What `time_cells` returned for these very networks, where `file` holds it."""
    if not file.exists():
        return None
    timing = read_json(file, "remove it, and run the comparison again")
    timed = {name: times["sha256"] for name, times in timing["cells"].items()}
    return timing if timed == {cell.config.folder.name: _digest(cell) for cell in cells} else None


def _digest(cell: Cell) -> str:
    """Of the model file: a cell that was removed and trained anew has another network."""
    return digest(cell.run.model)


def dense_ratio(cells: Sequence[Cell], timing: Mapping[str, Any]) -> float:
    """Mean latency ratio of the dense twins among the cells; 1 when there are none."""
    twins = [cell.config.folder.name for cell in cells if cell.label == DENSE]
    return fmean(timing["cells"][name]["ratio"]["median"] for name in twins) if twins else 1.0


def time_cells(cells: Sequence[Cell], threads: int) -> dict[str, Any]:
    """Time finished cells, with nothing else of the comparison running.

    Args:
        cells: At least one, all of one model.
        threads: Torch threads meanwhile.

    Returns:
        `conditions`, and under `cells`, by folder name, the quartiles over the rounds of
        `milliseconds` and of `ratio`, to the dense network in the same round, and the `sha256` of
        the model file.

    Raises:
        ValueError: The cells were trained on a GPU that is not here, or a model file is damaged.
    """
    summary = read_json(cells[0].run.summary, "remove its folder to train it anew")
    device = torch.device(summary["machine"]["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{cells[0].config.folder} was trained on CUDA, and PyTorch finds no CUDA device to "
            "time it on: go on where there is one"
        )
    channels_last = cells[0].config.channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def network() -> nn.Module:
        torch.manual_seed(0)
        model = summary["model"]
        return build_model(
            model["name"],
            num_classes=model["num_classes"],
            in_shape=tuple(model["in_shape"]),
            width=model["width"],
        )

    def ready(model: nn.Module) -> nn.Module:
        placed: nn.Module = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        return placed

    generator = torch.Generator().manual_seed(0)
    shape = (summary["latency"]["batch"], *summary["model"]["in_shape"])
    images = torch.randn(shape, generator=generator)
    images = images.to(device, memory_format=layout)
    dense = ready(network())
    found: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        slim = ready(load(cell.run.model, network()))
        times = compare_latency({"dense": dense, "slim": slim}, images, threads=threads)
        found[cell.config.folder.name] = {
            "milliseconds": times["slim"].milliseconds._asdict(),
            "ratio": times["slim"].ratio._asdict(),
            "sha256": _digest(cell),
        }
    return {"conditions": asdict(times.conditions), "cells": found}
