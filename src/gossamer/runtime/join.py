"""Joining: sparse layers that follow each other in a graph run as one call.

Between two layers Python takes longer than a small layer: what it works with has left the caches.
The graph itself stays as it is, with a node and a module for every layer, for whoever exports,
compiles, saves or copies it; only its `forward` goes another way where nobody looks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.runtime import kernels
from gossamer.runtime.layers import SparseLayer, is_watched

__all__ = ["join"]


def join(model: nn.Module) -> nn.Module:
    """The same model; of a graph, with a `forward` that joins sparse convolutions."""
    if isinstance(model, fx.GraphModule):
        runs = [run for run in _runs(model) if len(run) > 1]
        if runs:
            _redirect(model, runs)
    return model


def _runs(model: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Sparse convolutions that follow each other, in the order of the graph."""
    run: list[fx.Node] = []
    for node in model.graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, SparseLayer) and module.geometry.maps == 2 and not node.kwargs:
            run.append(node)
        else:
            yield run
            run = []


def _redirect(model: fx.GraphModule, runs: Sequence[Sequence[fx.Node]]) -> None:
    """Give the model's class, which is its own, the forward of a graph with joined runs.

    That graph's code works on this model, its modules and tensors. Copies of the model, which are
    made from its graph, have that graph's forward again.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(model.graph, copies))
    for i, run in enumerate(runs):
        name = f"_run_{i}"
        model.__dict__[name] = _replace(graph, name, [copies[node] for node in run], model)
    plain, joined = type(model).forward, type(fx.GraphModule(model, graph)).forward

    @functools.wraps(plain)
    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        chosen = plain if torch.compiler.is_compiling() else joined
        return chosen(self, *args, **kwargs)

    type(model).forward = forward


def _replace(graph: fx.Graph, name: str, nodes: Sequence[fx.Node], model: nn.Module) -> _Run:
    """One node for these; returns what it calls."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    numbers = {node: number for number, node in enumerate([*inputs, *nodes])}
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    layers, steps = [], []
    for node in nodes:
        layer = model.get_submodule(str(node.target))
        assert isinstance(layer, SparseLayer)
        layers.append(layer)
        steps.append(tuple(numbers[arg] for arg in node.args if isinstance(arg, fx.Node)))
    with graph.inserting_after(nodes[-1]):
        joined = graph.call_module(name, tuple(inputs))
    place = joined
    for i, node in enumerate(outputs):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (joined, i))
        node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    return _Run(layers, steps, [numbers[node] for node in outputs])


class _Run:
    """Sparse convolutions one after the other.

    Values are numbered: the inputs first, then each layer's output; a layer's step has the numbers
    of its input and of what is added.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        steps: Sequence[tuple[int, ...]],
        outputs: Sequence[int],
    ) -> None:
        self._layers, self._steps, self._outputs = layers, steps, outputs
        self._prepared: kernels.Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it knows where in memory the layers are

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._layers)
        if not (hooks or is_watched(*inputs) or any(x.requires_grad for x in inputs)):
            prepared = self._prepare(inputs)
            if prepared is not None and prepared.takes(inputs):
                return prepared(inputs)
        values = list(inputs)
        for layer, step in zip(self._layers, self._steps, strict=True):
            values.append(layer(*(values[number] for number in step)))
        return [values[number] for number in self._outputs]

    def _prepare(self, inputs: Sequence[Tensor]) -> kernels.Prepared | None:
        """A call for inputs of these shapes, where they are batches of images."""
        found = self._prepared
        shapes = tuple(tensor.shape for tensor in inputs)
        if found is not None and found.shapes == shapes:
            ours = zip(self._layers, found.steps, strict=True)
            if all(layer.holds(step) for layer, step in ours):
                return found
        if any(len(shape) != 4 for shape in shapes):
            return None
        steps = [layer.step(*step) for layer, step in zip(self._layers, self._steps, strict=True)]
        self._prepared = kernels.Prepared(steps, shapes, self._outputs)
        return self._prepared
