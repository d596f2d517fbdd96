"""Training the cells: each is one `gossamer train`, in a process of its own.

A cell's folder gets its config.yaml before the process starts, which then is told to resume:
whether the run is new or was broken off, it goes on from what is there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from gossamer.train.compare.cell import Cell
from gossamer.train.compare.rivals import launched, unneeded
from gossamer.train.config import TrainConfig, to_yaml

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody keeps two comparisons out of one folder there
    fcntl = None  # type: ignore[assignment]

__all__ = ["default_jobs", "locked", "log_of", "train_cells"]

_LOG = "train.log"
_LOCK = ".lock"
_ERROR = "gossamer: error: "  # how a command that failed says why
_PATIENCE = 30.0  # seconds in which a process that is told to stop does so
_PAUSE = 0.05  # seconds between looks at the processes
# As the console script: the current directory must not come before installed packages.
_COMMAND = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from gossamer.train.cli import main; sys.exit(main())"
)


def default_jobs(threads: int, device: str) -> int:
    """Cells to train at a time: as many as the cores allow; one where they would share a GPU."""
    if device != "cpu" and torch.cuda.is_available():
        return 1
    # Not all of the machine's cores need be ours.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // threads)


def log_of(cell: Cell) -> Path:
    """What the cell's processes have printed."""
    return cell.run.path / _LOG


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold the folder; gives the descriptor that child processes inherit, to hold it as well.

    Raises:
        ValueError: Another comparison is at work there, or a process that one has left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield None
        return
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"a comparison is at work in {folder}: wait for it, or choose another folder "
                "with --out"
            ) from error
        yield file.fileno()


def train_cells(
    cells: Sequence[Cell],
    *,
    jobs: int,
    lock: int | None,
    ended: Callable[[Cell, str | None, float], bool],
) -> None:
    """Train the cells in this order, `jobs` at a time, each in a process of its own.

    A cell waits for those it comes after; where one of them fails, it is not started.

    Args:
        cells: None of them finished.
        jobs: Processes at a time.
        lock: Descriptor for the processes to inherit.
        ended: Told of every cell that has ended, or turned out not to be needed, with what went
            wrong or None, and its seconds; returns whether cells still waiting may start.

    Raises:
        KeyboardInterrupt: Ctrl-C or a signal to end; the processes have ended, and each cell goes
            on from its newest checkpoint next time.
    """
    waiting = list(cells)
    running: list[_Process] = []
    with _caught_signals() as caught:
        try:
            while not caught:
                while len(running) < jobs and (cell := _next(waiting)) is not None:
                    waiting.remove(cell)
                    try:
                        settings = None if unneeded(cell) else launched(cell)
                    except ValueError as error:
                        ended(cell, str(error), 0.0)
                    else:
                        if settings is None:
                            ended(cell, None, 0.0)
                        else:
                            running.append(_Process(cell, settings, lock))
                if not running:
                    break  # what still waits does so for cells that have failed
                time.sleep(_PAUSE)
                for process in [process for process in running if process.has_ended]:
                    running.remove(process)
                    if not ended(process.cell, process.error(), process.seconds):
                        waiting.clear()
        finally:
            _stop(running, caught)
    if caught:
        raise KeyboardInterrupt


def _next(waiting: Sequence[Cell]) -> Cell | None:
    """The first that has nothing to wait for any more."""
    ready = (cell for cell in waiting if all(other.finished for other in cell.after))
    return next(ready, None)


class _Process:
    """One `gossamer train` at work."""

    def __init__(self, cell: Cell, settings: TrainConfig, lock: int | None) -> None:
        self.cell = cell
        self._started = time.monotonic()
        run = cell.run
        if not run.config.exists():
            run.write_text(run.config, to_yaml(settings, cell.method))
        log = log_of(cell)
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self._popen = self._start(file, lock)

    def _start(self, log: IO[bytes], lock: int | None) -> subprocess.Popen[bytes]:
        config = self.cell.config
        # What may change between two starts goes with the command.
        words = ["--out", str(config.folder), "--device", config.device]
        words += ["--threads", str(config.threads)]
        words += [] if config.widths_of is None else ["--widths_of", config.widths_of]
        return subprocess.Popen(
            [sys.executable, "-c", _COMMAND, "train", "--resume", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _thread_limits(config.threads or 1),
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops its children
            pass_fds=() if lock is None else (lock,),
        )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    @property
    def has_ended(self) -> bool:
        """Whether it does nothing any more."""
        return self._popen.poll() is not None

    def error(self) -> str | None:
        """Why it failed; None when it did not."""
        code = self._popen.returncode
        if code == 0 and self.cell.finished:
            return None
        with log_of(self.cell).open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        last = said or [line.strip() for line in lines if line.strip()]
        if code < 0:
            name = signal.Signals(-code).name
            memory = " (is there enough memory?)" if name == "SIGKILL" else ""
            return f"ended by {name}{memory}"
        return last[-1] if last else f"ended with code {code} and said nothing"

    def stop(self) -> None:
        """Ask it to end; after the step that it is at, it will."""
        self._popen.terminate()

    def kill(self) -> None:
        """End it."""
        self._popen.kill()


def _stop(processes: Sequence[_Process], caught: Sequence[int]) -> None:
    """Let the processes end by themselves; a second signal, or their taking too long, ends them."""
    for process in processes:
        process.stop()
    deadline = time.monotonic() + _PATIENCE
    while alive := [process for process in processes if not process.has_ended]:
        if len(caught) > 1 or time.monotonic() > deadline:
            for process in alive:
                process.kill()
        time.sleep(_PAUSE)


def _thread_limits(threads: int) -> Mapping[str, str]:
    libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    return {f"{library}_NUM_THREADS": str(threads) for library in libraries}


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Ctrl-C, a signal to end and a closed terminal only join the list that this gives.

    An exception in the middle of a start would leave a process that nobody knows of.
    """
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may have signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # nohup ignores SIGHUP, and means it.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
