"""Runs of these tests time their networks in a few short rounds: nobody looks at the times."""

from collections.abc import Iterator
from functools import partial

import pytest

import gossamer.train.run
from gossamer.measure.latency import compare_latency


@pytest.fixture(autouse=True, scope="module")
def _short_rounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(compare_latency, rounds=3, min_round_ms=1.0)
        patch.setattr(gossamer.train.run, "compare_latency", quick)
        yield
