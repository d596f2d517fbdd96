"""SAD: worked numbers, cut layers, resuming."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import gossamer
from gossamer.measure import Sad, SadTracker, sad
from gossamer.ops import n_of_m, random_mask
from nets import batches, net, optimizer_for, train
from reference import srste as twin


def test_nested_masks() -> None:
    """1:4 inside 2:4 of the same weights: each of 4 groups loses one."""
    weight = torch.randn(2, 8)
    two, one = n_of_m(weight, 2, 4), n_of_m(weight, 1, 4)
    distance = sad(two, one)
    assert distance == Sad(changed=4, weights=16, maximum=12)
    assert distance.per_weight == 0.25


@pytest.mark.parametrize(
    ("n", "m", "maximum", "random"), [(2, 4, 1, 0.5), (1, 4, 0.5, 0.375), (1, 8, 0.25, 0.219)]
)
def test_independent_patterns(n: int, m: int, maximum: float, random: float) -> None:
    a, b = (n_of_m(torch.randn(512, 512), n, m) for _ in range(2))
    distance = sad(a, b)
    assert distance.maximum / distance.weights == maximum
    assert distance.per_weight == pytest.approx(random, abs=5e-3)
    assert distance.relative == pytest.approx(random / maximum, abs=2e-2)
    assert distance.changed % 2 == 0
    assert distance.changed == twin.sad([a.numpy()], [b.numpy()])


def test_the_maximum_is_reached() -> None:
    for kept_a, kept_b in ((3, 3), (3, 4), (8, 5), (10, 10), (0, 0), (0, 10)):
        a, b = torch.zeros(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
        a[:kept_a], b[10 - kept_b :] = True, True
        distance = sad(a, b)
        assert distance.changed == distance.maximum
        assert distance.relative == (1 if distance.maximum else 0)


def test_layers_add_up() -> None:
    a = [random_mask((6, 8), 10, torch.Generator().manual_seed(s)) for s in range(3)]
    b = [random_mask((6, 8), 10, torch.Generator().manual_seed(s + 9)) for s in range(3)]
    assert sad(a, b).changed == sum(sad(x, y).changed for x, y in zip(a, b, strict=True))
    assert sad(a, b).weights == 3 * 48
    with pytest.raises(ValueError, match="in the shape it had at the start"):
        sad(a, b[:2])


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (8,), (4, 3, 3, 3), (16, 8, 1, 1)])
def test_tracker_counts_as_sad_does(shape: tuple[int, ...]) -> None:
    masks = [{"a": torch.rand(shape) < 0.4, "b": torch.rand(2, 7) < 0.4} for _ in range(4)]
    tracker = SadTracker(masks[0])
    moved = 0.0
    for step in (1, 2, 3):
        check = tracker.check(step, masks[step])
        now, then = list(masks[step].values()), list(masks[step - 1].values())
        assert check.from_start == sad(list(masks[0].values()), now)
        assert check.since_last == sad(then, now)
        assert check.layers_from_start["a"] == sad(masks[0]["a"], masks[step]["a"])
        moved += check.since_last.per_weight
    assert tracker.cumulative == pytest.approx(moved)
    plain = check.to_dict()
    assert plain["since_last"]["relative"] == check.since_last.relative
    assert plain["layers"]["b"]["from_start"]["weights"] == 14


def test_a_resumed_tracker_reports_the_whole() -> None:
    masks = [{"a": torch.rand(9, 5) < 0.4} for _ in range(4)]
    whole, first, second = (SadTracker(masks[0]) for _ in range(3))
    expected = [whole.check(step, masks[step]) for step in (1, 2, 3)]
    first.check(1, masks[1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SadTracker(masks[2])
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [second.check(step, masks[step]) for step in (2, 3)] == expected[1:]
    assert second.cumulative == whole.cumulative


def test_refuses_another_network() -> None:
    tracker = SadTracker({"a": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the tracker was made for"):
        tracker.check(1, {"b": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="original shape"):
        tracker.check(1, {"a": torch.ones(3, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="not a tracker's state"):
        tracker.load_state_dict({"start": {}})
    with pytest.raises(ValueError, match="other layers or shapes"):
        tracker.load_state_dict(SadTracker({"a": torch.ones(2, 2)}).state_dict())


def test_cut_layers_count_in_their_original_shape() -> None:
    """Chase cuts channels: what was cut counts as pruned, at its place in the original."""
    model = net("vgg")
    method = gossamer.Chase(
        density=0.3, channel_sparsity=0.5, update_interval=4, min_channels=2, grow="random"
    )
    example = batches(1)[0][0]
    sparsifier = gossamer.Sparsifier(model, method, total_steps=40, example=example)
    start = sparsifier.supports()
    tracker = SadTracker(start)
    train(model, sparsifier, optimizer_for("sgd", model), batches(40))
    assert len(sparsifier.plan), "nothing was cut"
    supports = sparsifier.supports()
    for site in sparsifier.sites:
        whole = supports[site.name]
        assert whole.shape == site.original_shape
        assert int(whole.count_nonzero()) == site.nonzeros
        rows = sparsifier.plan.kept(site.name, "out")
        columns = sparsifier.plan.kept(site.name, "in")
        part = whole if rows is None else whole[rows]
        part = part if columns is None else part[:, columns]
        assert torch.equal(part, site.support)
    check = tracker.check(40, supports)
    assert check.from_start.changed == twin.sad(
        [mask.numpy() for mask in start.values()], [mask.numpy() for mask in supports.values()]
    )
    assert check.from_start.weights == sum(
        np.prod(site.original_shape) for site in sparsifier.sites
    )
