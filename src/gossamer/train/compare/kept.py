"""Rows of an earlier comparison that stand for their cells: what they report is not trained again.

A results.csv outlives its run folders: it is what people keep. Its rows are known again by the
digest of the settings that their runs had.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from gossamer.reading import reading
from gossamer.train.compare.cell import Cell
from gossamer.train.compare.results import FIELDS, LEFT_OUT, Row

__all__ = ["read_kept"]

_TEXT = (
    *("label", "rival", "method", "model", "data", "status", "train_clock"),
    *("gossamer", "torch", "machine", "settings", "folder", "error"),
)
_ANEW = "give the results.csv that gossamer compare wrote, or leave out --keep"


def read_kept(file: Path, cells: Iterable[Cell]) -> tuple[dict[Cell, Row], list[str]]:
    """The rows that stand for cells, and what is to be said of them and of the others.

    A row stands for the cell with the same settings, whatever its label, unless the cell's folder
    has a finished run, or a run that has not been made needs what is in that folder: the dense
    rival of a slim network is made from it.

    Args:
        file: A results.csv.
        cells: Of the comparison.

    Raises:
        ValueError: It is no results.csv, or one without the digests of its runs' settings.
        OSError: It cannot be read.
    """
    cells = list(cells)
    found = {row["settings"]: row for row in _rows(file)}
    kept = {
        cell: found[cell.settings] | {"label": cell.label, "density_asked": cell.density}
        for cell in cells
        if cell.settings in found and not cell.finished
    }
    for cell in reversed(cells):  # a rival comes after what it needs
        if not (cell in kept or cell.finished):
            for other in cell.after:
                kept.pop(other, None)
    known = {cell.settings for cell in cells}
    others = dict.fromkeys(row["label"] for row in found.values() if row["settings"] not in known)
    notes = [f"{len(kept)} rows of {file} are kept"]
    if others:
        notes.append(f"{file} has rows of other settings, which are left out: {', '.join(others)}")
    return kept, notes


def _rows(file: Path) -> list[Row]:
    """The rows of runs that have ended, or that are not needed."""
    with file.open(encoding="utf-8", newline="") as text, reading(str(file), _ANEW):
        table = csv.DictReader(text)
        missing = [name for name in FIELDS if name not in (table.fieldnames or ())]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        return [_typed(row) for row in table if row["status"] in ("done", LEFT_OUT)]


def _typed(row: Mapping[str, str]) -> Row:
    return {name: row[name] if name in _TEXT else _number(row[name]) for name in FIELDS}


def _number(text: str) -> float | None:
    """Of a field; None where it is empty."""
    if not text:
        return None
    return int(text) if text.isdecimal() else float(text)
