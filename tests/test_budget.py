"""Budgets in MACs, bytes and milliseconds, scores weighed by price, and widths by the clock.

Times are made up (`clocks.FakeClock`): what is decided by them is decided the same anywhere.
"""

import copy
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from clocks import FakeClock, never
from gossamer.measure import account
from gossamer.measure.layer_times import layer_calls, layer_widths
from gossamer.prices import cut_to
from gossamer.removal import select_blocks
from nets import Vgg, batches, images, net, optimizer_for, train

STEPS = 30
SHORT = {"density": 0.3, "update_interval": 4, "min_channels": 2, "channel_multiple": 1}


def _run(model: nn.Module, method: gossamer.Chase, steps: int = STEPS, **options):
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS, example=images(4), **options)
    optimizer = optimizer_for("sgd", model)
    train(model, sparsifier, optimizer, batches(STEPS)[:steps])
    return sparsifier, optimizer


def _widths(sparsifier: gossamer.Sparsifier) -> list[int]:
    return [int(pool.live.sum()) for pool in sparsifier.pools]


def _table(model: nn.Module, clock) -> gossamer.LatencyTable:
    return gossamer.latency(model, images(4), stopwatch=clock)


# Which blocks go


def _select(scores, ladders, enough, price=None, *, done=None, grains=None) -> list[list[int]]:
    live = [torch.ones(len(row), dtype=torch.bool) for row in scores]
    removed = select_blocks(
        [torch.tensor(row, dtype=torch.float64) for row in scores],
        live,
        ladders=ladders,
        enough=enough,
        done=done or (lambda widths: False),
        grains=grains,
        price=price,
    )
    return [channels.tolist() for channels in removed]


A, B = [0.1, 0.4, 0.2, 0.3], [0.15, 0.26, 0.25, 0.5]


def test_channel_by_channel_the_lowest_goes() -> None:
    ladders = [[3, 2, 1], [3, 2, 1]]
    assert _select([A, B], ladders, lambda w: sum(w) <= 5) == [[0, 2], [0]]
    assert _select([A, B], ladders, lambda w: sum(w) <= 4) == [[0, 2], [0, 2]]
    assert _select([A, B], ladders, lambda w: sum(w) <= 8) == [[], []]
    assert _select([A, B], ladders, lambda w: False) == [[0, 2, 3], [0, 1, 2]]  # all it can


def test_blocks_go_by_their_mean_score() -> None:
    # Of A {0.1, 0.2} goes in one, of B {0.15, 0.25}: first A's, although B's 0.15 is below 0.2.
    assert _select([A, B], [[2], [2]], lambda w: sum(w) <= 6) == [[0, 2], []]
    assert _select([A, B], [[1], [3]], lambda w: sum(w) <= 7) == [[], [0]]


def test_a_score_is_weighed_against_what_its_removal_saves() -> None:
    def price(widths):
        return 10 * widths[0] + 1 * widths[1]

    ladders = [[3, 2, 1], [3, 2, 1]]
    # 0.3 / 10 is less than 0.15 / 1: the first layer goes as far as it may.
    assert _select([A, B], ladders, lambda w: price(w) <= 14, price) == [[0, 2, 3], []]
    assert _select([A, B], ladders, lambda w: price(w) <= 13, price) == [[0, 2, 3], [0]]


def test_what_others_lost_changes_what_is_saved() -> None:
    """The price is a product: a channel of one layer costs as many as the other has."""

    def price(widths):
        return widths[0] * widths[1]

    ladders = [[5, 4, 3, 2], [3, 2, 1]]
    scores = [[1.0] * 6, [2.0] * 4]
    # 1/4 against 2/6, and again at five: 1/4 against 2/5, ... at three: 1/4 against 2/3.
    assert _select(scores, ladders, lambda w: sum(w) <= 7, price) == [[0, 1, 2], []]
    scores = [[1.0] * 6, [1.2] * 4]
    # 1/4 against 1.2/6 = 0.2; then 1/3 against 1.2/6; then 1/2 against 1.2/6.
    assert _select(scores, ladders, lambda w: sum(w) <= 7, price) == [[], [0, 1, 2]]


def test_widths_that_save_nothing_are_passed_over() -> None:
    def price(widths):  # works in twos, the second layer is for nothing
        return -(-widths[0] // 2) * 2

    ladders = [[3, 2, 1], [3, 2, 1]]
    assert _select([A, B], ladders, lambda w: price(w) <= 2, price) == [[0, 2], []]
    assert _select([A, B], ladders, lambda w: False, price) == [[0, 2], []]


def test_a_block_that_would_overspend_waits_and_is_made_smaller() -> None:
    def spent(limit):
        return lambda w: 10 * w[0] + w[1] <= limit

    scores = [[0.1] * 8, [5.0] * 8]
    ladders = [[4, 0], [4, 0]]
    # 88 may be 50 for now and 40 in the end: two blocks of the first would leave 8.
    assert _select(scores, ladders, spent(50), done=spent(40)) == [[0, 1, 2, 3], []]
    assert _select(scores, ladders, spent(40), done=spent(40)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    # At last the block whose turn it is goes as far as it must, in ones or in twos.
    last = {"done": spent(35), "grains": [1, 1]}
    assert _select(scores, ladders, spent(35), **last) == [[0, 1, 2, 3, 4, 5], []]
    last = {"done": spent(25), "grains": [2, 2]}
    assert _select(scores, ladders, spent(25), **last) == [[0, 1, 2, 3, 4, 5, 6, 7][:8], []]


@pytest.mark.parametrize("seed", range(10))
def test_selection_equals_the_slow_way(seed: int) -> None:
    """Every offer made anew after every block, none kept in a heap."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator).tolist() for n in (9, 12, 7)]
    weights = torch.rand(3, generator=generator).tolist()

    def price(widths):
        return sum(w * a * b for w, a, b in zip(weights, widths, [*widths[1:], 3], strict=True))

    ladders = [list(range(n - 2, 0, -2)) for n in (9, 12, 7)]
    limit = 0.3 * price([9, 12, 7])
    got = _select(scores, ladders, lambda w: price(w) <= limit, price)
    widths = [9, 12, 7]
    while price(widths) > limit:
        offers = []
        for pool, ladder in enumerate(ladders):
            lower = [w for w in ladder if w < widths[pool]]
            if lower:
                after = [*widths[:pool], lower[0], *widths[pool + 1 :]]
                ranked = sorted(scores[pool])
                lost = sum(ranked[len(ranked) - widths[pool] : len(ranked) - lower[0]])
                offers.append((lost / (price(widths) - price(after)), pool, lower[0]))
        _, pool, width = min(offers)
        widths[pool] = width
    assert [len(s) - len(r) for s, r in zip(scores, got, strict=True)] == widths
    for row, gone in zip(scores, got, strict=True):
        lowest = sorted(range(len(row)), key=lambda channel: row[channel])
        assert gone == sorted(lowest[: len(gone)])


# Budgets


@pytest.mark.parametrize(
    ("name", "per", "least"),
    [("vgg", "channel", 0.95), ("vgg", "bytes", 0.95), ("bottleneck", "macs", 0.9)],
)
def test_a_budget_of_macs_is_met(name: str, per: str, least: float) -> None:
    model = net(name)
    dense = account(model, images(2)).macs_executed
    method = gossamer.Chase(max_macs=0.5 * dense, channel_score_per=per, **SHORT)
    sparsifier, _ = _run(model, method)
    executed = account(model, images(2)).macs_executed
    assert least * 0.5 * dense <= executed <= 0.5 * dense
    assert sparsifier.prices["macs"](_widths(sparsifier)) == executed
    assert sparsifier.prices["macs"].dense == dense


@pytest.mark.parametrize("cut", ["during", "end"])
def test_a_budget_of_bytes_is_met(cut: str, tmp_path: Path) -> None:
    model = net("vgg", dtype=torch.float32)
    x, file = images(4, dtype=torch.float32), tmp_path / "slim.safetensors"
    gossamer.save(file, model)
    limit = 0.5 * file.stat().st_size
    method = gossamer.Chase(max_bytes=limit, **SHORT)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS, example=x, cut=cut)
    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS, dtype=torch.float32))
    sparsifier.finalize()
    slim = gossamer.shrink(model, x, plan=sparsifier.plan)
    gossamer.save(file, slim.model, slim.plan)
    assert 0.93 * limit <= file.stat().st_size <= limit


@pytest.mark.parametrize(
    ("per", "made_up"),
    [
        ("channel", {}),
        ("latency", {}),
        ("channel", {"volume": 1e-5, "overhead": 0.02, "noise": 0.01}),
        ("latency", {"whole": 1.4, "noise": 0.01}),
    ],
)
def test_a_budget_of_milliseconds_is_met(per: str, made_up: dict[str, float]) -> None:
    model, clock = Vgg((24, 32, 40, 40)).double(), FakeClock(**made_up)
    full, table = copy.deepcopy(model), _table(model, clock)
    method = gossamer.Chase(max_latency_ms=0.5 * table.dense, channel_score_per=per, **SHORT)
    sparsifier, _ = _run(model, method, latency=table)
    clock.noise = 0.0
    slim = cut_to(full, table.groups, _widths(sparsifier))
    share = clock.time(slim, images(4)) / clock.time(full, images(4)) / 0.5
    assert 0.93 <= share <= 1.0
    assert sparsifier.refused == []


def test_a_table_that_is_wrong_is_put_right_while_training() -> None:
    """Cut networks take far longer than their layers say: only measuring them shows it."""

    def clock(runs):
        times = FakeClock()(runs)
        if len(times) != 2:  # layers, and the networks that the table is fitted to
            return times
        return [times[0], times[0] * (times[1] / times[0]) ** 0.7]

    model = Vgg((24, 32, 40, 40)).double()
    table = _table(model, clock)
    method = gossamer.Chase(max_latency_ms=0.5 * table.dense, **SHORT)
    sparsifier, _ = _run(model, method, latency=table)
    assert table(_widths(sparsifier)) < 0.42 * table.dense
    assert 0.95 * 0.5 <= table.ratio(_widths(sparsifier)) <= 0.5


def test_several_budgets_hold_together() -> None:
    model = net("vgg")
    dense = account(model, images(2))
    method = gossamer.Chase(
        max_macs=0.6 * dense.macs_executed, max_bytes=0.5 * dense.bytes_on_disk, **SHORT
    )
    sparsifier, _ = _run(model, method)
    widths = _widths(sparsifier)
    macs = sparsifier.prices["macs"](widths) / (0.6 * dense.macs_executed)
    size = sparsifier.prices["bytes"](widths) / (0.5 * dense.bytes_on_disk)
    assert 0.93 <= max(macs, size) <= 1


def test_a_budget_is_approached_along_the_cubic() -> None:
    model = net("vgg")
    dense = account(model, images(2)).macs_executed
    method = gossamer.Chase(max_macs=0.4 * dense, **SHORT)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS, example=images(4))
    price, shares = sparsifier.prices["macs"], []
    train(
        model,
        sparsifier,
        optimizer_for("sgd", model),
        batches(STEPS),
        after_step=lambda step: shares.append(price(_widths(sparsifier)) / dense),
    )
    end = round(0.8 * STEPS)
    assert shares == sorted(shares, reverse=True)
    for step in method.removal_steps(STEPS):
        allowed = 0.4 + 0.6 * (1 - step / end) ** 3
        assert 0.8 * allowed < shares[step - 1] <= allowed + 0.05  # a block may have to wait
    assert shares[end - 2] > 0.4 >= shares[end - 1]


def test_scores_per_macs_cut_where_a_channel_costs_most() -> None:
    kept = {}
    for per in ("channel", "macs"):
        model = net("vgg")
        with torch.no_grad():  # all channels alike: what they cost decides alone
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.fill_(0.1)
        method = gossamer.Chase(channel_sparsity=0.3, channel_score_per=per, **SHORT)
        sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS, example=images(4))
        for site in sparsifier.sites:
            site.masked.mask.fill_(1.0)
            site.weight.data.fill_(0.1)
        end = gossamer.Progress(round(0.8 * STEPS), STEPS)
        removed = method.removals(sparsifier.pools, end, sparsifier.prices)
        kept[per] = [
            p.original_channels - len(r) for p, r in zip(sparsifier.pools, removed, strict=True)
        ]
    assert sum(kept["channel"]) == sum(kept["macs"]) == round(0.7 * 68)
    saved = {
        per: account(
            cut_to(net("vgg"), _table(net("vgg"), FakeClock()).groups, widths), images(2)
        ).macs_executed
        for per, widths in kept.items()
    }
    assert saved["macs"] < saved["channel"]


def test_a_floor_is_a_share_of_the_width_at_which_all_layers_meet_the_budget() -> None:
    model = net("vgg")
    dense = account(model, images(2)).macs_executed
    method = gossamer.Chase(max_macs=0.4 * dense, min_channel_factor=1.0, **SHORT)
    sparsifier, _ = _run(model, method)
    shares = [
        w / p.original_channels for w, p in zip(_widths(sparsifier), sparsifier.pools, strict=True)
    ]
    assert max(shares) - min(shares) < 0.12
    assert min(shares) > 0.55


def test_default_widths_are_multiples() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 4),
    ).double()  # fmt: skip
    method = gossamer.Chase(density=0.3, channel_sparsity=0.55, min_channels=2, update_interval=4)
    sparsifier, _ = _run(model, method)
    wide, middle, narrow = _widths(sparsifier)
    assert wide < 64
    assert wide % 16 == 0
    assert middle < 24
    assert middle % 8 == 0
    assert narrow < 12


def test_with_default_multiples_the_last_block_alone_is_odd() -> None:
    model = Vgg((32, 48, 64, 64)).double()
    dense = account(model, images(2)).macs_executed
    method = gossamer.Chase(density=0.3, update_interval=4, max_macs=0.35 * dense)
    sparsifier, _ = _run(model, method)
    assert 0.95 * 0.35 * dense <= account(model, images(2)).macs_executed <= 0.35 * dense
    odd = [w for w, size in zip(_widths(sparsifier), (8, 8, 16, 16), strict=True) if w % size]
    assert len(odd) == 1

    strict = gossamer.Chase(
        density=0.3, update_interval=4, max_macs=0.35 * dense, channel_multiple=8
    )
    sparsifier, _ = _run(Vgg((32, 48, 64, 64)).double(), strict)
    assert all(width % 8 == 0 for width in _widths(sparsifier))


# By the clock


def test_widths_that_are_no_faster_are_never_chosen() -> None:
    model = net("vgg")
    table = _table(model, FakeClock(blocks=4))
    method = gossamer.Chase(channel_sparsity=0.4, channel_score_per="latency", **SHORT)
    sparsifier, _ = _run(model, method, latency=table)
    full = [group.channels for group in table.groups]
    widths = _widths(sparsifier)
    assert sum(widths) < sum(full)
    for index, (width, group) in enumerate(zip(widths, table.groups, strict=True)):
        wider = [*widths[:index], min(width + 1, group.channels), *widths[index + 1 :]]
        assert width == group.channels or table(wider) > table(widths)


def test_a_layer_that_is_no_faster_when_it_is_cut_is_left_alone() -> None:
    """The first layer takes its time at any width, and the second does not mind its inputs."""

    def layer(module, positions: int) -> float:
        c_in, c_out, _ = layer_widths(module)
        return 1e-4 * positions * (10 if c_in == 3 else c_out)

    def clock(runs):
        return [
            sum(layer(m.get_submodule(c.layer), c.positions) for c in layer_calls(m, x))
            for m, x in runs
        ]

    model = Vgg((10, 16, 20, 20)).double()
    table = _table(model, clock)
    method = gossamer.Chase(channel_sparsity=0.4, channel_score_per="latency", **SHORT)
    sparsifier, _ = _run(model, method, latency=table)
    assert _widths(sparsifier)[0] == 10
    assert sum(_widths(sparsifier)) == round(0.6 * 66)
    (told,) = sparsifier.refused
    assert told.startswith("features.0 10 to ")
    assert told.endswith(f"ms, and uncut it is {table.dense:.4g} ms")


def test_a_cut_that_makes_the_network_slower_is_refused_with_the_figures() -> None:
    def clock(runs):
        times = FakeClock()(runs)
        return [times[0], 1.25 * times[0]] if len(times) == 2 else times

    model = net("vgg")
    table = _table(model, clock)
    method = gossamer.Chase(channel_sparsity=0.4, channel_score_per="latency", **SHORT)
    sparsifier, _ = _run(model, method, latency=table)
    assert _widths(sparsifier) == [group.channels for group in table.groups]
    assert len(sparsifier.plan) == 0
    assert len(sparsifier.refused) == len(method.removal_steps(STEPS))
    told = sparsifier.refused[0]
    assert "to" in told
    assert f"would take {1.25 * table.dense:.4g} ms" in told
    assert f"before the cut it is {table.dense:.4g} ms" in told


def test_a_budget_is_met_by_cutting_more() -> None:
    def clock(runs):
        times = FakeClock()(runs)
        return [times[0], 1.25 * times[0]] if len(times) == 2 else times

    model = net("vgg")
    dense = account(model, images(2)).macs_executed
    method = gossamer.Chase(max_macs=0.5 * dense, channel_score_per="latency", **SHORT)
    sparsifier, _ = _run(model, method, latency=_table(model, clock))
    assert sparsifier.refused == []
    assert account(model, images(2)).macs_executed <= 0.5 * dense


# Interruptions


def test_a_resumed_run_decides_by_what_was_measured() -> None:
    """The machine got twice as slow meanwhile: the resumed run must not notice."""
    limit = 0.5 * _table(net("vgg"), FakeClock(noise=0.01)).dense
    method = gossamer.Chase(max_latency_ms=limit, channel_score_per="latency", **SHORT)

    def table(scale: float, model: nn.Module) -> gossamer.LatencyTable:
        return _table(model, FakeClock(whole=1.2, volume=1e-6, scale=scale))

    whole = net("vgg")
    one, _ = _run(whole, method, latency=table(1.0, whole))

    first = net("vgg")
    half, optimizer = _run(first, method, steps=15, latency=table(1.0, first))
    buffer = io.BytesIO()
    saved = (half.state_dict(), first.state_dict(), optimizer.state_dict())
    torch.save(saved, buffer)
    json.dumps(half.state_dict()["latency"])  # plain data
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    second = net("vgg")
    other = gossamer.Sparsifier(
        second, method, total_steps=STEPS, example=images(4), latency=table(2.0, second)
    )
    again = optimizer_for("sgd", second)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert other.prices["latency"].dense == one.prices["latency"].dense
    train(second, other, again, batches(STEPS)[15:])
    assert other.plan == one.plan
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert other.state_dict()["latency"] == one.state_dict()["latency"]


def test_without_a_clock_the_state_is_as_it_was() -> None:
    sparsifier, _ = _run(net("vgg"), gossamer.Chase(channel_sparsity=0.3, **SHORT), steps=1)
    assert "latency" not in sparsifier.state_dict()
    assert sparsifier.prices == {}


# What is refused up front


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_macs": 1e5, "channel_sparsity": 0.5}, "both say how many channels go"),
        ({"max_bytes": 0}, "out of range"),
        ({"channel_score_per": "mac"}, "did you mean 'macs'"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gossamer.Chase(**settings)


@pytest.mark.parametrize("unit", ["max_macs", "max_bytes", "max_latency_ms"])
def test_what_is_out_of_reach_is_said_before_training(unit: str) -> None:
    model = net("vgg")
    table = _table(model, FakeClock(volume=1e-5, overhead=0.01))
    latency = table if unit == "max_latency_ms" else None
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def make(limit: float) -> gossamer.Sparsifier:
        method = gossamer.Chase(**{unit: limit}, **SHORT)
        return gossamer.Sparsifier(
            model, method, total_steps=STEPS, example=images(4), latency=latency
        )

    with pytest.raises(ValueError, match=r"out of reach.*min_channels=2") as error:
        make(1e-6 if unit == "max_latency_ms" else 5.0)
    least = float(str(error.value).split("at its floor, ")[1].split()[0].replace(",", ""))
    with pytest.raises(ValueError, match="is no less than the dense network's"):
        make(1e12)
    assert list(model.state_dict()) == list(state)  # nothing was attached
    # What it says can be reached, can be reached.
    sparsifier = make(1.01 * least)
    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS))
    (price,) = sparsifier.prices.values()
    assert price(_widths(sparsifier)) <= 1.01 * least


def test_a_table_that_nobody_asked_for() -> None:
    model = net("vgg")
    table = _table(model, FakeClock())
    method = gossamer.Chase(channel_sparsity=0.3, **SHORT)
    with pytest.raises(ValueError, match="does not follow it"):
        gossamer.Sparsifier(model, method, total_steps=STEPS, example=images(4), latency=table)


def test_without_a_table_latency_is_measured_on_the_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["gossamer.latency"], "in_turns", lambda **_: FakeClock())
    model = net("vgg")
    dense = FakeClock().time(model, images(4))
    method = gossamer.Chase(max_latency_ms=0.6 * dense, **SHORT)
    sparsifier, _ = _run(model, method)
    price = sparsifier.prices["latency"]
    assert price.dense == pytest.approx(dense)
    assert 0.9 * 0.6 <= price(_widths(sparsifier)) / dense <= 0.6


def test_keep_channels_are_full_in_the_price() -> None:
    model = net("vgg")
    table = _table(model, FakeClock())
    method = gossamer.Chase(max_latency_ms=0.7 * table.dense, **SHORT)
    sparsifier, _ = _run(model, method, latency=table, keep_channels=["features.3"])
    assert [pool.name for pool in sparsifier.pools] == ["features.0", "features.7", "features.10"]
    time = sparsifier.prices["latency"](_widths(sparsifier))
    assert 0.9 * 0.7 <= time / table.dense <= 0.7


def test_readings_of_before_are_used_without_a_clock() -> None:
    model = net("vgg")
    readings = _table(model, FakeClock()).readings
    table = gossamer.latency(model, images(4), stopwatch=never, readings=readings)
    assert table.dense == readings.whole[0]
