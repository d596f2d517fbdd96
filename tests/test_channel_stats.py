"""Channel statistics: exact on masks made by hand, and as expected on random ones."""

import math

import pytest
import torch

from gossamer.measure import channel_stats
from gossamer.measure.channels import held_by_sparsest
from gossamer.ops import random_mask


def test_by_hand() -> None:
    # Four channels of four places, with 4, 2, 1 and 1 weights: mean 2.
    rows = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    support = torch.tensor(rows).bool()
    weight = support * torch.tensor([[-1.0], [2.0], [-4.0], [1.0]])
    stats = channel_stats(weight, support)
    assert (stats.channels, stats.empty, stats.density) == (4, 0, 0.5)
    by_density = stats.by_density
    assert by_density.spread == pytest.approx(math.sqrt((4 + 0 + 1 + 1) / 4) / 2)
    # 8 of 16 places: S^2 = 16/15 * 1/4; S^2 / 4 * (1 - 4/16), over a mean of 1/2.
    assert by_density.random == pytest.approx(math.sqrt(16 / 15 / 4 / 4 * 0.75) / 0.5)
    assert (by_density.below_half, by_density.below_mean) == (0, 0.5)  # exactly half is not below
    # UMM: 1, 1, 1, 1/4; mean 13/16.
    umm = [1, 1, 1, 0.25]
    mean = sum(umm) / 4
    variance = sum((value - mean) ** 2 for value in umm) / 4
    assert stats.by_umm.spread == pytest.approx(math.sqrt(variance) / mean)
    assert (stats.by_umm.below_half, stats.by_umm.below_mean) == (0.25, 0.25)


def test_a_random_mask_spreads_as_expected() -> None:
    found, expected = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        mask = random_mask(torch.Size([32, 8, 3, 3]), 230, generator)
        stats = channel_stats(torch.randn(mask.shape, generator=generator) * mask, mask)
        for uneven in (stats.by_density, stats.by_umm):
            found.append(uneven.spread**2)
            expected.append(uneven.random**2)
    assert sum(found[0::2]) == pytest.approx(sum(expected[0::2]), rel=0.05)
    assert sum(found[1::2]) == pytest.approx(sum(expected[1::2]), rel=0.05)


def test_known_figure_of_the_random_spread() -> None:
    # sqrt((1 - d) / (d n)) for large layers: 32 channels of 288 places at density 0.1.
    mask = random_mask(torch.Size([1000, 288]), 28800, torch.Generator().manual_seed(0))
    stats = channel_stats(mask.float(), mask)
    assert stats.by_density.random == pytest.approx(math.sqrt(0.9 / 0.1 / 288), rel=1e-3)


def test_what_the_sparsest_channels_hold() -> None:
    support = torch.zeros(4, 10, dtype=torch.bool)
    for row, count in enumerate([1, 2, 7, 10]):
        support[row, :count] = True
    assert held_by_sparsest([support], 0.5)[0] == pytest.approx(3 / 20)
    assert held_by_sparsest([support], 0.625)[0] == pytest.approx((3 + 3.5) / 20)
    assert held_by_sparsest([support], 1.0) == (1.0, 1.0)
    assert held_by_sparsest([support, torch.ones(2, 10).bool()], 0.5)[0] == pytest.approx(13 / 40)
    masks = [
        random_mask(torch.Size([256, 512]), 13107, torch.Generator().manual_seed(s))
        for s in range(4)
    ]
    held, expected = held_by_sparsest(masks, 0.3)
    assert held == pytest.approx(expected, abs=0.005)
    assert expected < 0.3


def test_nothing_to_measure() -> None:
    empty = channel_stats(torch.zeros(3, 4))
    assert (empty.empty, empty.density, empty.by_umm.spread) == (3, 0, 0)
    with pytest.raises(ValueError, match=r"weight of shape \(3, 4\) and a support of \(4, 3\)"):
        channel_stats(torch.zeros(3, 4), torch.zeros(4, 3).bool())
    with pytest.raises(ValueError, match="nothing to share out"):
        held_by_sparsest([torch.zeros(3, 4).bool()], 0.5)
    with pytest.raises(ValueError, match=r"share=30: give a value in \[0, 1\]"):
        held_by_sparsest([torch.ones(3, 4).bool()], 30)
