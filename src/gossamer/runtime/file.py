"""Files of compiled models: safetensors with non-zeros and their indices, whole or not there.

The header says, as JSON, how the model was fused and how each layer is computed. Nothing in a file
is code: loading builds the layers from the user's own class and fills them, and checks every index
of every packed weight before a kernel sees it.

A packed weight fits every CPU of the same byte order. The choices in a file were measured where it
was made: `load(path, model, example)` measures again.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gossamer.example import Example
from gossamer.reading import reading, reason
from gossamer.runtime import kernels
from gossamer.runtime.compile import Choice, Compiled, choose
from gossamer.runtime.fuse import Fusion, Recipe, fuse_like
from gossamer.runtime.join import join
from gossamer.runtime.layers import (
    CsrLayer,
    DenseLayer,
    Geometry,
    Layer,
    PackedLayer,
    SparseLayer,
    has_onednn,
)
from gossamer.shrink.file import COMPILED_KEY, read_metadata, write_whole
from gossamer.shrink.plan import Plan

__all__ = ["load", "save"]

_VERSION = 1
_AGAIN = "write it again with gossamer.runtime.save"
_DENSE = {"eager": DenseLayer, "onednn": PackedLayer}
_CSR = ("rows", "columns", "values")


def save(path: str | os.PathLike[str], compiled: Compiled, plan: Plan | None = None) -> None:
    """Write a compiled model, its weights as they are packed.

    Args:
        path: A .safetensors file.
        compiled: Of `compile_sparse`.
        plan: That cut the model, as in `gossamer.save`: loading then takes the full-width model.

    Raises:
        OSError: The file cannot be written; whatever was at `path` before is still there.
    """
    layers = {n: m.path for n, m in compiled.model.named_modules() if isinstance(m, Layer)}
    header = {
        "version": _VERSION,
        "byteorder": sys.byteorder,
        "paths": layers,
        "recipe": asdict(compiled.recipe)
        | {"layers": {name: list(fusion) for name, fusion in compiled.recipe.layers.items()}},
        "choices": [asdict(choice) for choice in compiled.choices],
        "milliseconds": dict(compiled.milliseconds),
        "error": compiled.error,
        "machine": compiled.machine,
        "note": compiled.note,
        "plan": (plan or Plan()).to_json(),
    }
    tensors = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in compiled.model.state_dict().items()
    }
    data = safetensors.torch.save(tensors, {"format": "pt", COMPILED_KEY: json.dumps(header)})
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def load(
    path: str | os.PathLike[str], model: nn.Module, example: Example | None = None
) -> Compiled:
    """The compiled model of a file.

    Args:
        path: Of `save`.
        model: A fresh model of the class that was compiled, made with the same arguments; of a slim
            one saved with its plan, at full width. It is not changed, but for the plan's cuts.
        example: Measure every layer again, on this machine and this input.

    Raises:
        ValueError: The file is damaged, or was made from another model; says what differs.
        RuntimeError: The sparse kernels are missing here.
    """
    header = _header(path)
    with reading(f"the header of {path}", _AGAIN):
        recipe, paths, compiled = _parsed(header)
        plan = Plan.from_json(header["plan"])
    # Copies: what is checked must not be a view of a file that somebody may write to.
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    try:
        plan.apply(model)
        fused = fuse_like(model, recipe)
        layers = {
            name: _layer(name, fused.get_submodule(name), kind, tensors)
            for name, kind in paths.items()
        }
        for name, layer in layers.items():
            fused.set_submodule(name, layer)
        _fill(fused, tensors)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {reason(error)}. Build the model "
            "with the arguments it was compiled with, or compile it again"
        ) from error
    if example is None:
        return Compiled(model=join(fused), recipe=recipe, **compiled)
    before = _dense_again(fused, layers)
    return choose(before, recipe, example, before=fused)


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    metadata = read_metadata(path)
    if COMPILED_KEY not in metadata:
        raise ValueError(
            f"{path} is no compiled model: files of gossamer.save are loaded with gossamer.load, "
            "and compiled with gossamer.compile_sparse"
        )
    with reading(f"the header of {path}", _AGAIN):
        header = json.loads(metadata[COMPILED_KEY])
        if header["version"] != _VERSION:
            raise ValueError(f"it is of version {header['version']}, this Gossamer's {_VERSION}")
        if header["byteorder"] != sys.byteorder:
            raise ValueError(f"it is {header['byteorder']}-endian, this machine is not")
        return dict(header)


def _parsed(header: Mapping[str, Any]) -> tuple[Recipe, dict[str, str], dict[str, Any]]:
    """The recipe, how each layer is computed, and what was measured."""
    told = header["recipe"]
    if told["by"] not in ("graph", "modules"):
        raise ValueError(f"it was fused by {told['by']!r}")
    recipe = Recipe(
        by=told["by"],
        given=tuple(map(str, told["given"])),
        layers={
            str(name): Fusion(str(norm), add is True, relu is True)
            for name, (norm, add, relu) in told["layers"].items()
        },
        dropped=tuple(map(str, told["dropped"])),
    )
    paths = {str(name): str(path) for name, path in header["paths"].items()}
    if paths.keys() != recipe.layers.keys():
        raise ValueError("it names other layers than it has tensors for")
    choices = tuple(
        Choice(
            **row
            | {
                "weight": tuple(map(int, row["weight"])),
                "input": tuple(map(int, row["input"])),
                "density": float(row["density"]),
                "milliseconds": {str(k): float(v) for k, v in row["milliseconds"].items()},
            }
        )
        for row in header["choices"]
    )
    measured = {
        "choices": choices,
        "milliseconds": {str(k): float(v) for k, v in header["milliseconds"].items()},
        "error": float(header["error"]),
        "machine": str(header["machine"]),
        "note": str(header["note"]),
    }
    return recipe, paths, measured


def _layer(name: str, fresh: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> Layer:
    """The layer of the file in the place of a fresh one, without its bias."""
    if not isinstance(fresh, DenseLayer):
        raise ValueError(f"{name} is a {type(fresh).__name__}")
    g, bias, relu = fresh.geometry, fresh.bias, fresh.relu
    if f"{name}.bias" in tensors and bias is None:  # of a norm
        bias = torch.empty(g.outputs)
    if path in _DENSE:
        kind = DenseLayer if path == "eager" or not has_onednn() else PackedLayer
        return kind(g, fresh.weight, bias, relu)
    if path == "csr":
        if any(f"{name}.{part}" not in tensors for part in _CSR):
            raise ValueError(f"it has not all of {', '.join(f'{name}.{part}' for part in _CSR)}")
        rows, columns, values = (tensors[f"{name}.{part}"] for part in _CSR)
        _check_csr(name, g, rows, columns, values)
        return CsrLayer(g, rows, columns, values, bias, relu)
    if f"{name}.packed" not in tensors:
        raise ValueError(f"it has no {name}.packed")
    packed = tensors[f"{name}.packed"]
    kernels.check(packed)
    layer = SparseLayer(g, packed, bias, relu)
    if not g.fits(kernels.describe(packed)) or layer.path != path:
        raise ValueError(
            f"{name} is {path!r} of {g}, and what was packed is {kernels.describe(packed)}"
        )
    return layer


def _check_csr(name: str, g: Geometry, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Every index in range: PyTorch's product trusts what it is given."""
    try:
        torch.sparse_csr_tensor(rows, columns, values, (g.outputs, g.inputs), check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"{name} is no CSR matrix ({reason(error)})") from error


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    wrong = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors
        and (tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype)
    ]
    found = {"missing": missing, "unknown": extra, "other shapes": wrong}
    told = ", ".join(f"{what} {names[:3]}" for what, names in found.items() if names)
    if told:
        raise ValueError(told)
    model.load_state_dict(tensors, assign=True)


def _dense_again(model: nn.Module, layers: Mapping[str, Layer]) -> nn.Module:
    """A copy with the layers in their plain form, to be measured again."""
    dense = copy.deepcopy(model)
    for name, layer in layers.items():
        dense.set_submodule(name, DenseLayer(layer.geometry, layer.weight, layer.bias, layer.relu))
    return dense
