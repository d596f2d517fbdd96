"""Progress of a training: a bar in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from gossamer.train.engine import Row

__all__ = ["Bar", "Lines"]

_REFRESH_SECONDS = 0.2


class Bar:
    """A live bar on a terminal: loss, accuracy, density and live channels so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._shown = 0.0
        self._val = ""

    def noted(self, text: str) -> None:
        """Print it above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, network: str, epochs: int, steps: int, done: int) -> None:
        """Show the bar."""
        columns: list[ProgressColumn] = [
            TextColumn("{task.description} {task.fields[epoch]}/{task.fields[epochs]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        ]
        if self._console.width >= 100:
            columns.insert(1, BarColumn(bar_width=20))
        self._progress = Progress(*columns, console=self._console, auto_refresh=False)
        self._steps = steps
        self._val = ""
        self._task = self._progress.add_task(
            network,
            total=epochs * steps,
            completed=done * steps,
            epoch=done,
            epochs=epochs,
            figures="",
        )
        self._progress.start()

    def stepped(self, epoch: int, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Bring the bar up to date, a few times a second."""
        if self._progress is None or time.monotonic() - self._shown < _REFRESH_SECONDS:
            return
        self._shown = time.monotonic()
        self._update(epoch * self._steps + step, epoch + 1, figures())

    def epoch_ended(self, row: Row) -> None:
        """Show the validation accuracy from now on."""
        self._val = f"  val {row['val_accuracy']:.1%}"
        shown = {**row, "loss": row["train_loss"], "accuracy": row["train_accuracy"]}
        self._update(int(row["epoch"]) * self._steps, int(row["epoch"]), shown)

    def ended(self) -> None:
        """Leave the bar as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _update(self, steps: int, epoch: int, figures: Mapping[str, float]) -> None:
        assert self._progress is not None
        text = f"loss {figures['loss']:.3f}  accuracy {figures['accuracy']:.1%}{self._val}"
        text += f"  {_sparsity(figures)}"
        self._progress.update(self._task, completed=steps, epoch=epoch, figures=text)
        self._progress.refresh()


class Lines:
    """One line of text per epoch."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._network = ""
        self._epochs = 0

    def noted(self, text: str) -> None:
        """Write it."""
        self._write(text)

    def started(self, network: str, epochs: int, steps: int, done: int) -> None:
        """Say where it starts, when not at the start."""
        self._network, self._epochs = network, epochs
        if done:
            self._write(f"{network}: resumed after epoch {done} of {epochs}")

    def stepped(self, epoch: int, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Nothing."""

    def epoch_ended(self, row: Row) -> None:
        """Write the line."""
        self._write(
            f"{self._network}: epoch {row['epoch']}/{self._epochs}  loss {row['train_loss']:.3f}  "
            f"accuracy {row['train_accuracy']:.1%}  val {row['val_accuracy']:.1%}  "
            f"{_sparsity(row)}  {row['seconds']:.1f} s"
        )

    def ended(self) -> None:
        """Nothing."""


def _sparsity(figures: Mapping[str, float]) -> str:
    channels = f"  live {figures['live_channels']:.0f}" if figures["live_channels"] else ""
    return f"density {figures['density']:.3f}{channels}"
