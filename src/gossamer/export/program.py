"""torch.export: a program that PyTorch alone runs, without the model's class or this library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.example import Example
from gossamer.export.capture import Inputs, Subject, call, capture, flat, prepare, quiet
from gossamer.export.verify import Exported, Verified, check_outputs
from gossamer.export.zeros import zeros_note
from gossamer.shrink.file import write_whole

__all__ = ["to_program"]


def to_program(
    path: str | os.PathLike[str],
    model: nn.Module,
    example: Example,
    *,
    dynamic_batch: bool = True,
) -> Exported:
    """Write a plain model as a program of torch.export (.pt2), and verify the file.

    `torch.export.load(path).module()` runs it, on the device that the model is on. The file is read
    back and compared with the model as in `to_onnx`; where an output differs, none is left.

    Args:
        path: Of the file.
        model: A plain model (after `finalize()`); it is not changed.
        example: An input it accepts, with the batch in dimension 0.
        dynamic_batch: The program takes batches of any size; False: of the example's only.

    Raises:
        ValueError: The model is still parametrized, cannot be captured, or the program's outputs
            differ; `path` is as it was.
        OSError: The file cannot be written; `path` is as it was.
    """
    subject = prepare(model, example, dynamic_batch=dynamic_batch)
    program = capture(subject)
    found: Verified | None = None

    def write(temporary: Path) -> None:
        nonlocal found
        with temporary.open("wb") as file, quiet():
            torch.export.save(program, file)
        found = _verified(subject, temporary)

    write_whole(path, write)
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    note = zeros_note(subject.model)
    return Exported(
        path=str(path),
        format="program",
        bytes=Path(path).stat().st_size,
        inputs=_shapes(signature.user_inputs, values),
        outputs=_shapes(signature.user_outputs, values),
        verified=found,
        versions={"torch": str(torch.__version__)},
        notes=(note,) if note else (),
    )


def _verified(subject: Subject, path: Path) -> Verified:
    with path.open("rb") as file, quiet():
        program = torch.export.load(file).module()

    def run(inputs: Inputs) -> list[Tensor]:
        return list(flat(call(program, inputs)).values())

    return check_outputs(subject, run, f"PyTorch {torch.__version__}")


def _shapes(names: Any, values: dict[str, Any]) -> dict[str, tuple[int | str, ...]]:
    tensors = {name: values[name] for name in names if isinstance(values.get(name), Tensor)}
    return {
        name: tuple(size if isinstance(size, int) else "batch" for size in tensor.shape)
        for name, tensor in tensors.items()
    }
