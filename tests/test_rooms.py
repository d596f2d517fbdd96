"""Who may import whom: the walls between the rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gossamer"

# Rooms from the bottom up; a module imports only rooms below its own (and, where `own`, its own).
PURE = {"sharding", "ops", "surrogates", "schedules", "allocation", "example", "reading", "widths"}
CORE = {"site", "sparse_weight", "method"}
MAY_IMPORT: dict[str, set[str]] = {
    "sharding": set(),
    "ops": {"sharding"},
    "surrogates": {"ops"},  # sums over blocks
    "schedules": set(),
    "allocation": set(),
    "example": set(),
    "reading": set(),
    "widths": set(),
    "recording": {"example"},
    "provenance": {"example", "recording"},
    "channels": {"example", "provenance"},
    "sparse_weight": PURE,
    "site": PURE | {"channels", "sparse_weight"},
    "method": PURE | {"channels", "sparse_weight", "site"},
    "control": PURE | CORE,
    "forecast": PURE | CORE,
    "collapse": PURE | CORE | {"exploration"},
    "finite": set(),
    "exploration": {"ops", "sharding"},
    "parallel": {"sharding", "site"},
    "removal": {"widths"},
    "methods": PURE | CORE | {"channels", "control", "exploration", "forecast", "removal"},
    "shrink": {"channels", "example", "reading", "shrink", "widths"},
    "bake": {"sharding", "sparse_weight"},
    "measure": PURE | {"measure", "runtime"},  # the runtime is one of the engines
    "runtime": {"example", "reading", "runtime", "shrink"},  # plain models; shrink: files, plans
    "export": PURE | {"measure", "shrink", "export"},  # shrink: model files, written whole
    "narrow": {"channels", "example", "prices", "widths"},
    "prices": PURE | CORE | {"channels", "measure", "shrink"},
    "latency": PURE | CORE | {"channels", "measure", "prices", "shrink"},
    "fitting": PURE | CORE | {"channels", "latency", "parallel", "prices", "shrink"},
    "sparsifier": PURE
    | CORE
    | {"channels", "collapse", "bake", "fitting", "latency", "parallel", "shrink"},
    "testing": PURE | CORE | {"bake", "sparsifier"},
    "registry": PURE | CORE | {"methods"},
    "integrations": PURE
    | CORE
    | {"bake", "finite", "integrations", "measure", "shrink", "sparsifier"},
}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gossamer":
            parts = (node.module or "").split(".")[1:]
            rooms.update(parts[:1] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gossamer."):
                    rooms.add(alias.name.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_walls(path: Path) -> None:
    if room(path) != "train":
        assert "train" not in imported_rooms(path), "nobody imports train"
    if room(path) in MAY_IMPORT:
        extra = imported_rooms(path) - MAY_IMPORT[room(path)]
        assert not extra, f"{room(path)} must not import {extra}"


def test_methods_do_not_import_each_other() -> None:
    for path in (SOURCE / "methods").glob("*.py"):
        assert "methods" not in imported_rooms(path), path.name


def test_import_is_light() -> None:
    code = (
        "import sys, gossamer\n"
        "heavy = {'lightning', 'datasets', 'sklearn', 'matplotlib', 'jsonargparse'}\n"
        "heavy |= {'onnx', 'onnxscript', 'onnxruntime', 'transformers', 'accelerate'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert loaded.strip() == "[]"
