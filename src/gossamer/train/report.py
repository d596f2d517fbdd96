"""A run's summary as tables: for the terminal, and as report.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

__all__ = [
    "HEADER",
    "LEGEND",
    "loading",
    "markdown",
    "moved",
    "moves",
    "notes",
    "rows",
    "statement",
    "table",
    "untouched",
]

HEADER = "MACs are multiply-adds for one image (FLOPs are 2 per MAC); ratios are to dense"
LEGEND = """\
- dense: the twin, trained without a method from the same weights on the same batches.
- sparse: the full-width network with the trained zeros, which is what masks alone deliver.
- slim: the same network after the cut, as in model.safetensors.
- accuracy: on the test images, after the last epoch; no epoch was selected.
- density: share of the sparse layers' weights that is kept, of as many as the network has.
- channel sparsity: share of the channels that could be removed that nothing reads (sparse) or that
  are gone (slim).
- nonzeros: parameters that are not zero; for sparse layers, those on the support.
- MACs executed: what dense-format hardware runs, multiplying by zeros too.
- MACs sparse: what hardware that skips every zero would run.
- MACs training: of the whole run, forward and both backward products, those that the method's
  zeros allow to skip left out.
"""
TOPOLOGY_LEGEND = """\
- density: share of the sparse layers' weights that is kept (on the support).
- live output channels: those that keep a weight, of all sparse layers.
- SAD: weights that exactly one of two supports keeps; as a share of all weights.
- exploration: share of the weights that was ever kept (ITOP's R_s).
- churn: share of the kept weights that was not kept an epoch before.
- revived: of the weights that were ever dropped, the share that is kept.

layers.csv has them for every layer and epoch."""

# Rows of the path: title and format.
_PATH = {
    "density": ("density", "{:.4f}"),
    "live_channels": ("live output channels", "{:,.0f}"),
    "sad_from_start": ("SAD from the start", "{:.4f}"),
    "sad_since_last": ("SAD since the epoch before", "{:.4f}"),
    "exploration": ("exploration", "{:.4f}"),
    "churn": ("churn", "{:.4f}"),
    "revived": ("revived", "{:.4f}"),
}


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The comparison, with its head: one row per figure, for dense, sparse and slim."""
    twin = "dense" in summary
    dense: Mapping[str, Any] = summary["dense"] if twin else summary["reference"]
    networks = {"dense": dense, "sparse": summary["sparse"], "slim": summary["slim"]}
    latency, seconds = summary["latency"], summary["wall_seconds"]

    def row(
        title: str, key: str, shown: str, ratios: Mapping[str, float] | None = None
    ) -> tuple[str, ...]:
        cells = []
        for name, network in networks.items():
            cell = shown.format(network[key]) if key in network else "-"
            if ratios is not None and name != "dense":
                cell += f" ({ratios[name]:.3f}x)"
            cells.append(cell)
        return (title, *cells)

    def count(title: str, key: str, shown: str = "{:,.0f}") -> tuple[str, ...]:
        ratios = {name: network[key] / dense[key] for name, network in networks.items()}
        return row(title, key, shown, ratios)

    times = f"latency, batch {latency['batch']}, ms"
    trained = [f"{seconds[name]:.1f}" if name in seconds else "-" for name in ("dense", "sparse")]
    return [
        ("", "dense", "sparse", "slim"),
        row("accuracy", "accuracy", "{:.2%}"),
        row("density", "density", "{:.4f}"),
        row("channel sparsity", "channel_sparsity", "{:.4f}"),
        count("nonzeros", "nonzeros"),
        count("bytes on disk", "bytes_on_disk"),
        count("MACs executed", "macs_executed"),
        count("MACs sparse", "macs_sparse"),
        count("MACs training", "macs_training", "{:.4g}"),
        row(times, "latency_ms", "{:.3f}", latency["ratio"] if twin else None),
        ("training, seconds", *trained, ""),
    ]


def notes(summary: Mapping[str, Any]) -> str:
    """What is to be said below the comparison."""
    slim = summary["slim"]
    text = (
        f"Slim and sparse differ by at most {slim['max_abs_difference']:.3g} on the validation "
        f"images (largest output {slim['output_scale']:.3g})."
    )
    for row in summary["budgets"].values():
        unit = row["unit"]
        limit, dense, measured, predicted = (
            f"{row[key]:,.4g}" if unit == "ms" else f"{row[key]:,.0f}"
            for key in ("budget", "dense", "measured", "predicted")
        )
        share = row["measured"] / row["budget"]
        text += (
            f"\nBudget of {limit} {unit} ({row['budget'] / row['dense']:.3f} of dense, {dense}): "
            f"{'met' if share <= 1 else 'missed'} with {measured}, {share:.3f} of it "
            f"(predicted {predicted})."
        )
    widths = summary.get("widths")  # older runs had none
    if widths is not None:
        what = {
            "widths": "the widths",
            "macs": "the executed MACs, all layers narrowed alike,",
            "nonzeros": "as many weights as there are non-zeros, all layers narrowed alike,",
        }
        text += (
            f"\nThe network had {what[widths['match']]} of {widths['of']} from the start, and "
            "weights of its own; dense is the full-width network."
        )
    for refused in summary["refused"]:
        text += f"\nNot cut, it would have been slower: {refused}."
    for collapsed in summary.get("collapsed", ()):  # older runs did not look
        text += f"\nCollapse: {collapsed}."
    if "not_cut" in slim:
        text += f"\nNothing was cut: {slim['not_cut']}."
    if "dense" not in summary:
        text += "\nThe dense twin was not trained (--baseline does); its counts are the network's."
    return text


def moves(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What training did to the supports, with its head: a row per figure that did not stay."""
    path = summary["topology"]["path"]
    lines = [("after epoch", *(str(row["epoch"] or "start") for row in path))]
    others = [key for key in path[0] if key not in ("epoch", "sad_cumulative", *_PATH)]
    for key in (*_PATH, *others):
        title, shown = _PATH.get(key, (key.replace("_", ", "), "{:.3g}"))
        cells = [shown.format(row[key]) for row in path]
        if len(set(cells)) > 1:
            lines.append((title, *cells))
    return lines


def moved(summary: Mapping[str, Any]) -> str:
    """How far the supports have moved in all."""
    topology = summary["topology"]
    end, total = topology["from_start"], topology["sad_cumulative"]
    if not total:
        return "The supports stayed as they were at the start."
    return (
        f"SAD from the start: {end['changed']:,} of {end['weights']:,} weights, "
        f"{end['relative']:.4f} of the most that such supports can differ. Its sum from epoch to "
        f"epoch: {total:.4f} of all weights."
    )


def untouched(summary: Mapping[str, Any], most: int | None = None) -> str:
    """Which layers were left dense and which keep all their channels, and why; a line per reason.

    Args:
        summary: Of the run.
        most: Names per line, and lines of either kind, to show; None: all.
    """
    lines = []
    for title, key in (("left dense", "left_dense"), ("all channels kept", "locked")):
        names = defaultdict(list)
        for name, reason in summary[key].items():
            names[reason].append(name)
        for reason, layers in list(names.items())[:most]:
            rest = layers[most:] if most else []
            more = f" and {len(rest)} more" if rest else ""
            lines.append(f"{title}: {', '.join(layers[:most])}{more} - {reason}")
        if most and len(names) > most:
            others = sum(map(len, list(names.values())[most:]))
            lines.append(f"{title}: {others} more, for other reasons (report.md)")
    return "\n".join(lines)


def statement(found: Mapping[str, Any]) -> str:
    """The sentence to take away from what `gossamer analyze` has found."""
    held = found["held"]
    return (
        f"In this network the sparsest {held['channels']:.0%} of each layer's channels hold "
        f"{held['weights']:.0%} of the weights; at random places they would hold "
        f"{held['random']:.0%}."
    )


def loading(summary: Mapping[str, Any], file: str) -> str:
    """Three lines of Python that load the slim model."""
    model = summary["model"]
    width = "" if model["width"] == 1 else f", width={model['width']}"
    made = (
        f"build_model({model['name']!r}, num_classes={model['num_classes']}, "
        f"in_shape={tuple(model['in_shape'])}{width})"
    )
    return (
        "import gossamer\n"
        "from gossamer.train.models import build_model\n"
        f"model = gossamer.load({file!r}, {made})"
    )


def markdown(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """report.md: the comparison, what its words mean, the layers, the conditions, the settings."""
    machine, conditions = summary["machine"], summary["latency"]
    where = machine["gpu"] or machine["cpu"]
    layers = [("layer", "shape", "slim shape", "density in slim", "MACs executed, slim / full")]
    for row in summary["layers"]:
        layers.append(
            (
                row["layer"],
                "x".join(map(str, row["shape"])),
                "x".join(map(str, row["slim_shape"])),
                f"{row['slim_density']:.4f}",
                f"{row['slim_macs_executed'] / row['macs_executed']:.3f}",
            )
        )
    shown = yaml.safe_dump(dict(settings), sort_keys=False)
    return f"""\
# {settings["model"]} on {settings["data"]}, {settings["method"]}, seed {settings["seed"]}

{HEADER}.

{table(rows(summary))}

{notes(summary)}

{LEGEND}
Latency: median of {conditions["rounds"]} interleaved rounds; {conditions["mode"]} PyTorch \
{conditions["torch"]}, {conditions["dtype"]}, batch {conditions["batch"]}, \
{conditions["memory_format"]}, {conditions["threads"]} threads, {where}. Ratios are medians over \
the rounds.

## What training did

{_topology(summary)}

## The slim model

```python
{loading(summary, "model.safetensors")}
```

Images come to it normalised: `(x - mean) / std`, x in [0, 1], with `data.mean` and `data.std` of
summary.json.

## Layers

{table(layers)}

## Settings

```yaml
{shown}```
"""


def _topology(summary: Mapping[str, Any]) -> str:
    """The section of report.md about supports, and about what was left alone."""
    parts = []
    if summary["forecast"] is not None:
        parts.append(f"Forecast: {summary['forecast']}.")
    lines = moves(summary)
    if len(lines) > 1:
        parts += [table(lines), TOPOLOGY_LEGEND]
    parts.append(moved(summary))
    left = untouched(summary).splitlines()
    if left:
        parts.append("\n".join(f"- {line}" for line in left))
    return "\n\n".join(parts)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the head, as a Markdown table."""
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
