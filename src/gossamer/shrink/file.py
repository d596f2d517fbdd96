"""Model files: safetensors with the plan in the header. Whole or not there at all, never pickle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from gossamer.shrink.plan import Plan

__all__ = ["load", "read_plan", "save", "write_whole"]

_PLAN_KEY = "gossamer_plan"


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
    widen = plan.apply(model)
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} there and {tuple(expected[name].shape)} here"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or extra or wrong:
        widen()
        raise ValueError(
            f"{path} was made from another model: missing {missing[:3]}, unknown {extra[:3]}, "
            f"other shapes {wrong[:3]}; build the model with the arguments it was trained with"
        )
    model.load_state_dict(tensors)
    return model


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file's header. Raises ValueError when the file is damaged or has none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises its own, untyped, error class
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if _PLAN_KEY not in metadata:
        raise ValueError(
            f"{path} has no plan in its header: it was not written by Gossamer. Load it with "
            "safetensors.torch.load_file"
        )
    return Plan.from_json(metadata[_PLAN_KEY])


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Raises:
        OSError: Writing failed (a full disk, say); `path` is as it was, the temporary file gone.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o644)  # mkstemp lets nobody else read it
    try:
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"could not write {target} ({error.strerror}); nothing was changed: free some space "
            "or choose another folder",
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
