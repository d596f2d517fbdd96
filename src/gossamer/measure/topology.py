"""Topology: which weights a sparse network keeps, and how that moves while it trains.

E is a mask (1: kept), E_t the mask after step t. Weights are counted exactly, per layer and over
all layers.

    SAD_{i:j} = ||E_i - E_j||_1          weights that exactly one of two masks keeps
    exploration R_s = |union E_t| / |E|  share of the weights that were ever kept
    churn = |E_j - E_i| / |E_j|          share of the kept that was not kept at the last check, i
    revived = |left and E_j| / |left|    of the weights that were ever dropped, the share kept now

SAD: A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021, arXiv 2102.04010. Late in a healthy run it falls towards 0; masks that still move then
have not settled. The paper's number depends on the size of the network and on the pattern (1:8 can
differ in a quarter of the weights, 2:4 in all). To compare, it is also given per weight, and
relative to the most that masks of these densities can differ.

R_s: S. Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization
in Sparse Training", ICML 2021, arXiv 2102.02887.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Sad", "Topology", "TopologyCheck", "TopologyTracker", "sad"]

_BITS = ("start", "last", "now", "ever", "left")

# The product of eight bytes that are 0 or 1 has them side by side in its highest byte.
_GATHER = 0x0102040810204080


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
        return _share(self.changed, self.weights)

    @property
    def relative(self) -> float:
        """Share of the maximum."""
        return _share(self.changed, self.maximum)

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
    return _total(
        _sad(
            changed=int((one ^ other).count_nonzero()),
            weights=one.numel(),
            kept=int(one.count_nonzero()) + int(other.count_nonzero()),
        )
        for one, other in zip(map(_bool, masks), map(_bool, others), strict=True)
    )


def _sad(changed: int, weights: int, kept: int) -> Sad:
    """`kept`: by both masks together."""
    return Sad(changed, weights, min(kept, 2 * weights - kept))


def _total(parts: Iterable[Sad]) -> Sad:
    return Sad(*(sum(column) for column in zip(Sad(0, 0, 0), *parts, strict=True)))


@dataclass(frozen=True)
class Topology:
    """One layer, or all layers together, at a check.

    Attributes:
        from_start: SAD against the masks the tracker was made with.
        since_last: SAD against those of the check before (of the start, in the first check).
            `since_last.changed` are the flips.
        kept: Weights on the support.
        entered: Of these, those that were off it at the check before.
        ever: Weights that were on the support in any mask seen so far.
        left: Weights that were on the support in one mask seen, and off it in the next.
        returned: Of these, those on the support now.
        live_channels: Output channels that keep a weight.
    """

    from_start: Sad
    since_last: Sad
    kept: int
    entered: int
    ever: int
    left: int
    returned: int
    live_channels: int

    @property
    def weights(self) -> int:
        """Weights, those off the support and in cut channels included."""
        return self.from_start.weights

    @property
    def density(self) -> float:
        """Share of the weights that is on the support."""
        return _share(self.kept, self.weights)

    @property
    def exploration(self) -> float:
        """R_s: share of the weights that was ever on the support."""
        return _share(self.ever, self.weights)

    @property
    def churn(self) -> float:
        """Share of the support that was not on it at the check before."""
        return _share(self.entered, self.kept)

    @property
    def revived(self) -> float:
        """Share on the support now, of the weights that ever left it; 0 when none has."""
        return _share(self.returned, self.left)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data."""
        return {
            "density": self.density,
            "exploration": self.exploration,
            "churn": self.churn,
            "revived": self.revived,
            **vars(self),
            "from_start": self.from_start.to_dict(),
            "since_last": self.since_last.to_dict(),
        }


@dataclass(frozen=True)
class TopologyCheck:
    """The topology after so many steps: all layers together, and each layer by name."""

    step: int
    total: Topology
    layers: Mapping[str, Topology]

    def to_dict(self) -> dict[str, Any]:
        """The check as plain data."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"step": self.step, **self.total.to_dict(), "layers": layers}


class TopologyTracker:
    """Follows the topology of a run, from the start and from check to check.

        tracker, seen = TopologyTracker(sparsifier.supports()), sparsifier.revision
        ...                                                  # after every sparsifier.step:
        if sparsifier.revision != seen:
            tracker.observe(sparsifier.supports())
            seen = sparsifier.revision
        ...                                                  # now and then, say once an epoch:
        check = tracker.check(step, sparsifier.supports())

    Only masks that it is shown count: what comes and goes between two of them is not seen. It
    keeps five bits per weight, where the masks are. Its `state_dict` goes into a checkpoint, so
    that a resumed run reports the whole.

    Args:
        supports: The masks at the start, by layer name.

    Attributes:
        sad_cumulative: `since_last.per_weight`, summed over all checks: how much the masks moved in
            all. It depends on how often they are checked, so compare it at equal intervals.
    """

    def __init__(self, supports: Mapping[str, Tensor]) -> None:
        self.sad_cumulative = 0.0
        self._shapes = {name: tuple(mask.shape) for name, mask in supports.items()}
        now = self._pack(supports)
        self._bits = {"start": now, "last": now, "now": now, "ever": now, "left": now ^ now}

    def observe(self, supports: Mapping[str, Tensor]) -> None:
        """Take note of the masks as they are now: to be called whenever they have changed.

        Raises:
            ValueError: Other layers, or other shapes, than at the start.
        """
        now = self._pack(supports)
        old = {name: bits.to(now.device) for name, bits in self._bits.items()}
        new = {"now": now, "ever": old["ever"] | now, "left": old["left"] | (old["now"] & ~now)}
        self._bits = old | new

    def check(self, step: int, supports: Mapping[str, Tensor]) -> TopologyCheck:
        """Compare the masks as they are after `step` with the start and with the last check.

        Raises:
            ValueError: Other layers, or other shapes, than at the start.
        """
        self.observe(supports)
        start, last, now, ever, left = (self._bits[name] for name in _BITS)
        sets = {
            "start": start,
            "last": last,
            "from_start": now ^ start,
            "since_last": now ^ last,
            "kept": now,
            "entered": now & ~last,
            "ever": ever,
            "left": left,
            "returned": left & now,
        }
        found = zip(self._counts(sets.values()), _live(supports), strict=True)
        layers = {}
        for name, (counts, live) in zip(supports, found, strict=True):
            weights = supports[name].numel()
            count = dict(zip(sets, counts, strict=True))
            at_start, at_last = (count.pop(key) + count["kept"] for key in ("start", "last"))
            layers[name] = Topology(
                from_start=_sad(count.pop("from_start"), weights, at_start),
                since_last=_sad(count.pop("since_last"), weights, at_last),
                live_channels=live,
                **count,
            )
        self._bits["last"] = now
        check = TopologyCheck(step, _sum(layers.values()), layers)
        self.sad_cumulative += check.total.since_last.per_weight
        return check

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors to continue from."""
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        return {"shapes": shapes, "sad_cumulative": self.sad_cumulative, **self._bits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: The state is of another network, or not a tracker's.
        """
        try:
            shapes = {str(name): tuple(map(int, shape)) for name, shape in state["shapes"].items()}
            bits = {name: state[name] for name in _BITS}
            cumulative = float(state["sad_cumulative"])
        except Exception as error:  # whatever the damage happens to lead to
            raise ValueError(
                "this is not a tracker's state: pass what TopologyTracker.state_dict() returned"
            ) from error
        if list(shapes.items()) != list(self._shapes.items()):
            raise ValueError(
                "the state is of a network with other layers or shapes: resume with the model of "
                "the interrupted run"
            )
        packed = self._bits["now"]
        if any(
            not isinstance(one, Tensor) or (one.shape, one.dtype) != (packed.shape, packed.dtype)
            for one in bits.values()
        ):
            raise ValueError(
                f"the tracker's state is damaged: wanted {', '.join(_BITS)} of {len(packed)} bytes "
                "each; resume from an earlier checkpoint"
            )
        self._bits, self.sad_cumulative = bits, cumulative

    def _pack(self, supports: Mapping[str, Tensor]) -> Tensor:
        """All masks at a bit per weight, uint8, each layer filled up to whole bytes with zeros."""
        shapes = {name: tuple(mask.shape) for name, mask in supports.items()}
        if list(shapes) != list(self._shapes):
            raise ValueError(
                f"got masks of {list(shapes)}, the tracker was made for {list(self._shapes)}: pass "
                "sparsifier.supports() of the same run"
            )
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise ValueError(
                    f"got a mask of shape {shape} for {name}, at the start it was "
                    f"{self._shapes[name]}: pass sparsifier.supports(), which gives cut layers in "
                    "their original shape"
                )
        parts = [_pack(mask) for mask in supports.values()]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def _counts(self, sets: Iterable[Tensor]) -> list[list[int]]:
        """Ones in each layer: a list per layer, with the count of each of the packed sets."""
        sizes = [-(-math.prod(shape) // 8) for shape in self._shapes.values()]
        columns = [
            torch.stack([part.sum() for part in torch.split(_ones(bits), sizes)]) for bits in sets
        ]
        counts: list[list[int]] = torch.stack(columns, 1).tolist()
        return counts


def _pack(mask: Tensor) -> Tensor:
    """`(bytes,)` uint8, eight weights to the byte."""
    flat = _bool(mask).flatten()
    if len(flat) % 8 or flat.storage_offset() % 8:
        flat = F.pad(flat, (0, -len(flat) % 8))
    octets = flat.view(torch.int64) * _GATHER
    return octets.bitwise_right_shift_(56).to(torch.uint8)


def _ones(bits: Tensor) -> Tensor:
    """Ones in each byte: of 2, of 4, of 8 neighbouring bits."""
    ones = bits - (bits >> 1 & 0x55)
    ones = (ones & 0x33) + (ones >> 2 & 0x33)
    return ones + (ones >> 4) & 0x0F


def _live(supports: Mapping[str, Tensor]) -> list[int]:
    """Output channels of each mask that keep a weight."""
    # Of bytes the maximum is found 80 times as fast as "any" of bools.
    rows = [
        _bool(mask).reshape(len(mask), -1).view(torch.uint8).amax(1) for mask in supports.values()
    ]
    counts: list[int] = torch.stack([row.sum().to(rows[0].device) for row in rows]).tolist()
    return counts


def _sum(layers: Collection[Topology]) -> Topology:
    """The counts of all layers together."""
    columns = {key: [vars(layer)[key] for layer in layers] for key in Topology.__annotations__}
    from_start, since_last = (_total(columns.pop(key)) for key in ("from_start", "since_last"))
    counts = {key: sum(column) for key, column in columns.items()}
    return Topology(from_start=from_start, since_last=since_last, **counts)


def _bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > 0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
