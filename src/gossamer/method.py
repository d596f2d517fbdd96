"""Method: what a sparse training method has to say. Everything it does not say is the Sparsifier's.

A method is a frozen dataclass of its hyperparameters. It holds no state: what changes during
training lives in the model (masks, thresholds) and in the step count.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.allocation import allocate
from gossamer.channels import ChannelGroup
from gossamer.site import ChannelPool, Place, Site
from gossamer.sparse_weight import SparseWeight

__all__ = [
    "Cost",
    "Method",
    "Price",
    "Progress",
    "SupportChange",
    "allocate_density",
    "check_choice",
    "check_range",
]


# Where supports change all the time, looking at each would cost more than the looks are worth.
_LOOKS_PER_RUN = 1000


class Progress(NamedTuple):
    """Where training stands: optimizer steps done, and steps of the whole run."""

    step: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """Share of training that is done, in [0, 1]."""
        return min(self.step / self.total_steps, 1.0)

    def look_due(self, interval: int = 1) -> bool:
        """Whether to tell, after this step, of supports that change every `interval` steps.

        Short runs tell of every change, long ones of about 1000.
        """
        every = max(1, self.total_steps // (_LOOKS_PER_RUN * interval))
        return self.step % (every * interval) == 0


class Cost(NamedTuple):
    """Which of the three products of a training step skip weights off the support; that of the
    weight gradient, those that learn nothing (`SparseWeight.learns`).
    """

    sparse_forward: bool
    sparse_grad_input: bool
    sparse_grad_weight: bool


class SupportChange(NamedTuple):
    """New support of one site, as bools over its places: `kept | grown`. Whatever is not kept
    starts at zero, with its optimizer state cleared, also when it is dropped and grown in the same
    update.
    """

    kept: Tensor
    grown: Tensor


class Price(ABC):
    """What one run of the network costs, as a function of the widths of its channel pools."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """What it is counted in: "MACs", "bytes" or "ms"."""

    @property
    @abstractmethod
    def dense(self) -> float:
        """Price of the network as it was at the start."""

    @abstractmethod
    def __call__(self, widths: Sequence[int]) -> float:
        """Price when each pool, in order, is as wide as `widths` says."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyperparameters and rules of one sparse training method."""

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """What the method costs in each product of a training step."""

    @property
    def block(self) -> int:
        """Consecutive outputs that are kept or pruned together, at one input and kernel position:
        what the method selects is such a place. 1: a place is a weight.
        """
        return 1

    @abstractmethod
    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Places on the support of each site at the start, given the shapes of all sites' places:
        `(out / block, in, *kernel)`.
        """

    @abstractmethod
    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> SparseWeight:
        """The SparseWeight of one site: `weight: (out, in, *kernel)`, `count` places on the
        support.
        """

    def unfit(self, place: Place) -> str | None:
        """Why the method leaves the weight at `place` dense; None when it can make it sparse."""
        return None

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when the model or the length of the run cannot serve the method.

        Args:
            widths: Channels of every layer that may lose some, by name.
            total_steps: Optimizer steps of the run.
        """
        return None

    def check_channels(self, groups: Sequence[ChannelGroup], prices: Mapping[str, Price]) -> None:
        """Raise ValueError when what is to be removed cannot be.

        Args:
            groups: That may lose channels.
            prices: What their widths cost, in the units of `priced_in`.
        """
        return None

    def updates_at(self, progress: Progress) -> bool:
        """Whether the support changes after this step."""
        return False

    def wants_dense_grad(self, progress: Progress) -> bool:
        """Whether this step's update needs gradients off the support."""
        return False

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange] | None:
        """The supports after this step, one change per site; None leaves all as they are."""
        return None

    def removals(
        self, pools: Sequence[ChannelPool], progress: Progress, prices: Mapping[str, Price]
    ) -> list[Tensor] | None:
        """Channels to remove after this step: indices per pool, or None when none is due.

        `prices` are those of `priced_in`, for the widths of the pools in order.
        """
        return None

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool | None:
        """Bring what follows a schedule (annealing factors, thresholds to reset) to this step.

        Called once before training (step 0, no optimizer) and after every step, in `no_grad`.
        Returns True when a support changed, so that accounts are taken anew (`Progress.look_due`).
        """
        return None

    def wants_loss(self, progress: Progress) -> bool:
        """Whether this step must be told its training loss, with `Sparsifier.observe`."""
        return False

    def observe(self, sites: Sequence[Site], loss: Tensor) -> None:
        """Take note of a training loss, 0-d, float32, the mean over all processes."""
        return None

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """Term to add to the loss, 0-d; None for none."""
        return None

    @property
    def needs_graph(self) -> bool:
        """Whether the method works on channel groups, so that the Sparsifier needs an example."""
        return False

    @property
    def budgets(self) -> dict[str, float]:
        """What one run of the slim network may cost, by unit of price; empty without a budget."""
        return {}

    @property
    def priced_in(self) -> tuple[str, ...]:
        """Units whose prices `removals` must know: "macs", "bytes", "latency"."""
        return ()

    @property
    def cuts_skip_paths(self) -> bool:
        """Whether channels that several layers write or read may be removed too."""
        return False

    @property
    def recurrent(self) -> bool:
        """Whether the matrices of recurrent layers can be sparse, each as a site of its own."""
        return False

    def remedy(self, progress: Progress) -> str:
        """What empties layers at this step, and what to change: said when one collapses."""
        settings, name = self.to_dict(), type(self).__name__
        asked = f"density={settings.get('density')}"
        if settings.get("scope") == "global":
            return (
                f'{name}(scope="global", {asked}) ranks the weights of all layers together: '
                'scope="layer" gives each its share; or ask for a higher density'
            )
        return f"{name}({asked}) leaves it too few: ask for a higher density, or exclude the layer"

    def to_dict(self) -> dict[str, Any]:
        """Name and hyperparameters, as plain data."""
        return {"name": type(self).__name__, **asdict(self)}

    @classmethod
    def hyperparameters(cls) -> tuple[str, ...]:
        """Names of the hyperparameters, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Hyperparameters that have a default, with it."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}


def allocate_density(distribution: str, shapes: Sequence[torch.Size], density: float) -> list[int]:
    """Weights per layer, summing to `round(density * all weights)`."""
    total = sum(shape.numel() for shape in shapes)
    budget = round(density * total)
    if budget < len(shapes):
        raise ValueError(
            f"density={density} is below the reachable minimum: {budget} of {total} weights for "
            f"{len(shapes)} layers, and every layer needs one; give at least "
            f"{len(shapes) / total:.3g}"
        )
    return allocate(distribution, shapes, budget)


def check_range(
    method: Method,
    name: str,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    whole: bool = False,
) -> None:
    """Raise an error unless hyperparameter `name` is a number in [low, high] (or (low, high])."""
    value = getattr(method, name)
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(
            f"{type(method).__name__}: {name}={value!r} is a {type(value).__name__}: give a "
            f"{'whole number' if whole else 'number'}"
        )
    if not (low < value if open_low else low <= value) or not value <= high:
        bracket = "(" if open_low else "["
        raise ValueError(
            f"{type(method).__name__}: {name}={value!r} is out of range: "
            f"give a value in {bracket}{low}, {high}]"
        )


def check_choice(method: Method, name: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless hyperparameter `name` is one of `choices`; names the nearest."""
    value = getattr(method, name)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"{type(method).__name__}: {name}={value!r} is unknown{hint}: "
            f"choose one of {', '.join(choices)}"
        )
