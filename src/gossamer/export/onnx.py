"""ONNX: written by torch.onnx, verified in ONNX Runtime, whole or not there at all."""

from __future__ import annotations

import os
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.example import Example
from gossamer.export.capture import Inputs, Subject, call, capture, first_line, flat, prepare, quiet
from gossamer.export.verify import Exported, Verified, check_outputs
from gossamer.export.zeros import zeros_note
from gossamer.shrink.file import write_whole

__all__ = ["onnx_session", "to_onnx"]

_ONE_FILE = 2**31 - 2**24  # bytes of tensors; a protocol buffer cannot hold 2 GiB


def to_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    example: Example,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    verify: bool = True,
) -> Exported:
    """Write a plain model as ONNX and verify the file in ONNX Runtime, on the CPU.

    The file is read back and run on the example, on random inputs like it and, with a dynamic
    batch, in two other batch sizes; where an output differs from the model's in eval mode by more
    than rounding (1e-4 of the largest output in float32), no file is left. Inputs are named as the
    parameters of the model's forward, outputs "output" or by the keys of what it returns.

    It is one file, unless the tensors have 2 GiB and more: then they lie in a second file beside
    it, `<name>.data`, and a note says so.

    Args:
        path: Of the file.
        model: A plain model (after `finalize()`); it is not changed.
        example: An input it accepts, with the batch in dimension 0.
        dynamic_batch: The file takes batches of any size; False: of the example's only.
        opset: Version of ONNX's operators; None leaves torch's choice.
        verify: False writes the file without running it.

    Raises:
        ImportError: ONNX is not installed.
        ValueError: The model is still parametrized, cannot be captured or converted, ONNX Runtime
            cannot run it, or its outputs differ; `path` is as it was.
        OSError: The file cannot be written; `path` is as it was.
    """
    needed = ("torch", "onnx", "onnxscript", *(("onnxruntime",) if verify else ()))
    versions = {package: str(_need(package).__version__) for package in needed}
    target = Path(path)
    subject = prepare(model, example, dynamic_batch=dynamic_batch, device="cpu")
    if verify and torch.bfloat16 in _dtypes(subject):
        raise ValueError(
            "ONNX Runtime takes no bfloat16 from Python, so that the file could not be verified: "
            "export model.float(), or pass verify=False"
        )
    program = _converted(subject, opset)
    graph = program.model.graph
    tensors = sum(value.const_value.nbytes for value in graph.initializers.values())
    data = target.with_name(f"{target.name}.data") if tensors > _ONE_FILE else None
    found: Verified | None = None

    def write(temporary: Path) -> None:
        nonlocal found
        # In a folder of its own, under its final name, which the graph calls its data by.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            inside = Path(folder) / target.name
            program.save(inside, external_data=data is not None)
            if verify:
                found = _verified(subject, inside)
            if data is not None:
                os.replace(inside.with_name(data.name), data)
            os.replace(inside, temporary)

    write_whole(target, write)
    notes = [f"The tensors are in {data}: one ONNX file cannot hold 2 GiB."] if data else []
    notes += filter(None, [zeros_note(subject.model)])
    return Exported(
        path=str(target),
        format="onnx",
        bytes=sum(file.stat().st_size for file in (target, data) if file is not None),
        inputs={value.name: _shape(value) for value in graph.inputs},
        outputs={value.name: _shape(value) for value in graph.outputs},
        verified=found,
        versions=versions | {"opset": str(program.model.opset_imports[""])},
        notes=tuple(notes),
    )


def onnx_session(path: str | os.PathLike[str], threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU; PyTorch's number of threads if None.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: It cannot run the file; says why.
    """
    runtime = _need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors only: its warnings are about its own optimizations
    try:
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base of their own
        reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", first_line(error))
        raise ValueError(
            f"ONNX Runtime {runtime.__version__} cannot run {Path(path).name} on the CPU: {reason}"
        ) from error


def _converted(subject: Subject, opset: int | None) -> Any:
    """The torch.onnx.ONNXProgram."""
    outputs, given = call(subject.model, subject.inputs), flat(subject.inputs)
    captured = capture(subject)
    names = _output_names(outputs, {str(name) for name in captured.graph_signature.user_inputs})
    # Names one dimension for all, as they are equal; what may differ is in the program already.
    batched = [name for name, t in given.items() if t.dim() and len(t) == subject.batch][:1]
    named = [{0: "batch"} if name in batched else None for name in given]
    try:
        # The fused kernels' output has strides that not every reshape behind them can follow.
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                captured,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                output_names=names,
                dynamic_shapes=named if subject.dynamic else None,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"torch.onnx cannot convert {type(subject.model).__name__}: {first_line(cause)}; "
            "gossamer.export.to_program writes what torch.export can capture"
        ) from error
    assert program is not None
    came = program.model.opset_imports[""]
    if opset is not None and came != opset:
        raise ValueError(
            f"torch.onnx writes this model in opset {came} and cannot bring it to opset {opset}: "
            "leave opset out, or choose a newer one"
        )
    return program


def _output_names(outputs: Any, taken: set[str]) -> list[str]:
    names: list[str] = []
    for place in flat(outputs):
        name = f"output_{place}" if place.isdigit() else place or "output"
        while name in taken:
            name = f"output_{name}"
        taken.add(name)
        names.append(name)
    return names


def _verified(subject: Subject, file: Path) -> Verified:
    runtime = _need("onnxruntime")
    try:
        session = onnx_session(file)
    except ValueError as error:
        single = _dtypes(subject) <= {torch.float32}
        more = "" if single else "export model.float(), which it knows best, or "
        raise ValueError(
            f"nothing was written: {error}; {more}pass verify=False to write it all the same"
        ) from error
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        tensors = [tensor.numpy() for tensor in flat(inputs).values()]
        if len(tensors) != len(names):
            raise ValueError(f"the graph has {len(names)} inputs, the example {len(tensors)}")
        outputs = session.run(None, dict(zip(names, tensors, strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return check_outputs(subject, run, f"ONNX Runtime {runtime.__version__} (CPU)")


def _dtypes(subject: Subject) -> set[torch.dtype]:
    """Floating-point dtypes that the model computes in and is given."""
    tensors = [*subject.model.parameters(), *flat(subject.inputs).values()]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _need(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs the package {package}, which is not installed ({error}): "
            'pip install "gossamer[onnx]"'
        ) from error
