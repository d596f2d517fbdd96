"""safetensors: the tensors and the plan, to be loaded into the user's own class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from gossamer.example import Example
from gossamer.export.capture import Inputs, call, flat, prepare
from gossamer.export.verify import Exported, Verified, check_outputs
from gossamer.export.zeros import zeros_note
from gossamer.shrink.file import load, save, write_whole
from gossamer.shrink.plan import Plan

__all__ = ["to_safetensors"]


def to_safetensors(
    path: str | os.PathLike[str],
    model: nn.Module,
    example: Example,
    *,
    full: nn.Module,
    plan: Plan | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a plain model as `gossamer.save` does, and verify that it comes back.

    The file is loaded into `full`, which is cut to its widths and filled, and compared with the
    model on the example and on random inputs.

    Args:
        path: Of the file.
        model: A plain model (after `finalize()`); it is not changed.
        example: An input it accepts, with the batch in dimension 0.
        full: A full-width network of the same class and dtype; it becomes the model.
        plan: What was cut from the full-width network.
        metadata: For the file's header.

    Raises:
        ValueError: The model is still parametrized, or `full` is not what it was cut from; `path`
            is as it was.
        OSError: The file cannot be written; `path` is as it was.
    """
    subject = prepare(model, example, dynamic_batch=True)
    found: Verified | None = None

    def run(inputs: Inputs) -> list[Tensor]:
        return list(flat(call(full, inputs)).values())

    def write(temporary: Path) -> None:
        nonlocal found
        save(temporary, model, plan, metadata)
        load(temporary, full).eval()
        found = check_outputs(subject, run, f"PyTorch {torch.__version__}")

    write_whole(path, write)
    note = zeros_note(model)
    return Exported(
        path=str(path),
        format="safetensors",
        bytes=Path(path).stat().st_size,
        inputs={},
        outputs={},
        verified=found,
        versions={"torch": str(torch.__version__), "safetensors": safetensors.__version__},
        notes=(note,) if note else (),
    )
