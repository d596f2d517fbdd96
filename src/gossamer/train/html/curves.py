"""What happened epoch by epoch: of one run in full, of several overlaid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from gossamer.train.html.draw import Curve, Plot, plot
from gossamer.train.html.runs import COLOURS, LIVE, Row, Run

__all__ = ["Curves", "of"]


@dataclass(frozen=True)
class Curves:
    """The plots, and what is said where there is nothing to draw, a line each."""

    plots: list[Plot]
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """A plot of columns of metrics.csv.

    Attributes:
        name: Of the drawing.
        title: Of the figure.
        columns: Labels and columns; of several runs the first is drawn.
        flat: What is said when no value ever changes, with a place for the first.
        twin: The dense twin has these columns too.
        options: For `plot`.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    flat: str = ""
    twin: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_PANELS = (
    _Panel(
        name="accuracy",
        title="Accuracy",
        columns={"validation": "val_accuracy", "training": "train_accuracy"},
        twin=True,
        options={"percent": True},
    ),
    _Panel(
        name="loss",
        title="Loss",
        columns={"validation": "val_loss", "training": "train_loss"},
        twin=True,
        options={"log": True},
    ),
    _Panel(
        name="density",
        title="Density of the sparse layers",
        columns={"density": "density"},
        flat="The density stayed at {:.4f}.",
        options={"floor": 0, "note": "share of their weights that is kept"},
    ),
    _Panel(
        name="live",
        title="Live channels",
        columns={"live output channels": LIVE},
        flat="All {:,.0f} output channels of the sparse layers stayed alive: none was removed.",
        options={"floor": 0, "note": "output channels of the sparse layers that keep a weight"},
    ),
    _Panel(
        name="sad",
        title="SAD: how far the supports moved",
        columns={"from the start": "sad_from_start", "since the epoch before": "sad_since_last"},
        flat="The supports stayed as they were at the start: SAD is {:.0f}.",
        options={"floor": 0, "note": "weights that exactly one of two supports keeps, per weight"},
    ),
    _Panel(
        name="exploration",
        title="Exploration",
        columns={"ever kept": "exploration", "churn": "churn", "revived": "revived"},
        flat="Exploration stayed at {:.4f}: no weight was ever grown.",
        options={
            "floor": 0,
            "note": "ever kept: share of all weights (ITOP's R_s); churn: of the kept, not kept an "
            "epoch before; revived: of those ever dropped, kept now",
        },
    ),
)


def of(runs: Sequence[Run]) -> Curves:
    """The curves of one run, each figure in full; of several, the first figure of each panel."""
    alone = len(runs) == 1
    found = Curves([], [])
    for panel in _PANELS:
        curves = list(_of_one(panel, runs[0]) if alone else _of_several(panel, runs))
        if not curves:
            continue
        if panel.flat and _flat(curves, alone):
            found.missing.append(panel.flat.format(curves[0].points[0][1]))
            continue
        title, options = panel.title, dict(panel.options)
        if not alone:
            label = next(iter(panel.columns))
            title += f", {label}" if len(panel.columns) > 1 else ""
            options["note"] = options.get("note", "").partition(";")[0]  # of that label
        found.plots.append(plot(panel.name, title, curves, **options))
    found.missing.extend(_missing(runs))
    return found


def _of_one(panel: _Panel, run: Run) -> Iterator[Curve]:
    if panel.twin:
        label, column = next(iter(panel.columns.items()))
        points = _points(run.dense, column)
        if points:
            yield Curve(label=f"dense twin, {label}", points=points, colour="muted", dashed=True)
    for (label, column), colour in zip(panel.columns.items(), COLOURS, strict=False):
        points = _points(run.epochs, column)
        if points:
            shown = label if len(panel.columns) > 1 else ""  # the title says it
            yield Curve(label=shown, points=points, colour=colour)


def _of_several(panel: _Panel, runs: Sequence[Run]) -> Iterator[Curve]:
    column = next(iter(panel.columns.values()))
    for run in runs:
        points = _points(run.epochs, column)
        if points:
            yield Curve(label=run.name, points=points, colour=run.colour)
        twin = _points(run.dense, column) if panel.twin else []
        if twin:
            label = f"dense twin of {run.name}"
            yield Curve(label=label, points=twin, colour=run.colour, dashed=True)


def _flat(curves: Sequence[Curve], alone: bool) -> bool:
    """Whether nothing ever changed: in each curve of one run, in those of all runs together."""
    values = [[value for _, value in curve.points] for curve in curves]
    groups = values if alone else [list(chain(*values))]
    # That of the start is a sum over layers, which rounds.
    return all(math.isclose(min(group), max(group), rel_tol=1e-9) for group in groups)


def _points(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    return [
        (row["epoch"], row[column]) for row in rows if column in row and math.isfinite(row[column])
    ]


def _missing(runs: Sequence[Run]) -> Iterator[str]:
    """What is not drawn because a run does not have it."""

    def of(those: Sequence[Run]) -> str:
        return "" if len(runs) == 1 else f" of {', '.join(run.name for run in those)}"

    waiting = [run for run in runs if not run.epochs]
    if waiting:
        yield f"No epoch{of(waiting)} has ended yet: there is no curve to draw."
    alone = [run for run in runs if not run.dense and run.epochs]
    if alone:
        yield f"No dense twin{of(alone)} was trained (gossamer train --baseline true does)."
    unknown = [run for run in runs if run.epochs and not run.layers]
    if unknown:
        yield f"No layers.csv{of(unknown)}: nothing is known of its layers and supports by epoch."
