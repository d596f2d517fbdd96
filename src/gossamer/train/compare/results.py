"""What came of a comparison: a row per cell, and their means over the seeds."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

from gossamer.reading import read_json, reading
from gossamer.train.compare.cell import DENSE, Cell
from gossamer.train.compare.grid import Comparison
from gossamer.train.compare.rivals import unneeded
from gossamer.train.report import HEADER, table

__all__ = [
    "FIELDS",
    "LEFT_OUT",
    "TWINS",
    "Row",
    "failures",
    "figures_of",
    "groups",
    "markdown",
    "means",
    "rows",
]

Row = dict[str, Any]
Timing = Mapping[str, Any]
Group = tuple[str, float | None, str]  # label, density, rival
TWINS: Group = (DENSE, None, "")
LEFT_OUT = "left out"  # the status of a rival of a network from which nothing was cut

# Columns of results.csv, in order.
FIELDS = (
    *("label", "rival", "method", "model", "data", "density_asked", "seed", "status"),
    *("accuracy", "val_accuracy", "density", "channel_sparsity", "nonzeros", "bytes_on_disk"),
    *("macs_executed", "macs_sparse", "macs_training"),
    *("latency_ms", "latency_ratio", "latency_ratio_low", "latency_ratio_high"),
    *(
        "epochs",
        "train_seconds",
        "train_clock",
        "gossamer",
        "torch",
        "machine",
        "threads",
        "settings",
        "folder",
        "error",
    ),
)
# Figures of the table, with title and format; those of the dense twin are the unit of the ratios.
_RATIOS = {
    "nonzeros": "nonzeros",
    "bytes_on_disk": "bytes",
    "macs_executed": "MACs executed",
    "macs_sparse": "MACs sparse",
    "macs_training": "MACs training",
    "train_seconds": "training time",
}
_COLUMNS = {
    "accuracy": ("accuracy", "{:.2f}"),
    "difference": ("vs dense", "{:+.2f}"),
    "val_accuracy": ("validation", "{:.2f}"),
    "density": ("density", "{:.4f}"),
    "epochs": ("epochs", "{:.0f}"),
    **{name: (title, "{:.3f}") for name, title in _RATIOS.items()},
    "latency": ("latency", "{:.3f}"),
}
# Not shown where the table must be narrow.
_WIDE = ("val_accuracy", "density", "epochs", "nonzeros", "train_seconds")
_UNSTEADY = ("accuracy", "latency")  # what is never told without its deviation
_LEGEND = """\
- method: with the density that was asked for; seeds: how many runs. What follows is their mean +-
  standard deviation; without +- they agree in these digits.
- accuracy: on the test images, after the last epoch, in %; no epoch was selected. To choose among
  methods and settings look at the validation accuracy: choosing by this column would be choosing
  on the test images.
- vs dense: difference to the dense twin of the same seed, in percentage points.
- validation: accuracy on the validation images, after the last epoch, in %.
- density: share of the sparse layers' weights that is kept, of as many as the network has.
- nonzeros, bytes, MACs, latency: of the slim network, as shares of the dense one's.
- MACs executed: what dense-format hardware runs, multiplying by zeros too.
- MACs sparse: what hardware that skips every zero would run.
- MACs training: of the whole run, forward and both backward products, those that the method's
  zeros allow to skip left out.
- training time: of training and validation, by the processor's clock where one thread did all, so
  that what else ran on the machine does not count; else by the clock on the wall. Only of runs
  that were timed as the dense twins were: on such a machine, with that PyTorch and those threads.
"""
_RIVALS_LEGEND = """\
- slim, slim-wall-time, uniform, uniform-nonzeros: dense networks that were as small from the start,
  with weights of their own and the dense twin's recipe. slim has the widths of the slim network
  above it, and as many epochs; slim-wall-time the same widths, and as many epochs as fit into the
  training time of the sparse run, by what slim took for one; uniform the executed MACs of that slim
  network, and uniform-nonzeros as many weights as it has non-zeros, every layer narrowed by the
  same share.
"""


def rows(
    cells: Iterable[Cell],
    errors: Mapping[Cell, str],
    timing: Timing | None = None,
    kept: Mapping[Cell, Row] = MappingProxyType({}),
) -> list[Row]:
    """One row per cell, as in results.csv; what is not known yet is empty.

    Args:
        cells: All cells of the comparison.
        errors: Why cells have failed.
        timing: What `time_cells` returned.
        kept: Rows of earlier comparisons, which stay as they are.
    """
    return [kept.get(cell) or _row(cell, errors.get(cell, ""), timing) for cell in cells]


def _row(cell: Cell, error: str, timing: Timing | None) -> Row:
    config = cell.config
    row: Row = dict.fromkeys(FIELDS) | {
        "label": cell.label,
        "rival": cell.rival,
        "method": DENSE if cell.label == DENSE or cell.rival else config.method,
        "model": config.model,
        "data": config.data,
        "density_asked": cell.density,
        "seed": cell.seed,
        "status": _status(cell, error),
        "threads": config.threads,
        "settings": cell.settings,
        "folder": str(config.folder),
        "error": error,
    }
    if cell.finished:
        summary = read_json(cell.run.summary, "remove its folder to train it anew")
        slim, machine = summary["slim"], summary["machine"]
        row |= {name: slim[name] for name in FIELDS if name in slim and name != "latency_ms"}
        row |= {
            **_last_epoch(cell),
            "density": summary["sparse"]["density"],  # of all weights, not of those left
            **dict(zip(("train_seconds", "train_clock"), cell.training(), strict=True)),
            "gossamer": summary["versions"]["gossamer"],
            "torch": summary["versions"]["torch"],
            "machine": machine["gpu"] or machine["cpu"],
        }
    if timing is not None and config.folder.name in timing["cells"]:
        times = timing["cells"][config.folder.name]
        row["latency_ms"] = times["milliseconds"]["median"]
        row["latency_ratio"] = times["ratio"]["median"]
        row |= {f"latency_ratio_{end}": times["ratio"][end] for end in ("low", "high")}
    return row


def _status(cell: Cell, error: str) -> str:
    if cell.finished:
        return "done"
    if error:
        return "failed"
    return LEFT_OUT if unneeded(cell) else "waiting"


def _last_epoch(cell: Cell) -> dict[str, float]:
    """Its number, and the validation accuracy after it."""
    path = cell.run.metrics("sparse")
    with reading(str(path), "remove its folder to train it anew"):
        with path.open() as file:
            *_, last = csv.DictReader(file)
        return {"epochs": int(last["epoch"]), "val_accuracy": float(last["val_accuracy"])}


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """The finished rows by label, density and rival, in the order of the comparison."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            found.setdefault(_group(row), []).append(row)
    return found


def _group(row: Row) -> Group:
    return row["label"], row["density_asked"], row["rival"]


def figures_of(group: Sequence[Row], dense: Sequence[Row]) -> dict[str, list[float]]:
    """Figures of a group's rows: accuracies in %, and the rest as ratios to the dense twins'."""
    twins = {row["seed"]: row["accuracy"] for row in dense}
    found = {
        "accuracy": [100 * row["accuracy"] for row in group],
        "difference": [
            100 * (row["accuracy"] - twins[row["seed"]]) for row in group if row["seed"] in twins
        ],
        "val_accuracy": [100 * row["val_accuracy"] for row in group],
        "density": [row["density"] for row in group],
        "epochs": [row["epochs"] for row in group],
    }
    for name in _RATIOS:
        timed = name == "train_seconds"  # means nothing beside another machine's
        bases = [[twin[name] for twin in dense if not timed or _alike(row, twin)] for row in group]
        found[name] = [
            row[name] / fmean(base) for row, base in zip(group, bases, strict=True) if base
        ]
    found["latency"] = [row["latency_ratio"] for row in group if row["latency_ratio"] is not None]
    return found


def _alike(row: Row, twin: Row) -> bool:
    """Whether the times of two trainings can be compared."""
    return all(row[name] == twin[name] for name in ("machine", "torch", "threads", "train_clock"))


def means(rows: Sequence[Row], narrow: bool = False) -> list[tuple[str, ...]]:
    """The table, with its head: a row per method and density, mean +- sd over the seeds.

    `narrow`, for a terminal, has fewer columns and deviations.
    """
    grouped = groups(rows)
    dense = grouped.get(TWINS, [])
    shown = {name: column for name, column in _COLUMNS.items() if not narrow or name not in _WIDE}
    lines = [("method", "seeds", *(title for title, _ in shown.values()))]
    for kind, group in grouped.items():
        found = figures_of(group, dense)
        if kind == TWINS:
            found["difference"] = []
        cells = [
            _spread(found[name], form, deviation=not narrow or name in _UNSTEADY)
            for name, (_, form) in shown.items()
        ]
        lines.append((_named(kind), str(len(group)), *cells))
    return lines


def _named(kind: Group) -> str:
    label, density, rival = kind
    name = label if density is None else f"{label} {density:g}"
    return f"{name} {rival}" if rival else name


def _spread(values: Sequence[float], form: str, deviation: bool) -> str:
    """Mean +- standard deviation; the latter only where it shows."""
    if not values:
        return "-"
    text = form.format(fmean(values))
    if deviation and len(values) > 1:
        spread = form.replace("+", "").format(stdev(values))
        if float(spread):
            text += f" +- {spread}"
    return text


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each error, with the cells it ended."""
    by_error: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "failed":
            by_error.setdefault(row["error"], []).append(row)
    return [
        f"{', '.join(_cell(row) for row in failed)}: {error}" for error, failed in by_error.items()
    ]


def _cell(row: Row) -> str:
    return f"{_named(_group(row))} seed {row['seed']}"


def markdown(
    comparison: Comparison,
    rows: Sequence[Row],
    timing: Timing | None,
    plot: str | None,
    kept: int = 0,
) -> str:
    """compare.md: the table, what its words mean, what failed, the conditions, the settings.

    `kept` is how many of the rows are of earlier comparisons.
    """
    waiting = sum(row["status"] == "waiting" for row in rows)
    parts = [
        f"# {rows[0]['model']} on {rows[0]['data']}: {comparison.name}",
        f"{HEADER}.",
        table(means(rows)),
    ]
    if waiting:
        parts.append(f"{waiting} of {len(rows)} cells have not been trained yet.")
    parts += [f"Failed: {line}." for line in failures(rows)]
    left_out = [_cell(row) for row in rows if row["status"] == LEFT_OUT]
    if left_out:
        parts.append(f"Left out, because nothing was cut there: {'; '.join(left_out)}.")
    parts += comparison.notes
    if plot is not None:
        parts.append(f"![accuracy against MACs and latency]({plot})")
    rivals = _RIVALS_LEGEND if any(row["rival"] for row in rows) else ""
    legend = (_LEGEND + rivals).rstrip()
    parts += [legend, _conditions(timing, kept), "Single cells are in results.csv."]
    parts.append(f"## Settings\n\n```yaml\n{comparison.text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _conditions(timing: Timing | None, kept: int) -> str:
    said = []
    if timing is not None:
        found = timing["conditions"]
        said.append(
            f"Latency: after all training, one network at a time, each in turns with the dense "
            f"network: median of {found['rounds']} rounds; {found['mode']} PyTorch "
            f"{found['torch']}, {found['dtype']}, batch {found['batch']}, "
            f"{found['memory_format']}, {found['threads']} threads, "
            f"{found['gpu'] or found['cpu']}. The ratio of the dense twins, which should be 1, "
            "says how far to trust the others. The latencies in the cells' own folders were taken "
            "while other cells trained."
        )
    elif not kept:
        said.append("Latency is measured when all cells have been trained.")
    if kept:
        said.append(
            f"{kept} runs were made earlier, and their rows have been kept: trained and timed "
            "then, each in turns with the dense network, by the versions and on the machine that "
            "results.csv names."
        )
    return " ".join(said)
