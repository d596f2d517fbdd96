"""SAD: how far the topology of a sparse network has moved between two moments of its training.

A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021, arXiv 2102.04010:  SAD = ||E_i - E_j||_1, the weights that exactly one of two masks
keeps. Late in a healthy run it falls towards 0; masks that still move then have not settled.

The paper's number depends on the size of the network and on the pattern (1:8 can differ in a
quarter of the weights, 2:4 in all). To compare, it is also given per weight, and relative to the
most that masks of these densities can differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Sad", "SadCheck", "SadTracker", "sad"]


class Sad(NamedTuple):
    """Distance of two masks.

    changed: weights that exactly one of them keeps (the paper's SAD).
    weights: weights in all.
    maximum: the most that masks which keep as many can differ.
    """

    changed: int
    weights: int
    maximum: int

    @property
    def per_weight(self) -> float:
        """Share of all weights."""
        return self.changed / self.weights if self.weights else 0.0

    @property
    def relative(self) -> float:
        """Share of the maximum."""
        return self.changed / self.maximum if self.maximum else 0.0

    def to_dict(self) -> dict[str, float]:
        """All figures as plain data."""
        return {**self._asdict(), "per_weight": self.per_weight, "relative": self.relative}


def sad(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> Sad:
    """Distance of two masks, or of two lists of masks summed over the layers.

    Args:
        a: Bool mask (or 0 and 1), of any shape; or one per layer.
        b: The same for the other moment, in the same shapes.

    Raises:
        ValueError: The masks differ in number or shape.
    """
    masks, others = ([x] if isinstance(x, Tensor) else list(x) for x in (a, b))
    if [mask.shape for mask in masks] != [mask.shape for mask in others]:
        raise ValueError(
            f"got masks of shapes {[tuple(mask.shape) for mask in masks]} and "
            f"{[tuple(mask.shape) for mask in others]}: compare masks of the same layers, each in "
            "the shape it had at the start"
        )
    return _total(_distance(*pair) for pair in zip(masks, others, strict=True))


def _distance(a: Tensor, b: Tensor) -> Sad:
    a, b = a > 0, b > 0
    kept = int(a.count_nonzero()) + int(b.count_nonzero())
    return Sad(int((a ^ b).count_nonzero()), a.numel(), min(kept, 2 * a.numel() - kept))


def _total(parts: Any) -> Sad:
    return Sad(*(sum(column) for column in zip(Sad(0, 0, 0), *parts, strict=True)))


@dataclass(frozen=True)
class SadCheck:
    """SAD at one step: all layers together, and each layer by name.

    step: steps done.
    from_start: against the masks the tracker was made with.
    since_last: against those of the check before (of the start, in the first check).
    """

    step: int
    from_start: Sad
    since_last: Sad
    layers_from_start: Mapping[str, Sad]
    layers_since_last: Mapping[str, Sad]

    def to_dict(self) -> dict[str, Any]:
        """The check as plain data."""
        layers = {
            name: {
                "from_start": self.layers_from_start[name].to_dict(),
                "since_last": self.layers_since_last[name].to_dict(),
            }
            for name in self.layers_from_start
        }
        return {
            "step": self.step,
            "from_start": self.from_start.to_dict(),
            "since_last": self.since_last.to_dict(),
            "layers": layers,
        }


class SadTracker:
    """SAD of a run, against its start and from check to check.

        tracker = SadTracker(sparsifier.supports())
        ...                                                  # now and then, say once an epoch:
        check = tracker.check(step, sparsifier.supports())

    It keeps two masks per layer at a bit per weight; a check reads every mask once. Its
    `state_dict` goes into a checkpoint, so that a resumed run reports the whole.

    Args:
        supports: The masks at the start, by layer name.

    Attributes:
        cumulative: `since_last.per_weight`, summed over all checks: how much the masks moved in
            all. It depends on how often they are checked, so compare it at equal intervals.
    """

    def __init__(self, supports: Mapping[str, Tensor]) -> None:
        self.cumulative = 0.0
        self._start = {name: _pack(mask) for name, mask in supports.items()}
        self._last = dict(self._start)

    def check(self, step: int, supports: Mapping[str, Tensor]) -> SadCheck:
        """Compare the masks as they are after `step` with the start and with the last check.

        Raises:
            ValueError: Other layers, or other shapes, than at the start.
        """
        if supports.keys() != self._start.keys():
            raise ValueError(
                f"got masks of {sorted(supports)}, the tracker was made for {sorted(self._start)}: "
                "pass sparsifier.supports() of the same run"
            )
        start = {name: _against(self._start[name], mask) for name, mask in supports.items()}
        last = {name: _against(self._last[name], mask) for name, mask in supports.items()}
        self._last = {name: _pack(mask) for name, mask in supports.items()}
        check = SadCheck(step, _total(start.values()), _total(last.values()), start, last)
        self.cumulative += check.since_last.per_weight
        return check

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors to continue from."""
        return {
            "cumulative": self.cumulative,
            "start": {name: list(packed) for name, packed in self._start.items()},
            "last": {name: list(packed) for name, packed in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: The state is of another network, or not a tracker's.
        """
        shapes = {name: packed.shape for name, packed in self._start.items()}
        try:
            start, last = (
                {name: _Packed(bits, tuple(shape)) for name, (bits, shape) in state[key].items()}
                for key in ("start", "last")
            )
            cumulative = float(state["cumulative"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "this is not a tracker's state: pass what SadTracker.state_dict() returned"
            ) from error
        for found in (start, last):
            if {name: packed.shape for name, packed in found.items()} != shapes:
                raise ValueError(
                    "the state is of a network with other layers or shapes: resume with the model "
                    "of the interrupted run"
                )
        self._start, self._last, self.cumulative = start, last, cumulative


class _Packed(NamedTuple):
    """A mask at a bit per weight: `bits` is uint8, the shape is the mask's."""

    bits: Tensor
    shape: tuple[int, ...]


def _pack(mask: Tensor) -> _Packed:
    flat = (mask > 0).flatten().to(torch.uint8)
    octets = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    bits = torch.zeros(len(octets), dtype=torch.uint8, device=mask.device)
    for place, column in enumerate(octets.unbind(1)):
        bits |= column << place
    return _Packed(bits, tuple(mask.shape))


def _unpack(packed: _Packed) -> Tensor:
    columns = [(packed.bits >> place) & 1 for place in range(8)]
    flat = torch.stack(columns, 1).flatten()
    numel = torch.Size(packed.shape).numel()
    return flat[:numel].view(packed.shape).bool()


def _against(packed: _Packed, mask: Tensor) -> Sad:
    if tuple(mask.shape) != packed.shape:
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)}, at the start it was {packed.shape}: pass "
            "sparsifier.supports(), which gives cut layers in their original shape"
        )
    packed = packed._replace(bits=packed.bits.to(mask.device))
    return _distance(_unpack(packed), mask)
