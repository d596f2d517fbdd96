"""Model files: safetensors with the plan in the header. Whole or not there at all, never pickle."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gossamer.reading import reason
from gossamer.shrink.plan import Plan

__all__ = ["COMPILED_KEY", "load", "read_metadata", "read_plan", "save", "write_whole"]

_PLAN_KEY = "gossamer_plan"
COMPILED_KEY = "gossamer_runtime"  # in the header of files of gossamer.runtime.save


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    plan: Plan | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the model's tensors to a safetensors file, with the plan that cuts the full network.

    `metadata` goes into the file's header beside the plan.

    Raises:
        OSError: The file cannot be written; whatever was at `path` before is still there.
    """
    tensors = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in model.state_dict().items()
    }
    header = {**(metadata or {}), "format": "pt", _PLAN_KEY: (plan or Plan()).to_json()}
    data = safetensors.torch.save(tensors, metadata=header)
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Cut the full-width `model` to the file's widths, in place, and load the file's tensors.

    `model` is made with the user's own class; no method, no example and no Sparsifier is needed.
    Returns `model`.

    Raises:
        ValueError: The file is damaged, or was made from another model; says what differs.
    """
    plan = read_plan(path)
    tensors = safetensors.torch.load_file(path)
    try:
        widen = plan.apply(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    both = [name for name in expected if name in tensors]
    wrong = [
        f"{name} is {_about(tensors[name])} there and {_about(expected[name])} here"
        for name in both
        if not _alike(tensors[name], expected[name])
    ]
    if missing or extra or wrong:
        widen()
        found = {"missing": missing, "unknown": extra, "other shapes": wrong}
        told = ", ".join(f"{what} {names[:3]}" for what, names in found.items() if names)
        raise ValueError(
            f"{path} was made from another model: {told}; build the model with the arguments it "
            "was trained with"
        )
    model.load_state_dict(tensors)
    return model


def _alike(there: Tensor, here: Tensor) -> bool:
    """Of one shape and kind: weights may change their precision, but never become whole numbers."""
    floating = there.is_floating_point() and here.is_floating_point()
    return there.shape == here.shape and (floating or there.dtype == here.dtype)


def _about(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says beside its tensors. Raises ValueError when it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no model file {path}: look at the path") from error
    except Exception as error:  # safetensors raises its own, untyped, error class
        raise ValueError(
            f"{path} is not a whole safetensors file ({reason(error)}): save or copy it again"
        ) from error


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file's header. Raises ValueError when the file is damaged or has none."""
    metadata = read_metadata(path)
    if COMPILED_KEY in metadata:
        raise ValueError(
            f"{path} is a compiled model: load it with gossamer.runtime.load(path, model)"
        )
    if _PLAN_KEY not in metadata:
        raise ValueError(
            f"{path} has no plan in its header: it was not written by Gossamer. Load it with "
            "safetensors.torch.load_file"
        )
    try:
        return Plan.from_json(metadata[_PLAN_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_whole(
    path: str | os.PathLike[str],
    write: Callable[[Path], object],
    *,
    keep: str | os.PathLike[str] | None = None,
) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    The data is on the disk before the name is: after a crash, at `path` is the old file or the new.

    Args:
        path: The file to write.
        write: Is given the temporary file.
        keep: Where to put what was at `path` before; None: it goes.

    Raises:
        OSError: Writing failed (a full disk, say); `path` is as it was, the temporary file gone.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise _unwritten(target, error) from error
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o644)  # mkstemp lets nobody else read it
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            os.replace(target, keep)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritten(target, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_names(target.parent)


def _unwritten(target: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"could not write {target} ({error.strerror}); nothing was changed: free some space or "
        "choose another folder",
    )


def _sync_names(folder: Path) -> None:
    """Have the names in the folder outlive a crash; not every system and file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
