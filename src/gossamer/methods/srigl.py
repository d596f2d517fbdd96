"""SRigL: dynamic sparse training with constant fan-in and neuron ablation.

M. Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, arXiv 2305.02299.

    every dT steps, in each layer of R neurons (rows), A of them live, with k weights each
    1  K = floor(f(t) A k);  f(t) = (alpha / 2) (1 + cos(pi t / T_end))
    2  kept:     all weights but the K of smallest |w| in the layer
       wanted:   the K places of largest |dL/dw| that are not kept
    3  a live neuron with fewer than max(1, gamma k) weights kept or wanted is ablated for good
    4  k' = floor(B / A'), with the layer's budget of B weights and the A' neurons left
    5  each neuron grows its places of largest |dL/dw| until it has k' weights

Symbols: alpha -> `drop_fraction`, dT -> `update_interval`, T_end -> `t_end`, gamma ->
`gamma_sal`; B is R times a whole fan-in, from `density` and `distribution`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.exploration import drop_smallest, select, sizes, update_steps
from gossamer.method import Cost, Method, Progress, SupportChange, check_choice, check_range
from gossamer.schedules import cosine
from gossamer.sharding import is_sharded, like_local, local, whole
from gossamer.site import Site
from gossamer.sparse_weight import Masked

__all__ = ["SRigL", "largest_per_row", "neurons_to_keep", "rewire"]


def largest_per_row(scores: Tensor, counts: Tensor, among: Tensor) -> Tensor:
    """Bool mask of the `counts[r]` highest scores of each row r; ties go to the lower index.

    Args:
        scores: `(rows, n)`.
        counts: `(rows,)`, none above the row's candidates.
        among: `(rows, n)` bool: the candidates.
    """
    if is_sharded(scores):
        chosen = largest_per_row(local(scores), local(counts), local(among))
        return like_local(chosen, among)
    ranked = scores.masked_fill(~among, -math.inf).sort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(among).scatter_(1, ranked.indices, first)


def neurons_to_keep(
    salient: Tensor, live: Tensor, *, fan_in: int, gamma_sal: float, at_least: int
) -> Tensor:
    """`(rows,)` bool: the live neurons that are not ablated.

    Args:
        salient: `(rows,)` weights of each neuron that are kept or wanted.
        live: `(rows,)` bool: neurons that have weights.
        fan_in: Weights of each live neuron.
        gamma_sal: Share of them that must be salient; one weight must be in any case.
        at_least: Neurons that stay whatever they have: those of most salient weights, ties by
            index.
    """
    stay = live & (salient >= max(1, math.ceil(gamma_sal * fan_in - 1e-9)))
    if int(whole(stay.sum())) >= at_least:
        return stay
    return select([salient], at_least, [live])[0]


def rewire(
    weight: Tensor,
    support: Tensor,
    gradient: Tensor,
    *,
    budget: int,
    drop_fraction: float,
    gamma_sal: float | None,
) -> SupportChange:
    """One update of one layer.

    A weight that is dropped and grown again was never gone: it is among the kept.

    Args:
        weight: `(out, in, *kernel)`.
        support: Its bool mask, with as many weights in every live neuron.
        gradient: Magnitude of the dense gradient, of the weight's shape.
        budget: B, weights of the layer.
        drop_fraction: f(t).
        gamma_sal: gamma; None ablates no neuron.
    """
    shape = weight.shape
    weight, support, wish = (x.detach().flatten(1) for x in (weight, support, gradient))
    live = support.any(1)
    active, neurons = sizes([support, live])
    moved = math.floor(drop_fraction * active + 1e-9)
    (kept,) = drop_smallest([weight], [support], [moved])
    if gamma_sal is not None:
        (wanted,) = select([wish], moved, [live.unsqueeze(1) & ~kept])
        live = neurons_to_keep(
            (kept | wanted).sum(1),
            live,
            fan_in=active // neurons,
            gamma_sal=gamma_sal,
            at_least=max(1, math.ceil(budget / weight.shape[1])),
        )
    kept = kept & live.unsqueeze(1)
    missing = budget // int(whole(live.sum())) - kept.sum(1)
    grown = largest_per_row(wish, missing * live, live.unsqueeze(1) & ~kept)
    return SupportChange((kept | (grown & support)).view(shape), (grown & ~support).view(shape))


@dataclass(frozen=True, kw_only=True)
class SRigL(Method):
    """RigL with as many weights in every neuron of a layer; neurons that earn none are ablated.

    Args:
        density: Kept fraction of all sparse weights, in (0, 1], at most: fan-ins are whole numbers.
        distribution: How the budget is shared among layers: "erk", "er" or "uniform".
        update_interval: Steps between updates; None: 100, or a twentieth of a run shorter than
            2,000 steps.
        drop_fraction: Fraction of a layer's weights that an update drops and grows at the start; a
            cosine takes it to 0 at `t_end`.
        t_end: Fraction of training from which the support stays as it is.
        ablation: Whether neurons may be ablated.
        gamma_sal: A neuron is ablated when fewer than this share of its weights are salient: not
            among those to drop, or wanted by their gradient. The paper has 0.3 for convolutional
            networks and 0.95 for vision transformers.
    """

    density: float = 0.1
    distribution: str = "erk"
    update_interval: int | None = None
    drop_fraction: float = 0.3
    t_end: float = 0.75
    ablation: bool = True
    gamma_sal: float = 0.3

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_range(self, "drop_fraction", 0, 1)
        check_range(self, "t_end", 0, 1, open_low=True)
        check_range(self, "gamma_sal", 0, 1)
        if self.update_interval is not None:
            check_range(self, "update_interval", 1, math.inf, whole=True)

    @property
    def cost(self) -> Cost:
        """All three products are sparse; an update adds one dense weight gradient."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """B of every layer, a whole fan-in for each neuron; `round(density * all)` at most in all.

        Shares are rounded down to whole fan-ins. What that leaves over raises the fan-in of the
        layers that lost most of one, where it pays for all neurons.
        """
        rows = [shape[0] for shape in shapes]
        total = sum(shape.numel() for shape in shapes)
        wanted = round(self.density * total)
        if wanted < sum(rows):
            raise ValueError(
                f"SRigL: density={self.density} leaves {wanted} of {total} weights for {sum(rows)} "
                f"neurons in {len(shapes)} layers, and each needs one: give at least "
                f"{sum(rows) / total:.3g}"
            )
        shares = allocate(self.distribution, shapes, wanted, at_least=rows)
        counts = [share - share % row for share, row in zip(shares, rows, strict=True)]
        lost = [share % row / row for share, row in zip(shares, rows, strict=True)]
        left = wanted - sum(counts)
        for layer in sorted(range(len(rows)), key=lambda layer: -lost[layer]):
            if lost[layer] > 0 and rows[layer] <= left:
                counts[layer] += rows[layer]
                left -= rows[layer]
        return counts

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """A random mask with `count / out` ones in every row, uniform among all such masks."""
        draw = torch.rand(weight.flatten(1).shape, generator=generator)
        fan_in = torch.full((len(weight),), count // len(weight))
        mask = largest_per_row(draw, fan_in, torch.ones_like(draw, dtype=torch.bool))
        return Masked(weight, mask.view(weight.shape))

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when the run is over before the first update."""
        update_steps(self.update_interval, self.t_end, total_steps)

    def updates_at(self, progress: Progress) -> bool:
        """Every interval before `t_end`."""
        step, total = progress
        return step in update_steps(self.update_interval, self.t_end, total)

    def wants_dense_grad(self, progress: Progress) -> bool:
        """Growth ranks the gradient of the update's own step."""
        return self.updates_at(progress)

    def drop_rate(self, progress: Progress) -> float:
        """f(t): share of each layer that an update after this step drops."""
        fraction = progress.step / (self.t_end * progress.total_steps)
        return cosine(fraction, self.drop_fraction, 0.0)

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Rewire every layer; neurons of the last one, the outputs, are never ablated."""
        budget = self.budget([site.original_shape for site in sites])
        return [
            rewire(
                site.weight,
                site.support,
                site.gradient_magnitude,
                budget=count,
                drop_fraction=self.drop_rate(progress),
                gamma_sal=self.gamma_sal if self.ablation and site is not sites[-1] else None,
            )
            for site, count in zip(sites, budget, strict=True)
        ]
