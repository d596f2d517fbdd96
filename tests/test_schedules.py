"""The worked numbers of the schedules, and what they do at and beyond their ends."""

import math

import pytest

from gossamer.schedules import cosine, cubic, linear


def test_cubic_quarter_points() -> None:
    shares = [cubic(fraction, 0.0, 0.5) / 0.5 for fraction in (0.25, 0.5, 0.75)]
    assert shares == [0.578125, 0.875, 0.984375]


def test_cosine_ceiling_at_quarter_points() -> None:
    values = [cosine(fraction, 0.15, 0.1) for fraction in (0, 0.25, 0.5, 0.75, 1)]
    assert values == pytest.approx([0.15, 0.14268, 0.125, 0.10732, 0.1], abs=5e-6)


def test_drop_fraction_late_in_training() -> None:
    assert cosine(0.8, 0.5, 0.005) == pytest.approx(0.0523, abs=5e-5)


def test_linear() -> None:
    assert [linear(fraction, 2.0, 1.0) for fraction in (0, 0.25, 1)] == [2.0, 1.75, 1.0]


@pytest.mark.parametrize("schedule", [linear, cosine, cubic])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.15, 0.1), (0.5, 0.005), (0.0, 0.7)])
def test_ends_are_exact_and_kept_outside(schedule, start: float, end: float) -> None:
    for fraction in (1.0, 1.0 + 1e-12, 3.0, math.inf):
        # Exact where Chase counts on it: the budget and the channel target at the end.
        assert schedule(fraction, start, end) == (pytest.approx(end) if schedule is linear else end)
    for fraction in (0.0, -1e-12, -5.0):
        assert schedule(fraction, start, end) == pytest.approx(start, rel=1e-15)


@pytest.mark.parametrize("schedule", [linear, cosine, cubic])
def test_monotone(schedule) -> None:
    rising = [schedule(step / 1000, 0.0, 0.4) for step in range(1001)]
    falling = [schedule(step / 1000, 0.4, 0.1) for step in range(1001)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", [linear, cosine, cubic])
def test_constant_when_both_ends_agree(schedule) -> None:
    assert {schedule(step / 97, 0.1, 0.1) for step in range(98)} == {0.1}
