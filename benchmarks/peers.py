"""The same channels cut by Gossamer, by Torch-Pruning and by torch.ao's structured pruner.

    python benchmarks/peers.py [--networks resnet18 vgg16 ...] [--engines eager,onnx] [--batch 8]

Half of the channels inside of every network die, in multiples of 16, in one of two ways:

    unread   nothing reads them (Chase's way: the consumers' weights are zero)
    silent   nothing feeds them (a filter of zeros), so that a norm's shift comes out of them still

Each tool is told the same channels by its own interface. Then what it gives is compared with the
masked network's outputs, and timed in turns with the dense network: at equal widths the times
should be equal, and only exactness differs. Torch-Pruning cuts what it is told. torch.ao's pruner
follows patterns of layers in a chain, to which no norm belongs; "folded" networks, with their norms
folded into the convolutions, are there to give it something to cut. "changed": the cut moved the
outputs, without a word. "keeps the rest": of the channels that another tool cut; Gossamer's report
says of each layer why. Needs torch-pruning, which Gossamer itself does not.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.ao.pruning._experimental.pruner import BaseStructuredSparsifier
from torch.nn.utils.fusion import fuse_conv_bn_eval

import gossamer
from gossamer.channels import ChannelGroup, find_groups
from gossamer.measure.bench import bench
from gossamer.measure.latency import Quartiles
from gossamer.measure.macs import account, align
from gossamer.train.models import build_model

SHAPE = (3, 32, 32)
EXACT = 1e-4  # of the largest output; float32 sums in another order
AGAIN = "(dense again)"  # how far from 1 it is says how far to trust the other ratios

Removals = list[tuple[ChannelGroup, Tensor]]


# ---------------------------------------------------------------------- networks


class Encoder(nn.Module):
    """Patches, two transformer blocks, a mean and a classifier."""

    def __init__(self, dim: int = 96, hidden: int = 384) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.norm1 = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(dim, 4, batch_first=True) for _ in range(2)
        )
        self.norm2 = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for i in range(2):
            y = self.norm1[i](x)
            x = x + self.attention[i](y, y, y, need_weights=False)[0]
            x = x + self.down[i](nn.functional.gelu(self.up[i](self.norm2[i](x))))
        return self.head(x.mean(1))


class GroupNormed(nn.Module):
    """A chain whose norm mixes channels: what is cut changes the statistics of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(4, 64)
        self.conv2, self.conv3 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv3(torch.relu(self.conv2(x))))
        return self.head(x.mean((2, 3)))


class Chunked(nn.Module):
    """A gated block whose halves are chunks of one layer's output, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.mix = nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(48, 64, 3, padding=1)
        self.last, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=1)
        x = torch.relu(self.mix(value * torch.sigmoid(gate)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Mlp(nn.Sequential):
    """A flattened image through three layers: the chain that torch.ao's pruner is made for."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
            nn.Linear(256, 10),
        )  # fmt: skip


def named(name: str) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=10, in_shape=SHAPE)


def folded_vgg() -> nn.Module:
    """The VGG without norms, as a plain chain of convolutions with bias."""
    model = trained(named("vgg-small")()).eval()
    chain: list[nn.Module] = []
    for layer in model.features:
        if isinstance(layer, nn.BatchNorm2d):
            chain[-1] = fuse_conv_bn_eval(chain[-1], layer)
        else:
            chain.append(layer)
    model.features = nn.Sequential(*chain)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": named("resnet18"),
    "vgg16": named("vgg16"),
    "vgg-small, folded": folded_vgg,
    "mobilenetv1": named("mobilenetv1"),
    "transformer": Encoder,
    "mlp": Mlp,
    "groupnorm": GroupNormed,
    "chunked": Chunked,
}


def trained(model: nn.Module) -> nn.Module:
    """With norms that scale and shift, as after training."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


# ---------------------------------------------------------------------- zeros


def dying(groups: Sequence[ChannelGroup]) -> Removals:
    """Half of every group inside of the network, also of those that cannot be cut exactly."""
    removals: Removals = []
    for group in groups:
        kept = max(16, round(group.channels / 32) * 16)
        gone = torch.randperm(group.channels)[kept:].sort().values
        if group.internal and len(gone):
            removals.append((group, gone))
    return removals


@torch.no_grad()
def masked(model: nn.Module, removals: Removals, zeros: str) -> nn.Module:
    model = copy.deepcopy(model)
    for group, gone in removals:
        layers = {part.layer for part in group.producers}
        fed = [*group.producers, *(part for part in group.carriers if part.layer in layers)]
        for part in group.consumers if zeros == "unread" else fed:
            where = part.index[gone].flatten()
            model.get_parameter(part.tensor).index_fill_(part.dim, where, 0.0)
    return model


# ---------------------------------------------------------------------- tools


def by_gossamer(model: nn.Module, x: Tensor, removals: Removals) -> nn.Module:
    return gossamer.shrink(model, x).model


def by_torch_pruning(model: nn.Module, x: Tensor, removals: Removals) -> nn.Module:
    slim = copy.deepcopy(model)
    for parameter in slim.parameters():
        parameter.requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(slim, example_inputs=x)
    for group, gone in removals:
        layer = slim.get_submodule(group.producers[0].layer)
        where = group.producers[0].index[gone].flatten().tolist()
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, prune, where).prune()
    return slim


class Told(BaseStructuredSparsifier):
    """torch.ao's pruner with masks that are given."""

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        pass


def by_torch_ao(model: nn.Module, x: Tensor, removals: Removals) -> nn.Module:
    """What of it the pruner takes: it fails as a whole where one layer is in no pattern."""
    taken: Removals = []
    failure: Exception | None = None
    for removal in removals:
        try:
            _pruned(model, [removal])(x)
            taken.append(removal)
        except Exception as error:
            failure = error
    if not taken and failure is not None:
        raise failure
    return _pruned(model, taken)


def _pruned(model: nn.Module, removals: Removals) -> nn.Module:
    slim = copy.deepcopy(model)
    config = []
    for group, gone in removals:
        for part in group.producers:
            mask = torch.ones(slim.get_parameter(part.tensor).shape[part.dim], dtype=torch.bool)
            mask[part.index[gone].flatten()] = False
            config.append({"tensor_fqn": part.tensor, "mask": mask})
    pruner = Told({})
    pruner.prepare(slim, config)
    pruned: nn.Module = pruner.prune()
    return pruned


TOOLS = {
    "Gossamer": by_gossamer,
    "Torch-Pruning": by_torch_pruning,
    "torch.ao": by_torch_ao,
}


# ---------------------------------------------------------------------- side by side


@dataclass
class Cut:
    """What a tool made of a network: the slim one, or the first line of why not."""

    model: nn.Module | None
    difference: float
    macs: int
    note: str


def attempt(tool: str, model: nn.Module, x: Tensor, removals: Removals) -> Cut:
    try:
        slim = TOOLS[tool](model, x, removals)
        with torch.no_grad():
            before, after = model(x), slim.eval()(x)
        difference = float((before - after).abs().max() / before.abs().max())
        macs = account(slim, x).macs_executed
    except Exception as error:  # whatever a tool raises, that is its answer
        lines = str(error).strip().splitlines() or [""]
        return Cut(None, float("nan"), 0, f"fails: {type(error).__name__}: {lines[-1][:80]}")
    return Cut(slim, difference, macs, "" if difference <= EXACT else "changed")


def compare(name: str, zeros: str, engines: list[str], batch: int, rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    dense = trained(NETWORKS[name]()).eval()
    x = torch.randn(2, *SHAPE)
    groups = find_groups(dense, x)
    removals = dying(groups)
    model = masked(dense, removals, zeros)
    cuts = {tool: attempt(tool, model, x, removals) for tool in TOOLS}
    total = account(model, x).macs_executed
    least = min((cut.macs for cut in cuts.values() if cut.macs), default=total)
    for cut in cuts.values():
        if not cut.note and cut.macs > least:
            cut.note = "cuts nothing" if cut.macs == total else "keeps the rest"
    slim = {tool: cut.model for tool, cut in cuts.items() if cut.model is not None}
    models = {"dense": model, **slim, AGAIN: model}
    timed = bench(models, x, engines=engines, batches=[batch], rounds=rounds)
    times = {(row.engine, row.model): row.ratio for row in timed.rows}
    cuts[AGAIN] = Cut(model, 0.0, total, "")
    rows = []
    for tool, cut in cuts.items():
        ratios = [times.get((engine, tool)) for engine in engines]
        rows.append(
            [
                name,
                zeros,
                tool,
                f"{cut.macs / total:.3f}" if cut.macs else "-",
                f"{cut.difference:.1e}" if cut.model is not None else "-",
                *(text(ratio) for ratio in ratios),
                cut.note,
            ]
        )
    return rows


def text(ratio: Quartiles | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--zeros", nargs="+", default=["unread", "silent"])
    parser.add_argument("--engines", default="eager,onnx")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the tools
    torch.set_num_threads(1)
    engines = options.engines.split(",")
    print(
        f"batch {options.batch}, 1 thread, CPU time, torch {torch.__version__}, Torch-Pruning "
        f"{tp.__version__}; MACs and times are shares of the dense network's"
    )
    head = ["network", "zeros", "tool", "MACs", "difference", *engines, "note"]
    rows = [head]
    for name in options.networks:
        for zeros in options.zeros:
            rows += compare(name, zeros, engines, options.batch, options.rounds)
            new = align(rows[-len(TOOLS) - 1 :], text_columns=3)
            print(new, flush=True)
    print(f"\n{align(rows, text_columns=3)}")


if __name__ == "__main__":
    main()
