"""gossamer compile on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gossamer.runtime import load
from gossamer.train import cli
from gossamer.train.models import build_model


def test_compile_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fast.safetensors"
    words = ["compile", "lenet-300-100", "--in_shape", "1", "8", "8", "--batch", "3"]
    assert cli.main([*words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "too few zeros" in text
    assert "as fast as the model was" in text
    assert f"written: {out}" in text
    fresh = build_model("lenet-300-100", num_classes=10, in_shape=(1, 8, 8))
    assert load(out, fresh).model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)

    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["density"] == 1
    assert len(found["choices"]) == 3


def test_compile_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "lenet-300-100", "--batch", "0"]) == 2
    assert "--batch 0" in capsys.readouterr().err
    assert cli.main(["compile", "none.safetensors"]) == 1
    assert "none.safetensors" in capsys.readouterr().err
