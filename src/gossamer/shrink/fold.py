"""Folding: a channel that computes nothing but a constant moves into the biases of its readers.

Where all weights of a channel are zero, what is left of it is its bias and what norms and
activations make of that: the same number for every input. Its readers can have that number in
their own bias, and need not read it any more. That is exact in a linear layer, and in a convolution
that does not pad with zeros (at the border those would stand in the constant's place). A reader
without a bias hands the number on to the batch norm behind it, which takes it off its running mean;
in training that norm subtracts it anyway. A constant of zero can go anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gossamer.channels import ChannelGroup, Slice
from gossamer.example import Example, evaluating, map_tensors, run
from gossamer.shrink.verify import max_difference, outputs, tensor_along, tolerance

__all__ = ["Folded", "fold_constants", "silent"]

_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Folded(NamedTuple):
    """channels: how many were folded per group. kept: why silent channels of a group were not."""

    channels: dict[str, int]
    kept: dict[str, str]


@torch.no_grad()
def fold_constants(model: nn.Module, groups: Sequence[ChannelGroup], example: Example) -> Folded:
    """Fold the constants of silent channels into their readers, in place, verified.

    The readers' weights for these channels are zero afterwards. A group whose folding changes the
    outputs on the example is left as it was.

    Args:
        model: A plain model.
        groups: Channels that may go.
        example: An input of the model.
    """
    channels: dict[str, int] = {}
    kept: dict[str, str] = {}
    before = outputs(model, example)
    norms = _norms_behind(model, example)
    for group in groups:
        rows = (silent(model, group) & _read(model, group)).nonzero().squeeze(1)
        if not len(rows):
            continue
        others = [part.tensor for part in group.consumers if not _is_reader(model, part)]
        if others:
            kept[group.name] = f"{others[0]} reads them, which cannot take a constant in"
            continue
        inputs = _inputs(model, group, example)
        foldable = torch.ones(len(rows), dtype=torch.bool)
        deltas = []
        for part in group.consumers:
            reader = model.get_submodule(part.layer)
            seen = inputs[part.layer]
            if isinstance(seen, str):
                foldable[:] = False
                kept[group.name] = seen
                break
            positions = part.index[rows]  # (rows, per_channel)
            low, high = (extreme[positions] for extreme in seen)
            constant = ((high - low) <= 1e-6 * high.abs().clamp(min=1e-12)).all(1)
            if not constant.all():
                kept[group.name] = "what they emit is not one constant"
            norm = norms.get(reader)
            reason = _not_exact(part.layer, reader, norm)
            exact = constant if not reason else constant & (high == 0).all(1) & (low == 0).all(1)
            if reason and bool((constant & ~exact).any()):
                kept[group.name] = reason
            foldable &= exact
            deltas.append((reader, norm, positions, high))
        if not foldable.any():
            continue
        touched = [module for reader, norm, *_ in deltas for module in (reader, norm) if module]
        were = [_state(module) for module in touched]
        for reader, norm, positions, values in deltas:
            _fold(reader, norm, positions[foldable].flatten(), values[foldable].flatten())
        difference = max_difference(before, outputs(model, example))
        if difference > tolerance(before, 1.0):
            for module, state in zip(touched, were, strict=True):
                module.load_state_dict(state)
            kept[group.name] = f"folding them changes the outputs by {difference:.3g}"
        else:
            channels[group.name] = int(foldable.sum())
    return Folded(channels, kept)


def silent(model: nn.Module, group: ChannelGroup) -> Tensor:
    """`(channels,)` bool: channels all of whose weights are zero, in every producer."""
    found = torch.ones(group.channels, dtype=torch.bool)
    for part in group.producers:
        found &= ~(tensor_along(model, part) != 0).flatten(1).any(1).cpu()[part.index].any(1)
    return found


def _is_reader(model: nn.Module, part: Slice) -> bool:
    """Whether a slice lies in the weight of a layer that can take constants into its bias."""
    reader = model.get_submodule(part.layer)
    return isinstance(reader, _READERS) and part.tensor.endswith(".weight")


def _read(model: nn.Module, group: ChannelGroup) -> Tensor:
    found = torch.zeros(group.channels, dtype=torch.bool)
    for part in group.consumers:
        found |= (tensor_along(model, part) != 0).flatten(1).any(1).cpu()[part.index].any(1)
    return found


def _inputs(
    model: nn.Module, group: ChannelGroup, example: Example
) -> dict[str, tuple[Tensor, Tensor] | str]:
    """Lowest and highest value that each reader sees at each input position, or why unknown."""
    seen: dict[str, list[Tensor]] = {part.layer: [] for part in group.consumers}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            seen[layer].append(arguments[0].detach().movedim(dim, 0).flatten(1))

        return hook

    generator = torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor)

    handles = [model.get_submodule(layer).register_forward_pre_hook(watch(layer)) for layer in seen]
    try:
        with evaluating(model):
            for inputs in (example, map_tensors(example, noisy)):
                run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[Tensor, Tensor] | str] = {}
    for layer, values in seen.items():
        if len(values) != 2:
            found[layer] = f"{layer} runs {len(values) // 2} times in a forward pass"
        else:
            whole = torch.cat(values, 1).double().cpu()
            found[layer] = (whole.amin(1), whole.amax(1))
    return found


def _norms_behind(model: nn.Module, example: Example) -> dict[nn.Module, nn.Module]:
    """The batch norm that a layer without a bias hands its output to, by layer."""
    made: list[tuple[Tensor, nn.Module]] = []
    behind: dict[nn.Module, nn.Module] = {}

    def leave(module: nn.Module, _: object, output: Tensor) -> None:
        made.append((output, module))

    def enter(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        for output, layer in made:
            if arguments and arguments[0] is output:
                behind[layer] = module

    handles = []
    for module in model.modules():
        if isinstance(module, _READERS) and module.bias is None:
            handles.append(module.register_forward_hook(leave))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(enter))
    try:
        with evaluating(model):
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return behind


def _not_exact(layer: str, reader: nn.Module, norm: nn.Module | None) -> str:
    """Why a constant other than zero cannot be folded into this reader; empty when it can."""
    if isinstance(reader, nn.modules.conv._ConvNd):
        padded = reader.padding != "valid" and any(
            size != 0 for size in (reader.padding if not isinstance(reader.padding, str) else (1,))
        )
        if padded and reader.padding_mode == "zeros":
            return f"{layer} pads with zeros, which stand in the constant's place at the border"
    if reader.bias is None and norm is None:
        return f"{layer} has no bias to fold their constants into, and no batch norm behind it"
    return ""


def _fold(reader: nn.Module, norm: nn.Module | None, positions: Tensor, values: Tensor) -> None:
    weight = _weight(reader)
    columns = weight[:, positions.to(weight.device)].double()
    per_position = columns.flatten(2).sum(2) if columns.dim() > 2 else columns
    constant = per_position @ values.to(columns)
    if isinstance(reader.bias, Tensor):
        reader.bias += constant.to(reader.bias)
    elif norm is not None:
        mean = norm.running_mean
        assert isinstance(mean, Tensor)
        mean -= constant.to(mean)
    weight[:, positions.to(weight.device)] = 0


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()
