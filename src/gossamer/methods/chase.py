"""Chase: dynamic sparse training that becomes channel sparsity while it trains.

L. Yin et al., "Dynamic Sparsity Is Channel-Level Sparsity Learner", NeurIPS 2023, arXiv 2305.19454.

    phase A, every dT steps until T_A:   keep the K largest |w| over all layers,
                                         then grow to b(t) N by the largest |dL/dw|
        b(t) = d + margin (1 + cos(pi t / T_A)) / 2
    phase B, every dT steps after T_A:   drop a fraction by |w|, grow back to K by |dL/dw|
    channels, until T_c:                 remove the live channels of lowest UMM until
        live = round((1 - S(t)) C),  S(t) = S_c (1 - (1 - t / T_c)^3)
        UMM(c) = (1 / n_c) sum_i |w_i|,  no layer below m_l = int(C_l (1 - S_c) beta)

Symbols: d -> `density`, N -> weights of the original network, K = round(d N), dT ->
`update_interval`, margin -> `memory_margin`, T_A -> `explore_end`, T_c -> `channel_end`, S_c ->
`channel_sparsity`, C -> channels of all eligible layers, beta -> `min_channel_factor`, n_c -> the
original fan-in of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.exploration import SCOPES, Count, prune_to, random_scores, select, sizes
from gossamer.method import (
    Cost,
    Method,
    Progress,
    SupportChange,
    allocate_density,
    check_choice,
    check_range,
)
from gossamer.ops import channel_magnitude, random_mask
from gossamer.schedules import cosine, cubic
from gossamer.site import ChannelPool, Site
from gossamer.sparse_weight import Masked

__all__ = ["Chase", "select_channels"]

CHANNEL_SCORES = ("umm", "masked_mean", "density")


@dataclass(frozen=True, kw_only=True)
class Chase(Method):
    """Global prune-and-grow under a soft memory bound, with gradual channel removal.

    Args:
        density: Final kept fraction of all sparse weights of the original network, in (0, 1].
        distribution: Layer densities at the start: "erk", "er" or "uniform".
        update_interval: Steps between support updates; None: 1000, or a twentieth of the run and
            at most 100 when the run is shorter than 20,000 steps.
        memory_margin: Extra density at the start, falling to 0 by a cosine over phase A.
        explore_end: End of phase A, as a fraction of training.
        drop_fraction: Phase B drop fraction at the start of training; a cosine over the run ...
        drop_fraction_end: ... takes it to this.
        t_end: Fraction of training after which the support stays as it is.
        grow: "gradient" (largest gradient) or "random".
        scope: "global" ranks all layers together; "layer" gives each layer its share by
            `distribution`, recomputed for the widths after each removal.
        channel_sparsity: Share of the eligible channels to remove, in [0, 1); 0 removes none.
        channel_interval: Steps between removals, a multiple of `update_interval`; None: about 10
            removals.
        channel_start: Start of the removal schedule, as a fraction of training.
        channel_end: Its end, when exactly `channel_sparsity` is reached; None: `explore_end`.
        channel_score: "umm", "masked_mean" (mean over active weights) or "density".
        min_channel_factor: No layer falls below this share of its uniform final width: 1 removes
            evenly, 0 wherever scores are lowest.
        min_channels: No layer falls below this many channels (or its width, if narrower).
        channel_multiple: Widths are rounded to a multiple of this (8 or 16 suit most hardware).
    """

    density: float = 0.1
    distribution: str = "erk"
    update_interval: int | None = None
    memory_margin: float = 0.05
    explore_end: float = 0.8
    drop_fraction: float = 0.5
    drop_fraction_end: float = 0.005
    t_end: float = 1.0
    grow: str = "gradient"
    scope: str = "global"
    channel_sparsity: float = 0.4
    channel_interval: int | None = None
    channel_start: float = 0.0
    channel_end: float | None = None
    channel_score: str = "umm"
    min_channel_factor: float = 0.2
    min_channels: int = 8
    channel_multiple: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_choice(self, "grow", ("gradient", "random"))
        check_choice(self, "scope", SCOPES)
        check_choice(self, "channel_score", CHANNEL_SCORES)
        for name in ("memory_margin", "drop_fraction", "drop_fraction_end", "t_end"):
            check_range(self, name, 0, 1)
        check_range(self, "explore_end", 0, 1, open_low=True)
        check_range(self, "min_channel_factor", 0, 1)
        if self.t_end < self.explore_end:
            raise ValueError(
                f"Chase: t_end={self.t_end} comes before explore_end="
                f"{self.explore_end}, and would freeze more weights than the density allows: give "
                "an earlier explore_end too"
            )
        for name in ("update_interval", "channel_interval"):
            if getattr(self, name) is not None:
                check_range(self, name, 1, math.inf, whole=True)
        check_range(self, "min_channels", 1, math.inf, whole=True)
        check_range(self, "channel_multiple", 1, math.inf, whole=True)
        if not 0 <= self.channel_sparsity < 1:
            raise ValueError(
                f"Chase: channel_sparsity={self.channel_sparsity} leaves no channels or adds some: "
                "give a share of channels to remove in [0, 1)"
            )
        if not 0 <= self.channel_start < self._channel_end <= self.explore_end:
            raise ValueError(
                f"Chase: channels are removed from {self.channel_start} to {self._channel_end} of "
                f"training: give channel_start < channel_end <= explore_end={self.explore_end}, so "
                "that lost weights can grow elsewhere"
            )

    # ------------------------------------------------------------------ what the Sparsifier asks

    @property
    def cost(self) -> Cost:
        """All three products are sparse; an update adds one dense weight gradient."""
        return Cost(sparse_forward=True, sparse_grad_input=True, sparse_grad_weight=True)

    @property
    def needs_graph(self) -> bool:
        """Channels are removed unless `channel_sparsity` is 0."""
        return self.channel_sparsity > 0

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer, summing to `round(density * all weights)`."""
        return allocate_density(self.distribution, shapes, self.density)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """A uniformly random mask with exactly `count` ones."""
        return Masked(weight, random_mask(weight.shape, count, generator))

    def validate(self, widths: Mapping[str, int], total_steps: int) -> None:
        """Raise ValueError when the schedule has no room or the channels cannot be removed."""
        interval = self._interval(total_steps)
        if interval > self._explore_steps(total_steps):
            raise ValueError(
                f"Chase: update_interval={interval} is longer than the exploration phase of "
                f"{self._explore_steps(total_steps)} steps ({self.explore_end} of {total_steps}): "
                "train longer or give a smaller interval"
            )
        if self.channel_interval is not None and self.channel_interval % interval:
            raise ValueError(
                f"Chase: channel_interval={self.channel_interval} is no multiple of "
                f"update_interval={interval}: removals fall midway between updates"
            )
        if not self.needs_graph:
            return
        start, end = self._channel_window(total_steps)
        if self.channel_interval is not None and self.channel_interval > end - start:
            raise ValueError(
                f"Chase: channel_interval={self.channel_interval} is longer than the "
                f"{end - start} steps in which channels are removed, and would take all of them at "
                "once at the end: give a smaller one"
            )
        total = sum(widths.values())
        target = round((1 - self.channel_sparsity) * total)
        floors = sum(self._floor(width) for width in widths.values())
        if floors > target:
            raise ValueError(
                f"Chase: channel_sparsity={self.channel_sparsity} would leave {target} of {total} "
                f"channels, but the floors of {len(widths)} layers ({', '.join(list(widths)[:4])}"
                f"{', ...' if len(widths) > 4 else ''}) add up to {floors}: the highest reachable "
                f"is {1 - floors / total:.3f}; lower channel_sparsity, min_channels="
                f"{self.min_channels} or channel_multiple={self.channel_multiple}"
            )

    def updates_at(self, progress: Progress) -> bool:
        """Every interval, and at the end of phase A, which brings the count to exactly K."""
        step, total = progress
        if step == self._explore_steps(total):
            return True
        return step % self._interval(total) == 0 and step <= self.t_end * total

    def wants_dense_grad(self, progress: Progress) -> bool:
        """Growth ranks the gradient of the update's own step."""
        return self.grow == "gradient" and self.updates_at(progress)

    def update(
        self, sites: Sequence[Site], progress: Progress, generator: torch.Generator
    ) -> list[SupportChange]:
        """Prune to the budget and grow to the ceiling (phase A), or drop and grow (phase B)."""
        original = sum(site.original_numel for site in sites)
        budget = round(self.density * original)
        supports = [site.support for site in sites]
        live = [site.masked.live for site in sites]
        active = sum(sizes(supports))
        if progress.step <= self._explore_steps(progress.total_steps):
            keep, goal = min(active, budget), round(self.ceiling(progress) * original)
        else:
            dropped = math.ceil(self.drop_rate(progress) * min(active, budget))
            keep, goal = min(active, budget) - dropped, budget
        capacity = sum(sizes(live))

        weights = [site.weight for site in sites]
        none_held = [0] * len(sites)
        kept = prune_to(weights, supports, self._count(sites, keep, none_held, supports))
        if self.grow == "gradient":
            growth = [site.gradient_magnitude for site in sites]
        else:
            growth = random_scores(weights, generator)
        candidates = [allowed & ~held for allowed, held in zip(live, kept, strict=True)]
        missing = max(0, min(goal, capacity) - keep)
        grown = select(growth, self._count(sites, missing, sizes(kept), candidates), candidates)
        return [SupportChange(*change) for change in zip(kept, grown, strict=True)]

    def removals(self, pools: Sequence[ChannelPool], progress: Progress) -> list[Tensor] | None:
        """Channels of the lowest score, so many that the schedule's live count is left."""
        if not self.needs_graph or progress.step not in self.removal_steps(progress.total_steps):
            return None
        total = sum(pool.original_channels for pool in pools)
        return select_channels(
            [self.score(pool) for pool in pools],
            [pool.live for pool in pools],
            floors=[self._floor(pool.original_channels) for pool in pools],
            live_target=round((1 - self.sparsity_at(progress)) * total),
            multiple=self.channel_multiple,
        )

    # ------------------------------------------------------------------ schedules

    def ceiling(self, progress: Progress) -> float:
        """b(t): density up to which phase A grows."""
        fraction = progress.step / self._explore_steps(progress.total_steps)
        return min(1.0, cosine(fraction, self.density + self.memory_margin, self.density))

    def drop_rate(self, progress: Progress) -> float:
        """Fraction of the support that a phase B update drops."""
        return cosine(progress.fraction, self.drop_fraction, self.drop_fraction_end)

    def sparsity_at(self, progress: Progress) -> float:
        """S(t): share of the eligible channels that is to be gone after this step."""
        start, end = self._channel_window(progress.total_steps)
        return cubic((progress.step - start) / (end - start), 0.0, self.channel_sparsity)

    def removal_steps(self, total_steps: int) -> list[int]:
        """Steps of the removal events: half an interval off the updates, and the window's end."""
        interval = self._interval(total_steps)
        start, end = self._channel_window(total_steps)
        spacing = self.channel_interval or interval * max(1, round((end - start) / interval / 10))
        grid = range(spacing - interval // 2, end, spacing)
        return [*(step for step in grid if step > start), end]

    @property
    def _channel_end(self) -> float:
        return self.explore_end if self.channel_end is None else self.channel_end

    def _channel_window(self, total_steps: int) -> tuple[int, int]:
        start = round(self.channel_start * total_steps)
        return start, max(start + 1, round(self._channel_end * total_steps))

    def _explore_steps(self, total_steps: int) -> int:
        return max(1, round(self.explore_end * total_steps))

    def _interval(self, total_steps: int) -> int:
        if self.update_interval is not None:
            return self.update_interval
        return 1000 if total_steps >= 20_000 else max(1, min(100, total_steps // 20))

    def _floor(self, channels: int) -> int:
        """Channels that a layer of this width keeps at least, in whole multiples."""
        share = (1 - self.channel_sparsity) * self.min_channel_factor
        floor = int(channels * share + 1e-9)  # 20 * (1 - 0.8) is a hair below 4
        floor = max(floor, self.min_channels)
        return min(channels, math.ceil(floor / self.channel_multiple) * self.channel_multiple)

    # ------------------------------------------------------------------ ranking

    def score(self, pool: ChannelPool) -> Tensor:
        """`(pool.group.channels,)` float64 on the CPU: the `channel_score` of each channel."""
        weight = pool.producer.weight
        fan_in = pool.producer.original_fan_in
        if self.channel_score == "umm":
            score = channel_magnitude(weight, fan_in)
        else:
            active = pool.producer.support.flatten(1).sum(1, dtype=torch.float64)
            if self.channel_score == "density":
                score = active / fan_in
            else:
                score = channel_magnitude(weight, 1) / active.clamp(min=1)
        return score.cpu()[pool.group.producers[0].index[:, 0]]

    def _count(
        self, sites: Sequence[Site], total: int, held: Sequence[int], among: Sequence[Tensor]
    ) -> Count:
        """How many of the candidates `among` to take, in the method's scope.

        `held`: weights each layer has already; they count towards its share under "layer".
        """
        if self.scope == "global":
            return total
        shares = allocate(
            self.distribution,
            [site.masked.live_shape for site in sites],
            sum(held) + total,
            at_least=held,
            at_most=[have + free for have, free in zip(held, sizes(among), strict=True)],
        )
        return [share - have for share, have in zip(shares, held, strict=True)]


def select_channels(
    scores: Sequence[Tensor],
    live: Sequence[Tensor],
    *,
    floors: Sequence[int],
    live_target: int,
    multiple: int = 1,
) -> list[Tensor]:
    """Channels to remove from each pool so that `live_target` are left over all pools.

    The live channel of lowest score goes first, ties by (pool, channel); a pool on its floor loses
    no more. With `multiple` above 1 every width that shrinks becomes a multiple, and the total
    comes as close to the target as that allows.

    Args:
        scores: One `(channels,)` tensor per pool.
        live: One `(channels,)` bool tensor per pool; only live channels count and may go.
        floors: Channels each pool keeps at least.
        live_target: Channels to leave over all pools.
        multiple: What widths are rounded to.

    Returns:
        Sorted int64 indices per pool.
    """
    ranked = [
        sorted((value, channel) for channel, value in enumerate(score.tolist()) if alive[channel])
        for score, alive in zip(scores, (mask.tolist() for mask in live), strict=True)
    ]
    current = [len(channels) for channels in ranked]
    widths = list(current)
    surplus = sum(widths) - live_target
    for _, pool in sorted((value, pool) for pool, row in enumerate(ranked) for value, _ in row):
        if surplus <= 0:
            break
        if widths[pool] > floors[pool]:
            widths[pool] -= 1
            surplus -= 1
    if multiple > 1:
        widths = _rounded(widths, current, floors, multiple)
    return [
        torch.tensor(sorted(channel for _, channel in row[: len(row) - width]), dtype=torch.int64)
        for row, width in zip(ranked, widths, strict=True)
    ]


def _rounded(
    widths: Sequence[int], current: Sequence[int], floors: Sequence[int], multiple: int
) -> list[int]:
    """Widths in multiples, none above `current`; their sum is as near as can be to that given."""
    low = [
        width if width == now else max(floor, width - width % multiple)
        for width, now, floor in zip(widths, current, floors, strict=True)
    ]
    rest = sum(widths) - sum(low)
    for pool in sorted(range(len(low)), key=lambda pool: low[pool] - widths[pool]):
        step = min(multiple, current[pool] - low[pool])
        if step and 2 * rest >= step:
            low[pool] += step
            rest -= step
    return low
