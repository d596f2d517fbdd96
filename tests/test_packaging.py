"""The wheel and the sdist: what is in them, and what somebody has who installs nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import gossamer
from gossamer.registry import METHODS

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

SNIPPET = """\
import torch
from torch import nn

import gossamer
from gossamer.measure import account

model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
sparsifier = gossamer.Sparsifier(model, gossamer.RigL(density=0.5), total_steps=40)
density: float = sparsifier.density
slim: gossamer.Shrunk = gossamer.shrink(sparsifier.finalize(), torch.zeros(2, 8))
bytes_on_disk: int = account(slim.model, torch.zeros(2, 8)).bytes_on_disk
reveal_type(slim.plan)
"""
MISTAKES = """\
import gossamer

gossamer.RigL(0.5)
gossamer.RigL(density="a tenth")
gossamer.shrink(1, None).tables()
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from it.

    Without isolation: the build tools of this environment do, and nothing is downloaded.
    """
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


def test_what_the_wheel_holds(wheel: Path) -> None:
    assert wheel.name.startswith(f"gossamer-{gossamer.__version__}-")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        text = b"".join(map(file.read, sorted(names)))
    source = ROOT / "src"
    modules = {str(path.relative_to(source)) for path in source.rglob("gossamer/**/*.py")}
    recipes = {f"gossamer/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    cards = {f"gossamer/cards/{name}.md" for name in METHODS}
    pages = {"gossamer/train/html/page.html", "gossamer/train/html/page.css"}
    wanted = modules | recipes | cards | pages | {"gossamer/py.typed"}
    assert wanted <= names
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert not {name for name in others if not name.endswith((".so", ".pyd"))}  # kernels, if any
    assert str(ROOT).encode() not in text
    assert b"/shared/" not in text


def test_what_the_sdist_holds(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        members = file.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"}
    kernels = (path for kind in ("cpp", "h") for path in (ROOT / "csrc").glob(f"*.{kind}"))
    wanted |= {str(path.relative_to(ROOT)) for path in kernels}  # lacking one, none is built
    assert wanted | {"src/gossamer/py.typed", "src/gossamer/cards/chase.md"} <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/", ".venv"))]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel; packages it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True, with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel)
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    ours = {path for path in sys.path if path.endswith("site-packages")}
    # A plain line is a folder to look in; the editable install of this environment stays out.
    (Path(where) / "needs.pth").write_text("\n".join(sorted(ours)) + "\n")
    return python


def test_the_wheel_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    """What is typed first, by somebody without a copy of the sources."""
    command = installed.parent / "gossamer"
    where = run(installed, "-c", "import gossamer; print(gossamer.__file__)", cwd=tmp_path)
    assert str(installed.parent.parent) in where
    run(
        command,
        *["train", "--config", "digits-chase", "--epochs", "4", "--warmup_epochs", "1"],
        cwd=tmp_path,
    )
    folder = tmp_path / "runs" / "digits-vgg-small-chase-s0"
    assert (folder / "report.html").stat().st_size > 50_000
    assert (folder / "model.safetensors").exists()
    assert run(command, "methods", "chase", cwd=tmp_path).startswith("# Chase")
    assert "digits-chase " in run(command, "recipes", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path).strip() == gossamer.__version__


def mypy(code: str, python: Path, folder: Path) -> list[str]:
    """What mypy says of a file of a user's, with the types of the installed wheel."""
    (folder / "mine.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    done = subprocess.run([*command, "mine.py"], cwd=folder, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_mypy_sees_the_types(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    lines = mypy(SNIPPET, installed, tmp_path)
    assert 'Revealed type is "gossamer.shrink.plan.Plan"' in lines[0]
    assert lines[1:] == ["Success: no issues found in 1 source file"]
    errors = mypy(MISTAKES, installed, tmp_path)
    assert {int(line.split(":")[1]) for line in errors if ": error:" in line} == {3, 4, 5}
