"""Top-KAST: the largest weights act, more of them learn; with gradient annealing on the rest.

S. Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, arXiv 2106.03517.
A. Kundu et al., "AutoSparse", 2023, arXiv 2304.06941: alpha, as AutoSparse's fixed-budget variant.

    A = the D n largest |W| of a layer,   B = the (D + M) n largest,   A within B
    W~ = W on A, else 0
    dL/dW = G on A,  alpha_i G on B \\ A,  0 off B
    loss  = task + c (1/2 ||W on A||^2 + 1/2 ||W on B \\ A||^2 / D)

Symbols: G = dL/dW~; D -> `density`, D + M -> `backward_density`, c -> `exploration_penalty`; n ->
weights of the layer; alpha_i -> `alpha` times `alpha_schedule`, 1 for plain Top-KAST.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.method import (
    Cost,
    Method,
    Progress,
    allocate_density,
    check_choice,
    check_range,
)
from gossamer.ops import keep_largest
from gossamer.schedules import DECAYS, anneal
from gossamer.site import Site
from gossamer.sparse_weight import SparseWeight, for_forward

__all__ = ["Nested", "TopKAST", "exploration_penalty", "nested_sets", "nested_weight"]


def nested_sets(weight: Tensor, forward: int, backward: int) -> tuple[Tensor, Tensor]:
    """Bool masks of A and B: the `forward` and the `backward` largest magnitudes, ties by index."""
    magnitude = weight.detach().abs()
    (outer,) = keep_largest([magnitude], backward)
    (inner,) = keep_largest([magnitude], forward, [outer])
    return inner, outer


def nested_weight(weight: Tensor, inner: Tensor, outer: Tensor, alpha: Tensor) -> Tensor:
    """`W` on A, else 0; its gradient reaches A whole, B \\ A times alpha, and nothing else.

    Args:
        weight: `(out, in, *kernel)`.
        inner: A, 0 or 1 in the weight's dtype.
        outer: B, likewise.
        alpha: 0-d, of the weight's dtype; a tensor, so that a new value compiles nothing anew.
    """
    effective: Tensor = _NestedWeight.apply(weight, inner, outer, alpha)  # type: ignore[no-untyped-call]
    return effective


def exploration_penalty(weight: Tensor, inner: Tensor, outer: Tensor, density: float) -> Tensor:
    """`1/2 ||W on A||^2 + 1/2 ||W on B \\ A||^2 / D`, 0-d; arguments as for `nested_weight`."""
    pull = torch.lerp(inner, outer, 1 / density).mul_(weight.detach())
    twice = (pull * weight).sum()
    # The product has the gradient of the penalty and twice its value.
    return twice - twice.detach() / 2


class _NestedWeight(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, inner: Tensor, outer: Tensor, alpha: Tensor) -> Tensor:
        return weight * inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inner, outer, alpha = ctx.saved_tensors
        return torch.lerp(inner, outer, alpha).mul_(grad), None, None, None


class Nested(SparseWeight):
    """Effective weight = latent weight on the forward set; the backward set around it learns.

    Latent weights outside both sets keep their values and may come back.

    Attributes:
        inner: A, `(out, in, *kernel)` 0 or 1, in the weight's dtype and memory format.
        outer: B, likewise; holds A.
        alpha: 0-d; share of the gradient that B \\ A gets.
        density: D of this layer.
    """

    inner: Tensor
    outer: Tensor
    alpha: Tensor

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.density = count / weight.numel()
        for name, mask in zip(("inner", "outer"), nested_sets(weight, count, count), strict=True):
            self.register_buffer(name, torch.empty_like(weight, requires_grad=False).copy_(mask))
        self.register_buffer("alpha", weight.new_zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` on A, zero elsewhere."""
        inner, outer = for_forward(self.inner, weight), for_forward(self.outer, weight)
        return nested_weight(weight, inner, outer, self.alpha)

    def support(self, weight: Tensor) -> Tensor:
        """A; an averaged mask (EMA of buffers) counts from one half up."""
        return self.inner > 0.5

    def learns(self, weight: Tensor) -> Tensor:
        """B while alpha is above 0, else A."""
        return self.outer > 0.5 if bool(self.alpha > 0) else self.support(weight)

    @property
    def keeps_count(self) -> bool:
        """A has as many weights all the time."""
        return True

    def figures(self) -> dict[str, Tensor]:
        """`alpha`."""
        return {"alpha": self.alpha}


@dataclass(frozen=True, kw_only=True)
class TopKAST(Method):
    """Always sparse: forward on the largest weights, gradients on those and the next largest.

    Args:
        density: Kept fraction of all sparse weights, in (0, 1].
        backward_density: Fraction of all sparse weights that gets gradients, from `density` to 1.
        distribution: How both are shared among layers: "uniform" (as in the paper), "erk" or "er".
        refresh_interval: Steps between selections of both sets; None: a thousandth of the run, at
            most 100. Between them weights of B that do not act learn unchecked, and many outgrow
            at once those that do: at few weights long intervals break training.
        exploration_penalty: Coefficient of the L2 penalty, which draws weights that do not act
            more strongly, by 1 / density. It stands in for the optimizer's weight decay.
        alpha: Share of the gradient that the backward set gets outside the forward set, in [0, 1].
        alpha_schedule: How alpha falls: "none" (plain Top-KAST), "sigmoid_cosine", "cosine",
            "sigmoid" or "linear" (gradient annealing).
        alpha_end: Fraction of training at which the decay is over.
        alpha_reset: Fraction from which alpha is exactly 0; 1 leaves it to the decay.
    """

    density: float = 0.2
    backward_density: float = 0.5
    distribution: str = "uniform"
    refresh_interval: int | None = None
    exploration_penalty: float = 1e-4
    alpha: float = 1.0
    alpha_schedule: str = "none"
    alpha_end: float = 1.0
    alpha_reset: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        if self.refresh_interval is not None:
            check_range(self, "refresh_interval", 1, math.inf, whole=True)
        check_range(self, "exploration_penalty", 0, math.inf)
        check_range(self, "alpha", 0, 1)
        check_choice(self, "alpha_schedule", tuple(DECAYS))
        check_range(self, "alpha_end", 0, 1, open_low=True)
        check_range(self, "alpha_reset", 0, 1)
        if not self.density <= self.backward_density <= 1:
            raise ValueError(
                f"TopKAST: backward_density={self.backward_density} must hold what acts forward: "
                f"give a value in [density={self.density}, 1]"
            )

    @property
    def cost(self) -> Cost:
        """Forward and input gradient stay on A, the weight gradient on B."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer in A, summing to `round(density * all weights)`."""
        return allocate_density(self.distribution, shapes, self.density)

    def backward_budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer in B, summing to `round(backward_density * all weights)`."""
        total = round(self.backward_density * sum(shape.numel() for shape in shapes))
        inner = self.budget(shapes)
        return allocate(self.distribution, shapes, max(total, sum(inner)), at_least=inner)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Nested:
        """The `count` largest magnitudes; `advance` chooses the backward set."""
        return Nested(weight, count)

    def alpha_at(self, progress: Progress) -> float:
        """alpha after this step."""
        return anneal(
            self.alpha_schedule,
            progress.fraction,
            self.alpha,
            end=self.alpha_end,
            reset=self.alpha_reset,
        )

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """The exploration penalty over all layers."""
        if self.exploration_penalty == 0:
            return None
        penalties = []
        for site in sites:
            nested = _nested(site)
            penalties.append(
                exploration_penalty(site.weight, nested.inner, nested.outer, nested.density)
            )
        return self.exploration_penalty * torch.stack(penalties).sum()

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool:
        """Anneal alpha; select both sets anew when it is time."""
        step, total = progress
        alpha = self.alpha_at(progress)
        before = self.alpha_at(Progress(step - 1, total))
        if step == 0 or alpha != before:
            for site in sites:
                _nested(site).alpha.fill_(alpha)
        closed = alpha == 0 and before > 0  # from here on B does not learn
        interval = self.refresh_interval or max(1, min(100, total // 1000))
        due = step % interval == 0 and step < total
        if due:
            self._select(sites, optimizer)
        return closed or (due and progress.look_due(interval))

    def _select(self, sites: Sequence[Site], optimizer: torch.optim.Optimizer | None) -> None:
        shapes = [site.original_shape for site in sites]
        counts = zip(sites, self.budget(shapes), self.backward_budget(shapes), strict=True)
        for site, forward, backward in counts:
            nested = _nested(site)
            inner, outer = nested_sets(site.weight, forward, backward)
            nested.inner.copy_(inner)
            nested.outer.copy_(outer)
            # Momentum would move weights that have left B.
            state = {} if optimizer is None else optimizer.state.get(site.weight, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == site.weight.shape:
                    value.mul_(nested.outer)


def _nested(site: Site) -> Nested:
    assert isinstance(site.sparse, Nested)
    return site.sparse
