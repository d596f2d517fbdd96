"""gossamer shrink: cut every channel that does nothing out of a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gossamer.train.commands import fail, model_parser, opened, print_table

if TYPE_CHECKING:
    from gossamer.shrink.shrink import Shrunk
    from gossamer.train.source import Source

__all__ = ["run"]

_EPILOG = """\
examples:
  gossamer shrink sparse.safetensors --model resnet20 --out slim.safetensors
  gossamer shrink runs/digits-vgg-small-rigl-s0 --out slim.safetensors

A channel goes when nothing reads it, or when all it emits is a constant that its readers' biases
can take: the outputs stay the same, and are compared. `gossamer check MODEL` says what would go."""
_FIGURES = {
    "macs_executed": "MACs executed",
    "macs_sparse": "MACs sparse",
    "nonzeros": "nonzeros",
    "bytes_on_disk": "bytes on disk",
}


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = model_parser("shrink", "Cut every channel that does nothing.", _EPILOG)
    parser.add_argument("--out", metavar="FILE", required=True, help=".safetensors file to write")
    parser.add_argument(
        "--multiple",
        type=int,
        default=1,
        metavar="N",
        help="keep as many dead channels as make each width a multiple of N: odd widths can be "
        "slower than wider ones (default: 1; 16 suits most hardware)",
    )
    parser.add_argument(
        "--block",
        type=int,
        default=1,
        metavar="N",
        help="cut outputs in whole blocks of N: what was trained with --block N, and is zero in "
        "blocks, stays so (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)

    from gossamer.shrink.file import save
    from gossamer.shrink.shrink import shrink

    try:
        source = opened(wanted, batch=2)
        slim = shrink(
            source.model,
            source.example,
            source.plan,
            multiple=wanted.multiple,
            block=wanted.block,
        )
        save(wanted.out, slim.model, slim.plan, source.architecture.metadata())
    except (ValueError, TypeError, OSError) as error:
        return fail(1, error)
    found = _found(source, slim, wanted.out)
    if wanted.json:
        print(json.dumps(found, indent=2))
        return 0
    print(slim.table())
    print(f"\n{slim.removed} channels cut; outputs differ by at most {slim.max_abs_difference:.3g}")
    print("MACs are multiply-adds for one image (FLOPs are 2 per MAC)")
    before, after = found["before"], found["after"]
    rows = [("", "before", "after", "ratio")]
    for key, title in _FIGURES.items():
        ratio = f"{after[key] / before[key]:.3f}x" if before[key] else "-"
        rows.append((title, f"{before[key]:,}", f"{after[key]:,}", ratio))
    print_table(rows)
    print(f"written: {wanted.out}")
    return 0


def _found(source: Source, slim: Shrunk, out: str) -> dict[str, Any]:
    from gossamer.measure.macs import account

    sizes = {
        name: account(model, source.example).to_dict()
        for name, model in (("before", source.model), ("after", slim.model))
    }
    return {
        "model": source.name,
        "out": out,
        "removed": slim.removed,
        "max_abs_difference": slim.max_abs_difference,
        "layers": [asdict(row) for row in slim.report],
        **{name: {key: size[key] for key in _FIGURES} for name, size in sizes.items()},
    }
