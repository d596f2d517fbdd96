"""What came of a comparison: a row per cell, and their means over the seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from gossamer.reading import read_json, reading
from gossamer.train.compare.grid import DENSE, Cell, Comparison
from gossamer.train.report import HEADER, table

__all__ = ["Row", "failures", "figures_of", "groups", "markdown", "means", "rows"]

Row = dict[str, Any]
Timing = Mapping[str, Any]

# Of results.csv, in order.
_FIELDS = (
    *("label", "method", "model", "data", "density_asked", "seed", "status"),
    *("accuracy", "val_accuracy", "density", "channel_sparsity", "nonzeros", "bytes_on_disk"),
    *("macs_executed", "macs_sparse", "macs_training"),
    *("latency_ms", "latency_ratio", "latency_ratio_low", "latency_ratio_high"),
    *("train_seconds", "gossamer", "torch", "machine", "threads", "folder", "error"),
)
# Figures of the table, with title and format; those of the dense twin are the unit of the ratios.
_RATIOS = {
    "nonzeros": "nonzeros",
    "bytes_on_disk": "bytes",
    "macs_executed": "MACs executed",
    "macs_sparse": "MACs sparse",
    "macs_training": "MACs training",
}
_COLUMNS = {
    "accuracy": ("accuracy", "{:.2f}"),
    "difference": ("vs dense", "{:+.2f}"),
    "val_accuracy": ("validation", "{:.2f}"),
    "density": ("density", "{:.4f}"),
    **{name: (title, "{:.3f}") for name, title in _RATIOS.items()},
    "latency": ("latency", "{:.3f}"),
}
_LEFT_OUT = ("val_accuracy", "density", "nonzeros")  # where the table must be narrow
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
"""


def rows(
    cells: Iterable[Cell], errors: Mapping[Cell, str], timing: Timing | None = None
) -> list[Row]:
    """One row per cell, as in results.csv; what is not known yet is empty.

    Args:
        cells: All cells of the comparison.
        errors: Why cells have failed.
        timing: What `time_cells` returned.
    """
    return [_row(cell, errors.get(cell, ""), timing) for cell in cells]


def _row(cell: Cell, error: str, timing: Timing | None) -> Row:
    config = cell.config
    row: Row = dict.fromkeys(_FIELDS) | {
        "label": cell.label,
        "method": DENSE if cell.label == DENSE else config.method,
        "model": config.model,
        "data": config.data,
        "density_asked": cell.density,
        "seed": cell.seed,
        "status": "done" if cell.finished else "failed" if error else "waiting",
        "threads": config.threads,
        "folder": str(config.folder),
        "error": error,
    }
    if cell.finished:
        summary = read_json(cell.run.summary, "remove its folder to train it anew")
        slim, machine = summary["slim"], summary["machine"]
        row |= {name: slim[name] for name in _FIELDS if name in slim and name != "latency_ms"}
        row |= {
            "val_accuracy": _val_accuracy(cell),
            "density": summary["sparse"]["density"],  # of all weights, not of those left
            "train_seconds": summary["wall_seconds"]["sparse"],
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


def _val_accuracy(cell: Cell) -> float:
    """After the last epoch."""
    path = cell.run.metrics("sparse")
    with reading(str(path), "remove its folder to train it anew"):
        with path.open() as file:
            *_, last = csv.DictReader(file)
        return float(last["val_accuracy"])


def groups(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    """The finished rows by label and density, in the order of the comparison."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            found.setdefault((row["label"], row["density_asked"]), []).append(row)
    return found


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
    }
    for name in _RATIOS:
        base = fmean(row[name] for row in dense) if dense else math.nan
        found[name] = [row[name] / base for row in group]
    found["latency"] = [row["latency_ratio"] for row in group if row["latency_ratio"] is not None]
    return found


def means(rows: Sequence[Row], narrow: bool = False) -> list[tuple[str, ...]]:
    """The table, with its head: a row per method and density, mean +- sd over the seeds.

    `narrow`, for a terminal, has fewer columns and deviations.
    """
    grouped = groups(rows)
    dense = grouped.get((DENSE, None), [])
    shown = {
        name: column for name, column in _COLUMNS.items() if not narrow or name not in _LEFT_OUT
    }
    lines = [("method", "seeds", *(title for title, _ in shown.values()))]
    for (label, density), group in grouped.items():
        found = figures_of(group, dense)
        if label == DENSE:
            found["difference"] = []
        cells = [
            _spread(found[name], form, deviation=not narrow or name in _UNSTEADY)
            for name, (_, form) in shown.items()
        ]
        lines.append((_named(label, density), str(len(group)), *cells))
    return lines


def _named(label: str, density: float | None) -> str:
    return label if density is None else f"{label} {density:g}"


def _spread(values: Sequence[float], form: str, deviation: bool) -> str:
    """Mean +- standard deviation; the latter only where it shows."""
    if not values or any(map(math.isnan, values)):
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
    return f"{_named(row['label'], row['density_asked'])} seed {row['seed']}"


def markdown(
    comparison: Comparison, rows: Sequence[Row], timing: Timing | None, plot: str | None
) -> str:
    """compare.md: the table, what its words mean, what failed, the conditions, the settings."""
    waiting = sum(row["status"] == "waiting" for row in rows)
    parts = [
        f"# {rows[0]['model']} on {rows[0]['data']}: {comparison.name}",
        f"{HEADER}.",
        table(means(rows)),
    ]
    if waiting:
        parts.append(f"{waiting} of {len(rows)} cells have not been trained yet.")
    parts += [f"Failed: {line}." for line in failures(rows)]
    parts += comparison.notes
    if plot is not None:
        parts.append(f"![accuracy against MACs and latency]({plot})")
    parts += [_LEGEND.rstrip(), _conditions(timing), "Single cells are in results.csv."]
    parts.append(f"## Settings\n\n```yaml\n{comparison.text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _conditions(timing: Timing | None) -> str:
    if timing is None:
        return "Latency is measured when all cells have been trained."
    found = timing["conditions"]
    return (
        f"Latency: after all training, one network at a time, each in turns with the dense "
        f"network: median of {found['rounds']} rounds; {found['mode']} PyTorch {found['torch']}, "
        f"{found['dtype']}, batch {found['batch']}, {found['memory_format']}, {found['threads']} "
        f"threads, {found['gpu'] or found['cpu']}. The ratio of the dense twins, which should be "
        "1, says how far to trust the others. The latencies in the cells' own folders were taken "
        "while other cells trained."
    )
