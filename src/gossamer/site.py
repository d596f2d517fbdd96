"""Site: one sparse weight of the model; and the channel pools that tie sites together."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.channels import ChannelGroup
from gossamer.sparse_weight import Masked, SparseWeight

__all__ = ["ChannelPool", "Layer", "Site", "find_layers"]

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_SPARSIFIABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Site:
    """One sparse weight.

    Attributes:
        name: Of the layer.
        module: The layer.
        weight: The latent weight, `(out, in, *kernel)`; the same object for the whole of training.
        sparse: What computes the effective weight from it.
        original_shape: Of the weight, before any cut; budgets refer to it.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    sparse: SparseWeight
    original_shape: torch.Size

    @property
    def effective(self) -> Tensor:
        """The effective weight, as the layer computes with it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def masked(self) -> Masked:
        """The SparseWeight of a mask method."""
        assert isinstance(self.sparse, Masked)
        return self.sparse

    @property
    def support(self) -> Tensor:
        """Bool tensor of the weight's shape: where the effective weight may be non-zero."""
        return self.sparse.support(self.weight)

    @property
    def nonzeros(self) -> int:
        """Size of the support."""
        return int(self.support.count_nonzero())

    @property
    def original_numel(self) -> int:
        """Weights of the layer before any cut."""
        return math.prod(self.original_shape)

    @property
    def original_fan_in(self) -> int:
        """Weights of one output channel before any cut."""
        return math.prod(self.original_shape[1:])

    @property
    def gradient_magnitude(self) -> Tensor:
        """|dense gradient| of this step, `(out, in, *kernel)`; zeros if none arrived."""
        gradient = self.masked.dense_gradient
        return torch.zeros_like(self.weight) if gradient is None else gradient.abs_()

    @property
    def density(self) -> float:
        """Share of the layer's present weights that are on the support."""
        return self.nonzeros / self.weight.numel()


@dataclass(frozen=True, eq=False)
class ChannelPool:
    """A channel group that may lose channels, with the site that produces it.

    `group.channels` is the width as the model is now; `original_channels` before any removal.
    """

    group: ChannelGroup
    producer: Site
    original_channels: int

    @property
    def name(self) -> str:
        """Name of the producing layer."""
        return self.producer.name

    @property
    def live(self) -> Tensor:
        """`(group.channels,)` bool on the CPU: channels that are not removed."""
        return self.producer.masked.live_out.flatten()[self.group.producers[0].index[:, 0]].cpu()


def find_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> dict[str, Layer]:
    """Layers of `model` to make sparse, by name: every linear and convolution layer.

    Args:
        model: A plain model.
        include: Name patterns (`fnmatch`, such as "layer1.*"); only these. None means all.
        exclude: Name patterns to leave dense.

    Raises:
        ValueError: A pattern that fits no layer, no layer left, a layer that is parametrized
            already, or two layers that share one weight.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, _SPARSIFIABLE)
    }
    for pattern in (*(include or ()), *exclude):
        if not fnmatch.filter(layers, pattern):
            near = difflib.get_close_matches(pattern, layers, 3) or list(layers)[:5]
            raise ValueError(
                f"pattern {pattern!r} matches no linear or convolution layer: "
                f"the model has, for instance, {', '.join(map(repr, near)) or 'none'}"
            )
    chosen = {
        name: module
        for name, module in layers.items()
        if (include is None or _matches(name, include)) and not _matches(name, exclude)
    }
    if not chosen:
        raise ValueError(
            f"no layer to make sparse: {type(model).__name__} has {len(layers)} linear and "
            "convolution layers, and include/exclude leave none of them"
        )
    for name, module in chosen.items():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is parametrized already: remove the parametrization "
                "(finalize(), if Gossamer made it), or exclude the layer"
            )
        weight = module.weight
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(
                f"{name} has no weight yet: run the model once on an example before the Sparsifier"
            )
        if not weight.requires_grad:
            raise ValueError(f"{name} is frozen (requires_grad=False): exclude it, or unfreeze it")
    _refuse_tied(model, chosen)
    return chosen


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_tied(model: nn.Module, chosen: dict[str, Layer]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer, module in chosen.items():
        names = owners[id(module.weight)]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one tied weight: a mask on one would not reach the "
                f"other. Exclude {layer!r}, or untie them"
            )
