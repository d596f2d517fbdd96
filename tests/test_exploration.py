"""The moves of drop and grow: by hand, against sorted lists, and their steps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.exploration import (
    drop_smallest,
    grow_largest,
    prune_to,
    random_scores,
    select,
    share,
    sizes,
    update_steps,
)


def _layers(seed: int, *, ties: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and masks of three layers."""
    generator = torch.Generator().manual_seed(seed)
    scores, masks = [], []
    for shape in ((4, 6), (3, 2, 3, 3), (5, 5)):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        scores.append((2 * values).round() if ties else values)
        masks.append(torch.rand(shape, generator=generator) < 0.5)
    return scores, masks


def _best(scores: list[Tensor], masks: list[Tensor], count: int) -> list[Tensor]:
    places = [
        (-float(score.flatten()[place]), layer, int(place))
        for layer, (score, mask) in enumerate(zip(scores, masks, strict=True))
        for place in mask.flatten().nonzero().flatten()
    ]
    chosen = [torch.zeros_like(mask) for mask in masks]
    for _, layer, place in sorted(places)[:count]:
        chosen[layer].view(-1)[place] = True
    return chosen


def _equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_select_over_all_layers_and_in_each(seed: int, ties: bool) -> None:
    scores, masks = _layers(seed, ties=ties)
    for count in (0, 1, 17, sum(sizes(masks))):
        assert _equal(select(scores, count, masks), _best(scores, masks, count))
    counts = [3, 0, sizes(masks)[2]]
    apart = [_best([s], [m], n)[0] for s, m, n in zip(scores, masks, counts, strict=True)]
    assert _equal(select(scores, counts, masks), apart)
    with pytest.raises(ValueError, match="cannot keep"):
        select(scores, sum(sizes(masks)) + 1, masks)


@pytest.mark.parametrize("seed", range(3))
def test_drop_and_prune_keep_the_largest_magnitudes(seed: int) -> None:
    weights, supports = _layers(seed)
    magnitudes = [weight.abs() for weight in weights]
    active = sizes(supports)
    assert active == [int(support.sum()) for support in supports]
    left = drop_smallest(weights, supports, 10)
    assert _equal(left, _best(magnitudes, supports, sum(active) - 10))
    assert _equal(prune_to(weights, supports, sum(active) - 10), left)
    left = drop_smallest(weights, supports, [1, 2, 0])
    assert sizes(left) == [active[0] - 1, active[1] - 2, active[2]]
    assert _equal(left, prune_to(weights, supports, sizes(left)))


@pytest.mark.parametrize("count", [9, [2, 3, 4]])
@pytest.mark.parametrize("seed", range(3))
def test_growth_with_and_without_what_was_just_dropped(seed: int, count) -> None:
    weights, supports = _layers(seed)
    scores = [score.abs() for score in _layers(seed + 10)[0]]
    kept = drop_smallest(weights, supports, [4, 4, 4])
    fresh = grow_largest(scores, count, kept, supports, revive=False)
    empty = [~support for support in supports]
    assert _equal([grown for _, grown in fresh], select(scores, count, empty))
    assert _equal([left for left, _ in fresh], kept)
    again = grow_largest(scores, count, kept, supports, revive=True)
    wanted = select(scores, count, [~mask for mask in kept])
    revived = 0
    for (left, grown), new, held, support in zip(again, wanted, kept, supports, strict=True):
        assert torch.equal(left | grown, held | new)
        assert torch.equal(left, (held | new) & support)
        assert not (grown & support).any()
        revived += int((left & ~held).sum())
    assert revived > 0


def test_random_scores_follow_the_generator_alone() -> None:
    tensors = [torch.zeros(50, 60), torch.zeros(3, 2, 3, 3, dtype=torch.float64)]
    one, two = (random_scores(tensors, torch.Generator().manual_seed(3)) for _ in range(2))
    assert _equal(one, two)
    assert [score.shape for score in one] == [tensor.shape for tensor in tensors]
    assert float(one[0].mean()) == pytest.approx(0.5, abs=0.03)
    assert 0 <= float(one[0].min()) < float(one[0].max()) < 1


def test_share_rounds_down() -> None:
    assert share(0.3, [10, 9, 3], "layer") == [3, 2, 0]
    assert share(0.3, [10, 9, 3], "global") == 6
    assert share(0.29, [100], "layer") == [29]  # 0.29 * 100 is 28.999999999999996
    assert share(1.0, [7, 0], "layer") == [7, 0]
    exact = [share(k / n, [n], "global") for n in range(1, 200) for k in range(n + 1)]
    assert exact == [k for n in range(1, 200) for k in range(n + 1)]


@pytest.mark.parametrize(
    ("interval", "t_end", "total", "steps"),
    [
        (10, 0.75, 100, range(10, 75, 10)),
        (25, 0.75, 100, [25, 50]),
        (10, 1.0, 100, range(10, 100, 10)),
        (None, 1.0, 2000, range(100, 2000, 100)),
        (None, 1.0, 1999, range(99, 1999, 99)),
        (None, 0.5, 30, range(1, 15)),
        (1, 1.0, 2, [1]),
    ],
)
def test_update_steps(interval: int | None, t_end: float, total: int, steps) -> None:
    assert [*update_steps(interval, t_end, total)] == [*steps]


def test_no_update_steps() -> None:
    with pytest.raises(ValueError, match=r"update_interval=80 .* step 75 \(0\.75 of 100 steps\)"):
        update_steps(80, 0.75, 100)


def test_scores_of_another_memory_format() -> None:
    """Gradients of a channels_last model: selection does not depend on the layout."""
    scores, masks = _layers(0)
    other = [s.contiguous(memory_format=torch.channels_last) if s.dim() == 4 else s for s in scores]
    assert _equal(select(other, 20, masks), select(scores, 20, masks))
    changes = grow_largest(other, 5, drop_smallest(other, masks, 5), masks, revive=True)
    expected = grow_largest(scores, 5, drop_smallest(scores, masks, 5), masks, revive=True)
    for got, wanted in zip(changes, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
