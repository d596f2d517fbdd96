"""gossamer export: write a model for an engine, and verify what was written."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.train.commands import fail, model_parser, opened

if TYPE_CHECKING:
    from gossamer.export import Exported
    from gossamer.train.source import Source

__all__ = ["run"]

_SUFFIX = {"onnx": ".onnx", "program": ".pt2", "safetensors": ".safetensors"}
_EPILOG = """\
examples:
  gossamer export runs/digits-vgg-small-chase-s0 --to onnx
  gossamer export slim.safetensors --to program --out slim.pt2
  gossamer export old.safetensors --model mypackage.models:make_net --in_shape 3 64 64

onnx runs in ONNX Runtime and other engines, program (torch.export) in PyTorch without the
network's class; safetensors holds the tensors and the plan that cuts the full-width class.
Every file is read back and compared with the model; one that differs is not written."""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = model_parser(
        "export", "Write a model as ONNX, torch.export program or safetensors, verified.", _EPILOG
    )
    parser.add_argument("--to", choices=tuple(_SUFFIX), default="onnx", help="default: onnx")
    parser.add_argument(
        "--out", metavar="FILE", help="default: beside what MODEL is, else in this folder"
    )
    parser.add_argument(
        "--batch", type=int, default=2, metavar="N", help="images to verify it on (default: 2)"
    )
    parser.add_argument(
        "--fixed_batch", action="store_true", help="the file takes exactly --batch images"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: PyTorch's)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)
    if wanted.to == "safetensors" and wanted.out is None:
        return fail(2, "--to safetensors: say with --out FILE where to write")
    if wanted.opset is not None and wanted.to != "onnx":
        return fail(2, f"--opset {wanted.opset} is for --to onnx, not --to {wanted.to}")
    out = _out(wanted.source, wanted.to) if wanted.out is None else Path(wanted.out)
    try:
        exported = _export(opened(wanted, wanted.batch), out, wanted)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return fail(1, error)
    print(json.dumps(exported.to_dict(), indent=2) if wanted.json else exported.text())
    return 0


def _export(source: Source, out: Path, wanted: Namespace) -> Exported:
    from gossamer.export import to_onnx, to_program, to_safetensors

    model, example, dynamic = source.model, source.example, not wanted.fixed_batch
    if wanted.to == "onnx":
        return to_onnx(out, model, example, dynamic_batch=dynamic, opset=wanted.opset)
    if wanted.to == "program":
        return to_program(out, model, example, dynamic_batch=dynamic)
    return to_safetensors(
        out,
        model,
        example,
        full=source.architecture.build() if source.dense is None else source.dense,
        plan=source.plan,
        metadata=source.architecture.metadata(),
    )


def _out(source: str, to: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path / f"model{_SUFFIX[to]}"
    if path.is_file():
        return path.with_suffix(_SUFFIX[to])
    return Path(f"{source.rpartition(':')[2]}{_SUFFIX[to]}")
