"""Site: one sparse weight of the model; and the channel pools that tie sites together."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.channels import ChannelGroup
from gossamer.ops import pooled
from gossamer.sharding import placed, whole
from gossamer.sparse_weight import Masked, SparseWeight

__all__ = [
    "ChannelPool",
    "Place",
    "Site",
    "fill_flat_weights",
    "find_layers",
    "in_places",
    "unsupported",
]

_SPARSIFIABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Place(NamedTuple):
    """A layer and the name of one of its weights."""

    module: nn.Module
    tensor: str

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        weight = getattr(self.module, self.tensor)
        assert isinstance(weight, Tensor)
        return weight


@dataclass(frozen=True, eq=False)
class Site:
    """One sparse weight.

    What a method selects are places: weights, or blocks of `block` consecutive outputs at one input
    and kernel position, of which a weight `(out, in, *kernel)` has `(out / block, in, *kernel)`.

    Attributes:
        name: Of the layer; in a recurrent layer of the matrix, such as "lstm.weight_ih_l0".
        module: The layer.
        tensor: Name of the weight in the layer.
        weight: The latent weight, `(out, in, *kernel)`; the same object for the whole of training.
            A DTensor where the model is sharded, as its masks then are.
        sparse: What computes the effective weight from it.
        original_shape: Of the weight, before any cut.
        block: Weights per place.
    """

    name: str
    module: nn.Module
    tensor: str
    weight: nn.Parameter
    sparse: SparseWeight
    original_shape: torch.Size
    block: int = 1

    @property
    def tensor_name(self) -> str:
        """Full name of the weight in the plain model."""
        named = self.name == self.tensor or self.name.endswith(f".{self.tensor}")
        return self.name if named else f"{self.name}.{self.tensor}"

    @property
    def effective(self) -> Tensor:
        """The effective weight, as the layer computes with it."""
        return Place(self.module, self.tensor).weight

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
    def learns(self) -> Tensor:
        """Bool tensor of the weight's shape: which weights need their gradient in a step."""
        return self.sparse.learns(self.weight.detach())

    @property
    def nonzeros(self) -> int:
        """Size of the support."""
        return int(whole(self.support.count_nonzero()))

    @property
    def original_numel(self) -> int:
        """Weights of the layer before any cut."""
        return math.prod(self.original_shape)

    @property
    def original_fan_in(self) -> int:
        """Weights of one output channel before any cut."""
        return math.prod(self.original_shape[1:])

    @property
    def original_places(self) -> torch.Size:
        """Shape of the places before any cut; budgets refer to it."""
        return in_places(self.original_shape, self.block)

    @property
    def places(self) -> Tensor:
        """Bool tensor of the places: those on the support of a mask."""
        return self.support if self.block == 1 else self.support[:: self.block]

    @property
    def live_places(self) -> Tensor:
        """Bool tensor of the places: those outside removed channels."""
        return self.masked.live if self.block == 1 else self.masked.live[:: self.block]

    @property
    def magnitude(self) -> Tensor:
        """|latent weight|, summed over each place."""
        return pooled(self.weight.detach().abs(), self.block)

    @property
    def gradient_magnitude(self) -> Tensor:
        """|dense gradient| of this step, summed over each place; zeros if none arrived."""
        gradient = self.masked.dense_gradient
        if gradient is None:
            return pooled(torch.zeros_like(self.weight), self.block)
        return pooled(placed(gradient, like=self.weight).abs_(), self.block)

    @property
    def density(self) -> float:
        """Share of the layer's present weights that are on the support."""
        return self.nonzeros / self.weight.numel()


@dataclass(frozen=True, eq=False)
class ChannelPool:
    """A channel group that may lose channels, with the sites that produce it.

    A channel that several layers write is one channel: it is removed in all of them or in none.

    Attributes:
        group: Its `channels` are the width as the model is now.
        producers: One site per slice of `group.producers`.
        original_channels: Before any removal.
    """

    group: ChannelGroup
    producers: tuple[Site, ...]
    original_channels: int

    @property
    def name(self) -> str:
        """Name of the group: of its first producer."""
        return self.group.name

    @property
    def producer(self) -> Site:
        """The first of them; the only one unless several layers write the channels."""
        return self.producers[0]

    @property
    def live(self) -> Tensor:
        """`(group.channels,)` bool on the CPU: channels that are not removed."""
        # One truth for all producers: every removal marks the channel in each of them.
        live = self.producer.masked.live_out.flatten()
        return live.cpu()[self.group.producers[0].index[:, 0]]

    @property
    def original_fan_in(self) -> int:
        """Weights that produce one channel, in all producers together, before any cut."""
        return sum(
            site.original_fan_in * part.index.shape[1]
            for site, part in zip(self.producers, self.group.producers, strict=True)
        )

    def total(self, measure: Callable[[Site], Tensor]) -> Tensor:
        """`(group.channels,)` float64 on the CPU: `measure(site): (out,)` over all that produce
        a channel, summed.
        """
        total = torch.zeros(self.group.channels, dtype=torch.float64)
        for site, part in zip(self.producers, self.group.producers, strict=True):
            total += whole(measure(site)).cpu()[part.index].sum(1)
        return total


def in_places(shape: Sequence[int], block: int) -> torch.Size:
    """Shape of the places of a weight `(out, in, *kernel)`: `(out / block, in, *kernel)`."""
    return torch.Size([shape[0] // block, *shape[1:]])


def find_layers(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    recurrent: bool = False,
) -> dict[str, Place]:
    """Weights of `model` to make sparse, by site name: every linear and convolution layer's.

    Args:
        model: A plain model.
        include: Name patterns (`fnmatch`, such as "layer1.*"); only these. None means all.
        exclude: Name patterns to leave dense.
        recurrent: Also the matrices of recurrent layers and cells, each a site of its own. In
            patterns, the layer's name stands for all of them.

    Raises:
        ValueError: A pattern that fits no layer, no layer left, a layer that is parametrized
            already, or two layers that share one weight.
    """
    layers = dict(_places(model, recurrent))
    kinds = "linear, convolution or recurrent" if recurrent else "linear or convolution"
    for pattern in (*(include or ()), *exclude):
        if not any(_matches(name, place, [pattern]) for name, place in layers.items()):
            near = difflib.get_close_matches(pattern, layers, 3) or list(layers)[:5]
            raise ValueError(
                f"pattern {pattern!r} matches no {kinds} layer: "
                f"the model has, for instance, {', '.join(map(repr, near)) or 'none'}"
            )
    chosen = {
        name: place
        for name, place in layers.items()
        if (include is None or _matches(name, place, include))
        and not _matches(name, place, exclude)
    }
    if not chosen:
        raise ValueError(
            f"no layer to make sparse: {type(model).__name__} has {len(layers)} weights of {kinds} "
            "layers, and include/exclude leave none of them"
        )
    for name, place in chosen.items():
        if parametrize.is_parametrized(place.module):
            raise ValueError(
                f"{name} is parametrized already: remove the parametrization "
                "(finalize(), if Gossamer made it), or exclude the layer"
            )
        weight = place.weight
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(
                f"{name} has no weight yet: run the model once on an example before the Sparsifier"
            )
        if not weight.requires_grad:
            raise ValueError(f"{name} is frozen (requires_grad=False): exclude it, or unfreeze it")
    _refuse_tied(model, chosen)
    return chosen


def unsupported(model: nn.Module, recurrent: bool = False) -> dict[str, str]:
    """Why weights of layers that multiply stay dense, whatever the method, by parameter name.

    Args:
        model: A plain model.
        recurrent: Whether the method makes the matrices of recurrent layers sparse.
    """
    reasons: list[tuple[tuple[type[nn.Module], ...], str]] = [
        (
            (nn.MultiheadAttention,),
            "belongs to an nn.MultiheadAttention: make query, key and value linear layers of their "
            "own to have them sparse",
        ),
        (_TRANSPOSED, "belongs to a transposed convolution, which no method makes sparse"),
    ]
    if not recurrent:
        why = "belongs to a recurrent layer, which of all methods DST makes sparse"
        reasons.append((_RECURRENT, why))
    return {
        f"{name}.{tensor}".lstrip("."): reason
        for name, module in model.named_modules()
        for kinds, reason in reasons
        if isinstance(module, kinds)
        for tensor, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1 and not tensor.startswith("bias")
    }


def fill_flat_weights(module: nn.RNNBase) -> None:
    """Have a parametrized recurrent layer compute with its effective weights.

    It reads them from a list. PyTorch refreshes the list by evaluating every parametrization up to
    three times, and leaves the graph of the last forward in it, which no deep copy survives. The
    class that parametrize has injected fills it for one forward; finalizing takes that class away.
    """
    cls: Any = type(module)
    plain: Any = cls.__bases__[0]

    def fill(self: nn.RNNBase) -> None:
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]

    def clear(self: nn.RNNBase) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)

    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            clear(self)

    cls._update_flat_weights, cls._init_flat_weights, cls.forward = fill, clear, forward
    clear(module)


def _places(model: nn.Module, recurrent: bool) -> Iterator[tuple[str, Place]]:
    for name, module in model.named_modules():
        if isinstance(module, _SPARSIFIABLE):
            yield name, Place(module, "weight")
        elif recurrent and isinstance(module, _RECURRENT):
            cell = ["weight_ih", "weight_hh"]
            names = module._flat_weights_names if isinstance(module, nn.RNNBase) else cell
            for tensor in names:
                if tensor.startswith("weight"):
                    yield f"{name}.{tensor}".lstrip("."), Place(module, tensor)


def _matches(name: str, place: Place, patterns: Iterable[str]) -> bool:
    names = (name, name.removesuffix(f".{place.tensor}"))
    return any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns for n in names)


def _refuse_tied(model: nn.Module, chosen: dict[str, Place]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer, place in chosen.items():
        names = owners[id(place.weight)]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one tied weight: a mask on one would not reach the "
                f"other. Exclude {layer!r}, or untie them"
            )
