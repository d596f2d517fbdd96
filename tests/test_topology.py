"""SAD and topology: worked numbers, plain twins, cut layers, resuming, and what they rely on."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.measure import Sad, Topology, TopologyTracker, sad
from gossamer.ops import n_of_m, random_mask
from gossamer.registry import METHODS
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


def mask(*rows: str) -> Tensor:
    """A mask as it is written: "1" where a weight is kept."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def test_a_layer_by_hand() -> None:
    tracker = TopologyTracker({"a": mask("1100", "0000")})
    tracker.observe({"a": mask("1010", "0000")})
    check = tracker.check(2, {"a": mask("1110", "0001")})
    assert check.total == check.layers["a"]
    assert check.total == Topology(
        from_start=Sad(changed=2, weights=8, maximum=6),
        since_last=Sad(changed=2, weights=8, maximum=6),
        kept=4,
        entered=2,  # the third of the first row, the last of the second
        ever=4,
        left=1,  # the second of the first row ...
        returned=1,  # ... which is back
        live_channels=2,
    )
    shares = check.total
    assert (shares.density, shares.exploration, shares.churn, shares.revived) == (0.5, 0.5, 0.5, 1)

    check = tracker.check(3, {"a": mask("0000", "1001")})
    assert check.total == Topology(
        from_start=Sad(changed=4, weights=8, maximum=4),
        since_last=Sad(changed=4, weights=8, maximum=6),
        kept=2,
        entered=1,
        ever=5,
        left=3,
        returned=0,
        live_channels=1,
    )
    assert (check.total.exploration, check.total.churn, check.total.revived) == (0.625, 0.5, 0)
    assert tracker.sad_cumulative == 2 / 8 + 4 / 8
    plain = check.to_dict()
    assert plain["step"] == 3
    assert plain["exploration"] == plain["layers"]["a"]["exploration"] == 0.625
    assert plain["since_last"]["per_weight"] == 0.5


def test_an_empty_support_divides_by_nothing() -> None:
    nothing = {"a": torch.zeros(3, 3, dtype=torch.bool)}
    total = TopologyTracker(nothing).check(1, nothing).total
    assert (total.density, total.churn, total.revived, total.live_channels) == (0, 0, 0, 0)
    assert total.from_start.relative == 0


def _by_sets(history: list[Tensor], checked: list[int]) -> dict[str, float]:
    """The figures of one layer after the last mask, from their definitions."""
    kept = [{i for i, one in enumerate(mask.flatten().tolist()) if one} for mask in history]
    now, last = kept[-1], kept[checked[-1]]
    left = set().union(*(a - b for a, b in pairwise(kept)))
    return {
        "from_start": len(now ^ kept[0]),
        "since_last": len(now ^ last),
        "kept": len(now),
        "entered": len(now - last),
        "ever": len(set().union(*kept)),
        "left": len(left),
        "returned": len(left & now),
        "live_channels": sum(bool(row.any()) for row in history[-1]),
    }


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (8,), (4, 3, 3, 3), (16, 8, 1, 1), (33, 31)])
def test_counts_are_those_of_the_definitions(shape: tuple[int, ...]) -> None:
    """Bits are packed eight to a byte; here they are sets."""
    generator = torch.Generator().manual_seed(len(shape))
    steps = 9
    masks = [
        {
            name: torch.rand(s, generator=generator) < 0.3
            for name, s in (("a", shape), ("b", (2, 7)))
        }
        for _ in range(steps)
    ]
    tracker, checked, moved = TopologyTracker(masks[0]), [0], 0.0
    for step in range(1, steps):
        if step % 3:
            tracker.observe(masks[step])
            continue
        check = tracker.check(step, masks[step])
        for name, layer in check.layers.items():
            found = vars(layer) | {key: getattr(layer, key).changed for key in SADS}
            assert found == _by_sets([m[name] for m in masks[: step + 1]], checked)
            assert layer.from_start == sad(masks[0][name], masks[step][name])
            assert layer.since_last == sad(masks[checked[-1]][name], masks[step][name])
        layers = list(check.layers.values())
        for key in ("kept", "entered", "ever", "left", "returned", "live_channels"):
            assert getattr(check.total, key) == sum(getattr(layer, key) for layer in layers)
        assert check.total.from_start == sad(list(masks[0].values()), list(masks[step].values()))
        checked.append(step)
        moved += check.total.since_last.per_weight
    assert tracker.sad_cumulative == pytest.approx(moved)


SADS = ("from_start", "since_last")


def test_every_byte_is_packed_and_counted() -> None:
    bytes_ = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    tracker = TopologyTracker({"a": bytes_ > 0})
    check = tracker.check(1, {"a": bytes_ < 1})
    assert (check.total.kept, check.total.ever, check.total.left) == (1024, 2048, 1024)
    assert check.total.from_start.changed == 2048
    assert check.total.live_channels == 255
    again = tracker.check(2, {"a": bytes_ > 0})
    assert (again.total.returned, again.total.from_start.changed) == (1024, 0)
    for row in range(256):  # each alone
        alone = TopologyTracker({"a": bytes_[row : row + 1] > 0})
        assert alone.check(1, {"a": bytes_[row : row + 1]}).total.kept == row.bit_count()


def test_memory_format_and_dtype_do_not_matter() -> None:
    first, second = (torch.rand(4, 6, 3, 3) < 0.4 for _ in range(2))
    plain, other = TopologyTracker({"a": first}), TopologyTracker({"a": first.float()})
    shuffled = second.to(memory_format=torch.channels_last)
    assert plain.check(1, {"a": second}) == other.check(1, {"a": shuffled})
    third = torch.rand(5, 6, 3, 3) < 0.4  # a part of it starts anywhere in memory
    assert plain.check(2, {"a": third[1:]}) == other.check(2, {"a": third[1:].clone()})


def test_a_resumed_tracker_reports_the_whole() -> None:
    masks = [{"a": torch.rand(9, 5) < 0.4, "b": torch.rand(3, 3) < 0.4} for _ in range(7)]
    whole, first, second = (TopologyTracker(masks[0]) for _ in range(3))
    for tracker in (whole, first):
        tracker.observe(masks[1])
        tracker.check(2, masks[2])
        tracker.observe(masks[3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TopologyTracker(masks[6])
    second.load_state_dict(torch.load(file, weights_only=True))
    for tracker in (whole, second):
        tracker.observe(masks[4])
    assert second.check(5, masks[5]) == whole.check(5, masks[5])
    assert second.sad_cumulative == whole.sad_cumulative > 0


def test_refuses_another_network() -> None:
    tracker = TopologyTracker({"a": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the tracker was made for"):
        tracker.check(1, {"b": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for a, .* original shape"):
        tracker.observe({"a": torch.ones(3, 4, dtype=torch.bool)})
    for state in ({}, {"shapes": {}}, {"shapes": 3}):
        with pytest.raises(ValueError, match="not a tracker's state"):
            tracker.load_state_dict(state)
    with pytest.raises(ValueError, match="other layers or shapes"):
        tracker.load_state_dict(TopologyTracker({"a": torch.ones(2, 2)}).state_dict())


# ------------------------------------------------------------------ in training


@pytest.mark.parametrize("name", METHODS)
def test_the_revision_tells_of_every_change(name: str) -> None:
    """What a tracker relies on: in a run of up to 1000 steps no change goes untold."""
    model = net("conv_flatten_linear")
    settings = {"str": {"s_init": -5.0}}  # by default it wants a longer run
    method, steps = METHODS[name].cls(**settings.get(name, {})), 60
    sparsifier = gossamer.Sparsifier(model, method, total_steps=steps, example=batches(1)[0][0])
    seen = [(sparsifier.revision, sparsifier.supports())]

    def look(_: int) -> None:
        seen.append((sparsifier.revision, sparsifier.supports()))

    train(model, sparsifier, optimizer_for("sgd", model), batches(steps), after_step=look)
    for (revision, supports), (later, others) in pairwise(seen):
        same = all(torch.equal(supports[layer], others[layer]) for layer in supports)
        assert same or later > revision


@pytest.mark.parametrize("interval", [1, 7, 400])
def test_long_runs_tell_of_a_thousand_changes(interval: int) -> None:
    total = 25_000
    steps = range(interval, total + 1, interval)
    told = [step for step in steps if gossamer.Progress(step, total).look_due(interval)]
    assert min(len(steps), 1000) <= len(told) < 2000
    assert interval < 400 or told == list(steps)


def test_exploration_is_the_union_of_all_supports() -> None:
    model = net("conv_flatten_linear")
    method = gossamer.Chase(density=0.2, channel_sparsity=0.2, update_interval=3, min_channels=2)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=60, example=batches(1)[0][0])
    tracker, seldom = (TopologyTracker(sparsifier.supports()) for _ in range(2))
    union, revision = sparsifier.supports(), sparsifier.revision

    def look(step: int) -> None:
        nonlocal revision
        supports = sparsifier.supports()
        for layer, support in supports.items():
            union[layer] |= support
        if sparsifier.revision != revision:
            tracker.observe(supports)
            revision = sparsifier.revision
        if step % 30 == 0:
            seldom.check(step, supports)

    train(model, sparsifier, optimizer_for("sgd", model), batches(60), after_step=look)
    check = tracker.check(60, sparsifier.supports())
    assert check.total.ever == sum(int(mask.count_nonzero()) for mask in union.values())
    assert check.total.exploration > seldom.check(60, sparsifier.supports()).total.exploration
    assert check.total.kept == round(0.2 * check.total.weights)


def test_cut_layers_count_in_their_original_shape() -> None:
    """Chase cuts channels: what was cut counts as pruned, at its place in the original."""
    model = net("vgg")
    method = gossamer.Chase(
        density=0.3, channel_sparsity=0.5, update_interval=4, min_channels=2, grow="random"
    )
    example = batches(1)[0][0]
    sparsifier = gossamer.Sparsifier(model, method, total_steps=40, example=example)
    start = sparsifier.supports()
    tracker = TopologyTracker(start)
    train(model, sparsifier, optimizer_for("sgd", model), batches(40))
    assert len(sparsifier.plan), "nothing was cut"
    supports = sparsifier.supports()
    for site in sparsifier.sites:
        whole = supports[site.name]
        assert whole.shape == site.original_shape
        assert int(whole.count_nonzero()) == site.nonzeros
        rows = sparsifier.plan.kept(site.tensor_name, 0)
        columns = sparsifier.plan.kept(site.tensor_name, 1)
        part = whole if rows is None else whole[rows]
        part = part if columns is None else part[:, columns]
        assert torch.equal(part, site.support)
    check = tracker.check(40, supports)
    assert check.total.from_start.changed == twin.sad(
        [mask.numpy() for mask in start.values()], [mask.numpy() for mask in supports.values()]
    )
    assert check.total.from_start.weights == sum(
        np.prod(site.original_shape) for site in sparsifier.sites
    )
