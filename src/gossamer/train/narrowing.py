"""A network that is narrow from the start: of a slim network's widths, or as large; new weights.

It is the rival of every sparse training: a dense network as small as what came of it, trained from
scratch. Liu et al. (ICLR 2019, arXiv 1810.05270) found pruned networks no better than it.

The weights are drawn from the same law as those of the full network, as narrow as it now is: of a
built-in network as `build_model` draws them, of a factory's as the factory does, times
sqrt(inputs before / inputs now) where a layer reads fewer channels. Its outputs then start as large
as at full width, and whatever a layer draws by its number of inputs is drawn by the new one.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.channels import ChannelGroup, find_groups
from gossamer.measure.macs import account
from gossamer.method import Price
from gossamer.narrow import cuttable
from gossamer.prices import Macs, Parameters
from gossamer.reading import reading
from gossamer.shrink.file import load, read_plan
from gossamer.shrink.plan import Plan
from gossamer.shrink.slice import cuts_for
from gossamer.shrink.verify import probe, try_cuts
from gossamer.train.folder import RunFolder
from gossamer.train.models import draw_again
from gossamer.train.source import model_file
from gossamer.widths import block, steps

__all__ = ["Widths", "digest", "even_widths", "is_narrower", "nothing_cut", "read_widths"]


_SHARE = 1 / 8  # of a layer: uniform widths go down by no larger steps,
_NEAR = 0.02  # and by smaller ones where MACs or weights come no nearer than that

Match = Literal["widths", "macs", "nonzeros"]


@dataclass(frozen=True, eq=False)
class Widths:
    """The widths that a network has from the start.

    Attributes:
        source: Run folder or model file that they come from.
        sha256: Of the model file.
        plan: Cuts the full-width network to them; which channels it keeps does not matter.
    """

    source: str
    sha256: str
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"source": self.source, "sha256": self.sha256, "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> Widths:
        """What `to_dict` made. Raises ValueError, which names `where`, for anything else."""
        with reading(where, "train from the start"):
            return cls(str(data["source"]), str(data["sha256"]), Plan.from_dict(data["plan"]))

    def check_source(self, given: str) -> None:
        """Raise ValueError when `given`, if it is there, holds another network than it did."""
        file = _file(given)
        if file.exists() and digest(file) != self.sha256:
            raise ValueError(
                f"this run has the widths that {self.source} had when it was started, and {given} "
                "holds another network now: train from the start, or choose another folder with "
                "--out"
            )

    def narrow(self, model: nn.Module, example: Tensor, *, built_in: bool) -> nn.Module:
        """Cut a full-width network with new weights, in place; returns it.

        Args:
            model: As its class or factory makes it.
            example: An input it accepts.
            built_in: Whether `build_model` knows how its weights are drawn.

        Raises:
            ValueError: It is another network than that of the plan; says what differs.
        """
        factors = {} if built_in else _factors(model, self.plan, example)
        try:
            self.plan.apply(model)
        except ValueError as error:
            raise ValueError(f"{self.source} was made from another network: {error}") from error
        with torch.no_grad():
            for name, factor in factors.items():
                model.get_parameter(name).mul_(factor)
        if built_in:
            draw_again(model)
        return model


def read_widths(
    spec: str,
    full: nn.Module,
    example: Tensor,
    *,
    network: tuple[str, float],
    match: Match = "widths",
    keep_channels: Sequence[str] = (),
) -> Widths:
    """The widths of a slim network.

    Args:
        spec: Folder of a run that has ended, or a model file of Gossamer's.
        full: The full-width network.
        example: An input it accepts.
        network: Name and `width` of `full`.
        match: What the network shall share with it: "widths"; or executed "macs", or as many
            weights as it has "nonzeros", within 2 % where whole channels allow it: every layer
            narrowed by the same share, within an eighth of it. Widths are multiples that hardware
            likes as far as that goes.
        keep_channels: Patterns of layers that are then left as they are.

    Raises:
        ValueError: Nothing was cut there ("nonzeros": no weight is zero), or it is another network;
            says what differs.
        OSError: It cannot be read.
    """
    file, said = model_file(spec, network[0])
    if said is not None and (said.name, said.width) != network:
        raise ValueError(
            f"{spec} has the widths of a {said.name} of width {said.width:g}, and this is to be "
            f"a {network[0]} of width {network[1]:g}: give --model {said.name} --width "
            f"{said.width:g}"
        )
    plan = read_plan(file)
    if match == "nonzeros":
        count = account(load(file, copy.deepcopy(full)), example).nonzeros
        if count >= sum(parameter.numel() for parameter in full.parameters()):
            raise ValueError(
                f"no weight of {spec} is zero: a dense network of as many is the dense twin"
            )
        groups = cuttable(find_groups(full, example), residual=True)
        even = _uniform(full, example, _but(groups, keep_channels), Parameters, count)
        return Widths(spec, digest(file), even)
    if not len(plan):
        raise ValueError(nothing_cut(spec))
    widths = Widths(spec, digest(file), plan)
    slim = widths.narrow(copy.deepcopy(full), example, built_in=":" not in network[0])
    if match == "widths":
        return widths
    groups = find_groups(full, example)
    residual = any(is_narrower(group, plan) and not group.internal for group in groups)
    groups = cuttable(groups, residual=residual)
    macs = account(slim, example).macs_executed
    even = _uniform(
        full, example, _but(groups, keep_channels), partial(Macs, example=example), macs
    )
    return Widths(spec, widths.sha256, even)


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def nothing_cut(spec: object) -> str:
    """What to say of a slim network that is as wide as the full one."""
    return (
        f"nothing was cut from {spec}: its network is as wide as before, and a dense network of "
        "those widths is the dense twin"
    )


def is_narrower(group: ChannelGroup, plan: Plan) -> bool:
    """Whether channels of this group of the full network are gone."""
    for part in group.producers:
        kept = plan.kept(part.tensor, part.dim)
        if kept is not None and not bool(torch.isin(part.index[:, 0], kept).all()):
            return True
    return False


def even_widths(
    channels: Sequence[int],
    ladders: Sequence[Sequence[int]],
    price: Callable[[Sequence[int]], float],
    target: float,
    unit: str,
) -> list[int]:
    """Widths that keep nearly the same share of each group, and whose price is nearest to `target`.

    The group that keeps the largest share goes down one rung, again and again.

    Args:
        channels: Of each group at full width.
        ladders: Widths that each may have, widest first.
        price: Of the network of these widths; falls with each.
        target: What it shall cost.
        unit: Of the price.

    Raises:
        ValueError: At its narrowest it costs more.
    """
    widths, before = list(channels), list(channels)
    while price(widths) > target:
        lower = [
            next((width for width in ladder if width < now), 0)
            for ladder, now in zip(ladders, widths, strict=True)
        ]
        there = [index for index, width in enumerate(lower) if width]
        if not there:
            raise ValueError(
                f"with uniform widths the network cannot come down to {target:,.0f} {unit}: as "
                f"narrow as it can be it has {price(widths):,.0f}. Leave widths_match out"
            )
        before = list(widths)
        most = max(there, key=lambda index: widths[index] / channels[index])
        widths[most] = lower[most]
    return min(widths, before, key=lambda found: abs(price(found) - target))


def _but(groups: Sequence[ChannelGroup], keep_channels: Sequence[str]) -> list[ChannelGroup]:
    return [
        group
        for group in groups
        if not any(fnmatchcase(group.name, pattern) for pattern in keep_channels)
    ]


def _uniform(
    full: nn.Module,
    example: Tensor,
    groups: Sequence[ChannelGroup],
    priced: Callable[[nn.Module, Sequence[ChannelGroup]], Price],
    target: float,
) -> Plan:
    """Cuts each of the groups that can be cut by the same share, to so much."""
    found, refused = try_cuts(full, groups, probe(full, example))
    chosen = [group for group in found if group.name not in refused]
    channels, price = [group.channels for group in chosen], priced(full, chosen)
    sizes = [block(g.channels, g.producers[0].index.shape[1]) for g in chosen]
    share, near = _SHARE, False
    while not near:
        sizes = [_halved(size, share * width) for size, width in zip(sizes, channels, strict=True)]
        ladders = [steps(*group) for group in zip(channels, sizes, strict=True)]
        widths = even_widths(channels, ladders, price, target, price.unit)
        near = abs(price(widths) / target - 1) <= _NEAR or max(sizes) == 1
        share /= 2
    even = Plan()
    gone = [(g, range(width, g.channels)) for g, width in zip(chosen, widths, strict=True)]
    even.record(cuts_for(full, gone))
    return even


def _halved(size: int, most: float) -> int:
    """`size`, or half of it, and half again, until it is at most `most`; at least 1."""
    while size > max(1.0, most):
        size //= 2
    return size


def _factors(full: nn.Module, plan: Plan, example: Tensor) -> dict[str, float]:
    """By what to multiply weights that read fewer channels than in the full network, by name."""
    factors = {}
    for group in find_groups(full, example):
        for part in group.consumers:
            kept = plan.kept(part.tensor, part.dim)
            if kept is not None:
                inputs = full.get_parameter(part.tensor).shape[part.dim]
                factors[part.tensor] = math.sqrt(inputs / len(kept))
    return factors


def _file(spec: str) -> Path:
    path = Path(spec)
    return RunFolder(path).model if path.is_dir() else path
