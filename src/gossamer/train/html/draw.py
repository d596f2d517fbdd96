"""Curves as inline SVG for the page: drawn by matplotlib, coloured by the page's style sheet.

Text is drawn small enough for a phone, and stays text. What is said of lines (names of runs and
layers) is not drawn but written beside the drawing, where HTML wraps and escapes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from gossamer.train.plots import svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

__all__ = ["SHADES", "Curve", "Plot", "plot"]

# The style sheet's variables, each drawn in a colour of its own that gives way to it.
SHADES = tuple(f"d{number}" for number in range(8))  # from the first layer to the last
_NAMES = ("ink", "muted", "grid", *(f"c{number}" for number in range(1, 9)), *SHADES)
_COLOURS = {name: f"#00fe{number:02x}" for number, name in enumerate(_NAMES)}
_VARIABLES = {colour: name for name, colour in _COLOURS.items()}

_INCHES = (5.0, 3.1)  # 360 x 223 points: as wide as a phone, so that 10 points are about 10 pixels
_PLACE = (0.115, 0.155, 0.87, 0.815)  # fixed: a layout engine takes as long as the drawing
_POINTS = 200  # of a curve, at most: a point every other pixel
_ALL = 1600  # of all curves of a plot, so that the page stays small
_DOTS = 2  # so few points are marked: they make no line to see
_WIDE = 50.0  # from such a ratio of highest to lowest on, loss is drawn on a logarithmic scale


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a plot.

    Attributes:
        label: What it shows; empty leaves it out of the legend.
        points: (x, y) each; what is not finite is not drawn.
        colour: A variable of the style sheet.
        dashed: Whether it is.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing with what is written beside it.

    Attributes:
        title: Of the figure.
        svg: Inline.
        legend: The curves to be told apart.
        note: How to read it; may be empty.
    """

    title: str
    svg: Markup
    legend: tuple[Curve, ...]
    note: str = ""


def plot(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x: str = "epoch",
    percent: bool = False,
    ratio: bool = False,
    log: bool = False,
    floor: float | None = None,
    even: bool = False,
    note: str = "",
) -> Plot:
    """Draw curves.

    Args:
        name: Of the drawing: a word that no other on the page has.
        title: Of the figure.
        curves: To draw; those with a label are in the legend.
        x: What the axis below shows: "epoch", or a share, shown in percent.
        percent: Values are shares; they are shown in percent.
        ratio: Values are ratios: a line at 1.
        log: The scale may be logarithmic, where values differ enough.
        floor: Lowest value shown.
        even: A diagonal: the line of what is spread evenly.
        note: How to read it.
    """
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    drawing = Figure(figsize=_INCHES)
    drawing.patch.set_visible(False)
    axes = drawing.add_axes(_PLACE)
    most = min(_POINTS, _ALL // max(1, len(curves)))
    for curve in curves:
        points = _some(curve.points, most)
        axes.plot(
            [at for at, _ in points],
            [value for _, value in points],
            color=_COLOURS[curve.colour],
            linestyle="--" if curve.dashed else "-",
            linewidth=1.6,
            marker="o" if len(points) <= _DOTS else "",
            markersize=3,
        )
    own: dict[str, Any] = {"color": _COLOURS["muted"], "linestyle": ":", "linewidth": 1.2}
    if ratio:
        axes.axhline(1.0, **own)
    if even:
        axes.plot([0, 1], [0, 1], **own)
    values = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    if log and values and 0 < min(values) * _WIDE < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif floor is not None:
        axes.set_ylim(bottom=floor)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _style(axes, x)
    legend = tuple(curve for curve in curves if curve.label)
    return Plot(
        title=title, svg=Markup(_inline(svg(drawing), name, title)), legend=legend, note=note
    )


def _style(axes: Axes, x: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ink = _COLOURS["muted"]
    axes.set_xlabel(x, color=ink)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.patch.set_visible(False)
    axes.grid(color=_COLOURS["grid"], linewidth=0.8)
    axes.tick_params(which="both", length=0, labelcolor=ink)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["grid"])


def _some(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the points, evenly chosen, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(place * (len(points) - 1) / (most - 1))] for place in range(most)]


def _inline(text: str, name: str, title: str) -> str:
    """A drawing of matplotlib as an element of the page, named so that no id is there twice."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "id" in attributes:
            if attributes["id"] in used:
                attributes["id"] = f"{name}-{attributes['id']}"
            else:
                del attributes["id"]
        for key, value in attributes.items():
            attributes[key] = _tidy(key, value, name)
        element.attrib.clear()
        element.attrib.update(attributes)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(key: str, value: str, name: str) -> str:
    """An attribute's value, shorter, in the page's colours and with the page's ids."""
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub(r"#00fe\w\w", lambda found: f"var(--{_VARIABLES[found[0]]})", value)
    if key in ("d", "x", "y", "transform"):
        value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", value)
        return " ".join(value.split())
    return value.replace("url(#", f"url(#{name}-")
