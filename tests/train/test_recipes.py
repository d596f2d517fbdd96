"""Recipes by name, where `gossamer train` and `gossamer compare` want a file."""

import json
from pathlib import Path

import pytest

from gossamer.train import cli, flags
from gossamer.train.recipes import about, recipe, recipe_names, settings_file

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_they_are_the_files_of_the_repository():
    assert recipe_names() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for name in recipe_names():
        assert recipe(name).read_text() == (RECIPES / f"{name}.yaml").read_text()


def test_they_are_listed_and_shown(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert {line.split()[0] for line in lines if line[0] != " "} == set(recipe_names())
    assert "Chase and its dense twin on scikit-learn's digits" in " ".join(lines)
    assert cli.main(["recipes", "digits-chase"]) == 0
    shown = capsys.readouterr().out
    assert shown == (RECIPES / "digits-chase.yaml").read_text()
    assert cli.main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["text"] for row in rows}["digits-chase"] == shown
    assert cli.main(["recipes", "digits-chase", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["about"] == about(shown)


def test_a_name_stands_for_the_file():
    by_name = flags.parse(["--config", "digits-chase", "--seed", "3"])
    assert by_name == flags.parse([f"--config={RECIPES / 'digits-chase.yaml'}", "--seed", "3"])
    assert flags.parse(["--config=digits-chase", "--seed", "3"]) == by_name
    assert by_name.config.seed == 3


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_file("digits-chase") == recipe("digits-chase")
    Path("digits-chase").write_text("method: static\n")
    assert settings_file("digits-chase") == Path("digits-chase")
    assert flags.parse(["--config", "digits-chase"]).config.method == "static"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("recipes digits-chose", "there is no recipe 'digits-chose' (did you mean digits-choose?)"),
        ("train --config digits-chas", "there is no file digits-chas (did you mean the recipe"),
        ("train --config recipes/digits-rigl.yml", "did you mean the recipe digits-rigl?"),
        ("compare nothing-like-it", "`gossamer recipes` lists them"),
        ("compare digits-chase", "has no list `methods`"),
        ("train --config digits-compare", "gossamer compare digits-compare"),
    ],
)
def test_what_is_not_there(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) in (1, 2)
    assert message in capsys.readouterr().err
