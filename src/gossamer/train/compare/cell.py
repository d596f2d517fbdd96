"""A cell: one run of a comparison."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from gossamer.method import Method
from gossamer.reading import read_json, reading
from gossamer.train.config import TrainConfig, telling
from gossamer.train.folder import RunFolder

__all__ = ["DENSE", "Cell"]

DENSE = "dense"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One run of a comparison.

    Attributes:
        label: Of the entry; several entries may have the same method.
        density: The one of the list; None where the entry's own settings decide.
        config: Settings of the run; its folder is the cell's.
        method: Hyperparameters.
        rival: Name of the kind, where the cell is a rival of the first of `after`; else empty.
        after: Cells that must have been trained before, because this one needs their outcome.
        optional: Whether a rival is left out without an error where nothing was cut.
    """

    label: str
    density: float | None
    config: TrainConfig
    method: Method
    rival: str = ""
    after: tuple[Cell, ...] = ()
    optional: bool = False

    @property
    def seed(self) -> int:
        """Of weights, masks, batches and validation images."""
        return self.config.seed

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.config.folder)

    @property
    def finished(self) -> bool:
        """Whether the run has been made to its end."""
        return self.run.summary.exists()

    @cached_property
    def settings(self) -> str:
        """A digest of what the outcome depends on: equal cells of two comparisons have the same.

        It does not depend on the label, on folders, nor on the data's content.
        """
        found = telling(self.config, self.method)
        if self.rival:  # its network is told by the cell that it comes after
            found["widths_of"] = [self.rival, *(other.settings for other in self.after)]
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]

    def training(self) -> tuple[float, str]:
        """Seconds that the training and its validation took, and whose: "cpu" or "wall".

        The processor's, where one thread of it has done all: it does not count the neighbours'.
        Else those of the clock on the wall.

        Raises:
            ValueError: The summary is damaged.
        """
        file, anew = self.run.summary, "remove its folder to train it anew"
        summary = read_json(file, anew)
        with reading(str(file), anew):
            machine = summary["machine"]
            alone = (machine["device"], machine["threads"]) == ("cpu", 1)
            clock = "cpu" if alone and "cpu_seconds" in summary else "wall"  # older runs had one
            return float(summary[f"{clock}_seconds"]["sparse"]), clock

    def __str__(self) -> str:
        density = "" if self.density is None else f"density {self.density:g}, "
        rival = f"{self.rival}, " if self.rival else ""
        return f"{self.label}, {density}{rival}seed {self.seed}"
