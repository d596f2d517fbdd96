"""keep_largest against a stable sort, on the inputs that break thresholds and sampling."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.ops import channel_magnitude, keep_largest, kth_largest, random_mask


def _brute_force(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor] | None = None
) -> list[np.ndarray]:
    """Sort all candidates by score, stably, and take the first k."""
    flat = np.concatenate([s.detach().double().contiguous().flatten().numpy() for s in scores])
    allowed = np.ones(len(flat), dtype=bool)
    if among is not None:
        allowed = np.concatenate([a.contiguous().flatten().numpy() for a in among])
    candidates = np.flatnonzero(allowed)
    order = candidates[np.argsort(-flat[candidates], kind="stable")]
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[order[:k]] = True
    ends = np.cumsum([s.numel() for s in scores])[:-1]
    return [
        part.reshape(tuple(s.shape)) for part, s in zip(np.split(chosen, ends), scores, strict=True)
    ]


def _check(scores: Sequence[Tensor], k: int, among: Sequence[Tensor] | None = None) -> None:
    got = keep_largest(scores, k, among)
    expected = _brute_force(scores, k, among)
    for mask, score, wanted in zip(got, scores, expected, strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == score.shape
        np.testing.assert_array_equal(mask.numpy(), wanted)


# Counts around every edge: none, one, the middle, all but one, all.
def _counts(total: int) -> list[int]:
    return sorted({0, 1, 2, total // 10, total // 2, total - total // 10, total - 1, total})


@pytest.mark.parametrize("seed", range(8))
def test_small_random(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4, 3, 3), (7,), (1, 5), (2, 3, 4)][: 1 + seed % 4]
    scores = [torch.randn(shape, generator=generator) for shape in shapes]
    for k in _counts(sum(s.numel() for s in scores)):
        _check(scores, k)


@pytest.mark.parametrize("seed", range(4))
def test_small_with_heavy_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 3, shape, generator=generator).float() for shape in [(5, 6), (40,)]]
    for k in range(71):
        _check(scores, k)


def _large(kind: str, generator: torch.Generator) -> list[Tensor]:
    """About 300,000 values in three tensors, so that the sampled path runs."""
    shapes = [(64, 64, 3, 3), (500, 100), (220_000,)]
    total = sum(math.prod(shape) for shape in shapes)
    position = torch.arange(total)
    if kind == "normal":
        flat = torch.randn(total, generator=generator)
    elif kind == "magnitude, 90 % zeros":
        flat = torch.randn(total, generator=generator).abs()
        flat[torch.rand(total, generator=generator) < 0.9] = 0
    elif kind == "constant":
        flat = torch.full((total,), 0.3)
    elif kind == "all zero":
        flat = torch.zeros(total)
    elif kind == "few values":
        flat = torch.randint(0, 5, (total,), generator=generator).float()
    elif kind == "period 2":  # every second value is seen by a stride of 2, and no other
        flat = torch.where(position % 2 == 0, 1.0, -1.0) * torch.rand(total, generator=generator)
    elif kind == "period 2, other phase":
        flat = torch.where(position % 2 == 1, 1.0, -1.0) * torch.rand(total, generator=generator)
    elif kind == "period 2, two values":
        flat = (position % 2).float()
    elif kind == "rising":
        flat = position.float()
    elif kind == "falling":
        flat = -position.float()
    elif kind == "one spike":
        flat = torch.zeros(total)
        flat[total // 2 + 1] = 1.0
    elif kind == "all in one tensor":
        flat = torch.rand(total, generator=generator) * 1e-6
        flat[:5000] += 1
    elif kind == "wide range":
        flat = torch.randn(total, generator=generator).mul(8).exp()
    elif kind == "signed zeros":
        flat = torch.where(position % 3 == 0, 0.0, -0.0)
        flat[::7] = 1.0
    elif kind == "infinities":
        flat = torch.randn(total, generator=generator)
        flat[::3] = -math.inf
        flat[1::11] = math.inf
    else:
        raise AssertionError(kind)
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


LARGE = [
    "normal",
    "magnitude, 90 % zeros",
    "constant",
    "all zero",
    "few values",
    "period 2",
    "period 2, other phase",
    "period 2, two values",
    "rising",
    "falling",
    "one spike",
    "all in one tensor",
    "wide range",
    "signed zeros",
    "infinities",
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", LARGE)
def test_large(kind: str) -> None:
    scores = _large(kind, torch.Generator().manual_seed(1))
    total = sum(s.numel() for s in scores)
    assert total > 1 << 18  # the stride of the sample is at least 2
    for k in (1, 3000, total // 10, total // 2, total - 1):
        _check(scores, k)


@pytest.mark.parametrize("k", [1, 20_000, 30_000, 30_001, 60_000])
def test_large_boundary_falls_into_the_zeros(k: int) -> None:
    # 30,000 positive values, the rest exact zeros: above, at and inside the mass of ties.
    flat = torch.zeros(300_000)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(300_000, generator=generator)[:30_000]
    flat[chosen] = torch.rand(30_000, generator=generator) + 0.1
    _check([flat[:100_000].reshape(100, 1000), flat[100_000:]], k)


@pytest.mark.parametrize("total", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, (1 << 18) - 1, 1 << 18])
def test_around_the_size_where_sampling_starts(total: int) -> None:
    flat = torch.randn(total, generator=torch.Generator().manual_seed(0))
    for k in (1, total // 3, total - 1):
        _check([flat], k)


@pytest.mark.parametrize("seed", range(3))
def test_among_large(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = _large("few values" if seed else "normal", generator)
    among = [torch.rand(s.shape, generator=generator) < 0.3 for s in scores]
    if seed == 2:
        among[0].zero_()  # a whole layer without a candidate
    candidates = sum(int(a.sum()) for a in among)
    for k in (0, 1, candidates // 7, candidates - 1, candidates):
        _check(scores, k, among)
    with pytest.raises(ValueError, match=str(candidates)):
        keep_largest(scores, candidates + 1, among)


def test_among_never_selects_what_is_not_a_candidate() -> None:
    scores = [torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0])]
    among = [torch.tensor([False, False, True, False, True])]
    assert keep_largest(scores, 1, among)[0].tolist() == [False, False, True, False, False]
    assert keep_largest(scores, 2, among)[0].tolist() == [False, False, True, False, True]
    assert scores[0].tolist() == [9.0, 9.0, 0.0, 0.0, 0.0]  # inputs are not written to
    assert among[0].tolist() == [False, False, True, False, True]


def test_among_of_all_candidates_is_a_copy() -> None:
    among = [torch.tensor([True, False])]
    mask = keep_largest([torch.tensor([1.0, 2.0])], 1, among)[0]
    mask[1] = True
    assert among[0].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2000, 140_000])
def test_dtypes(dtype: torch.dtype, size: int) -> None:
    # In bfloat16 140,000 random values have thousands of exact ties.
    scores = [
        torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype).abs(),
        torch.randn(100, 3, generator=torch.Generator().manual_seed(4)).to(dtype).abs(),
    ]
    for k in (1, size // 10, size // 2, size):
        _check(scores, k)


def test_float64_values_that_float32_cannot_tell_apart() -> None:
    scores = 1 + torch.arange(1000, dtype=torch.float64) * 1e-12
    _check([scores], 400)
    _check([scores.repeat(100)], 40_000)


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (128, 96, 4, 4)])
def test_channels_last_counts_in_logical_order(shape: tuple[int, ...]) -> None:
    """Ties go to the lower logical index, so the memory format cannot change a mask."""
    plain = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    last = plain.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for k in (1, plain.numel() // 4, plain.numel() // 2):
        _check([last], k)
        assert torch.equal(keep_largest([last], k)[0], keep_largest([plain], k)[0])


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (128, 96, 4, 4)])
def test_among_in_another_memory_format(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, shape, generator=generator).float()
    allowed = torch.rand(shape, generator=generator) < 0.5
    last = torch.channels_last
    for k in (1, 50, int(allowed.sum()) - 1, int(allowed.sum())):
        _check([score.to(memory_format=last)], k, [allowed])
        _check([score], k, [allowed.to(memory_format=last)])
        _check([score.to(memory_format=last)], k, [allowed.to(memory_format=last)])
        rows = torch.arange(shape[0])[:, None, None, None] % 2 == 0
        if k <= score.numel() // 2:  # an expanded view, as live channels are
            _check([score], k, [rows.expand(shape)])


def test_transposed_and_empty_tensors() -> None:
    scores = [torch.randn(7, 5).t(), torch.empty(0, 3), torch.randn(3, 4, 5).transpose(0, 2)]
    for k in (0, 1, 40, 95):
        _check(scores, k)


def test_nothing_to_choose_from() -> None:
    assert keep_largest([], 0) == []
    with pytest.raises(ValueError, match="1 of 0"):
        keep_largest([], 1)


@pytest.mark.parametrize("k", [-1, 13])
def test_count_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"{k} of 12"):
        keep_largest([torch.ones(3, 4)], k)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nan_among_few(k: int) -> None:
    with pytest.raises(ValueError, match="NaN"):
        keep_largest([torch.tensor([3.0, math.nan, 2.0, 1.0])], k)


@pytest.mark.parametrize("k", [1, 1000, 150_000, 299_999])
@pytest.mark.parametrize("nans", [1, 300_000])
def test_nan_among_many(k: int, nans: int) -> None:
    scores = torch.rand(300_000)
    scores[77_777 if nans == 1 else slice(None)] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        keep_largest([scores], k)


@pytest.mark.parametrize("kind", ["normal", "few values", "rising", "one spike", "infinities"])
def test_kth_largest(kind: str) -> None:
    scores = _large(kind, torch.Generator().manual_seed(2))
    order = np.sort(np.concatenate([s.flatten().numpy() for s in scores]))[::-1]
    for k in (1, 2, 12_345, len(order) // 2, len(order) - 1, len(order)):
        assert kth_largest(scores, k) == order[k - 1]


def test_random_mask_has_the_exact_count_and_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(4, 5)
    for _ in range(2000):
        mask = random_mask((4, 5), 6, generator)
        assert mask.dtype == torch.bool
        assert mask.shape == (4, 5)
        assert int(mask.sum()) == 6
        hits += mask
    # Every position is hit 600 times in the mean, with a standard deviation of 20.5.
    assert float((hits - 600).abs().max()) < 5 * 20.5
    assert not random_mask((3, 3), 0, generator).any()
    assert random_mask((3, 3), 9, generator).all()


def test_random_mask_depends_on_the_generator_alone() -> None:
    masks = []
    for _ in range(2):
        torch.rand(3)
        masks.append(random_mask((6, 7), 10, torch.Generator().manual_seed(5)))
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], random_mask((6, 7), 10, torch.Generator().manual_seed(6)))


def test_channel_magnitude_counts_inactive_positions() -> None:
    weight = torch.tensor([[0.0, 0.0, -0.6, 0.2], [1.0, -1.0, 1.0, -1.0], [0.0] * 4])
    assert channel_magnitude(weight, 4).tolist() == pytest.approx([0.2, 1.0, 0.0])
    assert channel_magnitude(weight, 4).dtype == torch.float64
    # Inputs that were cut were zero: the mean still divides by the original fan-in.
    assert channel_magnitude(weight[:, 2:], 4)[0].item() == pytest.approx(0.2)
    kernel = torch.randn(3, 2, 3, 3)
    expected = kernel.double().abs().mean((1, 2, 3))
    torch.testing.assert_close(channel_magnitude(kernel, 18), expected)


def test_channel_magnitude_of_half_precision_does_not_round() -> None:
    weight = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    assert channel_magnitude(weight, 4096).item() == float(weight[0, 0])
