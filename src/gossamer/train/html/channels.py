"""The channel picture of a run: how its weights lie over the channels, against chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gossamer.train import report
from gossamer.train.folder import RunFolder
from gossamer.train.html.draw import SHADES, Curve, Plot, plot
from gossamer.train.html.runs import Row, Run

__all__ = ["Picture", "of"]

_LAYERS = 16  # drawn at most, evenly chosen by depth: more cannot be told apart
_NAMED = len(SHADES)  # up to so many layers are in the legend by name


@dataclass(frozen=True)
class Picture:
    """Plots, sentences, and what is missing, a line each."""

    plots: list[Plot]
    told: list[str]
    missing: list[str]


def of(run: Run) -> Picture:
    """What is known of a run's channels."""
    found = Picture([], [], [])
    by_layer = run.by_layer
    if by_layer:
        _over_time(run, by_layer, found)
    kept = _kept(run, by_layer)
    if kept:
        found.plots.append(_held(run, kept))
    else:
        why = "there is no slim network yet" if run.summary is None else "model.safetensors or the "
        why += "" if run.summary is None else "summary's list of layers is not in the run folder"
        found.missing.append(f"How the weights lie over the channels at the end: {why}.")
    _analysed(run, found)
    return found


def _over_time(run: Run, by_layer: Mapping[str, Sequence[Row]], found: Picture) -> None:
    some = _some(list(by_layer))
    if len(some) < len(by_layer):
        found.missing.append(
            f"The curves show {len(some)} of {len(by_layer)} sparse layers, evenly chosen by "
            "depth; layers.csv has them all."
        )
    for column, title in (
        ("channel_spread", "Spread of channel density, over chance"),
        ("umm_spread", "Spread of channel magnitude (UMM), over chance"),
    ):
        curves = [
            Curve(label=label, colour=colour, points=points)
            for name, label, colour in _named(some)
            if (points := _against_chance(by_layer[name], column))
        ]
        if curves:
            name = f"{run.colour}-{column.replace('_', '-')}"
            note = "standard deviation over mean of the output channels; at 1, as random places"
            found.plots.append(plot(name, title, curves, ratio=True, floor=0, note=note))
        else:
            found.missing.append(
                f"{title}: not known, every sparse layer is as full as chance makes it even."
            )


def _against_chance(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    return [
        (row["epoch"], row[column] / row[f"{column}_random"])
        for row in rows
        if row[f"{column}_random"] and math.isfinite(row[column])
    ]


def _kept(run: Run, by_layer: Mapping[str, object]) -> dict[str, list[int]]:
    """Weights that each output channel kept, by layer; of channels that were cut, none."""
    file = RunFolder(run.path).model
    if not run.shapes or not file.exists():
        return {}
    import safetensors

    found = {}
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for row in run.shapes:
                name = row["layer"] if row["layer"] in names else f"{row['layer']}.weight"
                if row["layer"] not in by_layer or name not in names:
                    continue
                out = 1 if "Transpose" in row["kind"] else 0
                kept = (tensors.get_tensor(name).movedim(out, 0) != 0).flatten(1).sum(1).tolist()
                found[row["layer"]] = [*kept, *[0] * (row["shape"][out] - len(kept))]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): leave the run out") from error
    return found


def _held(run: Run, kept: Mapping[str, Sequence[int]]) -> Plot:
    """What share of a layer's weights its sparsest channels hold: Lorenz's curves."""
    curves = []
    for name, label, colour in _named(_some([name for name in kept if sum(kept[name])])):
        total = sum(kept[name])
        held = [0, *accumulate(sorted(kept[name]))]
        points = [(count / len(kept[name]), sum_ / total) for count, sum_ in enumerate(held)]
        curves.append(Curve(label=label, colour=colour, points=points))
    return plot(
        f"{run.colour}-held",
        "Weights held by the sparsest channels, at the end",
        curves,
        x="share of the layer's output channels, sparsest first",
        percent=True,
        floor=0,
        even=True,
        note="share of the layer's weights; dotted: evenly spread; flat at 0: cut channels",
    )


def _analysed(run: Run, found: Picture) -> None:
    """What `gossamer analyze` has found."""
    if run.summary is None:
        found.missing.append("What cutting channels would do is known when the run has ended.")
        return
    if run.analysis is None:
        found.missing.append(
            "What cutting the weakest channels would do to the outputs was not computed: "
            "gossamer analyze RUN does, and gossamer report RUN puts it here."
        )
        return
    cuts = run.analysis["cuts"]
    found.told.insert(0, report.statement(run.analysis))
    if not cuts:
        found.missing.append(
            "No channel of this network is written by one layer and read by one other, so none "
            "was tried to be cut."
        )
        return
    curves = [
        Curve(label=label, colour=colour, points=[(row["share"], row[key]) for row in cuts])
        for label, key, colour in (
            ("change of the outputs, relative", "error", "c1"),
            ("validation accuracy", "accuracy", "c2"),
            ("MACs executed, left", "macs_executed", "c3"),
        )
    ]
    found.plots.append(
        plot(
            f"{run.colour}-cuts",
            "If the weakest channels went now",
            curves,
            x="share of the channels that could go, weakest first",
            percent=True,
            floor=0,
            note="at once, without any training after, on the validation images",
        )
    )


def _some(names: Sequence[str]) -> list[str]:
    """At most so many of the layers, evenly chosen, with the first and the last."""
    if len(names) <= _LAYERS:
        return list(names)
    return [names[round(place * (len(names) - 1) / (_LAYERS - 1))] for place in range(_LAYERS)]


def _named(names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, label and colour of each layer, by depth."""
    last = max(1, len(names) - 1)
    for place, name in enumerate(names):
        ends = {0: "first layer", len(names) - 1: "last layer"}
        label = name if len(names) <= _NAMED else ends.get(place, "")
        yield name, label, SHADES[round(place / last * (len(SHADES) - 1))]
