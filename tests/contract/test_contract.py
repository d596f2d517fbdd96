"""Every method against every promise."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gossamer import DST, SRSTE, Chase, Static
from gossamer.method import Method
from gossamer.ops import random_mask
from gossamer.sparse_weight import Masked
from gossamer.testing import CONTRACT, check_method

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
    "dst": DST(alpha=2e-3),
    "dst-layer": DST(alpha=0.1, granularity="layer", clamp=True),
    "dst-weight": DST(alpha=1e-3, granularity="weight", reset_below=0.2),
}


@pytest.mark.parametrize("promise", CONTRACT)
@pytest.mark.parametrize("name", METHODS)
def test_promise(name: str, promise: str) -> None:
    CONTRACT[promise](METHODS[name])


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
