"""The layers of a run: density and width before and after, and what was left alone, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.train.html.runs import Row, Run

__all__ = ["Layer", "Reason", "of", "untouched"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer before training and after.

    Attributes:
        name: Of the layer.
        shape: Of its weight: at full width and, where it was cut, in the slim network.
        widths: Output channels: before, and after the cut; before the cut, those alive.
        densities: Share of the full-width weight that is kept: before, and after.
        slim: Density of the weight that is left in the slim network; None before there is one.
        macs: MACs executed, slim over full; None before there is a slim one.
    """

    name: str
    shape: str
    widths: tuple[int, int]
    densities: tuple[float, float]
    slim: float | None
    macs: float | None


@dataclass(frozen=True)
class Reason:
    """Why layers were left as they are, or why channels stay."""

    title: str
    layers: Sequence[str]
    reason: str


def of(run: Run) -> list[Layer]:
    """The layers: all that count, or the sparse ones of a run that has not ended."""
    by_layer = run.by_layer
    if not run.shapes:
        return [
            Layer(
                name=name,
                shape="",
                widths=(int(rows[0]["live_channels"]), int(rows[-1]["live_channels"])),
                densities=(rows[0]["density"], rows[-1]["density"]),
                slim=None,
                macs=None,
            )
            for name, rows in by_layer.items()
        ]
    found = []
    for row in run.shapes:
        dense: Row = {"density": row["density"]}
        shapes = ["x".join(map(str, row[key])) for key in ("shape", "slim_shape")]
        out = 1 if "Transpose" in row["kind"] else 0
        found.append(
            Layer(
                name=row["layer"],
                shape=" to ".join(dict.fromkeys(shapes)),
                widths=(row["shape"][out], row["slim_shape"][out]),
                densities=(by_layer.get(row["layer"], [dense])[0]["density"], row["density"]),
                slim=row["slim_density"],
                macs=row["slim_macs_executed"] / row["macs_executed"],
            )
        )
    return found


def untouched(run: Run) -> list[Reason]:
    """Which layers stayed dense and which keep all their channels, and why."""
    if run.summary is None:
        return []
    found: dict[tuple[str, str], list[str]] = {}
    for title, key in (("left dense", "left_dense"), ("all channels kept", "locked")):
        for name, reason in run.summary[key].items():
            found.setdefault((title, reason), []).append(name)
    return [Reason(title, names, reason) for (title, reason), names in found.items()]
