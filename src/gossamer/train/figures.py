"""The figures of the trained networks: the dense twin, the sparse one at full width, the slim one.

dense: the twin, trained without a method.
sparse: the full-width network with the trained zeros, which is what masks alone deliver.
slim: the same network after the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import evaluating
from gossamer.measure.macs import Account, account
from gossamer.shrink.plan import Plan
from gossamer.shrink.shrink import shrink, unread
from gossamer.sparsifier import Sparsifier
from gossamer.train.data import Batches
from gossamer.train.expand import expand, scatter, take
from gossamer.train.narrowing import is_narrower

if TYPE_CHECKING:
    from gossamer.train.engine import History

__all__ = ["Delivered", "accuracy", "deliver", "figures", "layers", "logits", "topology"]


@dataclass(frozen=True, eq=False)
class Delivered:
    """What came of a sparse training.

    Attributes:
        sparse: The full-width network with the trained zeros.
        slim: The same network without the channels that do nothing.
        plan: Cuts the full-width network to `slim`.
        supports: Of every sparse weight, by its tensor's name, bool, at full width.
        eligible: Channel groups, at full width, that could have lost channels.
        note: Why nothing was cut, when the network's channels cannot be traced; else empty.
    """

    sparse: nn.Module
    slim: nn.Module
    plan: Plan
    supports: Mapping[str, Tensor]
    eligible: tuple[ChannelGroup, ...]
    note: str

    def account(self, network: str, example: Tensor) -> Account:
        """Size and work of the "sparse" or the "slim" network, by the trained supports."""
        counts = {name: int(mask.count_nonzero()) for name, mask in self._masks(network).items()}
        model = self.sparse if network == "sparse" else self.slim
        return account(model, example, supports=counts)

    def density(self, network: str) -> float:
        """Share of the sparse layers' weights, as many as the network has, that is kept."""
        masks = self._masks(network).values()
        return sum(int(mask.count_nonzero()) for mask in masks) / sum(m.numel() for m in masks)

    def channel_sparsity(self, network: str) -> float:
        """Share of the eligible channels that nothing reads ("sparse"), that are gone ("slim")."""
        total = sum(group.channels for group in self.eligible)
        if network == "sparse":
            lost = sum(int(unread(self.sparse, group).sum()) for group in self.eligible)
        else:
            first = [group.producers[0] for group in self.eligible]
            lost = sum(
                len(part.index) - int(torch.isin(part.index[:, 0], positions).sum())
                for part in first
                if (positions := self.plan.kept(part.tensor, part.dim)) is not None
            )
        return lost / total if total else 0.0

    def _masks(self, network: str) -> dict[str, Tensor]:
        if network == "sparse":
            return dict(self.supports)
        return {name: take(mask, name, self.plan) for name, mask in self.supports.items()}


def deliver(
    sparsifier: Sparsifier, full: nn.Module, example: Tensor, before: Plan | None = None
) -> Delivered:
    """Finish a trained Sparsifier: bake its model, widen a copy of it, cut another.

    Args:
        sparsifier: At the end of training; it is done then.
        full: The network at full width, not sparsified; it becomes the sparse one.
        example: An input it accepts.
        before: What had been cut from it before training.
    """
    plan = Plan() if before is None else copy.deepcopy(before)
    plan.record(sparsifier.plan.changes)
    shapes = {name: parameter.shape for name, parameter in full.named_parameters()}
    supports = {
        name: scatter(site.support, shapes[name], name, plan)
        for site in sparsifier.sites
        for name in (site.tensor_name,)
    }
    trained = sparsifier.finalize()
    sparse = expand(trained, full, plan)
    try:
        groups = find_groups(full, example)
        cut = shrink(trained, example, plan, block=sparsifier.method.block)
    except ValueError as error:  # a method that needs no graph trains what cannot be traced
        return Delivered(sparse, trained, plan, supports, (), str(error))
    pools = {pool.name for pool in sparsifier.pools}
    lost = {group.name for group in groups if before is not None and is_narrower(group, before)}
    eligible = tuple(
        group
        for group in groups
        if group.name in lost
        or (group.name in pools if pools else group.internal and not group.locked)
    )
    return Delivered(sparse, cut.model, cut.plan, supports, eligible, "")


def figures(
    account: Account,
    *,
    accuracy: float,
    density: float,
    channel_sparsity: float,
    macs_training: float,
    latency_ms: float,
) -> dict[str, Any]:
    """One network's figures, by the names they have everywhere."""
    return {
        "accuracy": accuracy,
        "density": density,
        "channel_sparsity": channel_sparsity,
        "nonzeros": account.nonzeros,
        "bytes_on_disk": account.bytes_on_disk,
        "macs_executed": account.macs_executed,
        "macs_sparse": account.macs_sparse,
        "macs_training": macs_training,
        "latency_ms": latency_ms,
    }


def layers(sparse: Account, slim: Account) -> list[dict[str, Any]]:
    """One row per layer: its weight's shape, density and MACs at full width, and in the slim one.

    Args:
        sparse: Of the full-width network.
        slim: Of the same network after the cut.
    """
    after = {layer.name: layer for layer in slim.layers}
    return [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "slim_shape": list(after[layer.name].shape),
            "density": layer.density,
            "slim_density": after[layer.name].density,
            "macs_executed": layer.macs_executed,
            "slim_macs_executed": after[layer.name].macs_executed,
        }
        for layer in sparse.layers
    ]


def topology(history: History) -> dict[str, Any]:
    """What training did to the supports: where they ended, and the path there in a few points."""
    epochs = len(history.rows)
    path = []
    for epoch in sorted({round(epochs * quarter / 4) for quarter in range(5)}):
        row = history.start if epoch == 0 else history.rows[epoch - 1]
        layers = [layer for layer in history.layers if layer["epoch"] == epoch]
        live = sum(layer["live_channels"] for layer in layers)
        path.append(
            {"epoch": epoch, **{key: row[key] for key in history.start}, "live_channels": live}
        )
    return {**history.end, "sad_cumulative": history.rows[-1]["sad_cumulative"], "path": path}


def logits(model: nn.Module, batches: Batches) -> Tensor:
    """Outputs on all images, `(n, classes)` on the CPU, in eval mode."""
    with evaluating(model), torch.inference_mode():
        return torch.cat([model(images).cpu() for images, _ in batches])


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of the images whose class comes out highest; batches must not be shuffled."""
    return float((logits(model, batches).argmax(1) == batches.labels.cpu()).double().mean())
