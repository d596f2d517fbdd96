"""Pure functions of tensors that the methods are composed of.

Selection is exact and global: the k largest scores over many tensors, without concatenating them,
ties broken by (tensor, index). Equal inputs therefore give equal masks on every rank. Tensors may
be sharded over processes (DTensors), and then masks are sharded alike; samples and counts are all
that the processes exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.sharding import Crowd, is_sharded, like_local, local

__all__ = [
    "channel_magnitude",
    "keep_largest",
    "kth_largest",
    "n_of_m",
    "pooled",
    "random_mask",
    "spread",
    "straight_through",
]

_SMALL = 1 << 14  # up to this, one concatenated `kthvalue` is about as fast as sampling ...
_SMALL_WAITING = 1 << 16  # ... where every pass waits for a device or for other processes
_SAMPLE = 1 << 17  # a bracket of +-5 sigma from 131072 samples holds about 1 % of the values
_SHARE = 16  # of fewer values than so many samples each, one in so many is sampled
_SENT = 1 << 14  # samples that processes exchange; the bracket holds 3 %, and is searched again
_SIGMAS = 5.0


def keep_largest(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Bool masks that select exactly the `k` largest of all scores; ties go to the lower index.

    Args:
        scores: Tensors of any shapes, one dtype.
        k: How many to select over all tensors, `0 <= k <= number of candidates`.
        among: Bool tensors of the same shapes; only positions that are True are candidates.

    Raises:
        ValueError: `k` out of range, or a score that is NaN.
    """
    crowd = Crowd(scores)
    total = _candidates(scores, among, crowd)
    if not 0 <= k <= total:
        raise ValueError(f"cannot keep {k} of {total} candidates: k must be in [0, candidates]")
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    if k == total:
        if among is None:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        return [mask.clone() for mask in among]

    parts = [local(score) for score in scores]
    threshold = kth_largest(scores, k, among)
    masks = [part >= threshold for part in parts]
    if among is not None:
        for part, mask, allowed in zip(parts, masks, among, strict=True):
            mask.logical_and_(_in_format_of(part, local(allowed)))
    whole = [like_local(mask, score) for mask, score in zip(masks, scores, strict=True)]
    surplus = sum(crowd.counts(whole)) - k
    if surplus == 0:
        return whole
    # The threshold falls among equal scores: those of the highest index go.
    ties = [mask & (part == threshold) for mask, part in zip(masks, parts, strict=True)]
    counted = crowd.before([tie.count_nonzero() for tie in ties], scores)
    for mask, tie, (before, count) in reversed(list(zip(masks, ties, counted, strict=True))):
        gone = min(count, surplus)
        index = tie.flatten().nonzero().squeeze(1)[max(0, count - gone - before) :]
        mask[torch.unravel_index(index, mask.shape)] = False
        surplus -= gone
    assert surplus == 0
    return whole


def kth_largest(tensors: Sequence[Tensor], k: int, among: Sequence[Tensor] | None = None) -> float:
    """Value of the k-th largest candidate over all tensors, exact, `1 <= k <= candidates`.

    A sample brackets the value; one pass counts what lies above the bracket, and only what lies
    inside is ranked. A mass of equal values (exact zeros, say) at an edge of the bracket is
    counted, never ranked. `among` as in `keep_largest`. Raises ValueError on NaN.
    """
    crowd = Crowd(tensors)
    total = _candidates(tensors, among, crowd)
    assert 1 <= k <= total, (k, total)
    parts = crowd.parts(tensors)
    allowed: list[Tensor | None] = [None] * len(parts)
    if among is not None:
        masks = crowd.parts(among)
        allowed = [_flat(_in_format_of(*pair)) for pair in zip(parts, masks, strict=True)]
    pairs = list(zip(map(_flat, parts), allowed, strict=True))
    if _sum([flat.amax().isnan() for flat, _ in pairs if len(flat)], pairs, crowd):
        raise ValueError("scores contain NaN: look at the loss and the learning rate")
    return _kth(pairs, k, total, crowd)


_Pairs = Sequence[tuple[Tensor, Tensor | None]]


def _kth(pairs: _Pairs, k: int, total: int, crowd: Crowd) -> float:
    device = pairs[0][0].device
    size = crowd.total(sum(len(flat) for flat, _ in pairs), device)
    if size <= (_SMALL if crowd.alone and device.type == "cpu" else _SMALL_WAITING):
        return _rank(_sample(pairs, 1, crowd), k)

    sample = _sample(pairs, max(_SHARE, size // _SAMPLE) if crowd.alone else size // _SENT, crowd)
    share = k / total
    center = share * len(sample)
    margin = _SIGMAS * math.sqrt(len(sample) * share * (1 - share)) + 2
    while margin < len(sample):
        upper, lower = int(center - margin), math.ceil(center + margin)
        high = _rank(sample, upper + 1) if upper >= 0 else math.inf
        low = _rank(sample, lower + 1) if lower < len(sample) else -math.inf
        found = _inside(pairs, k, low, high, crowd)
        if found is not None:
            return found
        margin *= 8  # the stride met a pattern in the data; look wider
    return _rank(_sample(pairs, 1, crowd), k)


def _inside(pairs: _Pairs, k: int, low: float, high: float, crowd: Crowd) -> float | None:
    """The k-th largest value if it lies in [low, high], else None."""
    reach_high = _count(pairs, lambda flat: flat >= high, crowd)
    if k <= reach_high:
        return high if k > _count(pairs, lambda flat: flat > high, crowd) else None
    inner = torch.cat(
        [flat[_both((flat > low).logical_and_(flat < high), allowed)] for flat, allowed in pairs]
    )
    rank, size = k - reach_high, crowd.total(len(inner), inner.device)
    if rank <= size:
        # What is left is ranked here, or among processes searched again until it is little to send.
        return _rank(inner, rank) if crowd.alone else _kth([(inner, None)], rank, size, crowd)
    return low if k <= _count(pairs, lambda flat: flat >= low, crowd) else None


def _count(pairs: _Pairs, condition: Callable[[Tensor], Tensor], crowd: Crowd) -> int:
    counts = [_both(condition(flat), allowed).count_nonzero() for flat, allowed in pairs]
    return _sum(counts, pairs, crowd)


def _sum(counts: Sequence[Tensor], pairs: _Pairs, crowd: Crowd) -> int:
    zero = torch.zeros((), dtype=torch.int64, device=pairs[0][0].device)
    return int(crowd.sum(torch.stack([zero, *counts]).sum()))


def _both(mask: Tensor, allowed: Tensor | None) -> Tensor:
    return mask if allowed is None else mask.logical_and_(allowed)


def _sample(pairs: _Pairs, stride: int, crowd: Crowd) -> Tensor:
    """Every stride-th candidate of all tensors, in every process."""
    return crowd.gather(
        torch.cat(
            [
                flat[::stride] if allowed is None else flat[::stride][allowed[::stride]]
                for flat, allowed in pairs
            ]
        )
    )


def _rank(values: Tensor, k: int) -> float:
    return float(values.kthvalue(len(values) - k + 1).values)


def _flat(tensor: Tensor) -> Tensor:
    """All elements as one dimension, in storage order when that saves a copy."""
    if not tensor.is_contiguous() and tensor.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)  # channels_last storage
    return tensor.reshape(-1)


def _in_format_of(score: Tensor, mask: Tensor) -> Tensor:
    """The mask in the memory format of the score, so that both flatten in the same order."""
    if mask.stride() == score.stride():
        return mask
    return torch.empty_like(score, dtype=torch.bool).copy_(mask)


def _candidates(scores: Sequence[Tensor], among: Sequence[Tensor] | None, crowd: Crowd) -> int:
    if among is None:
        return sum(score.numel() for score in scores)
    return sum(crowd.counts(among))


def pooled(tensor: Tensor, block: int) -> Tensor:
    """Sums over every `block` consecutive rows: `(out, ...)` to `(out / block, ...)`."""
    return tensor if block == 1 else torch.unflatten(tensor, 0, (-1, block)).sum(1)


def spread(places: Tensor, block: int) -> Tensor:
    """Every row `block` times: `(out / block, ...)` to `(out, ...)`."""
    return places if block == 1 else places.repeat_interleave(block, 0)


def random_mask(
    shape: Sequence[int], count: int, generator: torch.Generator, block: int = 1
) -> Tensor:
    """Bool mask with exactly `count` True places, uniform among all such masks.

    A place is an entry, or with `block` so many consecutive rows at one position.
    """
    rows, *rest = shape
    numel = math.prod(shape) // block
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[:count]] = True
    return spread(mask.reshape(rows // block, *rest), block)


def channel_magnitude(weight: Tensor, fan_in: int) -> Tensor:
    """Unmasked mean magnitude (UMM) of every output channel: `(1 / fan_in) * sum |w|`.

    Args:
        weight: `(out, in, *kernel)`, zero off its support.
        fan_in: Positions of one channel, inactive ones included (Chase divides by all of them).

    Returns:
        `(out,)` in float64, so that dead positions in the sum cannot change a ranking.
    """
    return weight.detach().flatten(1).abs().sum(1, dtype=torch.float64) / fan_in


# Compared as integers, magnitudes order as they do as floats, and NaN has a place (the largest).
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 19  # weights whose temporaries stay in a CPU's cache: a quarter less time


def n_of_m(
    weight: Tensor, n: int, m: int, *, dense_tail: bool = False, out: Tensor | None = None
) -> Tensor:
    """Mask of the `n` largest magnitudes of every group; ties go to the lower index.

    A group is `m` consecutive inputs at one output and one kernel position. Where `in` is no
    multiple of `m`, the last group of a row is shorter; no group reaches into the next row. Every
    group of `m` keeps exactly `n`, whatever its values.

    Ranks come from comparing all pairs, one position of all groups with another: 2:4 takes 6
    compares of a quarter of the weights, and a sort ten times as long.

    Args:
        weight: `(out, in, *kernel)`, in any memory format.
        n: Weights to keep per group.
        m: Group size, `1 <= n <= m <= 256`.
        dense_tail: Keep a shorter last group whole; otherwise it keeps its `n` largest.
        out: Where to write ones and zeros, of the weight's shape; None: a new bool tensor, in the
            weight's memory format.

    Raises:
        ValueError: `n` or `m` out of range, or a weight without inputs.
    """
    if not 1 <= n <= m <= 256:
        raise ValueError(f"{n}:{m} is no pattern: give 1 <= n <= m <= 256")
    if weight.dim() < 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: wanted (out, in, *kernel)")
    weight = weight.detach()
    mask = torch.empty_like(weight, dtype=torch.bool) if out is None else out
    if is_sharded(weight):
        if local(weight).shape[1] != weight.shape[1]:
            raise ValueError(
                f"the {weight.shape[1]} inputs of each row are shared out among processes, and "
                f"{n}:{m} groups lie in rows: shard outputs (dimension 0), or leave the layer dense"
            )
        n_of_m(local(weight), n, m, dense_tail=dense_tail, out=local(mask))
        return mask
    rows, inputs = weight.shape[:2]
    tail = inputs % m
    if weight.device.type == "cpu":
        rows = max(1, _BLOCK * rows // max(1, weight.numel()))
    for block, kept in zip(torch.split(weight, rows), torch.split(mask, rows), strict=True):
        bits = block.abs().view(_BITS[block.element_size()])
        if inputs > tail:
            shape = (inputs // m, m)
            groups = torch.unflatten(bits[:, : inputs - tail], 1, shape)
            _mark_largest(groups, n, kept[:, : inputs - tail])
        if tail:
            keep = tail if dense_tail else min(n, tail)
            _mark_largest(bits[:, inputs - tail :].unsqueeze(1), keep, kept[:, inputs - tail :])
    return mask


def _mark_largest(groups: Tensor, n: int, mask: Tensor) -> None:
    """Write to `mask: (out, inputs, *kernel)` where the `n` largest of each group are.

    groups: `(out, groups, size, *kernel)`.
    """
    size = groups.shape[2]
    members = groups.unbind(2)
    # How many others of its group each is ahead of: first those before it, then pair by pair.
    ahead = [torch.full_like(x, j, dtype=torch.uint8) for j, x in enumerate(members)]
    for i in range(size):
        for j in range(i + 1, size):
            lower_wins = (members[i] >= members[j]).view(torch.uint8)
            ahead[i].add_(lower_wins)
            ahead[j].sub_(lower_wins)
    kept = torch.unflatten(mask, 1, groups.shape[1:3]).unbind(2)
    for count, target in zip(ahead, kept, strict=True):
        target.copy_(count.ge_(size - n))


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight * mask`, whose gradient reaches all of `weight` unmasked; `mask` is 0 or 1."""
    effective: Tensor = _StraightThrough.apply(weight, mask)  # type: ignore[no-untyped-call]
    return effective


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
