"""`gossamer compare`: methods x densities x seeds on one model and data set, from one YAML file.

cells/                one run folder per cell, with its train.log
results.csv           one row per cell, all figures
compare.md            means and deviations over the seeds, against the dense twin
accuracy.svg          accuracy against executed MACs, sparse MACs and latency
latency.json          measured after all training
compare.yaml          the file that was compared
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gossamer.reading import read_json
from gossamer.train.compare.cell import DENSE, Cell
from gossamer.train.compare.grid import COPY, Comparison, read
from gossamer.train.compare.kept import read_kept
from gossamer.train.compare.plot import draw
from gossamer.train.compare.processes import default_jobs, locked, log_of, train_cells
from gossamer.train.compare.results import Row, failures, markdown, means, rows
from gossamer.train.compare.rivals import unneeded
from gossamer.train.compare.timing import dense_ratio, stored, time_cells
from gossamer.train.folder import RunFolder

__all__ = ["Comparison", "Row", "compare", "failures", "means", "read"]

_PLOT = "accuracy.svg"
_TRUSTED = 0.05  # latency ratios of equal networks that are further from 1 are noise


def compare(
    comparison: Comparison,
    *,
    jobs: int | None = None,
    keep: Path | None = None,
    say: Callable[[str], None],
) -> list[Row]:
    """Train what has not been trained, time everything, and write the results; returns their rows.

    Finished cells are not run again, and a cell that was broken off goes on from its newest
    checkpoint. A cell that fails does not stop the others, unless every dense twin has failed: then
    nothing is left to compare with, and the settings for all are likely to be wrong.

    Args:
        comparison: What to compare.
        jobs: Cells to train at a time; None: cores divided by threads, or 1 on a GPU.
        keep: A results.csv whose rows stand for the cells of the same settings: those are not
            trained, nor timed again.
        say: Is told how it goes, a line at a time.

    Raises:
        ValueError: A folder holds a run with other settings, somebody else is at work there, or
            `keep` is no results.csv.
        OSError: A file could not be written; earlier files are still whole.
        KeyboardInterrupt: Ctrl-C or a signal to end; the next call goes on.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("comparisons are drawn with matplotlib: pip install 'gossamer[train]'")
    cells = comparison.cells
    kept, notes = ({}, []) if keep is None else read_kept(keep, cells)
    jobs = jobs or default_jobs(comparison.threads, cells[0].config.device)
    with locked(comparison.folder) as lock:
        comparison.check_unchanged()
        folder = RunFolder(comparison.folder)
        folder.write_text(folder.path / COPY, comparison.text)
        for note in (*comparison.notes, *notes):
            say(note)
        work = _Work(comparison, jobs, kept, say)
        if work.todo:
            say(
                f"{len(work.todo)} of {len(cells)} cells to train, {jobs} at a time on "
                f"{comparison.threads} threads each; their output is in "
                f"{log_of(work.todo[0]).parent.parent}/*/{log_of(work.todo[0]).name}"
            )
        train_cells(work.todo, jobs=jobs, lock=lock, ended=work.ended)
        return work.results()


class _Work:
    """How far a comparison has come."""

    def __init__(
        self,
        comparison: Comparison,
        jobs: int,
        kept: Mapping[Cell, Row],
        say: Callable[[str], None],
    ) -> None:
        self.comparison = comparison
        self.todo = [
            cell
            for cell in comparison.cells
            if not (cell in kept or cell.finished or unneeded(cell))
        ]
        self.errors: dict[Cell, str] = {}
        self._jobs = jobs
        self._kept = kept
        self._say = say
        self._ended = 0
        self._seconds = 0.0

    def ended(self, cell: Cell, error: str | None, seconds: float) -> bool:
        """Note a cell's end; returns whether the others are worth training."""
        self._ended += 1
        self._seconds += seconds
        if error is None and not cell.finished:
            told = "left out, because nothing was cut"
        elif error is None:
            summary = read_json(cell.run.summary, "remove its folder to train it anew")
            told = f"accuracy {summary['slim']['accuracy']:.2%}, {_duration(seconds)}"
        else:
            self.errors[cell] = error
            told = f"failed: {error}"
            if log_of(cell).exists():  # it was started
                told += f"; see {log_of(cell)}"
        left = len(self.todo) - self._ended
        rest = self._seconds / self._ended * left / self._jobs
        coming = f"; about {_duration(rest)} to go" if left else ""
        self._say(f"[{self._ended}/{len(self.todo)}] {cell}: {told}{coming}")
        self._write(None)
        twins = {cell for cell in self.comparison.cells if cell.label == DENSE}
        if twins <= self.errors.keys():
            self._say("every dense twin has failed: no other cell is started")
            return False
        return True

    def results(self) -> list[Row]:
        """Time what was trained, and write everything."""
        finished = [cell for cell in self.comparison.cells if cell.finished]
        file = self.comparison.folder / "latency.json"
        timing = stored(file, finished)
        if timing is None and finished:
            self._say(f"timing {len(finished)} networks, one at a time")
            timing = time_cells(finished, self.comparison.threads)
            RunFolder(self.comparison.folder).write_json(file, timing)
            off = dense_ratio(finished, timing)
            if abs(off - 1) > _TRUSTED:
                self._say(
                    f"the dense twins take {off:.2f} times what the dense network takes, which "
                    "should be 1: the machine is busy. To time again when it is not, remove "
                    f"{file} and give the same command"
                )
        return self._write(timing)

    def _write(self, timing: Mapping[str, Any] | None) -> list[Row]:
        """Write results.csv and compare.md; with latencies, the plot too."""
        folder = RunFolder(self.comparison.folder)
        found = rows(self.comparison.cells, self.errors, timing, self._kept)
        folder.write_rows(folder.path / "results.csv", found)
        plot = _PLOT if any(row["latency_ratio"] is not None for row in found) else None
        if plot is not None:
            draw(folder.path / plot, self.comparison.name, found)
        folder.write_text(
            folder.path / "compare.md",
            markdown(self.comparison, found, timing, plot, kept=len(self._kept)),
        )
        return found


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
