"""Plots as SVG files: the same bytes for the same data, written whole. Imports matplotlib late."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.shrink.file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "svg", "write_svg"]


def figure(width: float, height: float) -> Figure:
    """An empty drawing, in inches. Without pyplot: no window, no state of the process."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(drawing: Figure) -> str:
    """The drawing as SVG, with ids and text that do not change from run to run."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "gossamer", "svg.fonttype": "none"}):
        drawing.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def write_svg(path: Path, drawing: Figure) -> None:
    """Write the drawing. Raises OSError, with what was at `path` still there."""
    text = svg(drawing)
    write_whole(path, lambda temporary: temporary.write_text(text))
