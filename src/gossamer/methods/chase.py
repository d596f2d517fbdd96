"""Chase: dynamic sparse training that becomes channel sparsity while it trains.

L. Yin et al., "Dynamic Sparsity Is Channel-Level Sparsity Learner", NeurIPS 2023, arXiv 2305.19454.

    phase A, every dT steps until T_A:   keep the K largest |w| over all layers,
                                         then grow to b(t) N by the largest |dL/dw|
        b(t) = d + margin (1 + cos(pi t / T_A)) / 2
    phase B, every dT steps after T_A:   drop a fraction by |w|, grow back to K by |dL/dw|
    channels, until T_c:                 remove the live channels of lowest UMM until
        live = round((1 - S(t)) C),  S(t) = S_c (1 - (1 - t / T_c)^3)
        UMM(c) = (1 / n_c) sum_i |w_i|,  no layer below m_l = int(C_l (1 - S_c) beta)

A channel of a residual stream has many producers: i runs over the weights of all of them.

With a budget (MACs, bytes, milliseconds) instead of S_c, the lowest go, in blocks that hardware
likes, until
    price(widths) <= B(t) = B + (P - B) (1 - t / T_c)^3,  P the price of the dense network

Symbols: d -> `density`, N -> weights of the original network, K = round(d N), dT ->
`update_interval`, margin -> `memory_margin`, T_A -> `explore_end`, T_c -> `channel_end`, S_c ->
`channel_sparsity`, C -> channels of all eligible layers, beta -> `min_channel_factor`, n_c -> the
original fan-in of a channel, in all its producers together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.allocation import DISTRIBUTIONS, allocate
from gossamer.channels import ChannelGroup
from gossamer.exploration import SCOPES, Count, prune_to, random_scores, select, sizes
from gossamer.method import (
    Cost,
    Method,
    Price,
    Progress,
    SupportChange,
    allocate_density,
    check_choice,
    check_range,
)
from gossamer.ops import channel_magnitude, random_mask, spread
from gossamer.removal import select_blocks, select_channels
from gossamer.schedules import cosine, cubic
from gossamer.site import ChannelPool, Site, in_places
from gossamer.sparse_weight import Masked
from gossamer.widths import block, steps

__all__ = ["Chase"]

CHANNEL_SCORES = ("umm", "masked_mean", "density")
PRICES = ("macs", "bytes", "latency")

# Measured again, a latency differs by 2 % or more. So the last removal aims within 5 % below a
# budget, and those before it stay above: what a wrong measurement removes does not come back.
_LATENCY_AIM = {True: 0.975, False: 1.05}


@dataclass(frozen=True, kw_only=True)
class Chase(Method):
    """Global prune-and-grow under a soft memory bound, with gradual channel removal.

    Args:
        density: Final kept fraction of all sparse weights of the original network, in (0, 1].
        distribution: Layer densities at the start: "erk", "er" or "uniform".
        update_interval: Steps between support updates; None: 1000, or a twentieth of the run and
            at most 100 when the run is shorter than 20,000 steps.
        memory_margin: Extra density at the start, falling to 0 by a cosine over phase A; an update
            drops all that lies above `density`. None: 0.05, or twice the density below 0.025.
        explore_end: End of phase A, as a fraction of training.
        drop_fraction: Phase B drop fraction at the start of training; a cosine over the run ...
        drop_fraction_end: ... takes it to this.
        t_end: Fraction of training after which the support stays as it is.
        grow: "gradient" (largest gradient) or "random".
        scope: "global" ranks all layers together; "layer" gives each layer its share by
            `distribution`, recomputed for the widths after each removal.
        channel_sparsity: Share of the eligible channels to remove, in [0, 1); 0 removes none. None:
            0.4, or as many as the budgets ask for.
        max_macs: Budget: MACs of one example that the slim network executes.
        max_bytes: Budget: bytes of its safetensors file.
        max_latency_ms: Budget: milliseconds that it takes, measured on the machine at hand.
        channel_interval: Steps between removals, a multiple of `update_interval`; None: about 10
            removals.
        channel_start: Start of the removal schedule, as a fraction of training.
        channel_end: Its end, when exactly `channel_sparsity` is reached; None: `explore_end`.
        channel_score: "umm", "masked_mean" (mean over active weights) or "density".
        channel_score_per: What the score is weighed against: "channel" (as in the paper: every
            channel counts the same), or what its removal saves: "macs", "bytes" or "latency".
        min_channel_factor: No layer falls below this share of its uniform final width, rounded
            down to its multiple: 1 removes evenly, 0 wherever scores are lowest. With a budget,
            that width is where all layers as narrow would meet it.
        min_channels: No layer falls below this many channels (or its width, if narrower).
        channel_multiple: Widths are rounded to a multiple of this; None: to 16, or 8 in layers
            below 64 channels, or 1 below 16; the very last block is then only as large as a budget
            asks for. Where latency is measured, widths that are no faster than wider ones are
            passed over. With `block`: a multiple of it, and by default it.
        prune_residual: Also remove channels that several layers write or read: residual streams,
            concatenations, branches. Such a channel goes from all of them at once.
        block: Consecutive outputs that are kept or pruned together: 16 is what sparse kernels
            run fastest on a CPU (docs/block.md). Densities then count blocks, and channels
            go in whole blocks.
    """

    density: float = 0.1
    distribution: str = "erk"
    update_interval: int | None = None
    memory_margin: float | None = None
    explore_end: float = 0.8
    drop_fraction: float = 0.5
    drop_fraction_end: float = 0.005
    t_end: float = 1.0
    grow: str = "gradient"
    scope: str = "global"
    channel_sparsity: float | None = None
    max_macs: float | None = None
    max_bytes: float | None = None
    max_latency_ms: float | None = None
    channel_interval: int | None = None
    channel_start: float = 0.0
    channel_end: float | None = None
    channel_score: str = "umm"
    channel_score_per: str = "channel"
    min_channel_factor: float = 0.2
    min_channels: int = 8
    channel_multiple: int | None = None
    prune_residual: bool = False
    block: int = 1

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "distribution", tuple(DISTRIBUTIONS))
        check_choice(self, "grow", ("gradient", "random"))
        check_choice(self, "scope", SCOPES)
        check_choice(self, "channel_score", CHANNEL_SCORES)
        check_choice(self, "channel_score_per", ("channel", *PRICES))
        if self.memory_margin is not None:
            check_range(self, "memory_margin", 0, 1)
        for name in ("drop_fraction", "drop_fraction_end", "t_end"):
            check_range(self, name, 0, 1)
        check_range(self, "explore_end", 0, 1, open_low=True)
        check_range(self, "min_channel_factor", 0, 1)
        if self.t_end < self.explore_end:
            raise ValueError(
                f"Chase: t_end={self.t_end} comes before explore_end="
                f"{self.explore_end}, and would freeze more weights than the density allows: give "
                "an earlier explore_end too"
            )
        for name in ("update_interval", "channel_interval", "channel_multiple"):
            if getattr(self, name) is not None:
                check_range(self, name, 1, math.inf, whole=True)
        check_range(self, "min_channels", 1, math.inf, whole=True)
        check_range(self, "block", 1, math.inf, whole=True)
        if self.channel_multiple is not None and self.channel_multiple % self.block:
            raise ValueError(
                f"Chase: channel_multiple={self.channel_multiple} is no multiple of "
                f"block={self.block}, and would cut blocks apart: give a multiple of it, or leave "
                "channel_multiple out"
            )
        for unit in self.budgets:
            check_range(self, _SETTING[unit], 0, math.inf, open_low=True)
        if self.budgets and self.channel_sparsity is not None:
            raise ValueError(
                f"Chase: channel_sparsity={self.channel_sparsity} and "
                f"{', '.join(_SETTING[unit] for unit in self.budgets)} both say how many channels "
                "go: give one of them"
            )
        if not 0 <= self._share_removed < 1:
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
        return bool(self.budgets) or self._share_removed > 0

    @property
    def budgets(self) -> dict[str, float]:
        """The limits that were given, by unit."""
        limits = {unit: getattr(self, _SETTING[unit]) for unit in PRICES}
        return {unit: limit for unit, limit in limits.items() if limit is not None}

    @property
    def priced_in(self) -> tuple[str, ...]:
        """The units of the budgets, and of what scores are weighed against."""
        if not self.needs_graph:
            return ()
        return tuple(unit for unit in PRICES if unit in (*self.budgets, self.channel_score_per))

    @property
    def cuts_skip_paths(self) -> bool:
        """With `prune_residual`."""
        return self.prune_residual

    def budget(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Weights per layer, summing to `round(density * all weights)`."""
        return allocate_density(self.distribution, shapes, self.density)

    def attach(self, weight: nn.Parameter, count: int, generator: torch.Generator) -> Masked:
        """A uniformly random mask with exactly `count` places."""
        return Masked(weight, random_mask(weight.shape, count, generator, self.block))

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

    def check_channels(self, groups: Sequence[ChannelGroup], prices: Mapping[str, Price]) -> None:
        """Raise ValueError when too few channels can go; says how far the network can be cut."""
        channels = [group.channels for group in groups]
        blocks = [self._block(group.channels, group) for group in groups]
        floors = [self._floor(*pair, share=0) for pair in zip(channels, blocks, strict=True)]
        for unit, limit in self.budgets.items():
            price, setting = prices[unit], f"{_SETTING[unit]}={self.budgets[unit]:,.10g}"
            if limit >= price.dense:
                raise ValueError(
                    f"Chase: {setting} {price.unit} is no less than the dense network's "
                    f"{price.dense:,.6g} {price.unit}: give less, or leave it out"
                )
            least = price(floors)
            if least > limit * _aim(unit):
                raise ValueError(
                    f"Chase: {setting} {price.unit} is out of reach: with every layer that may "
                    f"lose channels at its floor, {least / _aim(unit):,.6g} of the dense "
                    f"network's {price.dense:,.6g} are left; give at least as much, lower "
                    f"min_channels={self.min_channels}, or let more layers be cut "
                    "(prune_residual=True, fewer keep_channels)"
                )
        if self.budgets:
            return
        share = 1 - self._share_removed
        floors = [self._floor(*pair, share=share) for pair in zip(channels, blocks, strict=True)]
        target = round(share * sum(channels))
        if sum(floors) > target:
            names = [group.name for group in groups]
            raise ValueError(
                f"Chase: channel_sparsity={self._share_removed} would leave {target} of "
                f"{sum(channels)} channels, but the floors of {len(names)} layers "
                f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}) add up to "
                f"{sum(floors)}: the highest reachable is {1 - sum(floors) / sum(channels):.3f}; "
                f"lower channel_sparsity, min_channels={self.min_channels} or "
                f"channel_multiple={self.channel_multiple}"
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
        original = sum(site.original_places.numel() for site in sites)
        budget = round(self.density * original)
        supports = [site.places for site in sites]
        live = [site.live_places for site in sites]
        active = sum(sizes(supports))
        if progress.step <= self._explore_steps(progress.total_steps):
            keep, goal = min(active, budget), round(self.ceiling(progress) * original)
        else:
            dropped = math.ceil(self.drop_rate(progress) * min(active, budget))
            keep, goal = min(active, budget) - dropped, budget
        capacity = sum(sizes(live))

        magnitudes = [site.magnitude for site in sites]
        none_held = [0] * len(sites)
        kept = prune_to(magnitudes, supports, self._count(sites, keep, none_held, supports))
        if self.grow == "gradient":
            growth = [site.gradient_magnitude for site in sites]
        else:
            growth = random_scores(magnitudes, generator)
        candidates = [allowed & ~held for allowed, held in zip(live, kept, strict=True)]
        missing = max(0, min(goal, capacity) - keep)
        grown = select(growth, self._count(sites, missing, sizes(kept), candidates), candidates)
        return [SupportChange(*change) for change in zip(kept, grown, strict=True)]

    def removals(
        self, pools: Sequence[ChannelPool], progress: Progress, prices: Mapping[str, Price]
    ) -> list[Tensor] | None:
        """Channels of the lowest score, so many that the schedule's count or price is left."""
        if not self.needs_graph or progress.step not in self.removal_steps(progress.total_steps):
            return None
        scores = [self.score(pool) for pool in pools]
        live = [pool.live for pool in pools]
        channels = [pool.original_channels for pool in pools]
        blocks = [self._block(pool.original_channels, pool.group) for pool in pools]
        share = self._uniform_share(channels, prices)
        floors = [self._floor(c, size, share) for c, size in zip(channels, blocks, strict=True)]
        target = round((1 - self.sparsity_at(progress)) * sum(channels))
        if not self.priced_in:
            return select_channels(
                scores, live, floors=floors, live_target=target, multiples=blocks
            )

        last = progress.step == self._channel_window(progress.total_steps)[1]
        final = round((1 - self._share_removed) * sum(channels))

        def within(widths: Sequence[int], target: int, limits: Mapping[str, float]) -> bool:
            if not limits:
                return sum(widths) <= target
            return all(prices[unit](widths) <= limit for unit, limit in limits.items())

        return select_blocks(
            scores,
            live,
            ladders=[steps(*ladder) for ladder in zip(channels, blocks, floors, strict=True)],
            enough=partial(within, target=target, limits=self._allowed(prices, progress)),
            done=partial(within, target=final, limits=self._goals(last)),
            grains=[self._grain(size) for size in blocks] if last else None,
            price=prices.get(self.channel_score_per),
        )

    # ------------------------------------------------------------------ schedules

    def ceiling(self, progress: Progress) -> float:
        """b(t): density up to which phase A grows."""
        fraction = progress.step / self._explore_steps(progress.total_steps)
        return min(1.0, cosine(fraction, self.density + self.margin, self.density))

    @property
    def margin(self) -> float:
        """What `memory_margin` comes to."""
        return min(0.05, 2 * self.density) if self.memory_margin is None else self.memory_margin

    def drop_rate(self, progress: Progress) -> float:
        """Fraction of the support that a phase B update drops."""
        return cosine(progress.fraction, self.drop_fraction, self.drop_fraction_end)

    def sparsity_at(self, progress: Progress) -> float:
        """S(t): share of the eligible channels that is to be gone after this step."""
        start, end = self._channel_window(progress.total_steps)
        return cubic((progress.step - start) / (end - start), 0.0, self._share_removed)

    def _allowed(self, prices: Mapping[str, Price], progress: Progress) -> dict[str, float]:
        """B(t): what the network may cost after this step, by unit."""
        start, end = self._channel_window(progress.total_steps)
        fraction = (progress.step - start) / (end - start)
        goals = self._goals(last=progress.step >= end)
        return {unit: cubic(fraction, prices[unit].dense, goal) for unit, goal in goals.items()}

    def _goals(self, last: bool) -> dict[str, float]:
        """B: where that ends, by unit."""
        return {unit: limit * _aim(unit, last) for unit, limit in self.budgets.items()}

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

    @property
    def _share_removed(self) -> float:
        """S_c; without meaning when there are budgets."""
        return 0.4 if self.channel_sparsity is None else self.channel_sparsity

    def _uniform_share(self, channels: Sequence[int], prices: Mapping[str, Price]) -> float:
        """Share of its channels that every layer would keep if all kept the same."""
        if not self.budgets:
            return 1 - self._share_removed
        low, high = 0.0, 1.0
        while high - low > 1e-3:
            share = (low + high) / 2
            widths = [max(1, round(share * width)) for width in channels]
            fits = all(prices[unit](widths) <= limit for unit, limit in self.budgets.items())
            low, high = (share, high) if fits else (low, share)
        return low

    def _block(self, channels: int, group: ChannelGroup) -> int:
        """Channels of a group that go at a time; `channels` before any cut."""
        size = block(channels, group.producers[0].index.shape[1], self._multiple)
        return math.lcm(size, self._unit(group))

    def _unit(self, group: ChannelGroup) -> int:
        """Neighbouring channels that go together, so that every block goes whole."""
        unit = group.unit(self.block)
        assert unit is not None, group.name  # such groups are locked
        return unit

    @property
    def _multiple(self) -> int | None:
        if self.channel_multiple is None and self.block > 1:
            return self.block
        return self.channel_multiple

    def _grain(self, size: int) -> int:
        """What the very last block is a multiple of, so that budgets are met and not undershot."""
        if not self.budgets or self._multiple is not None:
            return size
        return max(1, size // 4) if "latency" in self.budgets else 1

    def _floor(self, channels: int, size: int, share: float) -> int:
        """Channels that a layer keeps at least, in whole blocks.

        Args:
            channels: Of the layer, before any cut.
            size: Of a block.
            share: Of its channels that every layer would keep if all kept the same.
        """
        even = int(channels * share * self.min_channel_factor + 1e-9)  # 20 * (1 - 0.8) is below 4
        least = math.ceil(self.min_channels / size) * size
        return min(channels, max(even - even % size, least))

    # ------------------------------------------------------------------ ranking

    def score(self, pool: ChannelPool) -> Tensor:
        """`(pool.group.channels,)` float64 on the CPU: the `channel_score` of each channel, or the
        mean score of those that go together.

        Over the weights of all its producers at once: a sum of convolutions is one convolution of
        their inputs side by side, and is scored as that one.
        """
        score, unit = self._score(pool), self._unit(pool.group)
        return spread(score.view(-1, unit).mean(1), unit) if unit > 1 else score

    def _score(self, pool: ChannelPool) -> Tensor:
        if self.channel_score == "density":
            return pool.total(_active) / pool.original_fan_in
        magnitude = pool.total(lambda site: channel_magnitude(site.weight, 1))
        if self.channel_score == "umm":
            return magnitude / pool.original_fan_in
        return magnitude / pool.total(_active).clamp(min=1)

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
            [in_places(site.masked.live_shape, site.block) for site in sites],
            sum(held) + total,
            at_least=held,
            at_most=[have + free for have, free in zip(held, sizes(among), strict=True)],
        )
        return [share - have for share, have in zip(shares, held, strict=True)]


def _active(site: Site) -> Tensor:
    """`(out,)` weights of every channel that are on the support."""
    return site.support.flatten(1).sum(1, dtype=torch.float64)


_SETTING = {"macs": "max_macs", "bytes": "max_bytes", "latency": "max_latency_ms"}


def _aim(unit: str, last: bool = True) -> float:
    """Share of a budget to aim at: what is counted is met exactly, what is measured scatters."""
    return _LATENCY_AIM[last] if unit == "latency" else 1.0
