"""The `gossamer` command. It and `commands` alone print; heavy imports wait for whom they serve."""

from __future__ import annotations

import difflib
import json
import shlex
import sys
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gossamer
from gossamer.registry import METHODS, method_info
from gossamer.train.commands import (
    bench,
    check,
    compile,
    export,
    fail,
    print_table,
    quiet,
    report,
    shrink,
)

if TYPE_CHECKING:
    from gossamer.train.catalogue import Entry
    from gossamer.train.engine import Watcher
    from gossamer.train.flags import Request

__all__ = ["main"]

_HELP = """\
commands:
  train     train one network sparse, cut it, and report (gossamer train --help)
  compare   several methods, densities and seeds, one table (gossamer compare --help)
  analyze   what training did to a run's channels, and what cutting them would cost
  report    one HTML page of one or more runs: curves, layers, channels, figures
  shrink    cut every channel that does nothing out of a model
  export    write a model as ONNX, torch.export program or safetensors, verified
  compile   make a sparse model fast on this CPU: every layer by what is fastest here
  check     how sparse a model is, in what pattern, and what could be cut
  bench     time models in every engine at hand, or tell whether a cut will pay
  methods   list the sparse training methods, or show the card of one
  recipes   list the settings that come with Gossamer, or show those of one

examples:
  gossamer train --config digits-chase
  gossamer train --method chase --density 0.1 --channel_sparsity 0.5 --model vgg-small --baseline
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: done. 1: it failed, and says why in one line. 2: the command line or configuration file
    cannot be understood. 130, 143: interrupted, by Ctrl-C or SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "compare": _compare,
        "analyze": _analyze,
        "report": report.run,
        "shrink": shrink.run,
        "export": export.run,
        "compile": compile.run,
        "check": check.run,
        "bench": bench.run,
        "methods": _methods,
        "recipes": _recipes,
    }
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
        return fail(
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
        description="List the sparse training methods, or show the card of one.",
        epilog="examples:\n  gossamer methods\n  gossamer methods chase",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="method whose card to show")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)

    from gossamer.train.catalogue import DENSITY, card, entry

    if wanted.name is None:
        entries = [entry(info) for info in METHODS.values()]
        if wanted.json:
            print(json.dumps([each.to_dict() for each in entries], indent=2))
        else:
            _list(entries)
            print(
                f"\ntraining MACs: of a whole run, as a share of dense training's; at density "
                f"{DENSITY} where one can be\nset, on a network that uses every weight equally "
                "often. `gossamer methods NAME` shows a method's card."
            )
        return 0
    try:
        info = method_info(wanted.name)
        text = card(info.name)
    except ValueError as error:
        return fail(2, error)
    except OSError as error:
        return fail(1, error)
    if wanted.json:
        print(json.dumps(entry(info).to_dict() | {"card": text}, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        console = Console()
        console.print(Markdown(text), width=min(console.width, 100))
    else:
        print(text, end="")
    return 0


def _list(entries: Sequence[Entry]) -> None:
    if sys.stdout.isatty():
        from rich.box import HORIZONTALS
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=HORIZONTALS, show_lines=True)
        for title, ratio in (("method", 0), ("what it does", 3), ("training MACs", 2)):
            table.add_column(title, ratio=ratio or None)
        for each in entries:
            about = Text.assemble(each.summary, "\n", (each.paper, "dim"))
            if each.needs:
                about.append(f"\nneeds {', '.join(each.needs)}")
            table.add_row(each.name, about, each.cost)
        Console().print(table)
        return
    width = max(len(each.name) for each in entries)
    for each in entries:
        lines = [each.summary, each.paper]
        lines += [f"needs {', '.join(each.needs)}"] if each.needs else []
        lines += [f"training MACs {each.cost}"]
        print(f"{each.name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))


def _recipes(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="gossamer recipes",
        description="List the settings of runs and comparisons that come with Gossamer, or show "
        "those of one.",
        epilog="examples:\n  gossamer recipes\n  gossamer recipes digits-chase > mine.yaml\n  "
        "gossamer train --config digits-chase\n  gossamer compare digits-compare",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="recipe to show")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)

    from gossamer.train.recipes import about, recipe, recipe_names

    try:
        names = recipe_names() if wanted.name is None else [wanted.name]
        texts = {name: recipe(name).read_text(encoding="utf-8") for name in names}
    except OSError as error:
        return fail(1, error)
    if wanted.json:
        rows = [{"name": name, "about": about(text), "text": text} for name, text in texts.items()]
        print(json.dumps(rows if wanted.name is None else rows[0], indent=2))
    elif wanted.name is not None:
        print(texts[wanted.name], end="")
    else:
        width = max(map(len, names))
        lines = (
            textwrap.wrap(about(text), 100 - width - 2, break_on_hyphens=False)
            for text in texts.values()
        )
        for name, (first, *others) in zip(names, lines, strict=True):
            print(f"{name:<{width}}  {first}", *others, sep=f"\n{'':<{width}}  ")
    return 0


def _train(argv: list[str]) -> int:
    from gossamer.collapse import CollapseError
    from gossamer.train.flags import UsageError, parse
    from gossamer.train.folder import CHECKPOINTS, CONFIG, RunFolder
    from gossamer.train.html import write_page
    from gossamer.train.stop import Interrupted

    try:
        request = parse(argv)
    except UsageError as error:
        return fail(2, error)
    except (ValueError, TypeError, OSError) as error:
        return fail(1, error)
    folder = request.config.folder
    try:
        summary = _run(request)
        write_page([folder], RunFolder(folder).page)
    except (ValueError, TypeError) as error:
        return fail(1, error)
    except (OSError, FloatingPointError, CollapseError) as error:
        code = fail(1, error)
        asked = isinstance(error, OSError) and error.errno is None  # for what is not to be had
        if not asked and any((folder / CHECKPOINTS).glob("*.ckpt")):
            print(f"gossamer: {_go_on(folder)}", file=sys.stderr)
        return code
    except KeyboardInterrupt as stop:
        signal, saved = (stop.number, stop.saved) if isinstance(stop, Interrupted) else (2, "")
        told = f" ({saved})" if saved else ""
        on = f"; {_go_on(folder)}" if (folder / CONFIG).exists() else ""
        print(f"\ninterrupted{told}{on}", file=sys.stderr)
        return 128 + signal
    if request.as_json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary, request)
    return 0


def _go_on(folder: Path) -> str:
    return f"to go on: gossamer train --resume --out {shlex.quote(str(folder))}"


def _compare(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="gossamer compare",
        description="Train several methods at several densities and seeds, and their dense twin.",
        epilog="examples:\n  gossamer compare digits-compare\n  gossamer compare digits-rivals\n\n"
        "The file lists `methods`, `densities` and `seeds`, and has the settings of gossamer train"
        "\nthat all share. `rivals: [slim, slim-wall-time, uniform, uniform-nonzeros]` trains dense"
        "\nnetworks as small as the slim ones from scratch: of their widths, for as many epochs or"
        "\nfor as long; and of their MACs or non-zeros, every layer narrowed by the same share."
        "\nWhat is finished is not run again; after an interruption the same command goes on.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="YAML file, or recipe, of a comparison")
    parser.add_argument("--out", metavar="DIR", help="folder (default: runs/<name of FILE>)")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="cells to train at a time (default: cores / threads; 1 on a GPU)",
    )
    parser.add_argument(
        "--keep",
        metavar="CSV",
        help="results.csv of an earlier comparison: what has a row there, with the same settings, "
        "is not trained again",
    )
    parser.add_argument("--json", action="store_true", help="print the rows of all cells as JSON")
    wanted = parser.parse_args(argv)
    if wanted.jobs is not None and wanted.jobs < 1:
        return fail(2, f"--jobs {wanted.jobs}: give at least 1")

    from gossamer.train.compare import compare, failures, means, read
    from gossamer.train.flags import UsageError
    from gossamer.train.recipes import settings_file
    from gossamer.train.report import HEADER

    try:
        comparison = read(settings_file(wanted.file), wanted.out)
        rows = compare(
            comparison,
            jobs=wanted.jobs,
            keep=None if wanted.keep is None else Path(wanted.keep),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except UsageError as error:
        return fail(2, error)
    except (ValueError, OSError) as error:
        return fail(1, error)
    except KeyboardInterrupt:
        words = [shlex.quote(wanted.file)]
        for name in ("out", "keep"):
            if getattr(wanted, name) is not None:
                words += [f"--{name}", shlex.quote(getattr(wanted, name))]
        print(
            f"\ninterrupted; to go on:\n    gossamer compare {' '.join(words)}",
            file=sys.stderr,
        )
        return 130
    failed = failures(rows)
    if wanted.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"\n{rows[0]['model']} on {rows[0]['data']}\n{HEADER}")
        print_table(means(rows, narrow=True))
        print(f"everything is in {comparison.folder}: compare.md, results.csv, accuracy.svg, ...")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _analyze(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="gossamer analyze",
        description="Say how unevenly training has spread the weights of a finished run over the "
        "channels,\nagainst chance, and what cutting the weakest would do to the outputs.",
        epilog="example:\n  gossamer analyze runs/digits-vgg-small-chase-s0",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder that gossamer train wrote")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    wanted = parser.parse_args(argv)

    from gossamer.train.analyze import analyze, cut_table, layer_table, statement

    quiet()
    try:
        found = analyze(Path(wanted.run))
    except (ValueError, OSError) as error:
        return fail(1, error)
    if wanted.json:
        print(json.dumps(found, indent=2))
        return 0
    print_table(layer_table(found))
    if found["cuts"]:
        print()
        print_table(cut_table(found))
    print(f"\n{statement(found)}\nall of it is in {wanted.run}: analysis.md, .json, .svg")
    return 0


def _run(request: Request) -> dict[str, Any]:
    from gossamer.train.run import train

    quiet()
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
    from gossamer.train.report import HEADER, loading, moved, moves, notes, rows, untouched

    config = request.config
    print(f"\n{config.model} on {config.data}, {config.method}, seed {config.seed}")
    print(HEADER)
    print_table(rows(summary))
    print(f"\n{notes(summary)}\n")
    path = moves(summary)
    if len(path) > 1:
        print_table(path)
    print("\n".join(filter(None, [moved(summary), untouched(summary, most=3)])), end="\n\n")
    print(f"everything is in {config.folder}: report.html, report.md, model.safetensors, ...")
    print("the slim model is loaded with\n")
    print(
        "\n".join(
            f"    {x}"
            for x in loading(summary, str(config.folder / "model.safetensors")).splitlines()
        )
    )
