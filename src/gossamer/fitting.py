"""Fitting: what a method makes sparse of a model, which channels may go, and what they cost."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import Example, map_tensors
from gossamer.latency import LatencyTable, Milliseconds
from gossamer.latency import latency as measure_latency
from gossamer.method import Method, Price
from gossamer.parallel import from_first_rank
from gossamer.prices import Bytes, Macs
from gossamer.shrink.verify import probe, try_cuts
from gossamer.site import Place, Site, fill_flat_weights, find_layers, unsupported
from gossamer.sparse_weight import zero_after_load

__all__ = ["attach", "eligible", "fitting", "on_device", "priced"]


def fitting(
    model: nn.Module, method: Method, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[dict[str, Place], dict[str, str]]:
    """The weights that the method makes sparse, and why it leaves others dense, by name.

    Raises:
        ValueError: No weight fits, or one that `include` names does not; see `find_layers`.
    """
    layers = find_layers(model, include, exclude, method.recurrent)
    reasons = {
        name: reason
        for name, place in layers.items()
        if (reason := method.unfit(place) or _not_in_blocks(place, method.block))
    }
    asked = [name for name in reasons if name in (include or ())]  # by name, not by a pattern
    if asked:
        raise ValueError(f"{asked[0]} {reasons[asked[0]]}: leave it out of include")
    if len(reasons) == len(layers):
        listed = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:3])
        raise ValueError(f"{type(method).__name__} fits no layer of the model: {listed}")
    fit = {name: place for name, place in layers.items() if name not in reasons}
    return fit, reasons | unsupported(model, method.recurrent)


def _not_in_blocks(place: Place, block: int) -> str | None:
    """Why the outputs of a layer make up no whole blocks; a block never spans two groups."""
    groups = getattr(place.module, "groups", 1)
    outputs = len(place.weight) // groups
    if outputs % block == 0:
        return None
    each = f"{outputs} outputs in each of {groups} groups" if groups > 1 else f"{outputs} outputs"
    return f"has {each}, no multiple of block={block}"


def attach(name: str, place: Place, method: Method, count: int, generator: torch.Generator) -> Site:
    """Make a weight sparse: parametrize it by what the method computes it with."""
    module, tensor = place
    weight = place.weight
    assert isinstance(weight, nn.Parameter)
    sparse = method.attach(weight, count, generator)
    parametrize.register_parametrization(module, tensor, sparse)
    parametrized = module.parametrizations[tensor]  # type: ignore[index]
    assert isinstance(parametrized, parametrize.ParametrizationList)
    parametrized.register_load_state_dict_post_hook(zero_after_load)  # type: ignore[no-untyped-call]
    if isinstance(module, nn.RNNBase):
        fill_flat_weights(module)
    return Site(name, module, tensor, weight, sparse, weight.shape, method.block)


def eligible(
    model: nn.Module,
    method: Method,
    layers: Mapping[str, Place],
    example: Example | None,
    keep_channels: Sequence[str],
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Channel groups that may lose channels, and why the others may not."""
    if not method.needs_graph:
        return [], {}
    if example is None:
        raise ValueError(
            f"{type(method).__name__} removes channels and must see how layers are connected: "
            "pass example=<an input of the model>"
        )
    free, locked = [], {}
    groups = find_groups(model, example)
    for pattern in keep_channels:
        if not fnmatch.filter([group.name for group in groups], pattern):
            near = difflib.get_close_matches(pattern, [group.name for group in groups], 3)
            raise ValueError(
                f"keep_channels pattern {pattern!r} matches no layer that has channels"
                f"{': did you mean ' + ' or '.join(map(repr, near)) + '?' if near else ''}"
            )
    for group in groups:
        dense = [p.layer for p in (*group.producers, *group.consumers) if p.layer not in layers]
        if group.locked:
            locked[group.name] = group.locked
        elif not (group.internal or method.cuts_skip_paths):
            locked[group.name] = (
                "they lie on a skip path or make up attention heads (several layers write or read "
                "them): prune_residual=True cuts those too"
            )
        elif dense:
            locked[group.name] = f"{dense[0]} is left dense, and both ends must be sparse"
        elif group.unit(method.block) is None:
            locked[group.name] = f"they do not make up whole blocks of {method.block} outputs"
        elif any(fnmatch.fnmatchcase(group.name, pattern) for pattern in keep_channels):
            locked[group.name] = "keep_channels names it"
        else:
            free.append(group)
    tried = try_cuts(model, free, probe(model, example))
    locked.update(tried.refused)
    free = [group for group in tried.groups if group.name not in tried.refused]
    if not free:
        listed = "; ".join(f"{name}: {reason}" for name, reason in locked.items())
        raise ValueError(
            f"{_settings(method)}, but no layer of the model may lose channels: {listed}"
        )
    return free, locked


def _settings(method: Method) -> str:
    shown = ", ".join(f"{k}={v!r}" for k, v in method.to_dict().items() if "sparsity" in k)
    return f"{type(method).__name__}({shown})"


def priced(
    model: nn.Module,
    method: Method,
    groups: Sequence[ChannelGroup],
    example: Example | None,
    table: LatencyTable | None,
) -> dict[str, Price]:
    """What the network costs at other widths of its groups, in the units the method asks for."""
    prices: dict[str, Price] = {}
    if table is not None and "latency" not in method.priced_in:
        raise ValueError(
            f"latency= is given, but {type(method).__name__} does not follow it: leave it out, or "
            "have the method ask for it (max_latency_ms, channel_score_per='latency')"
        )
    if not method.priced_in:
        return prices
    assert example is not None
    if "macs" in method.priced_in:
        prices["macs"] = Macs(model, groups, example)
    if "bytes" in method.priced_in:
        prices["bytes"] = Bytes(model, groups)
    if "latency" in method.priced_in:
        readings = from_first_rank(
            lambda: (table or measure_latency(model, example, groups=groups)).readings
        )
        if table is None:
            table = measure_latency(model, example, groups=groups, readings=readings)
        names = [group.name for group in groups]
        prices["latency"] = Milliseconds(table.with_readings(readings), names)
    return prices


def on_device(example: Example, model: nn.Module) -> Example:
    """The example where the model's parameters are."""
    device = next(model.parameters()).device
    moved: Example = map_tensors(example, lambda tensor: tensor.to(device))
    return moved
