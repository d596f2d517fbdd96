"""Every method against every promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from gossamer import (
    DST,
    GMP,
    MEST,
    SET,
    SNFS,
    SRSTE,
    STR,
    AutoSparse,
    Chase,
    GraNet,
    RigL,
    SRigL,
    Static,
    TopKAST,
)
from gossamer.method import Method, Progress
from gossamer.ops import random_mask
from gossamer.site import Site
from gossamer.sparse_weight import Masked, SparseWeight
from gossamer.testing import CONTRACT, Trial, check_method

METHODS = {
    "static": Static(density=0.2),
    "static-uniform": Static(density=0.5, distribution="uniform"),
    "chase": Chase(density=0.2, channel_sparsity=0.4),
    "chase-unstructured": Chase(density=0.2, channel_sparsity=0.0),
    "chase-layer": Chase(density=0.2, channel_sparsity=0.4, scope="layer", grow="random"),
    "chase-multiple": Chase(density=0.2, channel_sparsity=0.5, channel_multiple=8),
    "srste": SRSTE(lam=1e-2),
    "srste-8": SRSTE(n=1, m=8, lam=0.5, mode="decoupled", remainder="dense", refresh_interval=3),
    "srste-annealed": SRSTE(lam=0.1, dense_until=0.3, anneal_until=0.6, remainder="pad"),
    "str": STR(s_init=-3.0),
    "str-row": STR(s_init=-3.0, granularity="row"),
    "autosparse": AutoSparse(s_init=-3.0),
    "autosparse-row": AutoSparse(
        s_init=-3.0, granularity="row", backward_sparsity=0.5, alpha_schedule="linear"
    ),
    "topkast": TopKAST(density=0.2, refresh_interval=5),
    "topkast-annealed": TopKAST(
        density=0.2, distribution="erk", refresh_interval=5, alpha_schedule="cosine", alpha=0.5
    ),
    "dst": DST(alpha=2e-3),
    "dst-layer": DST(alpha=0.1, granularity="layer", clamp=True),
    "dst-weight": DST(alpha=1e-3, granularity="weight", reset_below=0.2),
    "set": SET(density=0.2),
    "set-global": SET(density=0.2, distribution="uniform", drop="magnitude", scope="global"),
    "rigl": RigL(density=0.2),
    "rigl-global": RigL(density=0.2, distribution="uniform", scope="global", update_interval=3),
    "rigl-itop": RigL(density=0.2, drop_fraction=0.5, drop_fraction_end=0.005, t_end=1.0),
    "snfs": SNFS(density=0.2),
    "snfs-global": SNFS(density=0.2, distribution="erk", scope="global", smoothing=0.5),
    "gmp": GMP(density=0.2),
    "gmp-global": GMP(density=0.2, scope="global", initial_density=0.8, update_interval=3),
    "granet": GraNet(density=0.2),
    "granet-sparse": GraNet(density=0.2, initial_density=0.5, scope="layer", update_interval=3),
    "mest": MEST(density=0.2, variant="vanilla", gradient_weight=0.1),
    "mest-em": MEST(density=0.2, mutation=0.1, scope="global"),
    "mest-ems": MEST(density=0.2, mutation=0.1, variant="ems", distribution="erk"),
    "srigl": SRigL(density=0.2, gamma_sal=0.8, update_interval=3),
    "srigl-whole": SRigL(density=0.2, distribution="uniform", ablation=False),
    "rigl-block": RigL(density=0.2, block=8),
    "chase-block": Chase(density=0.2, channel_sparsity=0.4, block=8),
    "dst-block": DST(alpha=2e-3, block=8),
    "static-block": Static(density=0.2, block=8),
    "set-block": SET(density=0.2, drop="magnitude", block=8),
    "gmp-block": GMP(density=0.2, block=8),
    "granet-block": GraNet(density=0.2, block=8),
    "mest-block": MEST(density=0.2, block=8, gradient_weight=0.1),
}


# Compiling takes seconds: one method of each family in every run, all in `make test-all`.
COMPILED = ("chase", "dst")
# What blocks change is the Sparsifier's: in every run one mask method and the thresholds stand for
# all, with the promises that look at supports.
BLOCKS = [
    (name, promise)
    for name in ("rigl-block", "dst-block")
    for promise in ("exact_density", "finalize_is_plain")
]


def marks(name: str, promise: str) -> list[pytest.MarkDecorator]:
    if name.endswith("-block"):
        return [] if (name, promise) in BLOCKS else [pytest.mark.slow]
    if promise == "compiled_equals_eager":
        return [] if name in COMPILED else [pytest.mark.slow]
    return [pytest.mark.one_in(3)] if "-" in name else []  # settings of a method that is here


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        pytest.param(name, promise, marks=marks(name, promise))
        for name in METHODS
        for promise in CONTRACT
    ],
)
def test_promise(name: str, promise: str) -> None:
    CONTRACT[promise](METHODS[name], Trial())


@dataclass(frozen=True, kw_only=True)
class Careless(Static):
    """Draws its masks from the global generator, so that a seed says nothing."""

    def attach(self, weight: torch.nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        other = torch.Generator().manual_seed(int(torch.seed() % 2**31))
        return Masked(weight, random_mask(weight.shape, count, other))


@dataclass(frozen=True, kw_only=True)
class Generous(Static):
    """Keeps one weight more than its budget."""

    def attach(self, weight: torch.nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        return Masked(weight, random_mask(weight.shape, count + 1, generator))


@pytest.mark.parametrize(
    ("method", "promise"), [(Careless(), "accumulation"), (Generous(), "exact_density")]
)
def test_the_contract_can_fail(method: Method, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_method(method)


class Fading(SparseWeight):
    """Keeps a factor that changes as a Python float, and not in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor

    def support(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(weight, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Hasty(Static):
    def attach(self, weight: torch.nn.Parameter, count: int, generator: torch.Generator) -> Fading:
        return Fading()

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        for site in sites:
            site.sparse.factor = 1 - progress.fraction / 2


def test_the_contract_finds_what_recompiles() -> None:
    with pytest.raises(AssertionError, match="2 graphs were compiled, one was expected"):
        CONTRACT["compiled_equals_eager"](Hasty(), Trial())
