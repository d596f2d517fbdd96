"""A run's summary as tables: for the terminal, and as report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gossamer.measure.macs import Account

__all__ = ["HEADER", "LEGEND", "loading", "markdown", "notes", "rows"]

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
    if "not_cut" in slim:
        text += f"\nNothing was cut: {slim['not_cut']}."
    if "dense" not in summary:
        text += "\nThe dense twin was not trained (--baseline does); its counts are the network's."
    return text


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


def markdown(
    summary: Mapping[str, Any], settings: Mapping[str, Any], sparse: Account, slim: Account
) -> str:
    """report.md: the comparison, what its words mean, the layers, the conditions, the settings."""
    machine, conditions = summary["machine"], summary["latency"]
    where = machine["gpu"] or machine["cpu"]
    after = {layer.name: layer for layer in slim.layers}
    layers = [("layer", "shape", "slim shape", "density in slim", "MACs executed, slim / full")]
    for layer in sparse.layers:
        small = after[layer.name]
        layers.append(
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                "x".join(map(str, small.shape)),
                f"{small.density:.4f}",
                f"{small.macs_executed / layer.macs_executed:.3f}",
            )
        )
    shown = yaml.safe_dump(dict(settings), sort_keys=False)
    return f"""\
# {settings["model"]} on {settings["data"]}, {settings["method"]}, seed {settings["seed"]}

{HEADER}.

{_table(rows(summary))}

{notes(summary)}

{LEGEND}
Latency: median of {conditions["rounds"]} interleaved rounds; {conditions["mode"]} PyTorch \
{conditions["torch"]}, {conditions["dtype"]}, batch {conditions["batch"]}, \
{conditions["memory_format"]}, {conditions["threads"]} threads, {where}. Ratios are medians over \
the rounds.

## The slim model

```python
{loading(summary, "model.safetensors")}
```

Images come to it normalised: `(x - mean) / std`, x in [0, 1], with `data.mean` and `data.std` of
summary.json.

## Layers

{_table(layers)}

## Settings

```yaml
{shown}```
"""


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
