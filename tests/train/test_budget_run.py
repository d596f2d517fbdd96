"""A training run with budgets: what it measures goes on when it is resumed, and is reported."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch

import gossamer
from clocks import FakeClock
from gossamer.train.config import TrainConfig
from gossamer.train.run import train

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Broken:
    """Breaks a run off after its first epoch."""

    def noted(self, text): ...
    def started(self, network, epochs, steps, done): ...
    def stepped(self, epoch, step, figures):
        if epoch == 1:
            raise KeyboardInterrupt

    def epoch_ended(self, row): ...
    def ended(self): ...


def _config(folder: Path) -> TrainConfig:
    return TrainConfig(
        model="vgg-small",
        width=0.25,
        epochs=2,
        batch_size=64,
        lr=0.05,
        threads=1,
        latency_batch=4,
        out=str(folder),
    )


def test_a_run_keeps_its_budget_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def machine(scale: float) -> None:
        clock = FakeClock(volume=1e-5, whole=1.2, scale=scale)
        monkeypatch.setattr(sys.modules["gossamer.latency"], "in_turns", lambda **_: clock)

    machine(1.0)
    hopeless = gossamer.Chase(density=0.2, max_latency_ms=1e-9, min_channels=2)
    with pytest.raises(ValueError, match="out of reach") as error:
        train(_config(tmp_path / "whole"), hopeless)
    assert not (tmp_path / "whole").exists()
    dense = float(str(error.value).split("network's ")[1].split()[0])
    limit = 0.6 * dense
    method = gossamer.Chase(density=0.2, max_latency_ms=limit, min_channels=2)
    summary = train(_config(tmp_path / "whole"), method)
    row = summary["budgets"]["latency"]
    assert row["budget"] == limit
    assert 0.9 * limit <= row["measured"] <= limit
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.05)
    report = (tmp_path / "whole" / "report.md").read_text()
    assert f"Budget of {limit:,.4g} ms" in report
    assert "met with" in report
    assert summary["refused"] == []

    with pytest.raises(KeyboardInterrupt):
        train(_config(tmp_path / "broken"), method, watcher=Broken())
    machine(4.0)  # slower by now: a fresh table would say that the budget is out of reach
    again = train(_config(tmp_path / "broken"), method, resume=True)
    assert again["budgets"] == summary["budgets"]
    readings = [
        json.loads((tmp_path / n / "latency.json").read_text()) for n in ("whole", "broken")
    ]
    assert readings[0] == readings[1]
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("whole", "broken")
    )
    assert all(one[name].equal(two[name]) for name in one)
