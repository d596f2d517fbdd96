"""The plot of a comparison: accuracy against executed MACs, sparse MACs and measured latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from gossamer.train.compare.cell import DENSE
from gossamer.train.compare.results import TWINS, Row, figures_of, groups
from gossamer.train.compare.rivals import RIVALS
from gossamer.train.plots import figure, write_svg

__all__ = ["draw"]

_PANELS = {
    "macs_executed": "MACs executed / dense",
    "macs_sparse": "MACs sparse / dense",
    "latency": "latency / dense",
}
_MARKERS = "osD^vP*X<>hd"
_COLOURS = [f"C{n}" for n in range(10)] + ["navy", "darkgreen", "maroon", "gold", "hotpink", "teal"]
_RIVAL_MARKERS = dict(zip(RIVALS, "soD^", strict=True))


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write the plot as SVG: a panel for each cost, a line per label through its densities.

    Rivals have the colour of their label, dotted lines and open markers, one for each kind.

    Points are means over the seeds, bars the standard deviation; the dashed line is the dense
    twins' accuracy, the band its standard deviation.

    Raises:
        OSError: The file cannot be written; what was at `path` is still there.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    grouped = groups(rows)
    dense = grouped.pop(TWINS, [])
    lines: dict[tuple[str, str], list[Mapping[str, Sequence[float]]]] = {}
    for (label, _, rival), group in grouped.items():
        lines.setdefault((label, rival), []).append(figures_of(group, dense))
    labels = list(dict.fromkeys(label for label, _ in lines))
    own = figures_of(dense, dense)

    drawing = figure(13, max(4.4, 0.4 + 0.21 * (1 + len(lines))))  # as high as the legend
    panels = drawing.subplots(1, len(_PANELS), sharey=True)
    for axes, (name, caption) in zip(panels, _PANELS.items(), strict=True):
        if dense:
            mean, spread = _mean(own["accuracy"]), _spread(own["accuracy"])
            axes.axhline(mean, color="black", linestyle="--", linewidth=1)
            axes.axhspan(mean - spread, mean + spread, color="black", alpha=0.08, linewidth=0)
            if own[name]:
                axes.plot(_mean(own[name]), mean, "k*", markersize=12, label=DENSE)
        for (label, rival), points in lines.items():
            index = labels.index(label)
            shown = [point for point in points if point[name]]
            axes.errorbar(
                [_mean(point[name]) for point in shown],
                [_mean(point["accuracy"]) for point in shown],
                xerr=[_spread(point[name]) for point in shown],
                yerr=[_spread(point["accuracy"]) for point in shown],
                color=_COLOURS[index % len(_COLOURS)],
                marker=_RIVAL_MARKERS[rival] if rival else _MARKERS[index % len(_MARKERS)],
                markerfacecolor="white" if rival else None,
                linestyle=":" if rival else "-",
                linewidth=1,
                elinewidth=0.8,
                capsize=2,
                label=f"{label} {rival}" if rival else label,
            )
        axes.set_xlabel(caption)
        axes.grid(alpha=0.3)
        if name == "macs_sparse":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    panels[0].set_ylabel("test accuracy, %")
    drawing.suptitle(title)
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    write_svg(path, drawing)


def _mean(values: Sequence[float]) -> float:
    return fmean(values)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
