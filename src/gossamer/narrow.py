"""A network as narrow as a channel sparsity would leave it, before any training.

Time depends on widths, not on values: a network of the widths that training to that channel
sparsity would leave shows what the training would bring. Every layer loses the same share; a method
that takes more from some layers than from others ends at as many channels with other MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import Example, first_samples
from gossamer.prices import cut_to
from gossamer.widths import block, steps

__all__ = ["Narrowed", "cuttable", "narrowed"]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A narrower copy.

    Attributes:
        model: The copy; what it computes is of no use.
        channel_sparsity: Share of the channels that could go, and went.
        layers: How many layers compute fewer channels.
    """

    model: nn.Module
    channel_sparsity: float
    layers: int


def cuttable(groups: Sequence[ChannelGroup], *, residual: bool) -> list[ChannelGroup]:
    """The groups whose channels may go; with `residual` those on skip paths too."""
    return [group for group in groups if not group.locked and (residual or group.internal)]


def narrowed(
    model: nn.Module,
    example: Example,
    channel_sparsity: float,
    *,
    residual: bool = False,
    multiple: int | None = None,
    groups: Sequence[ChannelGroup] | None = None,
) -> Narrowed:
    """A copy of `model` with channels cut away, as near as can be the same share in every layer.

    Args:
        model: A plain model; it is not changed.
        example: An input it accepts.
        channel_sparsity: Share of the channels to remove, in [0, 1).
        residual: Cut the skip paths too, not only the channels inside of blocks.
        multiple: Widths become multiples of this; None: as Chase chooses it.
        groups: Of this model, from `find_groups`, where they are known already.

    Raises:
        ValueError: The share is out of range, or the model cannot be traced.
    """
    if not 0 <= channel_sparsity < 1:
        raise ValueError(f"channel_sparsity={channel_sparsity}: give a value in [0, 1)")
    if groups is None:
        groups = find_groups(model, first_samples(example, 2))
    chosen = cuttable(groups, residual=residual)
    widths = [_width(group, 1 - channel_sparsity, multiple) for group in chosen]
    before, after = sum(group.channels for group in chosen), sum(widths)
    return Narrowed(
        model=cut_to(model, chosen, widths),
        channel_sparsity=1 - after / before if before else 0.0,
        layers=sum(
            len(group.producers)
            for group, width in zip(chosen, widths, strict=True)
            if width < group.channels
        ),
    )


def _width(group: ChannelGroup, share: float, multiple: int | None) -> int:
    """Of the widths that the group may have the one nearest to that share of its own."""
    size = block(group.channels, group.producers[0].index.shape[1], multiple)
    options = steps(group.channels, size)
    return min(options, key=lambda width: abs(width - share * group.channels))
