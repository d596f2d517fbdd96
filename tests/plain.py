"""Masked training of an ordinary model by hand, without the package: the twins move the masks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.train.work import Work
from nets import Batch, batches, net, optimizer_for


class Moment(NamedTuple):
    """What a rule sees after the optimizer's step: one array per sparse layer, in model order."""

    step: int
    weights: list[np.ndarray]
    masks: list[np.ndarray]
    gradients: list[np.ndarray]  # dense, of this step's batch


class Change(NamedTuple):
    """Bool arrays per layer: what stays as it is, and what starts at zero."""

    kept: Sequence[np.ndarray]
    grown: Sequence[np.ndarray]


Rule = Callable[[Moment], Change | None]


def train(
    model: nn.Module,
    masks: Mapping[str, np.ndarray],
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    rule: Rule,
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of all steps, and the masks at the end; `masks`: by name of the layer, bool."""
    layers = {name: model.get_submodule(name) for name in masks}
    current = dict(masks)

    def zero(keep: Mapping[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, layer in layers.items():
                state = optimizer.state.get(layer.weight, {})
                for value in (layer.weight, *state.values()):
                    if value.shape == layer.weight.shape:
                        value[~torch.from_numpy(keep[name])] = 0

    zero(current)
    model.train()
    losses = []
    for step, (x, y) in enumerate(data, 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = [layer.weight.grad.numpy().copy() for layer in layers.values()]
        for name, layer in layers.items():
            layer.weight.grad[~torch.from_numpy(current[name])] = 0
        optimizer.step()
        weights = [layer.weight.detach().numpy() for layer in layers.values()]
        change = rule(Moment(step, weights, list(current.values()), gradients))
        if change is not None:
            zero(dict(zip(layers, change.kept, strict=True)))
            current = {
                name: kept | grown for name, kept, grown in zip(layers, *change, strict=True)
            }
    return losses, current


class Bill(NamedTuple):
    """Training MACs per example of a run of the MLP: in all, and of the forward at each step."""

    total: float
    forward: list[int]
    dense_forward: int


def training_macs(method: gossamer.Method, steps: int) -> Bill:
    """What `gossamer train` counts for a run of the MLP, beside weights counted in its masks."""
    model = net("mlp")
    sparsifier = gossamer.Sparsifier(model, method, total_steps=steps)
    optimizer = optimizer_for("sgd", model)
    data = batches(steps)
    work = Work(model, data[0][0], sparsifier)
    forward = []
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        work.add(1)
        forward.append(sum(int(site.masked.mask.sum()) for site in sparsifier.sites))
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    return Bill(work.total, forward, sum(site.weight.numel() for site in sparsifier.sites))
