"""Pure functions of tensors that the methods are composed of.

Selection is exact and global: the k largest scores over many tensors, without concatenating them,
ties broken by (tensor, index). Equal inputs therefore give equal masks on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["channel_magnitude", "keep_largest", "kth_largest", "random_mask"]

_SMALL = 1 << 16  # below this, one concatenated `kthvalue` is faster than sampling
_SAMPLE = 1 << 17  # a bracket of +-5 sigma from 131072 samples holds about 1 % of the values
_SIGMAS = 5.0


def keep_largest(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Bool masks that select exactly the `k` largest of all scores; ties go to the lower index.

    Args:
        scores: Tensors of any shapes, one dtype; finite.
        k: How many to select over all tensors, `0 <= k <= number of candidates`.
        among: Bool tensors of the same shapes; only positions that are True are candidates.

    Raises:
        ValueError: `k` out of range, or a score that is NaN.
    """
    if among is None:
        candidates = sum(score.numel() for score in scores)
    else:
        candidates = sum(int(allowed.sum()) for allowed in among)
        scores = [
            score.masked_fill(~allowed, -math.inf)
            for score, allowed in zip(scores, among, strict=True)
        ]
    if not 0 <= k <= candidates:
        raise ValueError(
            f"cannot keep {k} of {candidates} candidates: k must be in [0, candidates]"
        )
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    if k == candidates:
        if among is not None:
            return [allowed.clone() for allowed in among]
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]

    threshold = kth_largest(scores, k)
    masks = [score >= threshold for score in scores]
    if _total(masks) == k:
        return masks
    # The threshold falls among equal scores: all above it, then equals in index order.
    masks = [score > threshold for score in scores]
    missing = k - _total(masks)
    for mask, score in zip(masks, scores, strict=True):
        ties = (score == threshold).flatten().nonzero().squeeze(1)[:missing]
        if len(ties):
            mask[torch.unravel_index(ties, mask.shape)] = True
            missing -= len(ties)
    assert missing == 0
    return masks


def kth_largest(tensors: Sequence[Tensor], k: int) -> float:
    """Value of the k-th largest element over all tensors, exact, `1 <= k <= total`.

    A sample brackets the value; one pass counts what lies above the bracket, and only what lies
    inside is ranked. A mass of equal values (exact zeros, say) at an edge of the bracket is
    counted, never ranked. Raises ValueError on NaN.
    """
    flats = [_flat(tensor) for tensor in tensors]
    total = sum(flat.numel() for flat in flats)
    assert 1 <= k <= total, (k, total)
    if total <= _SMALL:
        return _rank(torch.cat(flats), k)

    stride = max(1, total // _SAMPLE)
    sample = torch.cat([flat[::stride] for flat in flats])
    share = k / total
    center = share * len(sample)
    margin = _SIGMAS * math.sqrt(len(sample) * share * (1 - share)) + 2
    while margin < len(sample):
        upper, lower = int(center - margin), math.ceil(center + margin)
        high = _rank(sample, upper + 1) if upper >= 0 else math.inf
        low = _rank(sample, lower + 1) if lower < len(sample) else -math.inf
        found = _inside(flats, k, low, high)
        if found is not None:
            return found
        margin *= 8  # the stride met a pattern in the data; look wider
    return _rank(torch.cat(flats), k)


def _inside(flats: Sequence[Tensor], k: int, low: float, high: float) -> float | None:
    """The k-th largest value if it lies in [low, high], else None."""
    reach_high = _total([flat >= high for flat in flats])
    if k <= reach_high:
        return high if k > _total([flat > high for flat in flats]) else None
    inner = torch.cat([flat[(flat > low) & (flat < high)] for flat in flats])
    rank = k - reach_high
    if rank <= len(inner):
        return _rank(inner, rank)
    return low if k <= _total([flat >= low for flat in flats]) else None


def _rank(values: Tensor, k: int) -> float:
    result = float(values.kthvalue(len(values) - k + 1).values)
    if math.isnan(result):
        raise ValueError("scores contain NaN: look at the loss and the learning rate")
    return result


def _flat(tensor: Tensor) -> Tensor:
    """All elements as one dimension, in storage order when that saves a copy."""
    if not tensor.is_contiguous() and tensor.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)  # channels_last storage
    return tensor.reshape(-1)


def _total(masks: Sequence[Tensor]) -> int:
    return int(torch.stack([mask.count_nonzero() for mask in masks]).sum())


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Bool mask with exactly `count` True entries, uniform among all such masks."""
    numel = math.prod(shape)
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[:count]] = True
    return mask.reshape(tuple(shape))


def channel_magnitude(weight: Tensor, fan_in: int) -> Tensor:
    """Unmasked mean magnitude (UMM) of every output channel: `(1 / fan_in) * sum |w|`.

    Args:
        weight: `(out, in, *kernel)`, zero off its support.
        fan_in: Positions of one channel, inactive ones included (Chase divides by all of them).

    Returns:
        `(out,)` in float64, so that dead positions in the sum cannot change a ranking.
    """
    return weight.detach().flatten(1).abs().sum(1, dtype=torch.float64) / fan_in
