"""gossamer report: one HTML page of one or more runs."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from gossamer.train.commands import fail

__all__ = ["run"]

_EPILOG = """\
examples:
  gossamer report runs/digits-vgg-small-chase-s0
  gossamer report runs/digits-vgg-small-*-s0 --out methods.html

The page is one file that loads nothing: curves, layers before and after, the channel picture, the
figures against dense, and how to repeat the run. Of a run that has not ended it shows what there
is. A finished run that `gossamer analyze` has not seen is analysed first, from its checkpoint."""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = ArgumentParser(
        prog="gossamer report",
        description="Write one HTML page of one run, or of several side by side.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder that gossamer train wrote")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="page to write (default: report.html in RUN; of several, in this folder)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="analyse nothing: show what the folders hold"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)

    from gossamer.train.folder import RunFolder
    from gossamer.train.html import write_page

    runs = [Path(name).expanduser() for name in wanted.runs]
    own = RunFolder(runs[0]).page if len(runs) == 1 else Path(RunFolder(Path()).page)
    out = own if wanted.out is None else Path(wanted.out).expanduser()
    try:
        if not wanted.quick:
            _analyse(runs)
        write_page(runs, out)
        size = out.stat().st_size
    except (ValueError, OSError) as error:
        return fail(1, error)
    if wanted.json:
        print(json.dumps({"runs": wanted.runs, "out": str(out), "bytes": size}, indent=2))
    else:
        print(f"written: {out}, {size:,} bytes; it opens in any browser")
    return 0


def _analyse(runs: Sequence[Path]) -> None:
    """Analyse the finished runs that were not; one that cannot be is told, and shown without."""
    from gossamer.train.folder import RunFolder

    for path in runs:
        folder = RunFolder(path)
        if folder.analysis.exists() or not folder.summary.exists():
            continue
        print(f"analysing the channels of {path} (--quick leaves it out)", file=sys.stderr)

        from gossamer.train.analyze import analyze
        from gossamer.train.commands import quiet

        quiet()
        try:
            analyze(path)
        except (ValueError, TypeError, OSError) as error:
            print(f"{path} is shown without: {' '.join(str(error).split())}", file=sys.stderr)
