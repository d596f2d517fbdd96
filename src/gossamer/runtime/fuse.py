"""Fusing: batch norms into the layers before them, sums and ReLUs onto their outputs.

Where `torch.fx` can follow the forward, layers are fused in its graph: norm, residual sum and ReLU.
Where it cannot (control flow by values), norms and ReLU modules that were seen to take exactly what
one layer gave are dropped. Either way the fused model is compared with the one it was made from,
and taken back where they differ.

What was fused is a `Recipe` of plain data, by which a fresh model is fused the same way.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gossamer.example import (
    Example,
    call_arguments,
    evaluating,
    nested_tensors,
    random_sample,
    run,
)
from gossamer.reading import reason
from gossamer.runtime.layers import DenseLayer, Geometry, MaxPool

__all__ = ["Fusion", "Recipe", "difference", "fuse", "fuse_like"]

_NORMS: dict[int, tuple[type[nn.Module], ...]] = {
    0: (nn.BatchNorm1d,),
    1: (nn.BatchNorm1d,),
    2: (nn.BatchNorm2d,),
}
_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
# Modules that read the weights of their linear layers instead of calling them.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TOLERANCE = 1e-4  # of the largest output


class Fusion(NamedTuple):
    """What was fused onto a layer: the norm's name (or ""), a residual sum, a ReLU."""

    norm: str = ""
    add: bool = False
    relu: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model was fused.

    Attributes:
        by: "graph", or "modules" where the forward could not be followed.
        given: Names of the forward's arguments that the example gives.
        layers: What was fused onto each layer, by its name.
        dropped: Norms and ReLUs that pass on what they get ("modules" only).
    """

    by: Literal["graph", "modules"]
    given: tuple[str, ...] = ()
    layers: Mapping[str, Fusion] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def fuse(model: nn.Module, example: Example) -> tuple[nn.Module, Recipe, str]:
    """A copy of `model` for inference, its layers `DenseLayer`s, and how it was fused.

    Also what was not fused and why, in a line; empty where the graph could be followed.

    Raises:
        Exception: Whatever the model raises on the example.
    """
    whole = [example, random_sample(example)]
    wanted = [_outputs(model, inputs) for inputs in whole[:1]]
    try:
        wanted += [_outputs(model, inputs) for inputs in whole[1:]]
    except Exception:  # the model does not take drawn values, or a batch of two
        whole = whole[:1]
    reasons = []
    for attempt in (_by_graph, _by_modules):
        try:
            fused, recipe = attempt(_plain(model), example)
            found = [_outputs(fused, inputs) for inputs in whole]
        except Exception as error:  # whatever tracing leads to: there is a way without
            reasons.append(f"{type(error).__name__}: {reason(error)}")
            continue
        worst = max(difference(a, b) for a, b in zip(wanted, found, strict=True))
        if worst <= TOLERANCE:
            note = f"sums and ReLU functions are not fused ({reasons[0]})" if reasons else ""
            return fused, recipe, note
        reasons.append(f"outputs differ by {worst:.2g} of the largest")
    plain = _plain(model)
    layers = dict.fromkeys(_called(plain, example), Fusion())
    _replace(plain, layers)
    note = f"nothing is fused (in the graph: {reasons[0]}; by modules: {reasons[1]})"
    return plain, Recipe(by="modules", layers=layers), note


def fuse_like(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of a fresh model of the same class, fused as the recipe says.

    Raises:
        ValueError: The recipe does not fit this model; says where.
    """
    plain = _plain(model)
    if recipe.by == "modules":
        names = {name for name, _ in plain.named_modules()}
        for name in [*recipe.dropped, *recipe.layers]:
            if name not in names:
                raise ValueError(f"there is no layer {name} in this {type(model).__name__}")
        for name, fusion in recipe.layers.items():
            if fusion.norm:
                _fold(plain, name, fusion.norm)
        for name in recipe.dropped:
            plain.set_submodule(name, nn.Identity())
        _replace(plain, recipe.layers)
        return plain
    graph = _trace(plain, recipe.given)
    fused = _fuse_graph(graph, recipe.layers)
    for name, fusion in recipe.layers.items():
        if fused.get(name) != fusion:
            raise ValueError(
                f"{name} was fused with {fusion}, and with {fused.get(name)} in this "
                f"{type(model).__name__}"
            )
    return graph


def difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference of the outputs over the largest output; inf where they do not compare."""
    worst = 0.0
    if len(wanted) != len(found):
        return float("inf")
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_floating_point() and a.numel():
            scale = a.abs().max().clamp(min=1e-12)
            worst = max(worst, float(((a - b).abs().max() / scale).nan_to_num(float("inf"))))
    return worst


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [tensor.clone() for tensor in nested_tensors(run(model, example))]


def _plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


# ------------------------------------------------------------------ which layers


def _eligible(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that a `DenseLayer` can stand for."""
    read = {
        id(inner)
        for module in model.modules()
        if isinstance(module, _READERS)
        for inner in module.modules()
    }
    for name, module in model.named_modules():
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        fits = name and id(module) not in read and not hooks
        if fits and isinstance(Geometry.of(module), Geometry):
            yield name, module


def _called(model: nn.Module, example: Example) -> list[str]:
    """Of the eligible layers those whose forward runs on the example."""
    called: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in list(_eligible(model))
    ]
    try:
        _outputs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def _replace(model: nn.Module, layers: Mapping[str, Fusion]) -> None:
    for name, fusion in layers.items():
        model.set_submodule(name, _dense(model.get_submodule(name), fusion.relu))
    _replace_pools(model)


def _replace_pools(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        hooks = module._forward_hooks or module._forward_pre_hooks
        pool = MaxPool.of(module) if type(module) is nn.MaxPool2d and name and not hooks else None
        if pool is not None:
            model.set_submodule(name, pool)


def _dense(module: nn.Module, relu: bool) -> DenseLayer:
    geometry = Geometry.of(module)
    if not isinstance(geometry, Geometry):
        raise ValueError(f"a {type(module).__name__} where a layer was packed: {geometry}")
    assert isinstance(module.weight, Tensor)
    bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
    return DenseLayer(geometry, module.weight.detach().contiguous(), bias, relu)


def _fold(model: nn.Module, name: str, norm: str) -> None:
    """Fold a norm's scale and shift into the layer before it."""
    layer, behind = model.get_submodule(name), model.get_submodule(norm)
    if not isinstance(behind, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"a {type(behind).__name__} where a norm was folded: {norm}")
    folded: nn.Module
    if isinstance(layer, nn.Linear):
        folded = fuse_linear_bn_eval(layer, behind)
    else:
        folded = fuse_conv_bn_eval(layer, behind)  # type: ignore[type-var]
    model.set_submodule(name, folded.requires_grad_(False))


def _is_norm(module: object, geometry: Geometry) -> bool:
    return type(module) in _NORMS[geometry.maps] and bool(
        getattr(module, "track_running_stats", False)
    )


# ------------------------------------------------------------------ in the graph


def _by_graph(model: nn.Module, example: Example) -> tuple[nn.Module, Recipe]:
    args, kwargs = call_arguments(example)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    given = tuple(bound.arguments)
    graph = _trace(model, given)
    places = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = [bound.arguments[str(name)] for name in places if name in bound.arguments]
    with torch.no_grad():
        ShapeProp(graph).propagate(*inputs)
    return graph, Recipe(by="graph", given=given, layers=_fuse_graph(graph))


def _trace(model: nn.Module, given: Sequence[str]) -> fx.GraphModule:
    """The forward as a graph; arguments that are not given have their defaults."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        raise ValueError("a forward with *args or **kwargs is not followed")
    fixed = {name: p.default for name, p in parameters.items() if name not in given}
    return fx.symbolic_trace(model, concrete_args=fixed or None)


def _fuse_graph(
    graph: fx.GraphModule, wanted: Mapping[str, Fusion] | None = None
) -> dict[str, Fusion]:
    """Fuse in place: all that can be, or what is wanted. Returns what was fused, by layer."""
    _drop_identities(graph)
    uses = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    eligible = dict(_eligible(graph))
    done: dict[str, Fusion] = {}
    for node in list(graph.graph.nodes):
        name = str(node.target)
        if node.op != "call_module" or name not in eligible or name in done:
            continue
        if wanted is not None and name not in wanted:
            continue
        fusion = Fusion() if wanted is None else wanted[name]
        if uses[name] == 1:
            fusion = _Site(graph, node, uses).fuse(None if wanted is None else fusion)
        graph.set_submodule(name, _dense(graph.get_submodule(name), fusion.relu))
        done[name] = fusion
    inside = [  # of modules that the graph does not look into
        name for name in eligible if name not in done and _is_within_leaf(graph, name, uses)
    ]
    for name in inside:
        if wanted is None or name in wanted:
            graph.set_submodule(name, _dense(graph.get_submodule(name), relu=False))
            done[name] = Fusion()
    _replace_pools(graph)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return done


def _is_within_leaf(graph: fx.GraphModule, name: str, uses: Counter[Any]) -> bool:
    parts = name.split(".")
    return any(uses[".".join(parts[:end])] for end in range(1, len(parts)))


def _drop_identities(graph: fx.GraphModule) -> None:
    """Take out what does nothing in eval mode: a layer's user behind it is then the layer's own."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            idle = type(module) is nn.Identity or isinstance(module, nn.modules.dropout._DropoutNd)
        else:
            idle = node.target is F.dropout and node.kwargs.get("training") is False
        if idle and node.args and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


class _Site:
    """A layer's node, and what stands behind it."""

    def __init__(self, graph: fx.GraphModule, node: fx.Node, uses: Counter[Any]) -> None:
        self._graph, self._node, self._uses = graph, node, uses
        geometry = Geometry.of(graph.get_submodule(str(node.target)))
        assert isinstance(geometry, Geometry)
        self._geometry = geometry

    def fuse(self, wanted: Fusion | None) -> Fusion:
        """Fuse what can be, or at most what is wanted."""
        norm = self._norm() if wanted is None or wanted.norm else ""
        add = (wanted is None or wanted.add) and self._add(checked=wanted is None)
        relu = (wanted is None or wanted.relu) and self._relu()
        return Fusion(norm, add, relu)

    def _user(self) -> fx.Node | None:
        """The only one that reads the layer's output."""
        users = list(self._node.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def _drop(self, user: fx.Node) -> None:
        user.replace_all_uses_with(self._node)
        self._graph.graph.erase_node(user)

    def _norm(self) -> str:
        user = self._user()
        if user is None or user.op != "call_module" or self._uses[user.target] != 1:
            return ""
        name = str(user.target)
        flat = self._geometry.maps or len(_shape(self._node) or (0, 0)) == 2
        if not flat or not _is_norm(self._graph.get_submodule(name), self._geometry):
            return ""
        _fold(self._graph, str(self._node.target), name)
        self._drop(user)
        return name

    def _add(self, *, checked: bool) -> bool:
        user = self._user()
        if user is None or not _is_sum(user) or len(user.args) != 2 or user.kwargs:
            return False
        first, second = user.args
        other = second if first is self._node else first
        if not isinstance(other, fx.Node) or first is second:
            return False
        if checked and (_shape(other) is None or _shape(other) != _shape(self._node)):
            return False
        # x += layer(y) changes x, which somebody may read later.
        if _in_place(user, self._graph) and first is not self._node:
            return False
        if any(_in_place(node, self._graph) for node in _between(self._node, user)):
            return False  # the layer is to run later than it did
        with self._graph.graph.inserting_before(user):
            moved = self._graph.graph.call_module(
                str(self._node.target), (*self._node.args, other), dict(self._node.kwargs)
            )
        moved.meta = dict(user.meta)
        user.replace_all_uses_with(moved)
        self._graph.graph.erase_node(user)
        self._graph.graph.erase_node(self._node)
        self._node = moved
        return True

    def _relu(self) -> bool:
        user = self._user()
        if user is None or not _is_relu(user, self._graph):
            return False
        self._drop(user)
        return True


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    found = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if found is None else tuple(found)


def _is_sum(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in _SUMS


def _is_relu(node: fx.Node, graph: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELUS


def _in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    ends = name.endswith("_") and not name.endswith("__")
    return ends or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


# ------------------------------------------------------------------ module by module


def _by_modules(model: nn.Module, example: Example) -> tuple[nn.Module, Recipe]:
    called = _called(model, example)
    behind = _Behind(model, example)
    layers: dict[str, Fusion] = {}
    dropped: list[str] = []
    for name in called:
        geometry = Geometry.of(model.get_submodule(name))
        assert isinstance(geometry, Geometry)
        norm = behind.of(name, partial(_is_norm, geometry=geometry))
        relu = behind.of(norm or name, lambda module: type(module) is nn.ReLU)
        layers[name] = Fusion(norm=norm, relu=bool(relu))
        dropped += [other for other in (norm, relu) if other]
    recipe = Recipe(by="modules", layers=layers, dropped=tuple(dropped))
    return fuse_like(model, recipe), recipe


class _Behind:
    """Which module took exactly the tensor that another gave, each running once."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self._model = model
        self._runs: Counter[str] = Counter()
        self._given: list[tuple[Tensor, str]] = []
        self._takers: dict[str, list[str]] = {}
        handles = []
        for name, module in model.named_modules():
            if not list(module.children()):
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave(name)))
        try:
            _outputs(model, example)
        finally:
            for handle in handles:
                handle.remove()

    def of(self, name: str, wanted: Callable[[nn.Module], bool]) -> str:
        """The name of the only module behind it, if it is wanted; else empty."""
        takers = self._takers.get(name, [])
        if len(takers) != 1 or self._runs[name] != 1 or self._runs[takers[0]] != 1:
            return ""
        return takers[0] if wanted(self._model.get_submodule(takers[0])) else ""

    def _enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._runs[name] += 1
            for tensor, giver in self._given:
                if args and args[0] is tensor:
                    self._takers.setdefault(giver, []).append(name)

        return hook

    def _leave(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and not (args and output is args[0]):
                self._given.append((output, name))

        return hook
