"""The methods as a user chooses among them: what each needs, what training costs, its card.

Nothing is written down here about any method: needs and costs are read off its default settings
on a small network, the costs from supports that move under random gradients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.measure.macs import Account, LayerMacs, training_products
from gossamer.method import Cost, Method, Progress
from gossamer.registry import MethodInfo
from gossamer.site import Site
from gossamer.sparsifier import Sparsifier

__all__ = ["DENSITY", "Entry", "card", "entry"]

DENSITY = 0.1  # at which methods that take a density are compared
_STEPS = 100  # of the run in which densities move
_LONG_RUN = 20_000  # steps over which dense gradients are counted
_PRODUCTS = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method in the list.

    Attributes:
        name: On the command line.
        summary: One line.
        paper: Where it comes from.
        needs: What its user must add to a plain training loop with a Sparsifier in it.
        products: Which products of a training step skip weights, and when.
        macs_training: Of a whole run, as a share of dense training, where every weight is used
            equally often.
        density: Share of the weights left at the end of that run.
    """

    name: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    products: str
    macs_training: float
    density: float

    @property
    def cost(self) -> str:
        """The training MACs in a line."""
        near = math.isclose(self.density, DENSITY, rel_tol=0.01)
        at = "" if near else f" at density {self.density:.2g}"
        return f"{self.macs_training:.2f}x{at}: {self.products}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def card(name: str) -> str:
    """The card of a method, Markdown. Raises FileNotFoundError when the package lacks it."""
    file = resources.files("gossamer") / "cards" / f"{name}.md"
    if not file.is_file():
        raise FileNotFoundError(
            f"this installation lacks the card of {name} ({file}): install gossamer again"
        )
    return file.read_text(encoding="utf-8")


@cache
def entry(info: MethodInfo) -> Entry:
    """What there is to say about a method."""
    names = info.cls.hyperparameters()
    asked = {name: DENSITY for name in ("density", "target_density") if name in names}
    method = info.cls(**asked)
    coming = (Progress(step, _LONG_RUN) for step in range(1, _LONG_RUN + 1))
    often = sum(map(method.wants_dense_grad, coming)) / _LONG_RUN
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random gradients are nothing to be warned of
        needs = _needs(info.cls())
        macs, density = _trained(method, often)
    return Entry(
        name=info.name,
        summary=info.summary,
        paper=info.paper,
        needs=needs,
        products=_in_words(method.cost, often),
        macs_training=macs,
        density=density,
    )


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    )


def _sparsifier(method: Method) -> Sparsifier:
    return Sparsifier(_network(), method, total_steps=_STEPS, example=torch.zeros(2, 64))


def _needs(method: Method) -> tuple[str, ...]:
    sparsifier = _sparsifier(method)
    steps = (Progress(step, _STEPS) for step in range(1, _STEPS + 1))
    found = {
        "an example input": method.needs_graph,
        "its penalty in the loss": method.penalty(sparsifier.sites) is not None,
        "its thresholds in the optimizer": len(sparsifier.parameter_groups()) > 1,
        "each batch's loss (observe)": any(map(method.wants_loss, steps)),
    }
    return tuple(need for need, needed in found.items() if needed)


def _in_words(cost: Cost, often: float) -> str:
    """Which products are sparse; `often` is the share of steps with a dense weight gradient."""
    if all(cost) and not often:
        return "all three products sparse"
    if not cost.sparse_grad_weight or often == 1:
        cost, when = cost._replace(sparse_grad_weight=False), "at every step"
    else:
        when = f"in {100 * often:.3g}% of the steps"
    always = [name for name, sparse in zip(_PRODUCTS[:2], cost, strict=False) if sparse]
    dense = [name for name in _PRODUCTS[:2] if name not in always]
    parts = [f"{' and '.join(always)} sparse"] if always else []
    parts += [f"{name} dense at every step" for name in dense]
    return ", ".join([*parts, f"weight gradient dense {when}"])


def _trained(method: Method, often: float) -> tuple[float, float]:
    """Training MACs as a share of dense training, and the density left."""
    sparsifier = _sparsifier(method)
    generator = torch.Generator().manual_seed(0)
    weights = [parameter for parameter in sparsifier.model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.SGD(sparsifier.parameter_groups(), lr=1e-3)
    total = 0.0
    for _ in range(_STEPS):
        total += _step_macs(sparsifier, method.cost, often)
        loss = sparsifier.penalty()
        for weight in weights:
            loss = loss + (weight * torch.randn(weight.shape, generator=generator)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        sparsifier.observe(loss)
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    full = 3 * sum(site.original_numel for site in sparsifier.sites)
    return total / _STEPS / full, sparsifier.density


def _step_macs(sparsifier: Sparsifier, cost: Cost, often: float) -> float:
    """MACs of a step, as the supports are, with dense weight gradients in the share `often`."""

    def account(counted: Callable[[Site], Tensor]) -> Account:
        layers = tuple(
            LayerMacs(
                name=site.name,
                kind="Linear",
                shape=tuple(site.weight.shape),
                positions=1,
                weights=site.weight.numel(),
                nonzeros=int(counted(site).count_nonzero()),
            )
            for site in sparsifier.sites
        )
        return Account(layers=layers, other_macs=0, other_nonzeros=0, bytes_on_disk=0)

    acting, learning = account(lambda site: site.support), account(lambda site: site.learns)
    forward, grad_input, _ = training_products(acting, **cost._asdict())
    *_, grad_weight = training_products(learning, **cost._asdict())
    return forward + grad_input + (1 - often) * grad_weight + often * learning.macs_executed
