"""Verification: a cut must leave the outputs as they were, or it is taken back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gossamer.channels import Change, ChannelGroup, Resize, Slice
from gossamer.example import (
    Example,
    evaluating,
    first_samples,
    map_tensors,
    nested_tensors,
    random_sample,
    run,
)
from gossamer.shrink.slice import Refusal, apply_cuts, cuts_for

__all__ = [
    "Tried",
    "Verified",
    "cut_verified",
    "max_difference",
    "outputs",
    "probe",
    "tensor_along",
    "tolerance",
    "try_cuts",
]

_TRIALS = 24  # settings that are tried for one group, at most
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors of the model's output on `example`, in eval mode, without autocast."""
    with evaluating(model):
        return _run(model, example)


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    device = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return list(nested_tensors(run(model, example)))


def probe(model: nn.Module, example: Example) -> Example:
    """What to compare outputs on: the example's first sample and a second one drawn like it.

    The example's first two samples where its tensors share no batch, or the model cannot compute
    with drawn values.
    """
    first = first_samples(example, 2)
    drawn = random_sample(first)
    if drawn is first:
        return first
    try:
        finite = all(bool(value.isfinite().all()) for value in outputs(model, drawn))
    except Exception:  # it takes certain values only: indices that fit each other, say
        return first
    return drawn if finite else first


def tensor_along(model: nn.Module, part: Slice) -> Tensor:
    """The values a slice lies in, its dimension first; a view of the tensor."""
    module = model.get_submodule(part.layer)
    value = getattr(module, part.tensor.rpartition(".")[2])
    assert isinstance(value, Tensor)
    return value.detach().movedim(part.dim, 0)


def max_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest absolute difference over all outputs; infinite when shapes differ or one is NaN."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return float("inf")
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        if one.numel():
            difference = float((one.double() - other.double()).abs().max())
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def tolerance(values: Sequence[Tensor], least_scale: float) -> float:
    """Difference that reordered sums may cause, relative to the largest output."""
    scale = max([least_scale, *(float(value.abs().max()) for value in values if value.numel())])
    return scale * max((_TOLERANCE.get(value.dtype, 0.0) for value in values), default=0.0)


class Verified(NamedTuple):
    """Cuts that were made, batch after batch, and the groups whose cut was taken back, with why."""

    batches: list[list[Change]]
    refused: dict[str, str]


def cut_verified(
    model: nn.Module,
    removals: Sequence[tuple[ChannelGroup, Tensor]],
    example: Example,
    optimizer: torch.optim.Optimizer | None = None,
    least_scale: float = 1.0,
) -> Verified:
    """Remove channels in place, where that leaves the outputs on `example` as they were.

    All groups are cut at once; only when outputs differ is each tried by itself, and taken back if
    it is to blame. Differences count relative to the largest output, and at least to
    `least_scale`.
    """
    before = outputs(model, example)
    limit = tolerance(before, least_scale)

    def attempt(chosen: Sequence[tuple[ChannelGroup, Tensor]]) -> tuple[list[Change], str]:
        cuts = cuts_for(model, chosen)
        try:
            undo = apply_cuts(model, cuts, optimizer)
        except Refusal as error:
            return [], str(error)
        try:
            difference = max_difference(before, outputs(model, example))
        except Exception as error:
            # Whatever a model raises on a wrong width says the same: this group must stay.
            undo()
            return [], f"the model fails once they are cut ({type(error).__name__}: {error})"
        if difference > limit:
            undo()
            return [], f"cutting them changes the outputs by {difference:.3g}"
        return cuts, ""

    removals = [(group, channels) for group, channels in removals if len(channels)]
    if not removals:
        return Verified([], {})
    cuts, reason = attempt(removals)
    if not reason:
        return Verified([cuts], {})
    batches: list[list[Change]] = []
    refused: dict[str, str] = {}
    for group, channels in removals:
        rows = torch.zeros(group.channels, dtype=torch.bool)
        rows[channels] = True
        for batch in batches:
            group = group.after(batch)
        cuts, reason = attempt([(group, rows.nonzero().squeeze(1))])
        if reason:
            refused[group.name] = reason
        else:
            batches.append(cuts)
    return Verified(batches, refused)


class Tried(NamedTuple):
    """The groups, with the settings that change with them, and why some cannot be cut."""

    groups: list[ChannelGroup]
    refused: dict[str, str]


def try_cuts(model: nn.Module, groups: Sequence[ChannelGroup], example: Example) -> Tried:
    """Cut every unlocked group on copies, one half and then the other, to see which cuts are exact.

    The channels are made dead first the way a method does it: no consumer reads them. The copies
    compute in float64, so that no rounding passes for a difference, and have noise on their
    parameters, so that no zero or tiny weight hides one. Outputs are compared in eval mode, and in
    train mode too unless that is random by itself (dropout). Where a model fails on the new
    widths, numbers in its own modules that spell the old ones are tried as well.
    """
    original, sample = _in_double(model, example)
    generator = torch.Generator().manual_seed(0)
    _add_noise(original, generator)
    drawn = {
        group.name: torch.randperm(group.channels, generator=generator)
        for group in groups
        if not group.locked
    }
    settled = {group.name: group for group in groups}
    refused: dict[str, str] = {}
    for half in range(2):
        removals = []
        for name, channels in drawn.items():
            if name not in refused:
                gone = channels.tensor_split([len(channels) // 2])[half]
                removals.append((settled[name], gone[: len(channels) - 1].sort().values))
        refused |= _try(original, removals, sample, settled, training=half == 0)
    return Tried(list(settled.values()), refused)


def _try(
    original: nn.Module,
    removals: Sequence[tuple[ChannelGroup, Tensor]],
    example: Example,
    settled: dict[str, ChannelGroup],
    training: bool,
) -> dict[str, str]:
    """Make channels dead and cut them; why not. Groups with their settings go to `settled`."""
    masked = copy.deepcopy(original)
    for group, gone in removals:
        for part in group.consumers:
            tensor_along(masked, part)[part.index[gone].flatten()] = 0
    trial = copy.deepcopy(masked)
    made = cut_verified(trial, removals, example, least_scale=0.0)
    refused = dict(made.refused)
    for group, gone in removals:
        if group.name in refused:
            found = _respelled(trial, group, gone, made.batches, example)
            if found is not None:
                settled[group.name] = replace(group, resizes=found)
                del refused[group.name]
    if training:
        whole = [
            (settled[group.name], gone)
            for group, gone in removals
            if group.name not in refused and len(gone)
        ]
        if whole and _differs_in_training(masked, whole, example):
            for group, gone in whole:
                if _differs_in_training(masked, [(group, gone)], example):
                    refused[group.name] = "cutting them changes what the model computes in training"
    return refused


@torch.no_grad()
def _add_noise(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # Zeros get a value, the others keep their sign: some are under a root.
            fan_in = parameter[0].numel() if parameter.dim() else 1
            draw, spread = (
                make(parameter.shape, generator=generator).to(parameter)
                for make in (torch.randn, torch.rand)
            )
            zero = (parameter == 0).to(parameter)
            parameter.mul_(1 + spread).add_(zero * draw / fan_in**0.5)


def _respelled(
    model: nn.Module,
    group: ChannelGroup,
    gone: Tensor,
    batches: list[list[Change]],
    example: Example,
) -> tuple[Resize, ...] | None:
    """Settings with which the model, otherwise as it is, bears the cut; it is made then."""
    rows = torch.zeros(group.channels, dtype=torch.bool)
    rows[gone] = True
    candidates = _spelling(model, group)
    for batch in batches:
        group = group.after(batch)
    removed = rows.nonzero().squeeze(1)
    choices = [candidates, *(list(pair) for n in (1, 2) for pair in combinations(candidates, n))]
    for chosen in choices[:_TRIALS] if candidates else []:
        resized = replace(group, resizes=tuple(chosen))
        made = cut_verified(model, [(resized, removed)], example, least_scale=0.0)
        if made.batches:
            batches += made.batches
            return tuple(chosen)
    return None


def _spelling(model: nn.Module, group: ChannelGroup) -> list[Resize]:
    """Whole numbers in the user's own modules around a group that equal one of its widths."""
    sizes = {group.channels: 1} | {
        part.index.numel(): part.index.shape[1] for part in (*group.producers, *group.consumers)
    }
    modules = dict(model.named_modules())
    around: dict[str, None] = {}
    for part in (*group.producers, *group.consumers):
        parts = part.layer.split(".")
        around |= dict.fromkeys(".".join(parts[:depth]) for depth in range(len(parts), -1, -1))
    return [
        Resize(name, attribute, sizes[value])
        for name in around
        if not type(modules[name]).__module__.startswith("torch.nn.")
        for attribute, value in vars(modules[name]).items()
        if type(value) is int and value > 1 and value in sizes
    ]


def _in_double(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """A copy in float64 with its example; as it is where the model computes in nothing else."""
    trial = copy.deepcopy(model).double()
    sample = map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)
    try:
        outputs(trial, sample)
    except Exception:  # a cast inside the model, or a device without float64
        return copy.deepcopy(model), example
    return trial, sample


def _differs_in_training(
    model: nn.Module, removals: Sequence[tuple[ChannelGroup, Tensor]], example: Example
) -> bool:
    """Whether the cut shows in train mode; False where two runs of one model differ already."""
    first, second, slim = (copy.deepcopy(model).train() for _ in range(3))
    apply_cuts(slim, cuts_for(slim, removals))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):  # dropout must not draw the user's numbers
        try:
            before, again = _run(first, example), _run(second, example)
        except Exception:  # it cannot be run in train mode on so few samples: nothing to compare
            return False
        try:
            after = _run(slim, example)
        except Exception:  # whatever the model raises on a wrong width says the same
            return True
    if max_difference(before, again) > 0:
        return False
    # Norms over few samples amplify rounding far beyond that of eval mode.
    return max_difference(before, after) > 1e3 * tolerance(before, 1.0)
