"""SR-STE: N:M sparsity from scratch, a straight-through gradient with pruned weights drawn to zero.

A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021, arXiv 2102.04010.

    forward:  W~ = E * W,   E = 1 at the N largest |w| of every M consecutive inputs
    step:     W <- W - gamma (g(W~) + lambda_W (1 - E) * W)

g(W~) = dL/dW~ reaches every weight, also pruned ones, so that they may come back; the second term
keeps them from doing so at random. It is the gradient of lambda_W / 2 ||(1 - E) * W||^2 with E held
fixed, and is added to the loss as that: then it counts once per step, whatever the accumulation,
the number of processes, the loss scale, and the uses of a weight.

Symbols: N -> `n`, M -> `m`, lambda_W -> `lam`, E -> `NOfM.mask`, gamma -> the learning rate. Plain
STE is `lam=0`; the annealed form (AST) is `anneal_until`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.method import Cost, Method, Progress, check_choice, check_range
from gossamer.schedules import linear
from gossamer.site import Place, Site
from gossamer.sparse_weight import NOfM

__all__ = ["SRSTE", "decay_pruned", "pruned_penalty"]

_SGD_LAM = 2e-4
# They divide a gradient by its own running size, and with it what lam added.
_ADAPTIVE = ("adam", "rmsprop", "adagrad", "lamb", "adafactor")


@dataclass(frozen=True, kw_only=True)
class SRSTE(Method):
    """N of every M consecutive inputs, chosen anew after each step.

    Args:
        n: Weights kept ...
        m: ... of every so many consecutive inputs, at one output and one kernel position.
        lam: How strongly pruned weights are drawn to zero; 0 is plain STE. The paper's 2e-4 is a
            value for SGD. A negative value pushes them back up (an ablation of the paper).
        mode: "gradient": as a penalty on the loss, through optimizer and clipping, as in the paper.
            "decoupled": by w <- w (1 - lr lam) after each step, as AdamW decays weights; useful
            values are 10 to 100 times larger.
        refresh_interval: Steps between new masks; 1 as in the paper. More steps than the run has
            keep the magnitude mask of the initial weights.
        dense_until: Fraction of training before which nothing is pruned; 0 as in the paper.
        anneal_until: `lam` rises linearly from 0, at `dense_until`, to its value at this fraction
            of training; 0: it is constant.
        remainder: Layers whose inputs per row are no multiple of `m`: "exclude" leaves them dense
            (`Sparsifier.left_dense` lists them), "pad" keeps at most `n` of the shorter last group,
            "dense" keeps all of it. Depthwise convolutions always stay dense.
    """

    n: int = 2
    m: int = 4
    lam: float = _SGD_LAM
    mode: str = "gradient"
    refresh_interval: int = 1
    dense_until: float = 0.0
    anneal_until: float = 0.0
    remainder: str = "exclude"

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 256:
            raise ValueError(
                f"SRSTE: n={self.n}, m={self.m} is no pattern: give 1 <= n < m <= 256, such as "
                "2 of 4 or 1 of 8"
            )
        check_choice(self, "mode", ("gradient", "decoupled"))
        check_choice(self, "remainder", ("exclude", "pad", "dense"))
        if not math.isfinite(self.lam):
            raise ValueError(f"SRSTE: lam={self.lam!r}: give a finite number, 0 for plain STE")
        check_range(self, "refresh_interval", 1, math.inf, whole=True)
        check_range(self, "dense_until", 0, 1)
        check_range(self, "anneal_until", 0, 1)
        if 0 < self.anneal_until <= self.dense_until:
            raise ValueError(
                f"SRSTE: anneal_until={self.anneal_until} is not after dense_until="
                f"{self.dense_until}, when the first weights are pruned: give a later one, or 0"
            )

    # ------------------------------------------------------------------ what the Sparsifier asks

    @property
    def cost(self) -> Cost:
        """Pruned weights have a gradient too: that product stays dense."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=False)

    def unfit(self, place: Place) -> str | None:
        """Why a layer stays dense: depthwise, or inputs that are no multiple of `m`."""
        module, inputs = place.module, place.weight.shape[1]
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups > 1 == inputs:
            return "is a depthwise convolution, with a single input per output"
        if self.remainder == "exclude" and inputs % self.m:
            noun = "input" if inputs == 1 else "inputs"
            return (
                f"has {inputs} {noun} per row; {self.n}:{self.m} needs a multiple of {self.m} "
                '(or remainder="pad")'
            )
        return None

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights that the pattern keeps of each layer."""
        counts = []
        for shape in shapes:
            groups, tail = divmod(shape[1], self.m)
            kept = groups * self.n + (tail if self.remainder == "dense" else min(self.n, tail))
            counts.append(shape.numel() // shape[1] * kept)
        return counts

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> NOfM:
        """The pattern; `advance` takes the first mask."""
        return NOfM(weight, self.n, self.m, dense_tail=self.remainder == "dense")

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """lambda_W / 2 ||(1 - E) * W||^2, over all layers; None in decoupled mode."""
        if self.mode == "decoupled" or self.lam == 0:
            return None
        terms = []
        for site, sparse in _sparse(sites):
            terms.append(pruned_penalty(site.weight, sparse.mask, sparse.lam))
        return torch.stack(terms).sum()

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool:
        """Decay what this step's mask pruned (decoupled); then mask and `lam` of the next step."""
        if optimizer is not None:
            if progress.step == 1:
                self._check_lam(optimizer)
            if self.mode == "decoupled" and self.lam:
                self._decay(sites, progress._replace(step=progress.step - 1), optimizer)
        start = self._dense_steps(progress.total_steps)
        due = progress.step >= start and (progress.step - start) % self.refresh_interval == 0
        lam = self.lam_at(progress)
        for site, sparse in _sparse(sites):
            if progress.step == 0 or self.anneal_until:
                sparse.lam.fill_(lam)
            if due:
                sparse.refresh(site.weight)
            elif progress.step == 0:
                sparse.open()
        return due and progress._replace(step=progress.step - start).look_due(self.refresh_interval)

    # ------------------------------------------------------------------ schedule

    def lam_at(self, progress: Progress) -> float:
        """lambda_W for the step after this one."""
        if self.anneal_until == 0:
            return self.lam
        start = self._dense_steps(progress.total_steps)
        end = max(start + 1, round(self.anneal_until * progress.total_steps))
        return linear((progress.step - start) / (end - start), 0.0, self.lam)

    def _dense_steps(self, total_steps: int) -> int:
        return round(self.dense_until * total_steps)

    # ------------------------------------------------------------------ the optimizer

    def _decay(
        self, sites: Sequence[Site], progress: Progress, optimizer: torch.optim.Optimizer
    ) -> None:
        rates = {
            id(parameter): float(group["lr"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        lam = self.lam_at(progress)
        for site, sparse in _sparse(sites):
            decay_pruned(site.weight, sparse.mask, rates[id(site.weight)] * lam)

    def _check_lam(self, optimizer: torch.optim.Optimizer) -> None:
        name = type(optimizer).__name__
        adaptive = any(part in name.lower() for part in _ADAPTIVE)
        if adaptive and self.mode == "gradient" and self.lam == _SGD_LAM:
            warnings.warn(
                f"SRSTE: lam={self.lam} was tuned for SGD, and {name} rescales it weight by "
                'weight. Tune it: in gradient mode start at 1e-2, with mode="decoupled" at 1, and '
                "choose the smallest value with which masks come to rest by the end of training "
                "(gossamer.measure.TopologyTracker)",
                stacklevel=2,
            )


def pruned_penalty(weight: Tensor, mask: Tensor, lam: Tensor) -> Tensor:
    """`lam / 2 ||(1 - mask) * weight||^2`, 0-d; its gradient is `lam (1 - mask) * weight`.

    Args:
        weight: `(out, in, *kernel)`.
        mask: Of the same shape, 0 or 1; held fixed.
        lam: 0-d.
    """
    penalty: Tensor = _PrunedPenalty.apply(weight, mask, lam)  # type: ignore[no-untyped-call]
    return penalty


class _PrunedPenalty(torch.autograd.Function):
    """Two passes over the weight where autograd would make six."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, lam: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask, lam)
        pruned = _pruned(weight, mask)
        return pruned.square_().sum() * (lam / 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, mask, lam = ctx.saved_tensors
        return _pruned(weight, mask).mul_(lam * gradient), None, None


@torch.no_grad()
def decay_pruned(weight: Tensor, mask: Tensor, rate: float) -> None:
    """`weight *= 1 - rate (1 - mask)`, in place."""
    weight.sub_(_pruned(weight, mask), alpha=rate)


def _pruned(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.addcmul(weight, weight, mask, value=-1)


def _sparse(sites: Sequence[Site]) -> list[tuple[Site, NOfM]]:
    pairs = []
    for site in sites:
        assert isinstance(site.sparse, NOfM)
        pairs.append((site, site.sparse))
    return pairs
