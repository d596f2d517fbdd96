"""Every method of the registry has a card, a reference twin, and rows where users look."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest

from gossamer.method import Method
from gossamer.registry import METHODS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", METHODS)
def test_row(name: str) -> None:
    info = METHODS[name]
    assert info.name == name
    assert issubclass(info.cls, Method)
    assert info.summary
    assert info.paper
    assert (ROOT / "docs" / "methods" / f"{name}.md").exists(), "no card"
    assert (ROOT / "tests" / "reference" / f"{name}.py").exists(), "no reference twin"
    assert name in (ROOT / "README.md").read_text(), "the README does not name it"


@pytest.mark.parametrize("name", METHODS)
def test_hyperparameters_are_frozen_and_documented(name: str) -> None:
    cls = METHODS[name].cls
    method = cls()
    with pytest.raises(FrozenInstanceError):
        method.density = 0.5  # type: ignore[attr-defined]
    documented = "".join(base.__doc__ or "" for base in cls.__mro__ if is_dataclass(base))
    for field in fields(cls):
        assert f"        {field.name}: " in documented, f"{field.name} is undocumented"
