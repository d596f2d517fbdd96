"""What README, cards and pages show is so: snippets run, commands are understood, links lead on."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer.train import cli, flags
from gossamer.train.models import build_model
from ports import free_port

ROOT = Path(__file__).parent.parent
TEXTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SLOW = [("python", "docs/own-method.md")]  # checks a method's whole contract
RUN = "runs/digits-vgg-small-chase-s0"  # that the pages speak of


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def pages(language: str) -> list[object]:
    found = []
    for page in TEXTS:
        if blocks(page, language):
            name = str(page.relative_to(ROOT))
            slow = (language, name) in SLOW
            found.append(pytest.param(page, id=name, marks=[pytest.mark.slow] if slow else []))
    return found


# ------------------------------------------------------------------ Python


class MyNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


def names() -> dict[str, object]:
    """What the snippets take as given: a model, data and a loss of the reader's own."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (8,), generator=generator)
    return {
        "torch": torch,
        "MyNet": MyNet,
        "model": MyNet(),
        "images": images,
        "loader": [(images, labels)] * 40,
        "steps": 40,
        "criterion": nn.CrossEntropyLoss(),
    }


@pytest.mark.parametrize("page", pages("python"))
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "start.md":  # a run has been made
        trained = build_model("vgg-small", num_classes=10, in_shape=(1, 8, 8))
        (tmp_path / RUN).mkdir(parents=True)
        gossamer.save(tmp_path / RUN / "model.safetensors", trained)
    snippets = blocks(page, "python")
    for snippet in snippets:
        # What snippets on several processes would set, and leave behind.
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        for name, value in {**place, "RANK": 0, "WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        exec(compile(snippet, str(page), "exec"), names())
    if page.name == "README.md":
        assert len(snippets) == 2
        assert (tmp_path / "slim.safetensors").exists()


# ------------------------------------------------------------------ commands


class Understood(Exception):
    """The command line was parsed to its end."""


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a block, or on an indented line, of a page."""
    text = "\n".join(blocks(page, "sh"))
    text += "\n".join(re.findall(r"\n\n {4}(python (?:.*\\\n)*.*)", page.read_text()))
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_gossamer(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    if "--help" in arguments:
        assert cli.main(arguments) == 0
    elif arguments[0] == "train":
        flags.parse(arguments[1:])
    else:
        parse = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser, args: list[str]) -> None:
            parse(parser, args)
            raise Understood

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Understood):
                cli.main(arguments)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of ours is there and understands its flags, for one who has a wheel alone."""
    monkeypatch.chdir(tmp_path)
    for settings in blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", settings):
            (tmp_path / name[1]).write_text(settings)
    for command, *arguments in commands(page):
        if command == "gossamer":
            check_gossamer(arguments, monkeypatch)
        elif command == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif command == "pip":
            for extra in re.findall(r"\[(\w+)\]", arguments[-1]):
                assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        else:
            assert command in ("python", "pytest", "torchrun", "tensorboard"), command
            for word in arguments:
                assert not word.endswith(".py") or (ROOT / word).exists(), word


def test_commands_that_are_wrong_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ngossamer bench a b --engine eager  # what\n```\n\n    python no.py \\\n x"
    )
    assert commands(page) == [
        ["gossamer", "bench", "a", "b", "--engine", "eager"],
        ["python", "no.py", "x"],
    ]
    for wrong in ("train --densty 0.1", "bench", "bench a --batches 3", "trian"):
        with pytest.raises((pytest.fail.Exception, flags.UsageError)):
            check_gossamer(wrong.split(), monkeypatch)


# ------------------------------------------------------------------ links, and what must be there


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_cards_show_their_differences() -> None:
    for card in (ROOT / "docs" / "methods").glob("*.md"):
        assert re.search(r"^## Differences.*?^1\. ", card.read_text(), re.DOTALL | re.MULTILINE), (
            card
        )


def test_the_api_has_every_public_name() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)|heading: (\S+)$", text, re.MULTILINE))
    names = {path or heading for path, heading in shown}
    for file in ("__init__", "measure/__init__", "export/__init__", "integrations/*"):
        for path in (ROOT / "src" / "gossamer").glob(f"{file}.py"):
            room = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    for name in ast.literal_eval(node.value):
                        wanted = f"{room.removesuffix('.__init__')}.{name}"
                        assert wanted in names, f"docs/api lacks {wanted}"
