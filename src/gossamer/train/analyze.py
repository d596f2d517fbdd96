"""What training did to the channels of a finished run, and what cutting them would cost.

Three questions, each against chance: how unevenly the weights lie over the channels of each layer,
how that came about over training, and how far the output moves when the weakest channels are cut.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import Example
from gossamer.measure.channels import channel_stats, held_by_sparsest
from gossamer.measure.macs import account
from gossamer.ops import channel_magnitude, keep_largest
from gossamer.shrink.slice import apply_cuts, cuts_for
from gossamer.train.data import Batches
from gossamer.train.figures import accuracy, logits
from gossamer.train.folder import RunFolder
from gossamer.train.plots import figure, write_svg
from gossamer.train.report import statement
from gossamer.train.run import restore

__all__ = ["analyze", "cut_rows", "cut_table", "layer_table", "markdown", "statement"]

_SPARSEST = 0.3  # share of the channels that the statement is about
_CUTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)

_LEGEND = """\
- spread: standard deviation over mean of the output channels' densities (of their UMM, the mean
  |w| over all places of a channel). "random" is what the same weights at random places would have.
- below half, below mean: channels with less than half the density of their layer, and with less
  than all of it.
- cut: the channels of lowest UMM in the whole network go, as if they were pruned now, without any
  training after. Error: |change of the outputs| / |outputs|, on the validation images.
"""


def analyze(path: Path) -> dict[str, Any]:
    """Analyse the finished run in folder `path`, and write analysis.{json,md,svg} into it.

    Raises:
        ValueError: The folder holds no finished run.
        OSError: A file could not be read or written.
    """
    folder = RunFolder(path)
    run = restore(path)
    sites = run.sparsifier.sites
    held, expected = held_by_sparsest([site.support for site in sites], _SPARSEST)
    layers = {
        site.name: asdict(channel_stats(site.effective.detach(), site.support)) for site in sites
    }
    model = run.sparsifier.finalize().eval()
    groups = [g for g in find_groups(model, run.example) if g.internal and not g.locked]
    found: dict[str, Any] = {
        "run": str(path),
        "method": run.method.to_dict(),
        "held": {"channels": _SPARSEST, "weights": held, "random": expected},
        "layers": layers,
        "cuts": cut_rows(model, groups, run.example, run.val),
    }
    with folder.layers.open(newline="") as file:
        epochs = list(csv.DictReader(file))
    folder.write_json(folder.path / "analysis.json", found)
    folder.write_text(folder.path / "analysis.md", markdown(found))
    _draw(folder.path / "analysis.svg", found, epochs)
    return found


def cut_rows(
    model: nn.Module, groups: Sequence[ChannelGroup], example: Example, images: Batches
) -> list[dict[str, float]]:
    """What cutting more and more of the weakest channels does: one row per share of them.

    Args:
        model: A plain network in eval mode; it is left as it is.
        groups: The channels that may go. All groups compete; each keeps at least one channel.
        example: An input of the model.
        images: To compare outputs and accuracy on.
    """
    if not groups:
        return []
    scores = [_umm(model, group) for group in groups]
    total = sum(group.channels for group in groups)
    before = logits(model, images)
    macs = account(model, example).macs_executed
    others = [torch.arange(len(score)) != int(score.argmax()) for score in scores]
    rows = []
    for share in (0.0, *_CUTS):
        left = max(total - round(share * total), len(groups))
        kept = keep_largest(scores, left - len(groups), others)
        narrow = copy.deepcopy(model)
        removals = [
            (group, (~mask & rest).nonzero().squeeze(1))
            for group, mask, rest in zip(groups, kept, others, strict=True)
        ]
        apply_cuts(narrow, cuts_for(narrow, removals), None)
        after = logits(narrow, images)
        rows.append(
            {
                "share": share,
                "channels": total - left,
                "error": float((after - before).norm() / before.norm()),
                "accuracy": accuracy(narrow, images),
                "macs_executed": account(narrow, example).macs_executed / macs,
            }
        )
    return rows


def layer_table(found: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """Channel statistics of each layer, with a head."""
    head = (
        "layer",
        "channels",
        "empty",
        "density",
        "spread",
        "random",
        "UMM spread",
        "random",
        "below half",
        "below mean",
    )
    return [head] + [
        (
            name,
            f"{layer['channels']}",
            f"{layer['empty']}",
            f"{layer['density']:.4f}",
            f"{layer['by_density']['spread']:.2f}",
            f"{layer['by_density']['random']:.2f}",
            f"{layer['by_umm']['spread']:.2f}",
            f"{layer['by_umm']['random']:.2f}",
            f"{layer['by_density']['below_half']:.0%}",
            f"{layer['by_density']['below_mean']:.0%}",
        )
        for name, layer in found["layers"].items()
    ]


def cut_table(found: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """What cutting would do, with a head."""
    head = ("channels cut", "of all", "output error", "val accuracy", "MACs executed")
    return [head] + [
        (
            f"{row['channels']}",
            f"{row['share']:.0%}",
            f"{row['error']:.2%}",
            f"{row['accuracy']:.2%}",
            f"{row['macs_executed']:.3f}x",
        )
        for row in found["cuts"]
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """analysis.md."""
    cuts = found["cuts"]
    parts = [
        f"# Channels of {found['run']}",
        statement(found),
        _table(layer_table(found)),
        _table(cut_table(found))
        if cuts
        else "No channel of this network is written by one layer and read by one other, so none "
        "was tried to be cut.",
        _LEGEND,
        "![spread over training, and the error of cuts](analysis.svg)",
    ]
    return "\n\n".join(parts) + "\n"


def _umm(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Unmasked mean magnitude of each channel of a group, `(channels,)`."""
    (producer,) = group.producers
    weight = model.get_submodule(producer.layer).weight
    assert isinstance(weight, Tensor)
    return channel_magnitude(weight, weight[0].numel())[producer.index].mean(1)


def _table(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def _draw(path: Path, found: Mapping[str, Any], epochs: Sequence[Mapping[str, str]]) -> None:
    drawing = figure(12, 7.4)
    (density, umm, of_cuts), (below_half, below_mean, keys) = drawing.subplots(2, 3)
    panels = {
        density: ("spread of channel density / random", "channel_spread"),
        umm: ("spread of UMM / random", "umm_spread"),
        below_half: ("share of channels below half the mean density", "channels_below_half"),
        below_mean: ("share of channels below the mean density", "channels_below_mean"),
    }
    for axes, (caption, column) in panels.items():
        for index, name in enumerate(found["layers"]):
            rows = [row for row in epochs if row["layer"] == name]
            at = [int(row["epoch"]) for row in rows]
            values = [_against_random(row, column) for row in rows]
            axes.plot(at, values, color=f"C{index % 10}", linewidth=1, label=name)
        if column.endswith("spread"):
            axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="random mask")
        axes.set_xlabel("epoch")
        axes.set_ylabel(caption)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    keys.axis("off")
    handles, labels = density.get_legend_handles_labels()
    if len(found["layers"]) <= 40:
        keys.legend(handles, labels, loc="center", fontsize="x-small", ncols=2)
    of_cuts.plot(
        [row["share"] for row in found["cuts"]], [row["error"] for row in found["cuts"]], "o-"
    )
    of_cuts.set_xlabel("share of channels cut, weakest first")
    of_cuts.set_ylabel("relative error of the outputs")
    of_cuts.set_ylim(bottom=0)
    of_cuts.grid(alpha=0.3)
    write_svg(path, drawing)


def _against_random(row: Mapping[str, str], column: str) -> float:
    """A figure of layers.csv, over what chance would give where that is known."""
    chance = float(row.get(f"{column}_random", 1.0))
    return float(row[column]) / chance if chance else float("nan")
