"""Every Python snippet in the README and the method cards runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), names())
    if page.name == "README.md":
        assert len(snippets) == 2
        assert (tmp_path / "slim.safetensors").exists()


def test_cards_show_their_differences() -> None:
    for card in (ROOT / "docs" / "methods").glob("*.md"):
        assert re.search(r"^## Differences.*?^1\. ", card.read_text(), re.DOTALL | re.MULTILINE), (
            card
        )
