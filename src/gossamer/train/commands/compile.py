"""gossamer compile: make a sparse model fast on this CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gossamer.train.commands import fail, model_parser, opened, print_table

if TYPE_CHECKING:
    from gossamer.runtime.compile import Compiled
    from gossamer.train.source import Source

__all__ = ["run"]

_EPILOG = """\
examples:
  gossamer compile runs/digits-vgg-small-rigl-s0
  gossamer compile sparse.safetensors --model resnet20 --batch 8 --out fast.safetensors

Every layer is timed dense and in the sparse formats, on this machine and this batch size, and what
is fastest is taken. In your own code: gossamer.compile_sparse; gossamer.runtime.load reads FILE."""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = model_parser("compile", "Make a sparse model fast on this CPU.", _EPILOG)
    parser.add_argument("--out", metavar="FILE", help=".safetensors file to write, compressed")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images to measure on (default: 1)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default: 1, timed in CPU time"
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="of sparse weights (default: float32); the others change the outputs",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)
    if wanted.batch < 1 or wanted.threads < 1:
        return fail(2, f"--batch {wanted.batch}, --threads {wanted.threads}: give 1 or more")

    from gossamer.measure.latency import using_threads
    from gossamer.runtime import compile_sparse, save

    try:
        source = opened(wanted, wanted.batch)
        with using_threads(wanted.threads):
            compiled = compile_sparse(source.model, source.example, storage=wanted.storage)
        if wanted.out is not None:
            save(wanted.out, compiled, source.plan)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return fail(1, error)
    if wanted.json:
        print(json.dumps({"model": source.name, "out": wanted.out} | compiled.to_dict(), indent=2))
    else:
        _show(source, compiled, wanted.out)
    return 0


def _show(source: Source, compiled: Compiled, out: str | None) -> None:
    print_table(compiled.rows(), text_columns=2, notes=True)
    print(f"\n{source.name}, batch {len(source.example)}")
    print("\n".join(compiled.lines()))
    if out is not None:
        print(f"written: {out}")
