"""A run folder, read: finished or not, whatever is there."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.reading import read_json
from gossamer.train.config import read_yaml
from gossamer.train.folder import RunFolder

__all__ = ["COLOURS", "LIVE", "Row", "Run", "names", "read"]

Row = dict[str, Any]  # numbers, and under "layer" a name

COLOURS = tuple(f"c{number}" for number in range(1, 9))  # of page.css
LIVE = "live_output_channels"  # column of all sparse layers together, not in metrics.csv


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: The folder.
        name: What the page calls it; no other run there has the same.
        colour: Of its lines.
        settings: Of config.yaml.
        summary: Of summary.json; None before the run has ended.
        epochs: Rows of metrics.csv; the first is what training started from, where that is known.
        dense: Rows of metrics-dense.csv; empty without a twin.
        layers: Rows of layers.csv; empty before the first epoch has ended.
        analysis: Of analysis.json; None when `gossamer analyze` was not run.
    """

    path: Path
    name: str
    colour: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    epochs: Sequence[Row]
    dense: Sequence[Row]
    layers: Sequence[Row]
    analysis: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """Network, data, method and seed."""
        return "{model} on {data}, {method}, seed {seed}".format(**self.settings)

    @property
    def unfinished(self) -> str:
        """How far a run has come that has not ended, and what goes on with it; else empty."""
        if self.summary is not None:
            return ""
        wanted = self.settings["epochs"]
        done = f"{_last(self.epochs)} of {wanted} epochs"
        if self.settings["baseline"]:
            done += f", of its dense twin {_last(self.dense)}"
        return (
            f"This run has not ended: {done}. To go on: "
            f"gossamer train --resume --out {shlex.quote(str(self.path))}"
        )

    @property
    def by_layer(self) -> dict[str, list[Row]]:
        """The rows of layers.csv of each sparse layer."""
        found: dict[str, list[Row]] = {}
        for row in self.layers:
            found.setdefault(row["layer"], []).append(row)
        return found

    @property
    def shapes(self) -> Sequence[Mapping[str, Any]]:
        """What the summary says of each layer; nothing before the run has ended."""
        return [] if self.summary is None else self.summary.get("layers", [])


def names(paths: Sequence[Path]) -> list[str]:
    """Short names of the folders: the last part of each path, and as many before as it takes.

    Raises:
        ValueError: A folder is there twice.
    """
    parts = [path.expanduser().resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1)
        raise ValueError(f"{twice} is there twice: give each run once")
    count = 1
    while len({own[-count:] for own in parts}) < len(parts):
        count += 1
    return ["/".join(own[-count:]) for own in parts]


def read(path: Path, name: str, colour: str) -> Run:
    """The run in folder `path`.

    Raises:
        ValueError: The folder holds no run, or a damaged one.
        OSError: A file could not be read.
    """
    folder = RunFolder(path.expanduser())
    if not folder.config.exists():
        raise ValueError(f"{path} holds no run: give the folder that `gossamer train` wrote")
    settings = read_yaml(folder.config)
    lacking = {"model", "data", "method", "seed", "epochs", "baseline"} - settings.keys()
    if lacking:
        raise ValueError(f"{folder.config} lacks {', '.join(sorted(lacking))}: it is of no run")
    layers = _rows(folder.layers)
    return Run(
        path=path,
        name=name,
        colour=colour,
        settings=settings,
        summary=_json(folder.summary),
        epochs=_whole(_rows(folder.metrics("sparse")), layers),
        dense=_rows(folder.metrics("dense")),
        layers=layers,
        analysis=_json(folder.analysis),
    )


def _whole(epochs: Sequence[Row], layers: Sequence[Row]) -> list[Row]:
    """The epochs with what only the layers' rows say: live channels, and the start."""
    by_epoch: dict[float, list[Row]] = {}
    for row in layers:
        by_epoch.setdefault(row["epoch"], []).append(row)
    live = {epoch: sum(row["live_channels"] for row in rows) for epoch, rows in by_epoch.items()}
    rows = [row | ({LIVE: live[row["epoch"]]} if row["epoch"] in live else {}) for row in epochs]
    if epochs and 0 in by_epoch:
        weights = sum(row["weights"] for row in by_epoch[0])
        start: Row = {
            column: sum(row[column] * row["weights"] for row in by_epoch[0]) / weights
            for column in ("density", "exploration", "sad_from_start", "sad_since_last")
        }
        rows.insert(0, {"epoch": 0.0, **start, LIVE: live[0]})
    return rows


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [
                {key: text if key == "layer" else float(text) for key, text in row.items()}
                for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): leave the run out") from error


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return read_json(path, "leave the run out")


def _last(rows: Sequence[Row]) -> int:
    return int(rows[-1]["epoch"]) if rows else 0
