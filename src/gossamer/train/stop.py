"""Stopping a run from outside: Ctrl-C, SIGTERM (a cluster takes the machine back), SIGHUP.

The first signal lets the step that is being made end, so that a checkpoint of it can be written;
a second one does not wait. Outside of training, where nothing is lost, the first does not either.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "Stop", "stoppable"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run.

    Attributes:
        number: Of the signal; `128 + number` is the exit code of who is ended by it.
        saved: What a checkpoint was written of, in words; empty for none.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved


class Stop:
    """Whether a run has been asked to end.

    Attributes:
        number: Of the signal that asked; None so far.
        waits: Whether the first signal is only noted, for `number` to be looked at.
        saved: See `Interrupted`; for who raises it later.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.waits = False
        self.saved = ""
        self._caught: list[int] = []

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first, end at the second."""
        first = self.number is None
        self.number = self.number or number
        if not (self.waits and first):
            raise Interrupted(self.number)

    def attend(self) -> None:
        """Take the signals, from whoever has them now."""
        for number in self._caught:
            signal.signal(number, self.catch)

    def check(self) -> None:
        """Raise Interrupted if the run has been asked to end."""
        if self.number is not None:
            raise Interrupted(self.number, self.saved)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Take the signals that ask a process to end, where they are ours to take.

    Only the main thread may have signals; and one that is ignored (nohup does that) stays so.
    """
    stop = Stop()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is None:
                continue
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                before[number] = handler
    stop._caught = list(before)
    stop.attend()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
