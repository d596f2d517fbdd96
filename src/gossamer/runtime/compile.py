"""compile_sparse: every layer by the fastest of the ways to compute it on this machine.

Batch norms, sums and ReLUs are fused into layers first (`fuse.py`). Then each layer is timed on the
shapes that the example gives it: as eager PyTorch, in oneDNN with its weight packed, and in the
sparse formats. They take turns, and the medians decide. Zeros pay only where there are many of
them: a layer below that stays dense, and the table says by how much.

A dense convolution of oneDNN works channels last, a sparse one on plain images: in between the
layout is changed, which costs as much as a small layer. So the network is put together by dense
times that include such changes and by those that do not, and all dense too, and what is fastest as
a whole is taken.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.example import (
    Example,
    batch_size,
    evaluating,
    example_tensors,
    nested_tensors,
    random_sample,
    run,
)
from gossamer.runtime import kernels
from gossamer.runtime.fuse import TOLERANCE, Recipe, difference, fuse
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

__all__ = ["Choice", "Compiled", "choose", "compile_sparse"]

DENSE = ("eager", "onednn")
_HOPELESS = 0.7  # above this density zeros are not used: a sparse format would read more than dense
_GAIN = 0.97  # of the dense time that a sparse format must stay below: less is noise
_FEW_ROWS = 64  # up to which the "lanes" format is tried
_ROUNDS = 7
_ROUND_MS = 2.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a layer is computed, and why.

    Attributes:
        layer: Its name.
        weight: Shape of its dense weight.
        input: Shape of its input on the example.
        density: Share of the weight that is not zero.
        milliseconds: Median per call, by way of computing it. "onednn" is with channels-last
            images changed to plain ones behind it.
        path: Which was taken.
        reason: Why.
    """

    layer: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    density: float
    milliseconds: Mapping[str, float]
    path: str
    reason: str

    @property
    def dense(self) -> float | None:
        """Milliseconds of the fastest dense way; None where nothing was timed."""
        times = [ms for path, ms in self.milliseconds.items() if path in DENSE]
        return min(times, default=None)

    @property
    def sparse(self) -> float | None:
        """Milliseconds of the fastest sparse way; None where none was timed."""
        times = [ms for path, ms in self.milliseconds.items() if path not in DENSE]
        return min(times, default=None)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compile_sparse made.

    Attributes:
        model: For inference on a CPU, in float32; other batch sizes work too.
        choices: A row per layer.
        milliseconds: Median per call on the example: "as it was", "dense" (fused, every layer by
            the fastest dense way) and "compiled".
        error: Largest difference to the outputs as they were, over the largest output.
        machine: Where it was measured.
        note: What the user should know, such as missing kernels; empty mostly.
        recipe: How the model was fused.
    """

    model: nn.Module
    choices: tuple[Choice, ...]
    milliseconds: Mapping[str, float]
    error: float
    machine: str
    note: str
    recipe: Recipe

    @property
    def density(self) -> float:
        """Share of the weights of all layers in the table that are not zero."""
        sizes = [_count(choice.weight) for choice in self.choices]
        kept = sum(n * c.density for n, c in zip(sizes, self.choices, strict=True))
        return kept / max(1, sum(sizes))

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that run in sparse kernels."""
        return tuple(c.layer for c in self.choices if c.path not in DENSE)

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of cells, a line per layer; the head first."""
        lines: list[tuple[str, ...]] = [
            ("layer", "weight", "density", "dense ms", "sparse ms", "path", "why")
        ]
        for c in self.choices:
            times = (f"{ms:.3g}" if ms is not None else "-" for ms in (c.dense, c.sparse))
            weight = "x".join(map(str, c.weight))
            lines.append((c.layer, weight, f"{c.density:.3f}", *times, c.path, c.reason))
        return lines

    def lines(self) -> list[str]:
        """What came of it as a whole, in sentences."""
        told = [self.note] if self.note else []
        times = self.milliseconds
        if times:
            gain = times["as it was"] / times["compiled"]
            over_dense = times["dense"] / times["compiled"]
            told.append(
                f"{times['compiled']:.3g} ms on the example: {gain:.2f}x as fast as the model was "
                f"({times['as it was']:.3g} ms), {over_dense:.2f}x as fast as its layers fused and "
                f"dense ({times['dense']:.3g} ms)"
            )
        told.append(
            f"{len(self.sparse_layers)} of {len(self.choices)} layers run in sparse kernels, "
            f"density {self.density:.3f}; outputs differ by {self.error:.1g} of the largest"
        )
        return [*told, f"measured on {self.machine}"]

    def table(self) -> str:
        """What was chosen and why, as plain text."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        text = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
            for row in rows
        ]
        return "\n".join([*text, "", *self.lines()])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model as plain data, ready for JSON."""
        found = asdict(replace(self, model=nn.Identity()))
        found.pop("model"), found.pop("recipe")
        return found | {"density": self.density}


def compile_sparse(
    model: nn.Module,
    example: Example,
    *,
    storage: kernels.Storage = "float32",
    rounds: int = _ROUNDS,
) -> Compiled:
    """Make a model with zeros in its weights fast on this CPU.

    The model is copied and not changed. Norms are folded, and every linear layer and convolution is
    replaced by the fastest way to compute it that was measured, with as many threads as
    `torch.get_num_threads()` says. `print(compiled.table())` shows what was chosen, and why.

    Args:
        model: A plain model in float32 on the CPU: trained and `finalize`d, slim or not.
        example: An input of the size that it will see; another batch size works, and may be better
            served by a model compiled for it.
        storage: Of sparse weights. "bfloat16" and "int8" change the outputs, `error` says by how
            much.
        rounds: Times that each way is measured.

    Returns:
        `compiled.model` works in eager PyTorch, under torch.compile and torch.export.

    Raises:
        ValueError: The model is not in float32 on the CPU, or not finalized.
        RuntimeError: The compiled model computes something else.
    """
    _check(model, example, storage, rounds)
    fused, recipe, note = fuse(model, example)
    found = choose(fused, recipe, example, before=model, storage=storage, rounds=rounds)
    return replace(found, note="; ".join(filter(None, (found.note, note))))


def choose(
    fused: nn.Module,
    recipe: Recipe,
    example: Example,
    *,
    before: nn.Module,
    storage: kernels.Storage = "float32",
    rounds: int = _ROUNDS,
) -> Compiled:
    """Give every `DenseLayer` of `fused`, in place, the fastest way to compute it.

    Args:
        fused: Of `fuse`.
        recipe: How it was fused.
        example: An input.
        before: What its outputs and its time are compared with.
        storage: Of sparse weights.
        rounds: Times that each way is measured.

    Raises:
        RuntimeError: The compiled model computes something else.
    """
    note = kernels.missing() or ""
    with evaluating(before), torch.no_grad():
        wanted = _outputs(before, example)
        layers = {name: m for name, m in fused.named_modules() if isinstance(m, DenseLayer)}
        inputs = _inputs(fused, layers, example)
        formats = _formats_to_try(layers, inputs) if not note else {}
        tried = {
            name: _tried(layer, inputs.get(name), formats.get(name, []), storage, not note, rounds)
            for name, layer in layers.items()
        }
        plans: dict[_Plan, dict[str, str]] = {}
        for plan in _PLANS:
            paths = {name: layer.best(plan) for name, layer in tried.items()}
            if paths not in plans.values():
                plans[plan] = paths
        copies = {plan: _assembled(fused, tried, paths) for plan, paths in plans.items()}
        calls: dict[Any, Callable[[], object]] = {"as it was": partial(run, before, example)}
        calls |= {plan: partial(run, model, example) for plan, model in copies.items()}
        times = _milliseconds(calls, rounds)
        dense = min((plan for plan in plans if not plan.sparse), key=times.__getitem__)
        taken = min(plans, key=times.__getitem__)
        if times[taken] > _GAIN * times[dense]:
            taken = dense
        compiled = copies[taken]
        error = difference(wanted, _outputs(compiled, example))
        if storage == "float32" and error > TOLERANCE:
            raise RuntimeError(
                f"the compiled model's outputs differ by {error:.2g} of the largest from those of "
                f"the model, more than {TOLERANCE:g}: please report it with the model"
            )
    return Compiled(
        model=compiled,
        choices=tuple(
            layer.choice(name, plans[taken][name], whole=taken == dense and len(plans) > 1)
            for name, layer in tried.items()
        ),
        milliseconds={
            "as it was": times["as it was"],
            "dense": times[dense],
            "compiled": times[taken],
        },
        error=error,
        machine=_machine(),
        note=note,
        recipe=recipe,
    )


def _check(model: nn.Module, example: Example, storage: str, rounds: int) -> None:
    if storage not in get_args(kernels.Storage) or rounds < 1:
        raise ValueError(
            f"got storage={storage!r}, rounds={rounds}; wanted one of "
            f"{', '.join(get_args(kernels.Storage))}, and at least one round"
        )
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name or 'the model'} is parametrized: call sparsifier.finalize() or "
                "gossamer.finalize(model) first, then compile the plain model"
            )
    batch_size(example)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += [("the example", tensor) for tensor in example_tensors(example)]
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}, and the sparse kernels run on the CPU: pass "
                "model.cpu() and an example there"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype}, and the sparse kernels compute in float32: pass "
                "model.float() and an example of that type"
            )


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """On the example and on drawn values, where the model takes those."""
    found = [tensor.clone() for tensor in nested_tensors(run(model, example))]
    drawn = random_sample(example)
    try:
        return found + [tensor.clone() for tensor in nested_tensors(run(model, drawn))]
    except Exception:  # a fixed batch size, or inputs that must be more than drawn numbers
        return found


def _inputs(
    model: nn.Module, layers: Mapping[str, DenseLayer], example: Example
) -> dict[str, tuple[Tensor, ...]]:
    """Tensors of the shapes that each layer gets: its input, and what is added."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    generator = torch.Generator().manual_seed(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in seen:
                seen[name] = tuple(torch.randn(x.shape, generator=generator) for x in args)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ------------------------------------------------------------------ one layer


class _Plan(NamedTuple):
    """What to choose by. together: dense neighbours hand each other channels-last images."""

    sparse: bool
    together: bool


_PLANS = tuple(_Plan(sparse, together) for sparse in (False, True) for together in (True, False))


@dataclass(frozen=True)
class _Tried:
    """The ways to compute a layer, and what they took. together: times without changing layouts."""

    ways: Mapping[str, Layer]
    milliseconds: Mapping[str, float]
    together: Mapping[str, float]
    density: float
    input: tuple[int, ...]
    why_not: str

    def best(self, plan: _Plan) -> str:
        """The way to take under a plan."""
        times = self.together if plan.together else self.milliseconds
        if not times:
            return "eager"
        dense = min((path for path in times if path in DENSE), key=times.__getitem__)
        sparse = [path for path in times if path not in DENSE]
        if not plan.sparse or not sparse:
            return dense
        fastest = min(sparse, key=times.__getitem__)
        return fastest if times[fastest] <= _GAIN * times[dense] else dense

    def choice(self, name: str, path: str, *, whole: bool) -> Choice:
        """The row of the table. whole: the network as a whole is faster without sparse layers."""
        weight = self.ways["eager"].geometry.weight_shape
        row = Choice(
            layer=name,
            weight=weight,
            input=self.input,
            density=self.density,
            milliseconds=self.milliseconds,
            path=path,
            reason=self.why_not,
        )
        if row.dense is None or row.sparse is None:
            return row
        gain = row.dense / row.sparse
        if path not in DENSE:
            reason = f"{gain:.2f}x as fast as dense"
            if self.why_not:
                reason += " in PyTorch, in the layout of the layers around it"
        elif self.why_not:
            return row
        elif gain * _GAIN < 1:
            reason = f"below break-even: sparse would be {gain:.2f}x as fast"
        elif whole:
            reason = f"{gain:.2f}x alone, but the whole network is faster dense"
        else:
            reason = f"{gain:.2f}x alone, lost to changes of layout around it"
        return replace(row, reason=reason)


def _tried(
    layer: DenseLayer,
    inputs: tuple[Tensor, ...] | None,
    formats: Sequence[kernels.Format],
    storage: kernels.Storage,
    has_kernels: bool,
    rounds: int,
) -> _Tried:
    weight, density = layer.weight, _density(layer)
    if inputs is None:
        why = "not called on the example"
        return _Tried({"eager": layer}, {}, {}, density, (), why)
    ways: dict[str, Layer] = {"eager": layer}
    if has_onednn():
        ways["onednn"] = PackedLayer(layer.geometry, weight, layer.bias, layer.relu)
    why = ""
    hopeless = _is_hopeless(layer)
    if hopeless:
        why = f"density {density:.2f}: too few zeros to use"
    for format in formats:
        sparse = SparseLayer.of(layer, format, "float32" if hopeless else storage)
        ways[sparse.path] = sparse
    if hopeless or has_kernels:
        pass
    elif layer.geometry.maps == 0 and inputs[0].dim() > 1:
        ways["csr"] = CsrLayer.of(layer)
    else:
        why = "only the kernels have sparse convolutions"
    calls: dict[str, Callable[[], object]] = {}
    for path, way in ways.items():
        calls[path] = partial(_plainly, way, inputs) if path in DENSE else partial(way, *inputs)
    if "onednn" in ways and layer.geometry.maps == 2:
        last = [x.contiguous(memory_format=torch.channels_last) for x in _batched(inputs)]
        calls["onednn, channels last"] = partial(ways["onednn"], *last)
    times = _milliseconds(calls, rounds)
    together = dict(times)
    if "onednn, channels last" in times:
        together["onednn"] = min(together["onednn"], together.pop("onednn, channels last"))
        times.pop("onednn, channels last")
    return _Tried(ways, times, together, density, tuple(inputs[0].shape), why)


def _plainly(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    y: Tensor = layer(*inputs)
    return y.contiguous()


def _batched(inputs: Iterable[Tensor]) -> list[Tensor]:
    return [x if x.dim() == 4 else x.unsqueeze(0) for x in inputs]


def _density(layer: DenseLayer) -> float:
    return float(layer.weight.count_nonzero()) / max(1, layer.weight.numel())


def _is_hopeless(layer: DenseLayer) -> bool:
    g = layer.geometry
    depthwise = g.maps and g.groups == g.inputs > 1  # few weights anyway: no change of layout
    return not depthwise and _density(layer) > _HOPELESS


def _formats_to_try(
    layers: Mapping[str, DenseLayer], inputs: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, list[kernels.Format]]:
    """By layer. Dense convolutions between sparse ones are tried as blocks without gaps."""
    hopeless = {name for name, layer in layers.items() if _is_hopeless(layer)}
    found: dict[str, list[kernels.Format]] = {}
    for name, (x, *_) in inputs.items():
        layer = layers[name]
        if name not in hopeless:
            found[name] = _formats(layer.geometry, layer.weight, x)
        elif layer.geometry.maps and len(hopeless) < len(layers):
            found[name] = ["block16"]
    return found


def _formats(geometry: Geometry, weight: Tensor, x: Tensor) -> list[kernels.Format]:
    """The formats worth trying on an input."""
    found: list[kernels.Format] = ["rows"]
    if geometry.maps == 0 and x.numel() // x.shape[-1] <= _FEW_ROWS:
        found.append("lanes")
    # In blocks of 16 outputs as many weights are multiplied as there are blocks with any non-zero.
    flat = weight.reshape(geometry.groups, geometry.outputs // geometry.groups, -1) != 0
    blocks = sum(float(panel.any(1).sum()) for panel in torch.split(flat, 16, 1))
    if 16 * blocks < 4 * max(1.0, float(flat.sum())):
        found.append("block16")
    return found


def _assembled(fused: nn.Module, tried: Mapping[str, _Tried], plan: Mapping[str, str]) -> nn.Module:
    """A copy of the fused model with the layers of the plan; weights are shared."""
    shared = {id(m): m for layer in tried.values() for m in layer.ways.values()}
    model = copy.deepcopy(fused, {**{id(t): t for t in _tensors(fused)}, **shared})
    for name, path in plan.items():
        model.set_submodule(name, tried[name].ways[path])
    return join(model)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


# ------------------------------------------------------------------ timing


def _milliseconds(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median milliseconds per call of each, in turns; every other round in reverse.

    With one thread by the process's own clock, which neighbours on the machine disturb less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, call in calls.items():
        call()  # packs weights, takes memory
        start = time.perf_counter()
        call()
        taken = 1e3 * (time.perf_counter() - start)
        repeats[name] = max(1, min(1000, round(_ROUND_MS / max(taken, 1e-3))))
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = clock()
            for _ in range(repeats[name]):
                calls[name]()
            times[name].append(1e3 * (clock() - start) / repeats[name])
    return {name: statistics.median(own) for name, own in times.items()}


def _machine() -> str:
    isa = "" if kernels.missing() else f", {kernels.get_isa()}"
    threads = torch.get_num_threads()
    return f"{_processor()}{isa}, {threads} thread(s), torch {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
