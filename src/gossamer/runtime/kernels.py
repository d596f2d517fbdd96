"""The sparse CPU kernels (csrc), with tensors in place of pointers.

A weight is packed once and run many times; the packed layer is a tensor of bytes that may be copied
and saved:

    packed = pack(conv.weight, stride=(2, 2), padding=(1, 1))
    y = run(packed, x, conv.bias, relu=True)

The library is built with the package where there is a C++ compiler; `missing()` says whether it is
there. Nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "Format",
    "Isa",
    "Layer",
    "Prepared",
    "Step",
    "Storage",
    "available_isas",
    "check",
    "describe",
    "get_isa",
    "max_pool",
    "missing",
    "output_shape",
    "pack",
    "run",
    "set_isa",
    "unpack",
]

# What csrc/gossamer_kernels.h says of these names, in its order.
Format = Literal["rows", "block16", "lanes"]
Storage = Literal["float32", "bfloat16", "int8"]
Isa = Literal["portable", "avx2", "avx512"]

_ABI = 2
_HEADER = 128  # no packed layer has fewer bytes
_LIBRARY = Path(__file__).with_name("_kernels.so")
_BUILD = "install a C++ compiler (g++ 12 or newer, or clang) and run `pip install` again"


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("out_channels", "in_channels", "groups", "kernel_h", "kernel_w"),
            *("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
        )
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "bias")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "x", "add", "y")),
        *((name, ctypes.c_int32) for name in ("x_base", "add_base", "y_base", "relu")),
    ]


class _Pool(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width", "kernel_h", "kernel_w"),
            *("stride_h", "stride_w", "pad_h", "pad_w"),
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What was packed. A linear layer is a 1x1 convolution; pairs are (height, width)."""

    out_channels: int
    in_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    format: Format = "rows"
    storage: Storage = "float32"

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(out_channels, in_channels / groups, kernel height, kernel width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def _as_c(self) -> _Layer:
        pairs = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        return _Layer(self.out_channels, self.in_channels, self.groups, *pairs)


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.platform == "win32":
        return "the sparse kernels are not built on Windows: use Linux, macOS or WSL"
    if not _LIBRARY.exists():
        return f"the sparse kernels were not built: {_BUILD}"
    try:
        library = ctypes.CDLL(os.fspath(_LIBRARY))
    except OSError as error:
        return f"the sparse kernels cannot be loaded ({error}): {_BUILD}"
    if library.gsm_abi_version() != _ABI:
        got = library.gsm_abi_version()
        return f"the sparse kernels are of version {got}, not {_ABI}: run `pip install` again"
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.gsm_status_text.restype = ctypes.c_char_p
    library.gsm_pack_bytes.argtypes = [pointer, i32, i32, pointer]
    library.gsm_pack_bytes.restype = i64
    library.gsm_pack.argtypes = [pointer, i32, i32, pointer, pointer, i64]
    library.gsm_check.argtypes = [pointer, i64]
    library.gsm_packed_layer.argtypes = [pointer, pointer, pointer, pointer]
    library.gsm_unpack.argtypes = [pointer, pointer]
    library.gsm_run.argtypes = [pointer, pointer, i64, i64, i64]
    library.gsm_run.argtypes += [pointer, pointer, i32, pointer, i32]
    library.gsm_run_steps.argtypes = [pointer, i64, pointer, i32]
    library.gsm_max_pool.argtypes = [pointer, i32, pointer, pointer, i32]
    if wanted := os.environ.get("GOSSAMER_ISA"):
        if wanted not in get_args(Isa):
            raise ValueError(f"GOSSAMER_ISA={wanted}: it is one of {', '.join(get_args(Isa))}")
        if library.gsm_set_isa(get_args(Isa).index(wanted)):
            raise ValueError(f"GOSSAMER_ISA={wanted}: this CPU cannot run it")
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def missing() -> str | None:
    """Why the kernels cannot be used here and what to do, in one line; None where they can."""
    library = _load()
    return library if isinstance(library, str) else None


def get_isa() -> Isa:
    """The instruction set in use: the best of this CPU, `GOSSAMER_ISA`, or what was set."""
    isa: Isa = get_args(Isa)[_library().gsm_get_isa()]
    return isa


def set_isa(isa: Isa) -> None:
    """Use another instruction set, in the whole process.

    Raises:
        ValueError: There is none of this name, or this CPU does not have it.
    """
    _index(isa, Isa, "isa")
    if _library().gsm_set_isa(get_args(Isa).index(isa)):
        raise ValueError(f"this CPU or build has no {isa}: it has {', '.join(available_isas())}")


def available_isas() -> tuple[Isa, ...]:
    """The instruction sets that this CPU and this build have."""
    library = _library()
    current = library.gsm_get_isa()
    found = tuple(isa for i, isa in enumerate(get_args(Isa)) if library.gsm_set_isa(i) == 0)
    library.gsm_set_isa(current)
    return found


def pack(
    weight: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    format: Format = "rows",
    storage: Storage = "float32",
) -> Tensor:
    """Pack the non-zeros of a weight.

    Args:
        weight: (out, in) of a linear layer or (out, in / groups, height, width) of a convolution,
            float32, on the CPU.
        stride, padding, dilation: (height, width); padding is with zeros.
        groups: Of the convolution.
        format: `rows`: unstructured zeros, any layer; the one for many columns (batch x map size).
            `block16`: weights whose zeros come in columns of 16 outputs; any layer, any batch.
            `lanes`: linear layers of small batch, unstructured or N:M.
        storage: Of the values; products and sums are float32. `int8` has a scale per output.

    Returns:
        (bytes,) uint8.

    Raises:
        ValueError: A shape, dtype or name is not one of those; int8 of a weight that is not finite.
        RuntimeError: The kernels are missing.
    """
    library = _library()
    if weight.ndim not in (2, 4):
        raise ValueError(f"a weight of shape {tuple(weight.shape)}: it needs 2 or 4 dimensions")
    out, channels, height, width = (*weight.shape, 1, 1)[:4]
    layer = Layer(
        out_channels=out,
        in_channels=channels * groups,
        kernel=(height, width),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        format=format,
        storage=storage,
    )
    _check_float(weight, "weight")
    weight = weight.detach().contiguous()
    as_c = ctypes.byref(layer._as_c())
    codes = _index(format, Format, "format"), _index(storage, Storage, "storage")
    size = library.gsm_pack_bytes(as_c, *codes, weight.data_ptr())
    if size < 0:
        raise ValueError(f"{layer} cannot be packed: {_text(size)}")
    packed = torch.empty(size, dtype=torch.uint8)
    status = library.gsm_pack(as_c, *codes, weight.data_ptr(), packed.data_ptr(), size)
    if status:
        raise ValueError(f"{layer} cannot be packed: {_text(status)}")
    return packed


def check(packed: Tensor) -> None:
    """Make sure that bytes from a file are a packed layer, every index of it in range.

    `run` trusts what it is given.

    Raises:
        ValueError: They are not.
        RuntimeError: The kernels are missing.
    """
    if _library().gsm_check(_bytes(packed).data_ptr(), packed.numel()):
        raise ValueError(
            f"{packed.numel()} bytes that are not a packed layer of this version of the kernels: "
            "pack the dense weight again"
        )


def describe(packed: Tensor) -> Layer:
    """The layer that was packed.

    Raises:
        ValueError: It is not a packed layer.
        RuntimeError: The kernels are missing.
    """
    return _layer(_header(packed))


def unpack(packed: Tensor) -> Tensor:
    """The dense weight again, as the storage rounded it: (out, in / groups, height, width).

    Raises:
        ValueError: It is not a packed layer.
        RuntimeError: The kernels are missing.
    """
    weight = torch.empty(describe(packed).weight_shape)
    _library().gsm_unpack(packed.data_ptr(), weight.data_ptr())
    return weight


def output_shape(layer: Layer, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of `run`'s output for an input of this shape.

    Raises:
        ValueError: The layer does not take such an input.
    """
    linear = layer.kernel == (1, 1) and layer.padding == (0, 0)
    fits = len(shape) == 4 or (len(shape) == 2 and linear)
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            shape[2:], layer.padding, layer.dilation, layer.kernel, layer.stride, strict=False
        )
    ]
    if not fits or shape[1] != layer.in_channels or min(sizes, default=1) < 1:
        raise ValueError(f"an input of shape {tuple(shape)} does not fit {layer}")
    return shape[0], layer.out_channels, *sizes


def run(
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """relu(conv(x) + bias + add), the last three as wanted.

    Args:
        packed: Of `pack`, or checked by `check`.
        x: (batch, in) or (batch, in, height, width), float32, contiguous.
        bias: (out,), float32.
        add: Of the output's shape; may be `out` itself.
        relu: Cut negative outputs off.
        out: Receives the result; must not overlap `x`.
        threads: At most so many; PyTorch's number by default. They are PyTorch's own.

    Returns:
        (batch, out) or (batch, out, height, width); equal bits for every number of threads.

    Raises:
        ValueError: A shape, dtype or memory format is not one of those, or the format is `lanes`
            and the input has a map.
        RuntimeError: The kernels are missing.
    """
    library = _library()
    layer, shape = _plan(_header(packed), x.shape)
    _check_run(x, x.shape, "x")
    if out is None:
        out = torch.empty(shape)
    else:
        _check_run(out, shape, "out")
    if bias is not None:
        _check_run(bias, (layer.out_channels,), "bias")
    if add is not None:
        _check_run(add, shape, "add")
    status = library.gsm_run(
        packed.data_ptr(),
        x.data_ptr(),
        x.shape[0],
        *(x.shape[2:] or (1, 1)),
        bias.data_ptr() if bias is not None else None,
        add.data_ptr() if add is not None else None,
        int(relu),
        out.data_ptr(),
        torch.get_num_threads() if threads is None else threads,
    )
    if status:
        raise ValueError(f"{layer} does not run on {tuple(x.shape)}: {_text(status)}")
    return out


@dataclass(frozen=True, kw_only=True)
class Step:
    """One `run` among several. Values are numbered: the inputs first, then each step's output.

    Attributes:
        packed, bias, relu: As `run` takes them.
        x, add: Numbers of values.
    """

    packed: Tensor
    bias: Tensor | None
    x: int
    add: int | None = None
    relu: bool = False


class Prepared:
    """Several `run`s as one call, on inputs of given shapes; their checks are done here.

    Between two layers Python takes longer than a small layer: what it works with has left the
    caches. Values that are not asked for share memory, as far as they are not needed at once.

    Attributes:
        steps, shapes: What it was made for; it keeps the steps' tensors alive.
    """

    def __init__(
        self, steps: Sequence[Step], shapes: Sequence[torch.Size], outputs: Sequence[int]
    ) -> None:
        self.steps, self.shapes = tuple(steps), tuple(shapes)
        self._run = _library().gsm_run_steps
        values: list[tuple[int, ...]] = [tuple(shape) for shape in shapes]
        for step in steps:
            layer, shape = _plan(_header(step.packed), torch.Size(values[step.x]))
            if step.bias is not None:
                _check_run(step.bias, (layer.out_channels,), "bias")
            if step.add is not None and values[step.add] != shape:
                raise ValueError(f"a sum of {values[step.add]} and {shape}")
            values.append(shape)
        self._out_shapes = [values[number] for number in outputs]
        given = len(shapes)
        # The bases: inputs, outputs, and the memory for all other values.
        places = {number: (number, 0) for number in range(given)}
        places |= {number: (given + i, 0) for i, number in enumerate(outputs)}
        offsets, self._floats = _arena(steps, values, set(places))
        places |= {number: (given + len(outputs), offset) for number, offset in offsets.items()}
        self._steps = (_Step * len(steps))()
        for i, step in enumerate(steps):
            shape = values[step.x]
            x, y = places[step.x], places[given + i]
            add = (-1, 0) if step.add is None else places[step.add]
            bias = None if step.bias is None else step.bias.data_ptr()
            sizes = (shape[0], *(shape[2:] or (1, 1)))
            offset = (x[1], add[1], y[1])
            bases = (x[0], add[0], y[0])
            self._steps[i] = _Step(
                step.packed.data_ptr(), bias, *sizes, *offset, *bases, int(step.relu)
            )
        self._bases = ctypes.c_void_p * (given + len(outputs) + 1)
        # Kept from call to call: fresh pages take longer to get than many a layer to compute.
        self._spare: list[Tensor] = []

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these can be computed on."""
        for x, shape in zip(inputs, self.shapes, strict=True):
            if x.shape != shape or x.dtype is not torch.float32:
                return False
            if not x.is_cpu or not x.is_contiguous():
                return False
        return True

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs; the caller has asked `takes`."""
        outputs = [torch.empty(shape) for shape in self._out_shapes]
        try:
            memory = self._spare.pop()  # atomic: each of several threads has its own
        except IndexError:
            memory = torch.empty(self._floats)
        bases = self._bases(*(tensor.data_ptr() for tensor in (*inputs, *outputs, memory)))
        status = self._run(self._steps, len(self.steps), bases, torch.get_num_threads())
        self._spare.append(memory)
        if status:
            raise ValueError(f"inputs of {self.shapes}: {_text(status)}")
        return outputs


def _arena(
    steps: Sequence[Step], values: Sequence[tuple[int, ...]], placed: set[int]
) -> tuple[dict[int, int], int]:
    """Where in one piece of memory each value lies that is not placed yet, and its floats."""
    given = len(values) - len(steps)
    last = {number: i for i, step in enumerate(steps) for number in (step.x, step.add)}
    offsets: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # from, to, value
    floats = 0
    for i in range(len(steps)):
        taken = [piece for piece in taken if last.get(piece[2], -1) >= i]
        if given + i in placed:
            continue
        size = -(-math.prod(values[given + i]) // 16) * 16
        start = 0
        for begin, end, _ in sorted(taken):
            if begin - start >= size:
                break
            start = max(start, end)
        offsets[given + i] = start
        taken.append((start, start + size, given + i))
        floats = max(floats, start + size)
    return offsets, floats


def max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    threads: int | None = None,
) -> Tensor:
    """Max pooling; pairs are (height, width).

    Args:
        x: (batch, channels, height, width), float32, contiguous or in torch.channels_last.
        kernel: Of the windows.
        stride: Between them.
        padding: At most half of the kernel.
        threads: At most so many; PyTorch's number by default.

    Returns:
        What `torch.nn.functional.max_pool2d` does, contiguous.

    Raises:
        ValueError: A shape, dtype or memory format is not one of those.
        RuntimeError: The kernels are missing.
    """
    library = _library()
    _check_float(x, "x")
    last = x.dim() == 4 and not x.is_contiguous()
    if x.dim() != 4 or (last and not x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}: max_pool needs four "
            "dimensions, contiguous or in torch.channels_last"
        )
    sizes = [(x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    out = torch.empty(*x.shape[:2], *(max(0, size) for size in sizes))
    pool = _Pool(*x.shape, *kernel, *stride, *padding)
    status = library.gsm_max_pool(
        ctypes.byref(pool),
        int(last),
        x.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads() if threads is None else threads,
    )
    if status:
        raise ValueError(
            f"kernel {kernel}, stride {stride}, padding {padding} on {tuple(x.shape)}: "
            f"{_text(status)}"
        )
    return out


def _text(status: int) -> str:
    text: bytes = _library().gsm_status_text(status)
    return text.decode()


def _index(name: str, names: object, what: str) -> int:
    choices = get_args(names)
    if name not in choices:
        raise ValueError(f"{what} {name!r}: it is one of {', '.join(choices)}")
    return choices.index(name)


def _bytes(packed: Tensor) -> Tensor:
    plain = packed.dtype == torch.uint8 and packed.ndim == 1 and packed.is_contiguous()
    if not plain or not packed.is_cpu or packed.numel() < _HEADER:
        raise ValueError(
            f"a {packed.dtype} tensor of shape {tuple(packed.shape)} on {packed.device}: a packed "
            "layer is a contiguous row of bytes on the CPU, as pack() returned it"
        )
    if packed.data_ptr() % 8:
        raise ValueError("a packed layer at an odd address: clone() it")
    return packed


def _header(packed: Tensor) -> bytes:
    return ctypes.string_at(_bytes(packed).data_ptr(), _HEADER)


# A call of a small layer takes microseconds: what follows from the header is worked out once.
@lru_cache(maxsize=4096)
def _layer(header: bytes) -> Layer:
    buffer = ctypes.create_string_buffer(header, len(header))
    c, format, storage = _Layer(), ctypes.c_int32(), ctypes.c_int32()
    code = _library().gsm_packed_layer(buffer, *map(ctypes.byref, (c, format, storage)))
    if code:
        raise ValueError(_text(code))
    return Layer(
        out_channels=c.out_channels,
        in_channels=c.in_channels,
        kernel=(c.kernel_h, c.kernel_w),
        stride=(c.stride_h, c.stride_w),
        padding=(c.pad_h, c.pad_w),
        dilation=(c.dilation_h, c.dilation_w),
        groups=c.groups,
        format=get_args(Format)[format.value],
        storage=get_args(Storage)[storage.value],
    )


@lru_cache(maxsize=4096)
def _plan(header: bytes, shape: torch.Size) -> tuple[Layer, tuple[int, ...]]:
    layer = _layer(header)
    return layer, output_shape(layer, shape)


def _check_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.float32 or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}: the kernels take float32 on the CPU"
        )


def _check_run(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        _check_float(tensor, name)
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: it needs shape "
            f"{tuple(shape)}, contiguous"
        )
