"""shrink: cut every channel that does nothing out of a plain model with zeros in it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import Example
from gossamer.shrink.fold import fold_constants
from gossamer.shrink.plan import Plan
from gossamer.shrink.verify import (
    cut_verified,
    max_difference,
    outputs,
    probe,
    tensor_along,
    try_cuts,
)
from gossamer.widths import block as channel_block

__all__ = ["GroupReport", "Shrunk", "shrink", "unread"]


@dataclass(frozen=True)
class GroupReport:
    """What became of one layer's output rows: how many there are, and why they stay if they do."""

    layer: str
    before: int
    after: int
    note: str


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A slim model, how it was cut, and the proof.

    Attributes:
        model: The slim model, plain PyTorch.
        plan: Kept positions; with the full-width class it rebuilds the slim model.
        report: One row per channel group.
        max_abs_difference: Between the outputs of both models on the example, eval mode.
    """

    model: nn.Module
    plan: Plan
    report: tuple[GroupReport, ...]
    max_abs_difference: float

    @property
    def removed(self) -> int:
        """Channels removed, over all groups."""
        return sum(row.before - row.after for row in self.report)

    def table(self) -> str:
        """The report as aligned text."""
        width = max([len("layer"), *(len(row.layer) for row in self.report)])
        lines = [f"{'layer':<{width}}  before   after  note"]
        lines += [
            f"{row.layer:<{width}}  {row.before:>6}  {row.after:>6}  {row.note}".rstrip()
            for row in self.report
        ]
        return "\n".join(lines)


def shrink(
    model: nn.Module,
    example: Example,
    plan: Plan | None = None,
    *,
    multiple: int = 1,
    block: int = 1,
) -> Shrunk:
    """A copy of `model` without the channels that do nothing; outputs stay the same.

    A channel goes when every consumer's weights for it are zero: then whatever it computes, and
    whatever a norm adds to it, reaches nothing. It goes too when its own weights are all zero, and
    the constant that is left of it can be folded into its readers' biases. Cutting one layer can
    free channels of the layer before or behind, so this repeats until nothing more goes. All is
    verified on the example, in eval mode, and taken back where outputs differ.

    Args:
        model: A plain model (after `finalize()`); it is not changed.
        example: An input it accepts: tensor, tuple of positional or dict of keyword inputs.
        plan: What had been cut before, during training (`sparsifier.plan`); the result's plan
            continues it.
        multiple: Keep as many dead channels as make each width a multiple of this. Networks of odd
            widths can be slower than wider ones: 16 suits most hardware.
        block: Cut outputs in whole blocks of so many neighbours only: what was trained with
            `block=16`, and is zero in blocks, stays so.

    Raises:
        ValueError: The model is still parametrized, or cannot be traced; names the module.
    """
    if block < 1:
        raise ValueError(f"block={block}: give 1, or the block that was trained for: 16")
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: give 1, or the widths that hardware likes: 8, 16")
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is still parametrized: call sparsifier.finalize() (or "
                "gossamer.finalize(model) on a copy) before shrink"
            )
    slim = copy.deepcopy(model)
    whole = Plan() if plan is None else copy.deepcopy(plan)
    groups = find_groups(model, example)
    before = {group.name: group.width for group in groups}
    notes = {group.name: group.locked for group in groups if group.locked}
    sample = probe(model, example)
    groups, refused = try_cuts(model, groups, sample)
    notes |= refused
    units = {g.name: g.unit(block) for g in groups if g.name not in notes}
    straddling = f"they do not make up whole blocks of {block} outputs"
    notes |= {name: straddling for name, unit in units.items() if unit is None}
    folded: Counter[str] = Counter()
    while True:
        constants = fold_constants(slim, [g for g in groups if g.name not in notes], sample)
        folded.update(constants.channels)
        dead = [
            (g, _removable(slim, g, multiple, unit))
            for g in groups
            if g.name not in notes and (unit := units[g.name]) is not None
        ]
        made = cut_verified(slim, dead, sample)
        notes.update(made.refused)
        for cuts in made.batches:
            whole.record(cuts)
            groups = [group.after(cuts) for group in groups]
        if not made.batches:
            break
    report = tuple(
        GroupReport(
            group.name,
            before[group.name],
            group.width,
            _note(notes.get(group.name), folded[group.name], constants.kept.get(group.name)),
        )
        for group in groups
    )
    difference = max_difference(outputs(model, example), outputs(slim, example))
    return Shrunk(slim, whole, report, difference)


def _note(locked: str | None, folded: int, silent: str | None) -> str:
    if locked is not None:
        return f"kept: {locked}"
    parts = [f"{folded} constant, folded into the next bias"] if folded else []
    parts += [f"constant channels kept: {silent}"] if silent else []
    return "; ".join(parts)


def _removable(model: nn.Module, group: ChannelGroup, multiple: int, unit: int) -> Tensor:
    dead = unread(model, group)
    if unit > 1:
        dead = dead.view(-1, unit).all(1).repeat_interleave(unit)
    size = channel_block(group.channels, group.producers[0].index.shape[1], multiple)
    size = math.lcm(size, unit)
    left = max(1, int((~dead).sum()))  # a layer without channels is none
    left += -left % size
    return dead.nonzero().squeeze(1)[max(0, left - int((~dead).sum())) :]


def unread(model: nn.Module, group: ChannelGroup) -> Tensor:
    """`(channels,)` bool: channels whose every consumer weight is zero."""
    dead = torch.ones(group.channels, dtype=torch.bool)
    for part in group.consumers:
        per_input = (tensor_along(model, part) != 0).flatten(1).any(1).cpu()
        dead &= ~per_input[part.index].any(1)
    return dead
