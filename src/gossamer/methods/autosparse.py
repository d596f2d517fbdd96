"""AutoSparse: learned soft thresholds with gradient annealing.

A. Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023,
arXiv 2304.06941.

    W~ = sign(W) * relu(|W| - g(s)),   g = sigmoid
    dL/dW = G h',   dL/ds = -g'(s) sum sign(W) G h',   h' = 1 where |W| >= g(s), else alpha_i
    alpha_i = alpha d(i, T),   0 from `alpha_reset` on
        d(i, T) = max((1 + cos(pi i / T)) / 2,  1 - g(-6 + 12 i / T))      "sigmoid_cosine"

Backward sparsity B: of each layer, the share B of the weights with the lowest |W| - g(s) gets no
gradient. Auto-tuned alpha: while training is young, alpha *= 1.05 after every period whose mean
loss is more than 1 % above that of dense training, else alpha *= 0.995; then it decays.

Symbols: G = dL/dW~; alpha_0 -> `alpha`, the decay d -> `alpha_schedule`, T -> `alpha_end`, B ->
`backward_sparsity`, dense losses D_e -> `dense_losses`, s_init -> `s_init`. i counts steps here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.control import Targeted
from gossamer.forecast import warn_if_futile
from gossamer.method import Cost, Progress, check_choice, check_range
from gossamer.ops import kth_largest
from gossamer.schedules import DECAYS, anneal
from gossamer.site import Site
from gossamer.sparse_weight import SoftThreshold

__all__ = ["AutoSparse", "tuning_factor"]


def tuning_factor(loss: float, dense_loss: float) -> float:
    """What a period of this mean loss multiplies alpha by; the constants are PQuant's."""
    return 1.05 if loss > 1.01 * dense_loss else 0.995


@dataclass(frozen=True, kw_only=True)
class AutoSparse(Targeted):
    """Learned soft thresholds; weights below them learn on, at a falling share of their gradient.

    Unless it is asked for, density falls with the weight decay of the thresholds, and rises with
    `alpha` and with the length of its decay.

    Args:
        alpha: Share of the gradient that weights below their threshold get at first, in [0, 1].
            0 is STR; more means less sparsity and higher accuracy.
        alpha_schedule: How it falls: "sigmoid_cosine", "cosine", "sigmoid", "linear" or "none".
        alpha_end: Fraction of training at which the decay is over.
        alpha_reset: Fraction from which alpha is exactly 0, and the weight gradient as sparse as
            the weights; 1 leaves it to the decay.
        s_init: Raw threshold at the start, at most 0.
        granularity: "layer" (one threshold each) or "row" (one per output channel, which collapses
            more easily).
        backward_sparsity: Share of each layer's weights that gets no gradient at all while alpha
            is above 0, in [0, 1).
        backward_interval: Steps between choices of that share.
        dense_losses: Mean training losses of a dense run over equal periods that fill the first
            `tune_end` of training: alpha is then tuned after each, which needs
            `Sparsifier.observe`. Empty: no tuning.
        tune_end: Fraction of training for tuning; the decay of alpha begins there.
    """

    alpha: float = 0.5
    alpha_schedule: str = "sigmoid_cosine"
    alpha_end: float = 1.0
    alpha_reset: float = 0.9
    s_init: float = -5.0
    granularity: str = "layer"
    backward_sparsity: float = 0.0
    backward_interval: int = 10
    dense_losses: tuple[float, ...] = ()
    tune_end: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", 0, 1)
        check_choice(self, "alpha_schedule", tuple(DECAYS))
        check_range(self, "alpha_end", 0, 1, open_low=True)
        check_range(self, "alpha_reset", 0, 1)
        check_range(self, "s_init", -math.inf, 0)
        check_choice(self, "granularity", ("layer", "row"))
        check_range(self, "backward_interval", 1, math.inf, whole=True)
        check_range(self, "tune_end", 0, 1, open_low=True)
        if not 0 <= self.backward_sparsity < 1:
            raise ValueError(
                f"AutoSparse: backward_sparsity={self.backward_sparsity} leaves no weight a "
                "gradient: give a share in [0, 1)"
            )
        if self.dense_losses and self.alpha_reset <= self.tune_end:
            raise ValueError(
                f"AutoSparse: alpha is reset at {self.alpha_reset}, before tuning ends: give "
                f"alpha_reset above tune_end={self.tune_end}"
            )
        if any(not math.isfinite(loss) for loss in self.dense_losses):
            raise ValueError(
                f"AutoSparse: dense_losses={self.dense_losses} are not all finite: give the mean "
                "training losses of a dense run that trains"
            )

    # ------------------------------------------------------------------ what the Sparsifier asks

    @property
    def cost(self) -> Cost:
        """All three products are sparse, but see `wants_dense_grad`."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    def wants_dense_grad(self, progress: Progress) -> bool:
        """While alpha is above 0, all weights learn, unless there is backward sparsity."""
        before = Progress(progress.step - 1, progress.total_steps)
        return self.backward_sparsity == 0 and self.alpha * self.decay_at(before) > 0

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> SoftThreshold:
        """Thresholds at `sigmoid(s_init)`, and what tuning remembers."""
        backward_sparse = self.backward_sparsity > 0
        sparse = SoftThreshold(
            weight, self.granularity, self.s_init, backward_sparse=backward_sparse
        )
        if self.dense_losses:
            # Float32 whatever the weights are: a sum over an epoch has no room in 16 bits.
            zero = torch.zeros((), device=weight.device)
            sparse.register_buffer("alpha_start", torch.full_like(zero, self.alpha))
            sparse.register_buffer("loss_sum", zero)
            sparse.register_buffer("loss_count", zero.clone())
        return sparse

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when tuning has more periods than steps."""
        steps = self._tuning_steps(total_steps)
        if len(set(steps)) < len(steps):
            raise ValueError(
                f"AutoSparse: {len(steps)} dense_losses, but tuning has only {steps[-1]} steps "
                f"(tune_end={self.tune_end} of {total_steps}): give fewer, of longer periods"
            )

    def remedy(self, progress: Progress) -> str:
        """The decay of the thresholds and alpha's, or the target."""
        if self.target_density is not None:
            return super().remedy(progress)
        alpha = self.alpha * self.decay_at(progress)
        return (
            f"Weight decay draws thresholds up, from AutoSparse(s_init={self.s_init:g}), and alpha "
            f"is {alpha:.3g} now: give them less (Sparsifier.parameter_groups, threshold_decay), a "
            "lower s_init, a higher alpha, a later alpha_end, or a target_density"
        )

    def advance(
        self,
        sites: Sequence[Site],
        progress: Progress,
        optimizer: torch.optim.Optimizer | None,
    ) -> bool:
        """Tune and anneal alpha; choose anew which weights get no gradient."""
        step, total = progress
        soft = [_soft(site) for site in sites]
        if self.target_density is None:
            warn_if_futile("AutoSparse", sites, progress, optimizer)
        tuned = self._tune(soft, progress)
        decay = self.decay_at(progress)
        changed = step == 0 or decay != self.decay_at(Progress(step - 1, total))
        if tuned or changed:
            for sparse in soft:
                if self.dense_losses:
                    sparse.alpha.copy_(sparse.get_buffer("alpha_start") * decay)
                else:
                    sparse.alpha.fill_(self.alpha * decay)
        if self.backward_sparsity > 0 and (changed or decay > 0):
            self._choose_cut(sites, step, decay)
        return super().advance(sites, progress, optimizer)

    # ------------------------------------------------------------------ alpha

    def decay_at(self, progress: Progress) -> float:
        """d: what alpha is multiplied by after this step, in [0, 1]."""
        start = self.tune_end if self.dense_losses else 0.0
        return anneal(
            self.alpha_schedule,
            max(progress.fraction - start, 0.0),
            1.0,
            end=self.alpha_end,
            reset=self.alpha_reset - start,
        )

    def wants_loss(self, progress: Progress) -> bool:
        """While alpha is tuned."""
        steps = self._tuning_steps(progress.total_steps)
        return bool(steps) and progress.step <= steps[-1]

    def observe(self, sites: Sequence[Site], loss: Tensor) -> None:
        """Add a loss to the period's mean."""
        first = _soft(sites[0])
        first.get_buffer("loss_sum").add_(loss)
        first.get_buffer("loss_count").add_(1)

    def _tuning_steps(self, total_steps: int) -> list[int]:
        """Last step of every tuning period."""
        periods = len(self.dense_losses)
        steps = self.tune_end * total_steps
        return [round(steps * (period + 1) / periods) for period in range(periods)]

    def _tune(self, soft: Sequence[SoftThreshold], progress: Progress) -> bool:
        """Adapt alpha to the loss of the period that ends at this step, if one does."""
        steps = self._tuning_steps(progress.total_steps)
        ends = progress.step in steps
        if not ends and (progress.step != 1 or not steps):
            return False
        total, count = (soft[0].get_buffer(name) for name in ("loss_sum", "loss_count"))
        if not count:
            raise ValueError(
                f"AutoSparse: no loss was told up to step {progress.step}, and dense_losses asks "
                "for tuning: call sparsifier.observe(loss) before every sparsifier.step(optimizer)"
            )
        if not ends:
            return False
        dense_loss = self.dense_losses[steps.index(progress.step)]
        factor = tuning_factor(float(total / count), dense_loss)
        for sparse in soft:
            sparse.get_buffer("alpha_start").mul_(factor).clamp_(max=1)
        total.zero_()
        count.zero_()
        return True

    # ------------------------------------------------------------------ backward sparsity

    def _choose_cut(self, sites: Sequence[Site], step: int, decay: float) -> None:
        """The (1 - B) n-th largest distance of each layer; no cut once alpha is 0."""
        for site in sites:
            sparse = _soft(site)
            if decay == 0:
                sparse.cut.fill_(-math.inf)
            elif step % self.backward_interval == 0:
                distance = site.weight.detach().abs() - sparse.threshold
                count = max(1, round((1 - self.backward_sparsity) * distance.numel()))
                sparse.cut.fill_(kth_largest([distance], count))


def _soft(site: Site) -> SoftThreshold:
    assert isinstance(site.sparse, SoftThreshold)
    return site.sparse
