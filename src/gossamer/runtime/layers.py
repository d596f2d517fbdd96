"""Layers that compute y = relu(layer(x) + add): dense in two ways, sparse in two.

All of them are for inference: they hold buffers, no parameters. What PyTorch does not have are
operators of `torch.ops.gossamer`, with shapes for tracing, so that `torch.export` and
`torch.compile` see one node where a sparse layer is. Exported programs need this module imported.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gossamer.runtime import kernels

__all__ = [
    "CsrLayer",
    "DenseLayer",
    "Geometry",
    "Layer",
    "MaxPool",
    "PackedLayer",
    "SparseLayer",
    "has_onednn",
    "is_watched",
]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a layer is without its weights.

    maps: Dimensions of its maps: 0 of a linear layer, 1 or 2 of a convolution. Pairs are (height,
    width); a convolution over one dimension has height 1.
    """

    maps: int
    outputs: int
    inputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Geometry | str:
        """Of a module; of one that these layers cannot stand for, the reason."""
        if type(module) is nn.Linear:
            return cls(maps=0, outputs=module.out_features, inputs=module.in_features)
        if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or type(module) not in (
            nn.Conv1d,
            nn.Conv2d,
        ):
            return f"there is no sparse kernel for {type(module).__name__}"
        if module.padding_mode != "zeros":
            return f"it pads with padding_mode={module.padding_mode!r}, the kernels with zeros"
        padding = _padding(module)
        if padding is None:
            return 'padding="same" pads one side more than the other here'
        return cls(
            maps=1 if isinstance(module, nn.Conv1d) else 2,
            outputs=module.out_channels,
            inputs=module.in_channels,
            kernel=_pair(module.kernel_size, 1),
            stride=_pair(module.stride, 1),
            padding=_pair(padding, 0),
            dilation=_pair(module.dilation, 1),
            groups=module.groups,
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight, as PyTorch's module has it."""
        return (self.outputs, self.inputs // self.groups, *self.kernel[2 - self.maps :])

    def fits(self, packed: kernels.Layer) -> bool:
        """Whether what was packed is such a layer."""
        names = ("kernel", "stride", "padding", "dilation", "groups")
        same = all(getattr(self, name) == getattr(packed, name) for name in names)
        return same and (self.outputs, self.inputs) == (packed.out_channels, packed.in_channels)


def _pair(sizes: tuple[int, ...], height: int) -> tuple[int, int]:
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (height, sizes[0])


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...] | None:
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(size % 2 for size in whole) else tuple(size // 2 for size in whole)


class Layer(nn.Module, ABC):
    """Abstract. `forward(x, add=None)` is relu(layer(x) + add), without what is not wanted.

    Attributes:
        geometry: Of the layer.
        relu: Whether it ends in one.
        weight: The dense weight, as PyTorch's module has it.
        bias: (out,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, geometry: Geometry, bias: Tensor | None, relu: bool) -> None:
        super().__init__()
        self.geometry = geometry
        self.relu = relu
        self.register_buffer("bias", bias)
        self.training = False

    @property
    @abstractmethod
    def path(self) -> str:
        """How it computes, in a word."""

    def train(self, mode: bool = True) -> Layer:
        """Only eval mode.

        Raises:
            RuntimeError: Training mode was asked for.
        """
        if mode:
            raise RuntimeError(
                "a model of compile_sparse is for inference, its layers cannot be trained: train "
                "the model that it was made from, and compile that again"
            )
        return super().train(False)

    def extra_repr(self) -> str:
        """For print(model)."""
        g = self.geometry
        return f"{self.path}, {tuple(g.weight_shape)}{', relu' if self.relu else ''}"


class DenseLayer(Layer):
    """As eager PyTorch computes it."""

    def __init__(
        self, geometry: Geometry, weight: Tensor, bias: Tensor | None, relu: bool = False
    ) -> None:
        super().__init__(geometry, bias, relu)
        self.register_buffer("weight", weight)

    @property
    def path(self) -> str:
        """How it computes, in a word."""
        return "eager"

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `Layer`."""
        g = self.geometry
        if g.maps == 0:
            y = F.linear(x, self.weight, self.bias)
        elif g.maps == 1:
            sizes = (g.stride[1], g.padding[1], g.dilation[1], g.groups)
            y = F.conv1d(x, self.weight, self.bias, *sizes)
        else:
            y = F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if add is not None:
            y = y + add
        return y.relu_() if self.relu else y


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN with weights in its own layouts."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLayer(Layer):
    """oneDNN, the weight packed in its own layout at the first call; maps come out channels last.

    While it is traced it is what eager PyTorch computes: compilers pack weights themselves.
    """

    def __init__(
        self, geometry: Geometry, weight: Tensor, bias: Tensor | None, relu: bool = False
    ) -> None:
        super().__init__(geometry, bias, relu)
        self.register_buffer("weight", weight)
        self._packed: tuple[int, Tensor] | None = None

    @property
    def path(self) -> str:
        """How it computes, in a word."""
        return "onednn"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # no layout of oneDNN can be copied or saved

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `Layer`."""
        g = self.geometry
        tracing = torch.compiler.is_compiling() or x.requires_grad
        if tracing or x.dtype != torch.float32 or (g.maps and x.dim() != 4) or not x.numel():
            return DenseLayer.forward(self, x, add)  # type: ignore[arg-type]
        after = "relu" if self.relu else "none"
        if g.maps == 0:
            if add is None:
                return self._linear(x, after)
            y = self._linear(x, "none") + add
            return y.relu_() if self.relu else y
        sizes = (list(g.padding), list(g.stride), list(g.dilation), g.groups)
        weight = self._reordered(x)
        if add is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *sizes, after, [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, add, weight, self.bias, *sizes, "add", 1.0, "relu" if self.relu else None, [], ""
            )
        result: Tensor = y
        return result

    def _linear(self, x: Tensor, after: str) -> Tensor:
        weight = self._reordered(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, after, [], "")
        return y

    def _reordered(self, x: Tensor) -> Tensor:
        if self._packed is None or self._packed[0] != self.weight.data_ptr():
            g, reorder = self.geometry, torch.ops.mkldnn
            with torch.no_grad():
                if g.maps == 0:
                    rows = x.numel() // x.shape[-1]
                    packed = reorder._reorder_linear_weight(self.weight, rows)
                else:
                    sizes = (list(g.padding), list(g.stride), list(g.dilation), g.groups)
                    packed = reorder._reorder_convolution_weight(self.weight, *sizes, list(x.shape))
            self._packed = (self.weight.data_ptr(), packed)
        return self._packed[1]


class SparseLayer(Layer):
    """The sparse kernels of `gossamer.runtime.kernels`."""

    packed: Tensor

    def __init__(
        self, geometry: Geometry, packed: Tensor, bias: Tensor | None, relu: bool = False
    ) -> None:
        super().__init__(geometry, bias, relu)
        self.register_buffer("packed", packed)
        g = geometry
        self._windows = (*g.kernel, *g.stride, *g.padding, *g.dilation)
        self._prepared: kernels.Prepared | None = None

    @classmethod
    def of(
        cls,
        dense: DenseLayer,
        format: kernels.Format,
        storage: kernels.Storage = "float32",
    ) -> SparseLayer:
        """The same layer, its weight packed.

        Raises:
            ValueError: The format cannot hold such a layer.
            RuntimeError: The kernels are missing.
        """
        g = dense.geometry
        weight = dense.weight.unsqueeze(2) if g.maps == 1 else dense.weight
        packed = kernels.pack(
            weight,
            stride=g.stride,
            padding=g.padding,
            dilation=g.dilation,
            groups=g.groups,
            format=format,
            storage=storage,
        )
        return cls(g, packed, dense.bias, dense.relu)

    @property
    def path(self) -> str:
        """How it computes, in a word."""
        layer = kernels.describe(self.packed)
        return layer.format if layer.storage == "float32" else f"{layer.format}-{layer.storage}"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight again, made at each call."""
        return kernels.unpack(self.packed).view(self.geometry.weight_shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it knows where in memory the layer is

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `Layer`."""
        _refuse_gradient(x, add)
        if not is_watched(x):
            inputs = (x,) if add is None else (x, add)
            prepared = self._prepare(inputs)
            if prepared is not None and prepared.takes(inputs):
                return prepared(inputs)[0]
        g = self.geometry
        if g.maps == 0:
            y: Tensor = _linear(x, self.packed, self.bias, add, self.relu, g.outputs)
            return y
        single = x.dim() == g.maps + 1  # one image, without a batch
        x, add = _as_images(x, g.maps, single), _as_images(add, g.maps, single)
        y = _convolve(x, self.packed, self.bias, add, self.relu, g.outputs, self._windows)
        y = y.squeeze(2) if g.maps == 1 else y
        return y.squeeze(0) if single else y

    def step(self, x: int, add: int | None = None) -> kernels.Step:
        """This layer among several."""
        own = self._buffers
        packed, bias = own["packed"], own["bias"]
        assert packed is not None
        return kernels.Step(packed=packed, bias=bias, x=x, add=add, relu=self.relu)

    def holds(self, step: kernels.Step) -> bool:
        """Whether the step's tensors are still those of this layer."""
        own = self._buffers
        return step.packed is own["packed"] and step.bias is own["bias"]

    def _prepare(self, inputs: Sequence[Tensor]) -> kernels.Prepared | None:
        """A call for inputs of these shapes, where they need no other shape themselves."""
        found = self._prepared
        shapes = tuple(tensor.shape for tensor in inputs)
        if found is not None and found.shapes == shapes and self.holds(found.steps[0]):
            return found
        if self.geometry.maps == 1 or len(shapes[0]) != (2 if self.geometry.maps == 0 else 4):
            return None
        step = self.step(*range(len(inputs)))
        self._prepared = kernels.Prepared([step], shapes, [len(inputs)])
        return self._prepared


def is_watched(*tensors: Tensor) -> bool:
    """Whether somebody follows PyTorch's operators; without, a call may go by them."""
    return (
        torch.compiler.is_compiling()
        or any(type(tensor) is not Tensor for tensor in tensors)
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or is_in_torch_dispatch_mode()
        or torch.autograd.profiler._is_profiler_enabled
    )


class CsrLayer(Layer):
    """A linear layer in PyTorch's own CSR format: what there is without the kernels."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(
        self,
        geometry: Geometry,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        bias: Tensor | None,
        relu: bool = False,
    ) -> None:
        super().__init__(geometry, bias, relu)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("values", values)

    @classmethod
    def of(cls, dense: DenseLayer) -> CsrLayer:
        """The same linear layer."""
        csr = _csr(dense.weight)
        rows, columns = (index.int() for index in (csr.crow_indices(), csr.col_indices()))
        return cls(dense.geometry, rows, columns, csr.values(), dense.bias, dense.relu)

    @property
    def path(self) -> str:
        """How it computes, in a word."""
        return "csr"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight again, made at each call."""
        return _csr_of(self.rows, self.columns, self.values, self.geometry.inputs).to_dense()

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `Layer`."""
        _refuse_gradient(x, add)
        y: Tensor = torch.ops.gossamer.csr_linear(
            x, self.rows, self.columns, self.values, self.bias, add, self.relu
        )
        return y


class MaxPool(nn.Module):
    """nn.MaxPool2d; plain images come out, of plain ones and of those with their channels last.

    PyTorch's also works out where each maximum was, and is 2 to 7 times slower.

    Attributes:
        kernel, stride, padding: (height, width).
    """

    def __init__(
        self, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    @classmethod
    def of(cls, pool: nn.MaxPool2d) -> MaxPool | None:
        """Of a module; None of one that it cannot stand for."""
        kernel, stride, padding, dilation = (
            (size, size) if isinstance(size, int) else (size[0], size[1])
            for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        )
        if pool.return_indices or pool.ceil_mode or dilation != (1, 1):
            return None
        return cls(kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """(..., height, width)."""
        plain = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        here = x.dim() == 4 and x.dtype == torch.float32 and x.is_cpu and not x.requires_grad
        if not (here and plain) or torch.compiler.is_compiling() or kernels.missing():
            return F.max_pool2d(x, self.kernel, self.stride, self.padding)
        return kernels.max_pool(x, self.kernel, self.stride, self.padding)


def _refuse_gradient(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            "the sparse kernels have no autograd formula, no gradient passes through this layer: "
            "call the model under torch.no_grad(), or use the one it was made from"
        )


def _as_images(x: Any, maps: int, single: bool) -> Any:
    if x is None:
        return None
    x = x.unsqueeze(0) if single else x
    return x.unsqueeze(2) if maps == 1 else x


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant)")
        return weight.to_sparse_csr()


def _csr_of(rows: Tensor, columns: Tensor, values: Tensor, inputs: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant)")
        shape = (len(rows) - 1, inputs)
        return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)


# ------------------------------------------------------------------ operators

# By the low-level interface: a torch.library.custom_op takes 10 us more per call, and every list of
# integers half of one. windows: pairs (height, width) of kernel, stride, padding, dilation.
_LIBRARY: Any = torch.library.Library("gossamer", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "sparse_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? add, bool relu, int outputs)"
    " -> Tensor"
)
_LIBRARY.define(
    "sparse_convolution(Tensor x, Tensor packed, Tensor? bias, Tensor? add, bool relu, "
    "int outputs, int[] windows) -> Tensor"
)
_LIBRARY.define(
    "csr_linear(Tensor x, Tensor rows, Tensor columns, Tensor values, Tensor? bias, Tensor? add, "
    "bool relu) -> Tensor"
)
_impl: Any = partial(torch.library.impl, types="CPU", lib=_LIBRARY)
_fake: Any = partial(torch.library.register_fake, lib=_LIBRARY)


@_impl("gossamer::sparse_linear")  # type: ignore[untyped-decorator]
def _sparse_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, add: Tensor | None, relu: bool, outputs: int
) -> Tensor:
    if x.dim() == 2:
        add = None if add is None else add.contiguous()
        return kernels.run(packed, x.contiguous(), bias, add=add, relu=relu)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    add = None if add is None else add.reshape(-1, outputs).contiguous()
    return kernels.run(packed, rows, bias, add=add, relu=relu).view(*x.shape[:-1], outputs)


@_fake("gossamer::sparse_linear")  # type: ignore[untyped-decorator]
def _sparse_linear_shape(
    x: Tensor, packed: Tensor, bias: Tensor | None, add: Tensor | None, relu: bool, outputs: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@_impl("gossamer::sparse_convolution")  # type: ignore[untyped-decorator]
def _sparse_convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    relu: bool,
    outputs: int,
    windows: list[int],
) -> Tensor:
    add = None if add is None else add.contiguous()
    return kernels.run(packed, x.contiguous(), bias, add=add, relu=relu)


@_fake("gossamer::sparse_convolution")  # type: ignore[untyped-decorator]
def _sparse_convolution_shape(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    relu: bool,
    outputs: int,
    windows: list[int],
) -> Tensor:
    pairs = (windows[i::2] for i in range(2))
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, (kernel, stride, padding, dilation) in zip(x.shape[2:], pairs, strict=True)
    ]
    return x.new_empty((x.shape[0], outputs, *sizes))


@_impl("gossamer::csr_linear")  # type: ignore[untyped-decorator]
def _csr_linear(
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    relu: bool,
) -> Tensor:
    weight = _csr_of(rows, columns, values, x.shape[-1])
    y = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    y = y.view(*x.shape[:-1], y.shape[1])
    if bias is not None:
        y += bias
    if add is not None:
        y += add
    return y.relu_() if relu else y


@_fake("gossamer::csr_linear")  # type: ignore[untyped-decorator]
def _csr_linear_shape(
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    relu: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows.shape[0] - 1))


_linear = torch.ops.gossamer.sparse_linear.default
_convolve = torch.ops.gossamer.sparse_convolution.default
