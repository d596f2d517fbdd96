"""`gossamer methods`: what it says of each method, and the cards."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from gossamer.method import Cost
from gossamer.registry import METHODS
from gossamer.train import catalogue, cli
from gossamer.train.catalogue import card, entry

ROOT = Path(__file__).resolve().parents[2]
BOTH = "forward and input gradient sparse"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_lists_the_registry(capsys):
    assert cli.main(["methods"]) == 0
    text = capsys.readouterr().out
    for info in METHODS.values():
        assert f"\n{info.name} " in "\n" + text
        assert info.summary in text
        assert info.paper in text
        assert f"training MACs {entry(info).cost}" in text
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(METHODS)
    assert rows[0]["macs_training"] == entry(METHODS["static"]).macs_training


def test_a_terminal_gets_a_table(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["methods"]) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    assert all(f"  {name} " in text for name in METHODS)
    assert "needs an example input" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("static", ()),
        ("chase", ("an example input",)),
        ("dst", ("its penalty in the loss", "its thresholds in the optimizer")),
        ("srste", ("its penalty in the loss",)),
    ],
)
def test_what_a_method_needs(name, needs):
    assert entry(METHODS[name]).needs == needs


def test_what_training_costs():
    """Against what the methods' equations say, at a density of 0.1 in every layer."""
    static, dst, srste = (entry(METHODS[name]) for name in ("static", "dst", "srste"))
    assert static.macs_training == pytest.approx(0.1, rel=1e-3)
    assert static.cost == "0.10x: all three products sparse"
    # 2:4: two products at one half, one dense.
    assert srste.macs_training == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert srste.cost == f"0.67x at density 0.5: {BOTH}, weight gradient dense at every step"
    # The thresholds bring the density down from 1; the weight gradient is dense all the time.
    assert 0.4 < dst.macs_training < 0.7
    assert dst.products == f"{BOTH}, weight gradient dense at every step"
    # One dense gradient in 1000 steps, and a margin above the density.
    chase = entry(METHODS["chase"])
    assert 0.1 < chase.macs_training < 0.15
    assert chase.products == f"{BOTH}, weight gradient dense in 0.1% of the steps"


@pytest.mark.parametrize(
    ("cost", "often", "words"),
    [
        ((True, True, True), 0.0, "all three products sparse"),
        ((True, True, True), 1.0, f"{BOTH}, weight gradient dense at every step"),
        ((True, True, False), 0.01, f"{BOTH}, weight gradient dense at every step"),
        (
            (True, False, True),
            0.01,
            "forward sparse, input gradient dense at every step, weight gradient dense in 1% of "
            "the steps",
        ),
    ],
)
def test_costs_in_words(cost, often, words):
    assert catalogue._in_words(Cost(*cost), often) == words


def test_it_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    entry.__wrapped__(METHODS["static"])
    assert torch.equal(torch.rand(1), wanted)


# ------------------------------------------------------------------ cards


@pytest.mark.parametrize("name", METHODS)
def test_every_card_is_there(name, capsys):
    wanted = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert card(name) == wanted
    assert cli.main(["methods", name]) == 0
    assert capsys.readouterr().out == wanted


def test_a_card_in_a_terminal_and_as_data(monkeypatch, capsys):
    assert cli.main(["methods", "static", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["name"], data["card"]) == ("static", card("static"))
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(["methods", "static"]) == 0
    text = screen.getvalue()
    assert "What it does" in text
    assert "##" not in text
    assert "```" not in text


def test_unknown_and_missing(monkeypatch, capsys, tmp_path):
    assert cli.main(["methods", "chaze"]) == 2
    assert "no method is called 'chaze' (did you mean 'chase'?)" in capsys.readouterr().err
    monkeypatch.setattr(catalogue.resources, "files", lambda _: tmp_path)
    assert cli.main(["methods", "chase"]) == 1
    assert "lacks the card of chase" in capsys.readouterr().err
