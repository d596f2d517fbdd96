"""The commands of `gossamer`, a module each: `run(argv)` prints and returns the exit code.

Here is what they share: how a MODEL is asked for, tables, and the one line of an error.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.train.source import Source

__all__ = ["add_model_arguments", "fail", "model_parser", "opened", "print_table", "quiet"]


def model_parser(command: str, description: str, epilog: str) -> ArgumentParser:
    """A parser of `gossamer COMMAND MODEL`, with the arguments that say what MODEL is."""
    parser = ArgumentParser(
        prog=f"gossamer {command}",
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="MODEL",
        help="folder or .safetensors file of gossamer train; name of a network; or "
        "package.module:factory",
    )
    add_model_arguments(parser)
    return parser


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add what describes a MODEL that does not describe itself."""
    about = parser.add_argument_group("about a MODEL that does not say it itself")
    about.add_argument("--model", help="name or factory of the network that a file was made from")
    about.add_argument("--width", type=float, default=1.0, help="factor on its channels")
    about.add_argument("--num_classes", type=int, metavar="N", help="of its output")
    about.add_argument(
        "--in_shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of the images it takes"
    )


def opened(wanted: Namespace, batch: int) -> Source:
    """The MODEL that was asked for, with an example of so many images; see `open_model`."""
    from gossamer.train.source import open_model

    return open_model(
        wanted.source,
        model=wanted.model,
        in_shape=None if wanted.in_shape is None else tuple(wanted.in_shape),
        num_classes=wanted.num_classes,
        width=wanted.width,
        batch=batch,
    )


def print_table(
    lines: Sequence[Sequence[str]], text_columns: int = 1, *, notes: bool = False
) -> None:
    """Print lines of cells, the first of them the head.

    Args:
        lines: Of equal length.
        text_columns: The first so many go to the left, the others to the right.
        notes: The last column is text too.
    """
    from gossamer.measure.macs import align

    if not sys.stdout.isatty():
        if notes:
            *last, note = zip(*lines, strict=True)
            width = max(map(len, note))
            lines = list(zip(*last, (text.ljust(width) for text in note), strict=True))
        print("\n".join(map(str.rstrip, align(lines, text_columns=text_columns).splitlines())))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    for column in table.columns[text_columns : -1 if notes else None]:
        column.justify = "right"
    Console().print(table)


def quiet() -> None:
    """Lightning's hints are for people who write Lightning code."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def fail(code: int, error: object) -> int:
    """Print why the command failed, in one line; returns its exit code."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename:
            text = f"{error.filename}: {text}; look at the path, or choose another"
    print(f"gossamer: error: {' '.join(text.split())}", file=sys.stderr)
    return code
