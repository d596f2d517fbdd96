"""The recipes that come with Gossamer: settings of runs and comparisons, by name.

Where `gossamer train` and `gossamer compare` want a file, the name of a recipe does too.
"""

from __future__ import annotations

import difflib
from importlib import resources
from itertools import takewhile
from pathlib import Path

__all__ = ["about", "recipe", "recipe_names", "settings_file"]

_FOLDER = Path(str(resources.files("gossamer"))) / "recipes"


def recipe_names() -> list[str]:
    """The names, in order of the alphabet."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe(name: str) -> Path:
    """The file of a recipe. Raises FileNotFoundError, with the nearest name, when there is none."""
    if name not in (names := recipe_names()):
        near = difflib.get_close_matches(name, names, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FileNotFoundError(f"there is no recipe {name!r}{hint}: `gossamer recipes` lists them")
    return _FOLDER / f"{name}.yaml"


def about(text: str) -> str:
    """The first sentence of the comment at the top of a recipe."""
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    sentence, _, _ = " ".join(line.lstrip("# ") for line in comment).partition(". ")
    return sentence.rstrip(".")


def settings_file(name: str) -> Path:
    """The file at a path, or the recipe of that name where there is none.

    Raises:
        FileNotFoundError: There is neither; names the nearest recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in recipe_names():
        return recipe(name)
    near = difflib.get_close_matches(path.stem, recipe_names(), 1)
    hint = f" (did you mean the recipe {near[0]}?)" if near else ""
    raise FileNotFoundError(
        f"there is no file {name}{hint}: give a YAML file of settings, or a recipe; "
        "`gossamer recipes` lists them"
    )
