"""The `gossamer` command. The only file that prints; heavy imports wait for the command in need."""

from __future__ import annotations

import difflib
import json
import logging
import shlex
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gossamer
from gossamer.registry import METHODS

if TYPE_CHECKING:
    from gossamer.train.engine import Watcher
    from gossamer.train.flags import Request

__all__ = ["main"]

_HELP = """\
commands:
  train     train one network sparse, cut it, and report (gossamer train --help)
  methods   list the sparse training methods

example:
  gossamer train --method chase --density 0.1 --channel_sparsity 0.5 --model vgg-small --baseline
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: done. 1: it failed, and says why in one line. 2: the command line or configuration file
    cannot be understood. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "methods": _methods}
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return _no_command(argv, list(commands))
    except SystemExit as stopped:  # argparse, after --help and --version
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        return 130


def _no_command(argv: list[str], commands: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], commands, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return _fail(
            2, f"there is no command {argv[0]!r}{hint}: choose one of {', '.join(commands)}"
        )
    parser = ArgumentParser(
        prog="gossamer",
        usage="gossamer COMMAND ...",
        description="Train a network sparse from scratch and get a smaller, faster model.",
        epilog=_HELP,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=gossamer.__version__)
    parser.parse_args(argv)
    parser.print_help()
    return 0 if argv else 2


def _methods(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="gossamer methods",
        description="List the sparse training methods.",
        epilog="example:\n  gossamer methods --json",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    if parser.parse_args(argv).json:
        rows = [
            {"name": info.name, "summary": info.summary, "paper": info.paper}
            for info in METHODS.values()
        ]
        print(json.dumps(rows, indent=2))
        return 0
    width = max(map(len, METHODS))
    for info in METHODS.values():
        print(f"{info.name:<{width}}  {info.summary}\n{'':<{width}}  {info.paper}")
    return 0


def _train(argv: list[str]) -> int:
    from gossamer.train.flags import UsageError, parse
    from gossamer.train.folder import CONFIG

    try:
        request = parse(argv)
    except UsageError as error:
        return _fail(2, error)
    except (ValueError, OSError) as error:
        return _fail(1, error)
    try:
        summary = _run(request)
    except (ValueError, TypeError, OSError) as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        folder = request.config.folder
        print("\ninterrupted", file=sys.stderr)
        if (folder / CONFIG).exists():
            print(
                "to go on from the last whole epoch:\n"
                f"    gossamer train --resume --out {shlex.quote(str(folder))}",
                file=sys.stderr,
            )
        return 130
    if request.as_json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary, request)
    return 0


def _run(request: Request) -> dict[str, Any]:
    from gossamer.train.run import train

    # Lightning's hints are for people who write Lightning code.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")

    return train(
        request.config,
        request.method,
        resume=request.resume,
        overwrite=request.overwrite,
        watcher=_watcher(),
    )


def _watcher() -> Watcher:
    from rich.console import Console

    from gossamer.train.progress import Bar, Lines

    if sys.stderr.isatty():
        return Bar(Console(stderr=True))
    return Lines(lambda line: print(line, file=sys.stderr, flush=True))


def _show(summary: dict[str, Any], request: Request) -> None:
    from gossamer.measure.macs import align
    from gossamer.train.report import HEADER, loading, notes, rows

    config = request.config
    lines = rows(summary)
    print(f"\n{config.model} on {config.data}, {config.method}, seed {config.seed}")
    print(HEADER)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*lines[0])
        for line in lines[1:]:
            table.add_row(*line)
        for column in table.columns[1:]:
            column.justify = "right"
        Console().print(table)
    else:
        print(align(lines))
    print(f"\n{notes(summary)}")
    print(f"everything is in {config.folder}: report.md, summary.json, model.safetensors, ...")
    print("the slim model is loaded with\n")
    print(
        "\n".join(
            f"    {x}"
            for x in loading(summary, str(config.folder / "model.safetensors")).splitlines()
        )
    )


def _fail(code: int, error: object) -> int:
    text = error.strerror if isinstance(error, OSError) and not error.filename else None
    print(f"gossamer: error: {' '.join(str(text or error).split())}", file=sys.stderr)
    return code
