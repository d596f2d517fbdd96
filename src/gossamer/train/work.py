"""Counting `macs_training` while a network trains, and its support and its widths change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gossamer.measure.macs import Account, TrainingMacs, account, training_products
from gossamer.method import Cost, Progress
from gossamer.site import Site
from gossamer.sparsifier import Sparsifier

__all__ = ["Work"]

_DENSE = Cost(sparse_forward=False, sparse_grad_input=False, sparse_grad_weight=False)


class Work:
    """MACs of the steps made so far; the account is only taken anew when something changed.

    How often an example uses each weight does not change when channels are cut, so the model runs
    once; later only sizes and supports are looked up.

    Args:
        model: The network, full-width, with `sparsifier` attached if there is one.
        example: An input it accepts.
        sparsifier: Of `model`; None when it trains dense.
    """

    def __init__(self, model: nn.Module, example: Tensor, sparsifier: Sparsifier | None) -> None:
        self._model = model
        self._sparsifier = sparsifier
        self._full = account(model, example)
        self._macs = TrainingMacs()
        self._revision = -1
        self._now = self._learning = self._full

    @property
    def total(self) -> float:
        """MACs of the whole run so far."""
        return self._macs.total

    def add(self, examples: int) -> None:
        """Add a step on so many examples, as the network is now."""
        cost = _DENSE
        if self._sparsifier is not None:
            if self._revision != self._sparsifier.revision:
                self._revision = self._sparsifier.revision
                sites = self._sparsifier.sites
                self._now = self._account(sites, lambda site: site.support)
                self._learning = self._account(sites, lambda site: site.learns)
            cost = self._sparsifier.method.cost
            coming = Progress(self._sparsifier.step_count + 1, self._sparsifier.total_steps)
            if self._sparsifier.method.wants_dense_grad(coming):
                cost = cost._replace(sparse_grad_weight=False)
        forward, grad_input, _ = training_products(self._now, **cost._asdict())
        *_, grad_weight = training_products(self._learning, **cost._asdict())
        self._macs.add(examples, forward=forward, grad_input=grad_input, grad_weight=grad_weight)

    def state_dict(self) -> dict[str, Any]:
        """The total, and what the last account counted, for a checkpoint: plain data."""
        state: dict[str, Any] = dict(self._macs.state_dict())
        if self._sparsifier is not None and self._revision == self._sparsifier.revision:
            accounts = (self._now, self._learning)
            state["counted"] = [[(r.weights, r.nonzeros) for r in one.layers] for one in accounts]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        The account goes on as it was too: supports may have moved since, unannounced.
        """
        self._macs.load_state_dict({k: v for k, v in state.items() if k != "counted"})
        if self._sparsifier is not None and "counted" in state:
            self._revision = self._sparsifier.revision
            self._now, self._learning = (self._counted(counts) for counts in state["counted"])

    def _counted(self, counts: Sequence[tuple[int, int]]) -> Account:
        rows = zip(self._full.layers, counts, strict=True)
        layers = [replace(row, weights=whole, nonzeros=kept) for row, (whole, kept) in rows]
        return replace(self._full, layers=tuple(layers))

    def _account(self, sites: Sequence[Site], counted: Callable[[Site], Tensor]) -> Account:
        """Of the network as wide as it is now, with the weights of each site that are counted."""
        named = {site.name or "weight": site for site in sites}
        dense = dict(self._model.named_parameters())
        layers = []
        for row in self._full.layers:
            if row.name in named:
                site = named[row.name]
                weights, nonzeros = site.weight.numel(), int(counted(site).count_nonzero())
            else:
                name = f"{row.name}.weight"
                weights = nonzeros = dense[name if name in dense else row.name].numel()
            layers.append(replace(row, weights=weights, nonzeros=nonzeros))
        return replace(self._full, layers=tuple(layers))
