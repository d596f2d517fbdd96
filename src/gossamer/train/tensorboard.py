"""Scalars for TensorBoard while training goes on: the columns of metrics.csv, epoch by epoch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from gossamer.train.engine import Row, Watcher

__all__ = ["TensorBoard"]


class TensorBoard:
    """A watcher that writes the scalars of every epoch, and passes on all that it is told.

    Args:
        path: Folder of the event files; each network has its own in there.
        watcher: Is told everything.

    Raises:
        ValueError: The package tensorboard is missing.
    """

    def __init__(self, path: Path, watcher: Watcher) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard=True needs the package tensorboard: pip install "
                "'gossamer[tensorboard]', or leave it out: metrics.csv has the same figures"
            )
        self._path = path
        self._watcher = watcher
        self._writer: SummaryWriter | None = None

    def noted(self, text: str) -> None:
        """Pass it on."""
        self._watcher.noted(text)

    def started(self, network: str, epochs: int, steps: int, done: int) -> None:
        """Open the network's events; what was written of epochs that come again is dropped."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(self._path / network, purge_step=done + 1 if done else None)
        self._watcher.started(network, epochs, steps, done)

    def stepped(self, epoch: int, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Pass it on."""
        self._watcher.stepped(epoch, step, figures)

    def epoch_ended(self, row: Row) -> None:
        """Write the row, to be seen at once."""
        assert self._writer is not None
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(row["epoch"]))
        self._writer.flush()
        self._watcher.epoch_ended(row)

    def ended(self) -> None:
        """Close the events."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._watcher.ended()
