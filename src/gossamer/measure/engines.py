"""Engines: the ways to run a model that a user may choose from, each behind the same call.

An engine takes a plain model and an example and gives back a function of the example's inputs, as
they are: casting them, or changing their layout, is part of what the engine costs. Outputs are
compared with those of the plain model before anything is timed.

Compiled models live side by side in one process, and three things would spoil their times (torch
2.13, ResNet-20 and -50):

- `torch._dynamo.reset()` between them: each one that is still in use compiles anew in its next
  call, inside the timed round (491 ms instead of 7).
- One code object for all: dynamo caches by code object, and every module compiles under the same
  one. The ninth width there silently runs eager (`recompile_limit`), and a model meant to be frozen
  runs what was compiled unfrozen for another of the same shapes.
- A size that changes: the second batch compiles for any size. Hence `dynamic=False`.

So every model gets a code object of its own, is compiled whole or refused, and nothing is reset.
Dense and slim, both alive in one process, then have the ratio of one process each: 0.48 against
0.51 compiled and 0.52 against 0.46 frozen (ResNet-18 halved, batch 8), and do not drift.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.example import Example, call_arguments, example_tensors, map_tensors, nested_tensors
from gossamer.measure.latency import using_threads

__all__ = ["ENGINES", "Engine", "Prepared", "find_engine"]

# Largest difference between engines of one precision, over the largest output. float32 products
# are rounded to TF32 in CUDA's convolutions.
_AGREE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


class Prepared(NamedTuple):
    """A model in an engine: a function of the example's inputs.

    error: largest difference of its outputs on the example to the plain model's, over the largest
        output; 0 when there is nothing to compare.
    """

    call: Callable[..., object]
    error: float


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run a model.

    Attributes:
        name: Of the engine.
        about: What it is, in a line.
        runs: "eager"; "compiled": torch.compile; "frozen": the same with the weights as constants,
            folded and packed; "graphs": compiled, replayed as a CUDA graph; "onnx": ONNX Runtime;
            "sparse": compile_sparse, each layer by what is fastest, zeros used where they pay.
        dtype: Model and floating-point inputs are converted to it; None: as they are. Converted
            rather than under autocast, which casts every weight again in each call.
        channels_last: Weights and image-like inputs get this layout.
        device: The only type of device it is for; None: any.
    """

    name: str
    about: str
    runs: Literal["eager", "compiled", "frozen", "graphs", "onnx", "sparse"] = "eager"
    dtype: torch.dtype | None = None
    channels_last: bool = False
    device: Literal["cpu", "cuda"] | None = None

    def missing(self, example: Example) -> str:
        """Why the engine cannot be had here for this example; empty when it can."""
        tensors = example_tensors(example)
        device = tensors[0].device.type if tensors else "cpu"
        if self.device not in (None, device):
            return f"it is for {self.device}, the example is on {device}"
        if self.name == "channels_last" and not any(x.dim() in (4, 5) for x in tensors):
            return "the example has no image-like input (4 or 5 dimensions)"
        if self.dtype == torch.bfloat16 and not _has_bfloat16(device):
            return f"this {device} has no bfloat16 instructions, it would emulate them"
        if self.runs == "onnx":
            wanted = ("onnx", "onnxscript", "onnxruntime")
            absent = ", ".join(name for name in wanted if find_spec(name) is None)
            return f"not installed: {absent} (pip install 'gossamer[onnx]')" if absent else ""
        if self.runs == "sparse":
            from gossamer.runtime import kernels

            return kernels.missing() or ""
        if self.runs != "eager":
            return _no_compiler(device)
        return ""

    def prepare(self, model: nn.Module, example: Example, threads: int | None = None) -> Prepared:
        """Make the model ready, and run it once.

        Args:
            model: A plain model; it is not changed, the engine has a copy in eval mode.
            example: An input it accepts. A compiled engine is made for its sizes.
            threads: Within operators; None: as many as torch has now. It may be built into what
                is compiled, so pass the number that it will run with.

        Raises:
            ValueError: The engine cannot run the model, or computes something else; says why.
        """
        if reason := self.missing(example):
            raise ValueError(f"the engine {self.name} cannot be had here: {reason}")
        args, kwargs = call_arguments(example)
        with using_threads(threads):
            plain = copy.deepcopy(model).eval()
            with torch.inference_mode():
                expected = list(nested_tensors(plain(*args, **kwargs)))
            try:
                with _quiet():
                    call = self._build(plain, args, kwargs)
                with torch.inference_mode():
                    found = list(nested_tensors(_as_tensors(call(*args, **kwargs))))
            except Exception as error:  # whatever an engine raises, it cannot run this model
                raise ValueError(
                    f"the engine {self.name} cannot run {type(model).__name__} ({_reason(error)})"
                ) from error
            return Prepared(call, self._error(expected, found))

    def _build(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., object]:
        if self.runs == "onnx":
            return _in_onnxruntime(model, args, kwargs)
        if self.runs == "sparse":
            from gossamer.runtime.compile import compile_sparse

            return compile_sparse(model, kwargs or args).model
        model = _converted(model, self.dtype, self.channels_last)
        run: Callable[..., object] = model
        if self.runs != "eager":
            run = _compiled(model, graphs=self.runs == "graphs")
        if self.dtype is None and not self.channels_last:
            call = run
        else:

            def call(*args: Any, **kwargs: Any) -> object:
                args, kwargs = map_tensors((args, kwargs), self._convert)
                return run(*args, **kwargs)

        if self.runs == "eager":
            return call
        with torch.inference_mode(), _freezing(self.runs == "frozen"):
            call(*args, **kwargs)  # compiles
        return call

    def _convert(self, x: Tensor) -> Tensor:
        if self.dtype is not None and x.is_floating_point():
            x = x.to(self.dtype)
        if self.channels_last and x.dim() in (4, 5):
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x = x.contiguous(memory_format=last)
        return x

    def _error(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        """Relative difference of the outputs; ValueError where they are not the same thing."""
        worst = 0.0
        for one, other in zip(expected, found, strict=False):  # an engine may leave out the last
            if one.shape != other.shape:
                raise ValueError(
                    f"the engine {self.name} gives outputs of shape {tuple(other.shape)}, the "
                    f"model of {tuple(one.shape)}"
                )
            if not one.numel() or not one.is_floating_point() or not one.isfinite().all():
                continue
            one, other = one.double().cpu(), other.double().cpu()
            error = float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))
            worst = max(worst, math.inf if math.isnan(error) else error)
        limit = math.inf if self.dtype is not None else _AGREE.get(expected[0].dtype, math.inf)
        if worst > limit or math.isinf(worst):
            raise ValueError(
                f"the engine {self.name} computes something else than the model: outputs differ "
                f"by {worst:.2g} of the largest"
            )
        return worst


_ENGINES = (
    Engine(name="eager", about="PyTorch as it is"),
    Engine(
        name="channels_last", about="PyTorch, weights and images channels last", channels_last=True
    ),
    Engine(
        name="bf16",
        about="PyTorch, all in bfloat16, channels last",
        dtype=torch.bfloat16,
        channels_last=True,
    ),
    Engine(
        name="fp16",
        about="PyTorch, all in float16, channels last",
        dtype=torch.float16,
        channels_last=True,
        device="cuda",
    ),
    Engine(
        name="compiled", about="torch.compile, channels last", runs="compiled", channels_last=True
    ),
    Engine(
        name="compiled-bf16",
        about="torch.compile, bfloat16",
        runs="compiled",
        dtype=torch.bfloat16,
        channels_last=True,
    ),
    Engine(
        name="compiled-fp16",
        about="torch.compile, float16",
        runs="compiled",
        dtype=torch.float16,
        channels_last=True,
        device="cuda",
    ),
    Engine(
        name="graphs-bf16",
        about="torch.compile, bfloat16, replayed as a CUDA graph",
        runs="graphs",
        dtype=torch.bfloat16,
        channels_last=True,
        device="cuda",
    ),
    Engine(
        name="graphs-fp16",
        about="torch.compile, float16, replayed as a CUDA graph",
        runs="graphs",
        dtype=torch.float16,
        channels_last=True,
        device="cuda",
    ),
    Engine(
        name="frozen",
        about="torch.compile with frozen weights, norms folded",
        runs="frozen",
        channels_last=True,
        device="cpu",
    ),
    Engine(
        name="frozen-bf16",
        about="torch.compile with frozen weights, bfloat16",
        runs="frozen",
        dtype=torch.bfloat16,
        channels_last=True,
        device="cpu",
    ),
    Engine(name="onnx", about="ONNX Runtime", runs="onnx", device="cpu"),
    Engine(
        name="sparse",
        about="compile_sparse: zeros used where that is faster",
        runs="sparse",
        device="cpu",
    ),
)

ENGINES = {engine.name: engine for engine in _ENGINES}


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises ValueError, with the names there are."""
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no engine {name!r}{hint}: choose of {', '.join(ENGINES)}")
    return ENGINES[name]


def _reason(error: BaseException) -> str:
    """The first line of what began it: compilers wrap an error many times over."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


# What there is


def _has_bfloat16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # A build without oneDNN has no such operator.
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())


def _no_compiler(device: str) -> str:
    if device == "cuda":
        return "" if find_spec("triton") else "not installed: triton"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    found = any(shutil.which(name) for name in compilers if name)
    return "" if found else "there is no C++ compiler: install g++, or name one in CXX"


# PyTorch


def _converted(model: nn.Module, dtype: torch.dtype | None, channels_last: bool) -> nn.Module:
    model = model.requires_grad_(False)
    if dtype is not None:
        model = model.to(dtype)
    if channels_last:
        for parameter in model.parameters():
            if parameter.dim() in (4, 5):
                last = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=last)
    return model


def _compiled(model: nn.Module, graphs: bool) -> Callable[..., object]:
    def run(*args: Any, **kwargs: Any) -> object:
        return model(*args, **kwargs)

    run.__code__ = run.__code__.replace()  # a code object of its own: see the top of the file
    if not graphs:
        return torch.compile(run, fullgraph=True, dynamic=False)
    replayed = torch.compile(
        run, fullgraph=True, dynamic=False, options={"triton.cudagraphs": True}
    )

    def replay(*args: Any, **kwargs: Any) -> object:
        # Models take turns: none of them is the continuation of the one before.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return replayed(*args, **kwargs)

    return replay


@contextlib.contextmanager
def _freezing(on: bool) -> Iterator[None]:
    """Let what is compiled meanwhile be frozen; as an option of torch.compile it does nothing."""
    if not on:
        yield
        return
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


# ONNX Runtime


def _in_onnxruntime(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Threads that wait by spinning take the cores from everyone else; alone on a machine with
    # several threads they are a quarter faster.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # Given the model itself, PyTorch 2.8 would trace the one branch that the example takes.
        captured = torch.export.export(model, args, kwargs, strict=False)
        program = torch.onnx.export(captured, dynamo=True, verbose=False)
        assert program is not None
        file = Path(folder) / "model.onnx"
        program.save(file)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    given = len(list(nested_tensors((args, kwargs))))
    if len(names) != given:
        raise ValueError(f"its graph reads {len(names)} of the {given} inputs ({names})")

    def call(*args: Any, **kwargs: Any) -> object:
        inputs = (tensor.contiguous().numpy() for tensor in nested_tensors((args, kwargs)))
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return call


def _as_tensors(output: object) -> object:
    """ONNX Runtime's list of arrays as tensors; anything else as it is."""
    if isinstance(output, list):
        return [torch.from_numpy(x) if hasattr(x, "__array_interface__") else x for x in output]
    return output


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what compilers and exporters tell their own developers."""
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
