"""Verification: a cut must leave the outputs as they were, or it is taken back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.channels import ChannelGroup, Cut
from gossamer.example import Example, evaluating, map_tensors, run
from gossamer.shrink.slice import apply_cuts, cuts_for

__all__ = ["Verified", "cut_verified", "max_difference", "outputs", "tolerance", "try_cuts"]

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors of the model's output on `example`, in eval mode, without autocast."""
    with evaluating(model):
        return _run(model, example)


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    device = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return list(_tensors(run(model, example)))


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

    batches: list[list[Cut]]
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

    def attempt(chosen: Sequence[tuple[ChannelGroup, Tensor]]) -> tuple[list[Cut], str]:
        cuts = cuts_for(model, chosen)
        undo = apply_cuts(model, cuts, optimizer)
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
    batches: list[list[Cut]] = []
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


def try_cuts(model: nn.Module, groups: Sequence[ChannelGroup], example: Example) -> dict[str, str]:
    """Cut half of every group's channels on copies; which groups cannot be cut exactly, and why.

    The channels are made dead first the way a method does it: no consumer reads them. The copies
    compute in float64, so that no rounding passes for a difference, and have noise on their
    parameters, so that no zero or tiny weight hides one. Outputs are compared in eval mode, and in
    train mode too unless that is random by itself (dropout).
    """
    trial, sample = _in_double(model, example)
    generator = torch.Generator().manual_seed(0)
    removals = []
    with torch.no_grad():
        for parameter in trial.parameters():
            if parameter.is_floating_point():
                # Zeros get a value, the others keep their sign: some are under a root.
                fan_in = parameter[0].numel() if parameter.dim() else 1
                draw, spread = (
                    make(parameter.shape, generator=generator).to(parameter)
                    for make in (torch.randn, torch.rand)
                )
                zero = (parameter == 0).to(parameter)
                parameter.mul_(1 + spread).add_(zero * draw / fan_in**0.5)
        for group in groups:
            gone = torch.randperm(group.channels, generator=generator)[: group.channels // 2]
            for part in group.consumers:
                weight = trial.get_submodule(part.layer).weight
                assert isinstance(weight, Tensor)
                weight[:, part.index[gone].flatten().to(weight.device)] = 0
            removals.append((group, gone.sort().values))
    masked = copy.deepcopy(trial)
    refused = cut_verified(trial, removals, sample, least_scale=0.0).refused
    whole = [(group, gone) for group, gone in removals if group.name not in refused and len(gone)]
    if whole and _differs_in_training(masked, whole, sample):
        for group, gone in whole:
            if _differs_in_training(masked, [(group, gone)], sample):
                refused[group.name] = "cutting them changes what the model computes in training"
    return refused


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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
