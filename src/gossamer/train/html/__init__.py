"""The page of one or more runs: a single HTML file that loads nothing, not even a script.

`runs` reads run folders, `draw` makes inline SVG, the other modules say what is on the page, and
page.html and page.css are how it looks. The same files give the same bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.train.folder import RunFolder
from gossamer.train.html import channels, curves, layers, results
from gossamer.train.html.runs import COLOURS, Run, names, read

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["page", "write_page"]

_NEEDS = ("jinja2", "matplotlib")


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in these folders to the file `out`.

    Raises:
        ValueError: As `page` does.
        OSError: A file could not be read or written; what was at `out` is still there.
    """
    RunFolder(out.parent).write_text(out, page(runs))


def page(runs: Sequence[Path]) -> str:
    """The page of the runs in these folders, finished or not, as ASCII.

    Raises:
        ValueError: No runs, more than can be told apart, a folder that holds none or is damaged,
            or a package that is missing.
        OSError: A file could not be read.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the page needs {', '.join(missing)}, not installed: pip install 'gossamer[train]'"
        )
    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(
            f"{len(runs)} runs for one page: give 1 to {len(COLOURS)}, which can be told apart; "
            "for more, `gossamer compare` makes a table"
        )
    found, abouts = [], []
    for path, name, colour in zip(runs, names(runs), COLOURS, strict=False):
        with _fitting(path):
            found.append(read(path, name, colour))
            abouts.append(_about(found[-1]))
    text = _template().render(
        title=found[0].title if len(found) == 1 else f"{len(found)} runs side by side",
        runs=abouts,
        curves=curves.of(found),
        compared=results.compared(found, [about["compared"] for about in abouts]),
        words=results.words(),
    )
    return text.strip().encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _about(run: Run) -> dict[str, Any]:
    """All that the page shows of one run alone."""
    return {
        "run": run,
        "tiles": results.tiles(run),
        "bars": results.bars(run),
        "table": results.table(run),
        "notes": results.notes(run),
        "compared": results.column(run),
        "layers": layers.of(run),
        "untouched": layers.untouched(run),
        "channels": channels.of(run),
        "conditions": results.conditions(run),
        "again": results.again(run),
    }


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Raise ValueError where a run's files lack what the page needs, or hold something else."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the files in {path} do not fit together ({type(error).__name__}: {error}): they are "
            "damaged, or of another version of Gossamer; train again, or leave the run out"
        ) from error


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    here = PackageLoader("gossamer.train", "html")
    made = Environment(
        loader=here,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return made.get_template("page.html")
