"""Checkpoints of a run: written whole, and the newest whole one found again.

A checkpoint has its name only when all of it is on the disk, and the one before is kept until the
next: `sparse.ckpt` and `sparse.previous.ckpt`. Whether one is whole, its own checksums say. Nothing
in it can run code.

    format 1: after whole epochs only
    format 2: also within an epoch; a checkpoint of format 1 is read as one of these
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import nn

from gossamer.reading import reading, reason, short
from gossamer.shrink.file import write_whole

__all__ = ["FORMAT", "WholeFiles", "check_network", "newest", "read"]

FORMAT = 2
# What Lightning and we look for in one.
_PARTS: dict[str, type] = {"state_dict": dict, "optimizer_states": list, "lr_schedulers": list}
_PARTS |= {"callbacks": dict, "loops": dict, "epoch": int, "global_step": int, "gossamer": dict}


def newest(paths: Sequence[Path], say: Callable[[str], None]) -> Path | None:
    """The first of the checkpoints that is whole; None where there is none at all.

    Args:
        paths: From the newest on; some need not be there.
        say: Is told of a damaged one that is left out.

    Raises:
        ValueError: There are some, and none is whole.
    """
    damaged: dict[Path, str] = {}
    for candidate in paths:
        if candidate.exists():
            reason = _damage(candidate)
            if reason is None:
                for other, why in damaged.items():
                    say(f"the checkpoint {other} is damaged ({why}): the one before it is taken")
                return candidate
            damaged[candidate] = reason
    for first, reason in damaged.items():
        names = " and ".join(map(str, damaged))
        raise ValueError(
            f"the checkpoint {first} is damaged ({reason}), and no other is whole; to train from "
            f"the start, remove {names}"
        )
    return None


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint, its tensors left on the disk until they are used.

    Raises:
        ValueError: It is not of `gossamer train`, or of a format that is not known here.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    away = f"to train from the start, remove {path}"
    if not isinstance(checkpoint, dict) or "gossamer" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of `gossamer train`; {away}")
    with reading(f"the checkpoint {path}", away):
        for name, kind in _PARTS.items():
            if not isinstance(checkpoint[name], kind):
                raise ValueError(f"{name} is {short(checkpoint[name])}, wanted a {kind.__name__}")
        if not all(
            isinstance(tensor, torch.Tensor) for tensor in checkpoint["state_dict"].values()
        ):
            raise ValueError("state_dict holds something else than tensors")
    found = checkpoint["gossamer"].get("format", 1)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise ValueError(
            f"the checkpoint {path} has format {short(found)}, and this version of Gossamer reads "
            f"1 to {FORMAT}: go on with the version that wrote it, or {away}"
        )
    return checkpoint


def check_network(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Raise ValueError unless the checkpoint is of this network, tensor by tensor."""
    theirs = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    for name, tensor in model.state_dict(prefix="model.").items():
        if theirs.get(name) != tensor.shape:
            got = tuple(theirs[name]) if name in theirs else "nothing"
            raise ValueError(
                f"the checkpoint {path} is of another network: for {name.removeprefix('model.')} "
                f"it has {got}, not {tuple(tensor.shape)}; to train from the start, remove {path}"
            )


class WholeFiles(CheckpointIO):
    """Lightning's checkpoints, written whole; the one before stays until the next.

    Args:
        previous: Where the one before is kept.
        whole: Whether the checkpoint that is there now is whole: a damaged one is not kept, least
            of all in the place of a whole one.
    """

    def __init__(self, previous: Path, whole: bool = True) -> None:
        self._previous = previous
        self._whole = whole

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it. Raises OSError, with all earlier ones as they were."""
        # Through memory: torch.save to a full disk raises a RuntimeError that names no file.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(
            path,
            lambda temporary: temporary.write_bytes(buffer.getbuffer()),
            keep=self._previous if self._whole else None,
        )
        self._whole = True

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove it."""
        Path(path).unlink(missing_ok=True)


def _damage(path: Path) -> str | None:
    """Why the file is no whole checkpoint; None when it is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            return f"the checksum of {wrong} is wrong"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception as error:  # whatever the damage happens to lead to
        return reason(error)
    return None
