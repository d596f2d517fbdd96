"""2:4 on CUDA: linear layers and 1x1 convolutions on sparse tensor cores, where that is faster.

It often is not: the gain needs a product that is bound by arithmetic (about a thousand rows and
more, and as many inputs and outputs); small batches and small layers lose. So every layer is timed
on the shapes that an example brings, and stays dense when sparse is not faster. It also stays dense
when its weight is not 2:4, because the packer would silently drop the excess.

The kernels are those of `torch.sparse` (a prototype there): cuSPARSELt, and CUTLASS on compute
capability 8.x. They know neither convolutions nor float32. A 1x1 convolution is a linear layer on
channels-last rows; other kernels would have to be unfolded, which costs more than it gains.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from gossamer.example import Example, evaluating, run
from gossamer.measure.latency import compare_latency
from gossamer.measure.macs import align
from gossamer.measure.pattern import LayerPattern, check_nm

__all__ = [
    "LayerReport",
    "Machine",
    "SemiStructured",
    "SemiStructuredConv1x1",
    "SemiStructuredLinear",
    "choose_backends",
    "misfit",
    "probe",
    "to_semi_structured",
]

_BACKENDS = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}
_DTYPES = (torch.float16, torch.bfloat16)
_TOLERANCE = 0.02  # of the largest output: some units in the last place of bfloat16


@dataclass(frozen=True)
class Machine:
    """What a device can run.

    device: as torch names it, with the name of the GPU.
    backends: that may serve, best first.
    why: where there is none, the reason.
    """

    device: str
    backends: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear or convolution layer.

    name: of the layer.
    shape: of its weight.
    rows: of the product in one call on the example; 0 when it was not run.
    dense_ms, sparse_ms: milliseconds per call, medians; None when it was not timed.
    backend: that runs it now; empty when it was left dense.
    why: it was left dense.
    """

    name: str
    shape: tuple[int, ...]
    rows: int = 0
    dense_ms: float | None = None
    sparse_ms: float | None = None
    backend: str = ""
    why: str = ""


@dataclass(frozen=True, eq=False)
class SemiStructured:
    """A model with 2:4 layers, and the account of every layer.

    Attributes:
        model: For inference on this device. Save the dense model with its zeros, not this one.
        layers: One row per linear and convolution layer.
        device: What it was timed on.
    """

    model: nn.Module
    layers: tuple[LayerReport, ...]
    device: str

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers that run 2:4."""
        return tuple(layer.name for layer in self.layers if layer.backend)

    def to_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        return {"device": self.device, "layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> str:
        """The account as plain text."""
        rows = [("layer", "shape", "rows", "dense ms", "2:4 ms", "outcome")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            times = (layer.dense_ms, layer.sparse_ms)
            dense, sparse = ("" if ms is None else f"{ms:.4g}" for ms in times)
            outcome = layer.backend or f"dense: {layer.why}"
            rows.append((layer.name, shape, f"{layer.rows or ''}", dense, sparse, outcome))
        done = f"{len(self.converted)} of {len(self.layers)} layers run 2:4 on {self.device}"
        return f"{align(rows, text_columns=6)}\n{done}"


def to_semi_structured(
    model: nn.Module, example: Example, *, max_ratio: float = 0.95, rounds: int = 15
) -> SemiStructured:
    """A copy of `model` whose 2:4 layers run on sparse tensor cores, where that is faster.

    A layer is replaced when it is linear or a 1x1 convolution in float16 or bfloat16, of a shape
    that a backend takes, exactly 2:4 along its inputs, gives the same outputs, and takes less time.
    On a device without such kernels nothing is replaced, and every row of the account says so.

    Args:
        model: A plain model (after `finalize()`), in the dtype and on the device it will run on; it
            is not changed.
        example: An input it accepts, of the batch size it will run with: it decides what is faster.
        max_ratio: Replace a layer whose time is at most this share of the dense time.
        rounds: Times each layer is measured both ways.

    Raises:
        ValueError: The model is still parametrized, or has no linear or convolution layer.
    """
    if max_ratio <= 0:
        raise ValueError(f"max_ratio={max_ratio}: give a share of the dense time above 0")
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is still parametrized: call sparsifier.finalize() (or "
                "gossamer.finalize(model) on a copy) first"
            )
    pattern = check_nm(model, 2, 4)
    converted = copy.deepcopy(model)
    machine = probe(next(converted.parameters()).device)
    reports: dict[str, LayerReport] = {}
    for row in pattern.layers:
        why = machine.why or misfit(converted.get_submodule(row.name), row, machine.backends)
        reports[row.name] = LayerReport(row.name, row.shape, why=why)
    fitting = [name for name, report in reports.items() if not report.why]
    inputs = _inputs(converted, fitting, example) if fitting else {}
    for name in fitting:
        report, replacement = _try(
            reports[name], converted, inputs.get(name), machine, max_ratio, rounds
        )
        reports[name] = report
        if replacement is not None and name:
            parent, _, child = name.rpartition(".")
            setattr(converted.get_submodule(parent), child, replacement)
        elif replacement is not None:
            converted = replacement  # the model is that one layer
    return SemiStructured(converted, tuple(reports.values()), machine.device)


# What could run


def probe(device: torch.device) -> Machine:
    """What 2:4 kernels `device` can run."""
    if device.type != "cuda":
        return Machine(str(device), (), f"the model is on {device}, and 2:4 kernels need CUDA")
    name = f"{device} ({torch.cuda.get_device_name(device)})"
    capability = torch.cuda.get_device_capability(device)
    cusparselt = torch.backends.cusparselt.is_available()
    backends = choose_backends(capability, cusparselt=cusparselt)
    why = ""
    if not backends:
        have = "with" if cusparselt else "without"
        why = (
            f"{name} has compute capability {'.'.join(map(str, capability))}, {have} cuSPARSELt: "
            "2:4 needs 8.0 and, from 9.0 on, a PyTorch with cuSPARSELt"
        )
    return Machine(name, backends, why)


def choose_backends(capability: tuple[int, int], *, cusparselt: bool) -> tuple[str, ...]:
    """Backends for a compute capability, best first; PyTorch's CUTLASS kernels are for 8.x only."""
    backends = []
    if cusparselt and capability >= (8, 0):
        backends.append("cusparselt")
    if capability[0] == 8:
        backends.append("cutlass")
    return tuple(backends)


def misfit(module: nn.Module, pattern: LayerPattern, backends: tuple[str, ...]) -> str:
    """Why a layer cannot run 2:4 on any of the backends; empty when it can."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not isinstance(module, nn.Linear):
        pointwise = isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}
        if not pointwise:
            return "only linear layers and 1x1 convolutions have 2:4 kernels"
        assert isinstance(module, nn.Conv2d)
        if module.groups != 1:
            return f"a convolution in {module.groups} groups is no single product"
        if not isinstance(module.padding, str) and any(module.padding):
            return f"padding {tuple(module.padding)} around a 1x1 convolution"
    if weight.dtype not in _DTYPES:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"the weight is {dtype}; 2:4 needs float16 or bfloat16: model.to(torch.bfloat16)"
    if not any(_takes(backend, weight) for backend in backends):
        needs = [
            f"multiples of {rows} and {columns} ({backend})"
            for backend, (rows, columns) in ((b, _multiples(b, weight.dtype)) for b in backends)
        ]
        return f"{weight.shape[0]} x {weight.shape[1]} weights; 2:4 needs {' or '.join(needs)}"
    if not pattern.fits:
        return f"not 2:4, the packer would drop weights: {pattern.why}"
    return ""


def _multiples(backend: str, dtype: torch.dtype) -> tuple[int, int]:
    needs = _BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return needs.sparse_min_rows, needs.sparse_min_cols


def _takes(backend: str, weight: Tensor) -> bool:
    return all(
        size % multiple == 0
        for size, multiple in zip(weight.shape[:2], _multiples(backend, weight.dtype), strict=True)
    )


# What is faster


def _inputs(model: nn.Module, names: list[str], example: Example) -> dict[str, Tensor]:
    """The largest input of each layer in one run on the example: shape and strides, no data."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and (name not in seen or args[0].numel() > seen[name].numel()):
                seen[name] = torch.empty_like(args[0], device="meta")

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(see(n)) for n in names]
    try:
        with torch.no_grad(), evaluating(model):
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _try(
    report: LayerReport,
    model: nn.Module,
    like: Tensor | None,
    machine: Machine,
    max_ratio: float,
    rounds: int,
) -> tuple[LayerReport, nn.Module | None]:
    """Time a layer dense and on every backend; the report, and the fastest if it is fast enough."""
    if like is None:
        return replace(report, why="the example does not reach it"), None
    dense = model.get_submodule(report.name)
    weight = dense.weight
    assert isinstance(weight, Tensor)
    x = torch.randn_like(like, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        wanted = dense(x)
    report = replace(report, rows=wanted.numel() // weight.shape[0])
    fastest: tuple[float, nn.Module] | None = None
    why = ""
    for backend in machine.backends:
        if not _takes(backend, weight):
            continue
        try:
            sparse = _replacement(dense, backend)
            with torch.no_grad():
                difference = (sparse(x) - wanted).abs().max()
        except (RuntimeError, NotImplementedError) as error:
            why = f"{backend} fails: {str(error).splitlines()[0]}"
            continue
        if not difference <= _TOLERANCE * wanted.abs().max():
            why = f"{backend} computes something else (by {float(difference):.3g})"
            continue
        dense_ms, sparse_ms, ratio = _times(dense, sparse, x, rounds)
        if fastest is None or ratio < fastest[0]:
            fastest = ratio, sparse
            report = replace(report, dense_ms=dense_ms, sparse_ms=sparse_ms, backend=backend)
    if fastest is None:
        return replace(report, why=why), None
    ratio, sparse = fastest
    if ratio > max_ratio:
        why = f"not faster: {ratio:.2f} of the dense time on {report.backend}"
        return replace(report, backend="", why=why), None
    return report, sparse


def _times(
    dense: nn.Module, sparse: nn.Module, x: Tensor, rounds: int
) -> tuple[float, float, float]:
    """Milliseconds per call of both, and the median ratio of the second to the first."""
    compared = compare_latency(
        {"dense": dense, "sparse": sparse}, x, rounds=rounds, min_round_ms=5.0
    )
    both = compared["dense"], compared["sparse"]
    return both[0].milliseconds.median, both[1].milliseconds.median, both[1].ratio.median


# What runs


class SemiStructuredLinear(nn.Module):
    """`x W^T + b` with a packed 2:4 weight, on inputs of any number of dimensions."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x: (*, in)`, returns `(*, out)`."""
        # PyTorch's own version views its input, which fails where that is not contiguous.
        rows = x.reshape(-1, x.shape[-1])
        return F.linear(rows, self.weight, self.bias).view(*x.shape[:-1], -1)


class SemiStructuredConv1x1(nn.Module):
    """A 1x1 convolution as a linear layer on channels-last rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = SemiStructuredLinear(weight, bias)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`x: (..., in, h, w)`, returns `(..., out, h / stride, w / stride)` in channels_last.

        Nothing is copied where `x` is channels_last and the stride is 1.
        """
        x = x[..., :: self.stride[0], :: self.stride[1]]
        rows: Tensor = self.linear(x.movedim(-3, -1))
        return rows.movedim(-1, -3)


def _replacement(module: nn.Module, backend: str) -> nn.Module:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    packed = _pack(weight.detach().flatten(1).contiguous(), backend)
    if isinstance(module, nn.Conv2d):
        return SemiStructuredConv1x1(packed, bias, module.stride)
    return SemiStructuredLinear(packed, bias)


def _pack(weight: Tensor, backend: str) -> Tensor:
    with warnings.catch_warnings():
        # Said once per process, of an API that nobody but this file calls.
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
        packed: Tensor = _BACKENDS[backend].from_dense(weight)
    return packed
