"""Widths that hardware likes, times of layers, and the latency of a network at any widths."""

import json

import pytest
import torch
from torch import nn

import gossamer
from clocks import FakeClock, never
from gossamer.latency import Milliseconds, Readings
from gossamer.measure import layer_times
from gossamer.measure.layer_times import Surface, grid, in_turns, layer_calls
from gossamer.prices import cut_to
from gossamer.widths import block, steps
from nets import images, net


@pytest.mark.parametrize(
    ("channels", "per_channel", "multiple", "size"),
    [
        (64, 1, None, 16),
        (63, 1, None, 8),
        (16, 1, None, 8),
        (15, 1, None, 1),
        (12, 64, None, 1),
        (16, 4, None, 4),
        (64, 1, 8, 8),
        (6, 1, 4, 4),
    ],
)
def test_blocks(channels: int, per_channel: int, multiple: int | None, size: int) -> None:
    assert block(channels, per_channel, multiple) == size


def test_steps() -> None:
    assert steps(64, 16) == [64, 48, 32, 16]
    assert steps(60, 16, 20) == [60, 48, 32]
    assert steps(8, 8) == [8]
    assert steps(3, 1) == [3, 2, 1]


def test_grid_is_what_hardware_likes() -> None:
    assert grid(512) == (8, 128, 256, 384, 512)
    assert grid(32) == (8, 16, 24, 32)
    assert grid(90)[-1] == 90
    assert all(width % 16 == 0 or width in (8, 90) for width in grid(90))
    assert all(width % 12 == 0 for width in grid(48, groups=12))
    assert grid(1) == (1,)


# Surfaces


def test_a_surface_is_exact_where_time_is_bilinear() -> None:
    def time(c_in: float, c_out: float) -> float:
        return 0.3 + 0.02 * c_in + 0.01 * c_out + 0.005 * c_in * c_out

    c_in, c_out = (8, 16, 32), (4, 64)
    surface = Surface(c_in, c_out, tuple(tuple(time(i, o) for o in c_out) for i in c_in))
    for i, o in [(8, 4), (32, 64), (11, 30), (20, 5), (4, 2), (40, 70)]:
        assert surface(i, o) == pytest.approx(time(i, o))
    fixed = Surface((3,), (8, 16), ((1.0, 2.0),))
    assert fixed(3, 12) == 1.5
    assert fixed(3, 0) == 0.0


# The clock


class Tick(nn.Module):
    """Takes as long as it says, by a clock of its own; each `every`th call is disturbed."""

    now = 0.0

    def __init__(self, seconds: float, every: int) -> None:
        super().__init__()
        self.seconds, self.every, self.calls = seconds, every, 0
        self.modes: set[bool] = set()

    def forward(self, x):
        self.calls += 1
        self.modes.add(self.training)
        Tick.now += self.seconds * (10 if self.calls % self.every == 0 else 1)
        return x * 2


def test_disturbed_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "read_clock", lambda clock, device: Tick.now)
    models = [Tick(0.003, 4), Tick(0.005, 5)]
    x = torch.ones(2, requires_grad=True)
    assert in_turns(rounds=12)([(model, x) for model in models]) == pytest.approx([3.0, 5.0])
    assert models[0].modes == {False}
    assert all(model.training for model in models)  # as they were
    in_turns(training=True, rounds=3)([(models[0], x)])
    assert models[0].modes == {False, True}


@pytest.mark.parametrize("training", [False, True])
def test_every_kind_of_layer_is_timed(training: bool) -> None:
    """By the real clock: what comes out is a time, and nothing is left behind."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1).to(memory_format=torch.channels_last),
        nn.ConvTranspose2d(16, 12, 2, stride=2, output_padding=1, bias=False),
        nn.Flatten(2),
        nn.Conv1d(12, 8, 3, padding="same"),
        nn.Linear(169, 16),
        nn.Linear(16, 4),
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stopwatch = in_turns(training=training, rounds=3, round_ms=0.01)
    x = torch.randn(2, 3, 8, 8)
    table = gossamer.latency(model, x, training=training, stopwatch=stopwatch)
    assert len(table.readings.surfaces) == 7
    assert all(ms > 0 for s in table.readings.surfaces for row in s.ms for ms in row)
    assert len(table.readings.whole) == 4
    assert min(table.readings.whole) > 0
    assert table.dense == table.readings.whole[0]
    assert ("training step" in table.table()) == training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# Networks


@pytest.mark.parametrize("name", ["vgg", "basic", "mobilenet", "densenet", "conv_flatten_linear"])
def test_the_table_is_exact_where_time_is_simple(name: str) -> None:
    """Products, elements and a constant: nothing in between was measured, all of it is right."""
    model, clock = net(name), FakeClock(volume=3e-6, overhead=0.02, whole=1.3)
    table = gossamer.latency(model, images(4), stopwatch=clock)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        widths = [
            int(torch.randint(1, g.channels + 1, (), generator=generator)) for g in table.groups
        ]
        slim = cut_to(model, table.groups, widths)
        assert table(widths) == pytest.approx(clock.time(slim, images(4)), rel=1e-6)
        assert table.ratio(widths) == pytest.approx(
            clock.time(slim, images(4)) / clock.time(model, images(4))
        )


def test_time_outside_the_layers_is_known_too() -> None:
    """Attention and recurrence cannot be timed alone: the whole networks tell, by their MACs."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 32, 3, padding=1)
            self.lstm = nn.LSTM(32, 16, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.lstm(self.conv(x).transpose(1, 2))[0][:, -1])

    def clock(runs):
        times = []
        for model, x in runs:
            if isinstance(model, Recurrent):
                layers = [model.conv, model.head]
                inputs = 1e-3 * model.lstm.input_size * x.shape[2]
                times.append(1e-3 * sum(layer.weight.numel() for layer in layers) + inputs + 0.7)
            else:
                times.append(1e-3 * model.weight.numel())
        return times

    table = gossamer.latency(Recurrent(), torch.randn(2, 4, 10), stopwatch=clock)
    at = next(i for i, group in enumerate(table.groups) if group.name == "conv")
    full = [group.channels for group in table.groups]
    half = [*full[:at], 16, *full[at + 1 :]]
    assert table(half) == pytest.approx(
        clock([(cut_to(Recurrent(), table.groups, half), torch.randn(2, 4, 10))])[0], rel=0.02
    )


def test_widths_that_are_no_faster_stand_in_brackets() -> None:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    table = gossamer.latency(model, torch.randn(2, 20), stopwatch=FakeClock(blocks=16))
    (group,) = table.groups
    assert [width for width, _ in table.alone(0)] == [32, 24, 16, 8]
    text = table.table()
    assert group.name in text
    assert "(24: " in text
    assert " 16: " in text
    assert "(8: " in text
    assert "batch 2" in text


def test_readings_go_to_a_file_and_back() -> None:
    model = net("vgg")
    table = gossamer.latency(model, images(4), stopwatch=FakeClock(volume=1e-6))
    readings = Readings.from_dict(json.loads(json.dumps(table.readings.to_dict())))
    again = gossamer.latency(model, images(4), stopwatch=never, readings=readings)
    widths = [5, 7, 11, 13]
    assert again(widths) == table(widths)
    other = table.with_readings(gossamer.latency(model, images(4), stopwatch=FakeClock()).readings)
    assert other(widths) < table(widths)
    with pytest.raises(ValueError, match="another network"):
        gossamer.latency(net("basic"), images(4), stopwatch=never, readings=readings)
    with pytest.raises(ValueError, match="no readings"):
        Readings.from_dict({"whole": [1, 2, 3, 4]})


def test_nothing_to_cut_is_said() -> None:
    with pytest.raises(ValueError, match="no channels that can be cut"):
        gossamer.latency(nn.Linear(4, 2), torch.randn(2, 4))


def test_the_users_random_numbers_stay() -> None:
    model = net("mlp")
    before = torch.get_rng_state()
    table = gossamer.latency(model, images(4), stopwatch=FakeClock())
    table.ratio([12, 10])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_price_is_scaled_to_what_was_measured() -> None:
    """The whole network takes longer than layers and volume explain; one check is not all."""
    model = net("vgg")

    def clock(runs):
        times = FakeClock()(runs)
        return [
            t * (1 if len(layer_calls(*run)) < 2 or t > 0.9 * times[0] else 1.2)
            for t, run in zip(times, runs, strict=True)
        ]

    table = gossamer.latency(model, images(4), stopwatch=FakeClock())
    price = Milliseconds(table, ["features.3", "features.10"])
    assert price([16, 20]) == pytest.approx(price.dense)
    widths = [8, 10]
    plain = price(widths)
    table._careful = clock
    assert price.check(widths) == pytest.approx(1.2)
    assert price(widths) == pytest.approx(1.2 * plain) == pytest.approx(price.measured)
    table._careful = lambda runs: [t * f for t, f in zip(clock(runs), (1.0, 1.02), strict=True)]
    assert price.check(widths) == pytest.approx(1.02)
    assert price(widths) == pytest.approx(1.2 * 1.01 * plain)  # the median of both

    other = Milliseconds(table, ["features.3", "features.10"])
    other.load_state_dict(json.loads(json.dumps(price.state_dict())))
    assert other(widths) == price(widths)
    assert other.measured == price.measured
    with pytest.raises(ValueError, match="knows nothing of the channels of elsewhere"):
        Milliseconds(table, ["elsewhere"])


def test_calls_are_told_apart_by_what_matters() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    first, second = layer_calls(model, torch.randn(3, 4, 6, 6))
    assert first.kind == second.kind
    assert first.positions == 3 * 36
    assert first.shape == (3, -1, 6, 6)
    (other, _) = layer_calls(model, torch.randn(3, 4, 7, 6))
    assert other.kind != first.kind
    last = torch.randn(3, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    assert layer_calls(model, last)[0].channels_last
    assert not first.channels_last
