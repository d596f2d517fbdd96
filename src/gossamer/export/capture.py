"""Capture: a plain model as a graph, by torch.export, for batches of any size."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from gossamer.example import Example, batch_size, call_arguments, map_tensors

__all__ = [
    "Inputs",
    "Subject",
    "call",
    "capture",
    "first_line",
    "flat",
    "prepare",
    "quiet",
    "resized",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward
_BATCH = "batch"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is to be written.

    Attributes:
        model: A copy, in eval mode.
        inputs: The example, as the model's forward names its parameters.
        batch: Samples in it.
        dynamic: Whether the file shall take batches of any size.
    """

    model: nn.Module
    inputs: Inputs
    batch: int
    dynamic: bool

    @property
    def traced(self) -> Inputs:
        """The inputs to capture the model on.

        torch.export takes a dimension of size 1 for one that never has another.
        """
        return resized(self.inputs, self.batch, 2) if self._widened else self.inputs

    @property
    def _widened(self) -> bool:
        return self.dynamic and self.batch == 1


def prepare(
    model: nn.Module, example: Example, *, dynamic_batch: bool, device: str | None = None
) -> Subject:
    """Copy a model and its example; the model itself is not changed.

    Args:
        model: A plain model (after `finalize()`).
        example: An input it accepts, with the batch in dimension 0.
        dynamic_batch: The file shall take batches of any size.
        device: To move both to; None leaves them where they are.

    Raises:
        ValueError: The model is still parametrized, or fails on the example; says where.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name or type(model).__name__} is still parametrized: call "
                "sparsifier.finalize() (or gossamer.finalize(model) on a copy) before exporting"
            )
    plain = copy.deepcopy(model).eval()
    args, kwargs = call_arguments(example)
    inputs: Inputs = map_tensors((args, kwargs), lambda t: t.detach().contiguous().clone())
    if device is not None:
        plain = plain.to(device)
        inputs = map_tensors(inputs, lambda t: t.to(device))
    subject = Subject(plain, inputs, batch_size(example), dynamic_batch)
    try:
        call(plain, subject.traced)
        bound = inspect.signature(plain.forward).bind(*inputs[0], **inputs[1])
    except Exception as error:
        repeated = ", its sample repeated" if subject._widened else ""
        raise ValueError(
            f"{type(model).__name__} fails on the example{repeated} "
            f"({type(error).__name__}: {first_line(error)}{_place(error)}): give an input that it "
            "accepts"
        ) from error
    return replace(subject, inputs=(bound.args, bound.kwargs))


def capture(subject: Subject) -> ExportedProgram:
    """The model as a graph.

    Raises:
        ValueError: torch.export cannot capture it; says why and where.
    """
    args, kwargs = subject.traced
    bound = inspect.signature(subject.model.forward).bind(*args, **kwargs)
    size = 2 if subject._widened else subject.batch
    shapes = _dynamic_shapes(bound, size) if subject.dynamic else None
    try:
        with quiet():
            program = torch.export.export(
                subject.model, args, kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ValueError(_cannot_capture(subject.model, error)) from error
    _forget(program)
    return program


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """What a model gives for copies of the inputs, which it may change, without gradients."""
    args, kwargs = map_tensors(inputs, torch.clone)
    with torch.no_grad():
        return model(*args, **kwargs)


def resized(inputs: Inputs, batch: int, size: int) -> Inputs:
    """The inputs with their `batch` samples repeated, or left out, to a batch of `size`."""

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != batch:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % batch]

    return inputs if size == batch else map_tensors(inputs, resize)


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors in nested tuples, lists and mappings, with names that tell where, in order."""
    if isinstance(value, Tensor):
        return {name: value}
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= flat(item, f"{name}_{key}" if name else str(key))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what torch and its exporters tell their own developers.

    Deprecations inside of these packages, notes in their log, and the graph that torch.export
    prints on stderr before it raises.
    """
    logs = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # Recurrent layers collect their own parameters anew.
        warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")
        # torch.export.load reads tensors from bytes.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for category in (DeprecationWarning, FutureWarning):
            for package in ("torch", "onnxscript", "onnx_ir", "onnx"):
                warnings.filterwarnings("ignore", category=category, module=rf"{package}\b")
        for log in logs:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or "it does not say why").splitlines()[0].rstrip(". ")


def _dynamic_shapes(bound: inspect.BoundArguments, size: int) -> dict[str, Any]:
    """`{0: batch}` in the place of every tensor that has the batch in dimension 0."""
    batch = Dim(_BATCH)

    def lay(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() and len(value) == size else {}
        if isinstance(value, Mapping):
            return {key: lay(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(lay(item) for item in value)
        return None

    return {name: lay(value) for name, value in bound.arguments.items()}


def _forget(program: ExportedProgram) -> None:
    """Drop what a file for others must not hold: paths and lines of source, the example."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _cannot_capture(model: nn.Module, error: Exception) -> str:
    text = str(error)
    start = f"torch.export cannot capture {type(model).__name__}: "
    if f"({_BATCH})" in text and "onstrain" in text:
        only = re.search(rf"^\s*{_BATCH} = (\d+)$", text, re.MULTILINE)
        sizes = f"batches of {only[1]} only" if only else "some batches only"
        return (
            f"{start}its forward works with {sizes}: do not write the batch size into it, or pass "
            "dynamic_batch=False"
        )
    if "data-dependent" in text:
        return (
            f"{start}its forward decides by values that it computes{_place(error)}: use "
            "torch.where or torch.cond there"
        )
    if unknown := re.match(r"Found <class '(.+)'> in output, which is not a known type", text):
        return (
            f"{start}it returns a {unknown[1]}: return tensors, in tuples, lists or dicts (Hugging "
            "Face models: use_cache=False)"
        )
    return f"{start}{type(error).__name__}: {first_line(error)}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where in the user's own code an error comes from; empty when it does not."""
    inside = (Path(torch.__file__).parent, Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(folder in Path(frame.filename).parents for folder in inside)
        and Path(frame.filename).exists()
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f", {Path(last.filename).name} line {last.lineno}: {last.line}"
