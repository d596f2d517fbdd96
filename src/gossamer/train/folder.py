"""The run folder: what a run writes, where, and when it may.

config.yaml          repeats the run
latency.json         what gossamer.latency measured before training, where the method asked for it
widths.json          what the network was cut to before training, where the run was told to
metrics.csv          one row per epoch (metrics-dense.csv: the dense twin's)
layers.csv           one row per epoch and sparse layer, of the sparse network
tensorboard/         the columns of metrics.csv for TensorBoard, where the run was told to
checkpoints/         sparse.ckpt, dense.ckpt: resumable, after every epoch and within long ones;
                     while a network trains also the one before, sparse.previous.ckpt
model.safetensors    the slim model, with the plan that cuts the full-width class to it
summary.json         the figures; written last
report.md            the figures, to read
report.html          the figures, to look at (gossamer report)
analysis.*           what training did to the channels (gossamer analyze)
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gossamer.shrink.file import write_whole

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody keeps two runs out of one folder there
    fcntl = None  # type: ignore[assignment]

__all__ = ["CHECKPOINTS", "CONFIG", "RunFolder"]

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
_NETWORKS = ("sparse", "dense")
_LATER = ("report.html", "analysis.json", "analysis.md", "analysis.svg")  # made of a run


class RunFolder:
    """Paths of a run's files. Every file is written whole or stays as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.latency = path / "latency.json"
        self.widths = path / "widths.json"
        self.model = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.report = path / "report.md"
        self.page = path / "report.html"
        self.layers = path / "layers.csv"
        self.analysis = path / "analysis.json"
        self.tensorboard = path / "tensorboard"

    def metrics(self, network: str) -> Path:
        """CSV of the "sparse" or the "dense" network's epochs."""
        return self.path / ("metrics.csv" if network == "sparse" else f"metrics-{network}.csv")

    def checkpoint(self, network: str) -> Path:
        """Newest checkpoint of the "sparse" or the "dense" network."""
        return self.path / CHECKPOINTS / f"{network}.ckpt"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it, as long as this process lives.

        Raises:
            ValueError: Another run is at work there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(
                f"a run is at work in {self.path}: wait for it or end it, or choose another folder "
                "with --out"
            ) from error
        except OSError:
            pass  # a file system without locks on folders
        try:
            yield
        finally:
            os.close(handle)

    def previous(self, network: str) -> Path:
        """The checkpoint before the newest."""
        return self.path / CHECKPOINTS / f"{network}.previous.ckpt"

    def sweep(self, finished: bool = False) -> None:
        """Remove the half-written files of a run that was killed; they never had their names.

        Of a run that has `finished` only the last checkpoints stay.
        """
        for path in (*self._files(), *map(self.checkpoint, _NETWORKS)):
            for half in path.parent.glob(f".{path.name}.????????"):
                half.unlink()
        if finished:
            for network in _NETWORKS:
                self.previous(network).unlink(missing_ok=True)

    def existing(self) -> list[Path]:
        """What a run has written here so far."""
        files = self._files()
        folders = [self.path / CHECKPOINTS, self.tensorboard]
        return [path for path in (*files, *folders) if path.exists()]

    def clear(self) -> None:
        """Remove what a run has written here, and nothing else."""
        for path in self.existing():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _files(self) -> list[Path]:
        files = [self.config, self.latency, self.widths, self.model, self.summary]
        files += [self.report, self.layers]
        files += map(self.metrics, _NETWORKS)
        return files + [self.path / name for name in _LATER]

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file whole. Raises OSError, with `path` as it was."""
        write_whole(path, lambda temporary: temporary.write_text(text))

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Write a JSON file whole. Raises OSError, with `path` as it was."""
        self.write_text(path, json.dumps(data, indent=2) + "\n")

    def write_rows(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows with the same keys as a CSV file. Raises OSError, with `path` as it was."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write_text(path, text.getvalue())
