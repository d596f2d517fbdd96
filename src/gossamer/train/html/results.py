"""What came of a run: its figures as tiles, bars and a table, and how to get them again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from gossamer.train import report
from gossamer.train.html.runs import Run

__all__ = [
    "Again",
    "Bar",
    "Comparison",
    "Tile",
    "again",
    "bars",
    "column",
    "compared",
    "conditions",
    "notes",
    "table",
    "tiles",
    "words",
]

_FIGURES = {
    "nonzeros": "nonzeros",
    "bytes_on_disk": "bytes on disk",
    "macs_executed": "MACs executed",
    "macs_sparse": "MACs sparse",
    "macs_training": "MACs training",
    "latency_ms": "latency",
}
_BUDGETS = {"macs_executed": "macs", "bytes_on_disk": "bytes", "latency_ms": "latency"}


@dataclass(frozen=True)
class Tile:
    """A figure to see first."""

    title: str
    value: str
    about: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure as bars against dense.

    Attributes:
        title: Of the figure.
        ratios: Of "sparse" and "slim", to dense.
        full: What a bar of full length stands for.
        budget: What the run was told to stay under, over dense; None without.
    """

    title: str
    ratios: Mapping[str, float]
    full: float
    budget: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: tables with a head, a column per run."""

    figures: Sequence[Sequence[str]]
    settings: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Again:
    """How to repeat a run.

    Attributes:
        command: On the command line.
        settings: Its config.yaml.
        loading: Python that loads the slim model; empty before there is one.
    """

    command: str
    settings: str
    loading: str


def tiles(run: Run) -> list[Tile]:
    """The figures to see first."""
    if run.summary is None:
        return _so_far(run)
    summary, slim = run.summary, run.summary["slim"]
    ratios = _ratios(run, "slim")
    about = "of the slim network, on the test images"
    if "dense" in summary:
        dense = summary["dense"]["accuracy"]
        points = 100 * (slim["accuracy"] - dense)
        about = f"dense twin {dense:.2%}: {points:+.2f} points"
    found = [Tile("accuracy", f"{slim['accuracy']:.2%}", about)]
    for key in ("macs_executed", "bytes_on_disk"):
        found.append(Tile(_FIGURES[key], f"{ratios[key]:.3f}x", f"of dense; {slim[key]:,.0f}"))
    batch = f"batch {summary['latency']['batch']}"
    if "latency_ms" in ratios:
        found.append(Tile("latency", f"{ratios['latency_ms']:.3f}x", f"of dense, {batch}"))
    else:
        found.append(Tile("latency", f"{slim['latency_ms']:.3f} ms", batch))
    density = summary["sparse"]["density"]
    channels = f"channel sparsity {slim['channel_sparsity']:.4f}"
    found.append(Tile("density", f"{density:.4f}", channels))
    training = Tile("MACs training", f"{ratios['macs_training']:.3f}x", "of a dense run's")
    return [*found, training]


def _so_far(run: Run) -> list[Tile]:
    if not run.epochs:
        return []
    last = run.epochs[-1]
    channels = f"channel sparsity {last['channel_sparsity']:.4f}"
    return [
        Tile("epochs", f"{last['epoch']:.0f}", f"of {run.settings['epochs']}"),
        Tile("validation accuracy", f"{last['val_accuracy']:.2%}", "after the last epoch"),
        Tile("density", f"{last['density']:.4f}", channels),
    ]


def _ratios(run: Run, network: str) -> dict[str, float]:
    """Of a network's figures to dense; the latency's is measured, and only against a twin."""
    assert run.summary is not None
    summary = run.summary
    dense = summary.get("dense", summary["reference"])
    own = summary[network]
    ratios = {key: own[key] / dense[key] for key in _FIGURES if key != "latency_ms"}
    if "dense" in summary:
        ratios["latency_ms"] = summary["latency"]["ratio"][network]
    return ratios


def bars(run: Run) -> list[Bar]:
    """The five figures and the latency against dense; none before the run has ended."""
    if run.summary is None:
        return []
    networks = {network: _ratios(run, network) for network in ("sparse", "slim")}
    found = []
    for key, title in _FIGURES.items():
        ratios = {name: own[key] for name, own in networks.items() if key in own}
        if not ratios:
            continue
        row = run.summary["budgets"].get(_BUDGETS.get(key))
        budget = None if row is None else row["budget"] / row["dense"]
        full = max(1.0, *ratios.values(), budget or 0.0)
        found.append(Bar(title=title, ratios=ratios, full=full, budget=budget))
    return found


def table(run: Run) -> list[tuple[str, ...]]:
    """The figures of dense, sparse and slim, with a head; empty before the run has ended."""
    return [] if run.summary is None else report.rows(run.summary)


def notes(run: Run) -> list[str]:
    """What is to be said below the table."""
    if run.summary is None:
        return []
    lines = report.notes(run.summary).splitlines()
    if "dense" not in run.summary:
        lines.append("So the latency has nothing to be held against, and there is no bar for it.")
    lines.append(report.moved(run.summary))
    if run.summary["forecast"] is not None:
        lines.append(f"Forecast: {run.summary['forecast']}.")
    return lines


def words() -> list[tuple[str, str]]:
    """What the words of the tables mean."""
    found = re.findall(r"^- (.+?): (.+?)(?=^- |\Z)", report.LEGEND, re.DOTALL | re.MULTILINE)
    return [(word, " ".join(text.split())) for word, text in found]


def compared(runs: Sequence[Run], columns: Sequence[Mapping[str, str]]) -> Comparison:
    """Several runs side by side, with what `column` says of each."""
    titles = list(dict.fromkeys(title for column in columns for title in column))
    head = ("", *(run.name for run in runs))
    figures = [(title, *(column.get(title, "-") for column in columns)) for title in titles]
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "out")
    settings = []
    for key in keys:
        cells = [str(run.settings[key]) if key in run.settings else "-" for run in runs]
        if len(set(cells) - {"-"}) > 1:  # what one method alone has is in its own settings
            settings.append((key, *cells))
    return Comparison([head, *figures], [head, *settings] if settings else [])


def column(run: Run) -> dict[str, str]:
    """What a table of several runs shows of this one, by title."""
    return dict(_column(run))


def _column(run: Run) -> Iterator[tuple[str, str]]:
    summary = run.summary
    yield "state", "done" if summary else "not ended"
    if run.epochs:
        last = run.epochs[-1]
        yield "epochs", f"{last['epoch']:.0f} of {run.settings['epochs']}"
        yield "validation accuracy", f"{last['val_accuracy']:.2%}"
    if summary is None:
        return
    slim = summary["slim"]
    yield "accuracy", f"{slim['accuracy']:.2%}"
    if "dense" in summary:
        yield "accuracy of the dense twin", f"{summary['dense']['accuracy']:.2%}"
    yield "density", f"{summary['sparse']['density']:.4f}"
    yield "channel sparsity", f"{slim['channel_sparsity']:.4f}"
    ratios = _ratios(run, "slim")
    for key, title in _FIGURES.items():
        if key in ratios:
            yield f"{title}, of dense", f"{ratios[key]:.3f}x"
    yield "latency, ms", f"{slim['latency_ms']:.3f}"
    yield "training, seconds", f"{summary['wall_seconds']['sparse']:.1f}"
    machine = summary["machine"]
    yield "machine", f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads"


def conditions(run: Run) -> list[tuple[str, str]]:
    """With what the figures were made."""
    if run.summary is None:
        return []
    summary, times = run.summary, run.summary["latency"]
    machine, data = summary["machine"], summary["data"]
    return [
        ("machine", machine["gpu"] or machine["cpu"]),
        ("device", f"{machine['device']}, {machine['threads']} threads"),
        ("system", machine["platform"]),
        ("versions", ", ".join(f"{name} {text}" for name, text in summary["versions"].items())),
        (
            "latency",
            f"median of {times['rounds']} interleaved rounds by the {times['clock']} clock: "
            f"{times['mode']} PyTorch, {times['dtype']}, batch {times['batch']}, "
            f"{times['memory_format']}, {times['threads']} threads; ratios are medians over the "
            "rounds",
        ),
        (
            "data",
            f"{data['name']}: {data['train']:,} training, {data['val']:,} validation and "
            f"{data['test']:,} test images, {len(data['classes'])} classes",
        ),
        (
            "training",
            ", ".join(f"{name} {text:.1f} s" for name, text in summary["wall_seconds"].items()),
        ),
    ]


def again(run: Run) -> Again:
    """How to repeat it."""
    return Again(
        command="gossamer train --config config.yaml --out runs/again",
        settings=yaml.safe_dump(dict(run.settings), sort_keys=False),
        loading="" if run.summary is None else report.loading(run.summary, "model.safetensors"),
    )
