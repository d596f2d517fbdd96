"""Collapse: a layer that keeps next to no weight, passes next to nothing on, and learns no more.

Thresholds that are learned, and rankings over all layers together, can empty a layer. A layer has
collapsed when it keeps fewer weights than its floor:

    floor = 0.001 of its weights, or a tenth of the density asked for where that is less
            (not more than half of what the method gave it at the start; at least one weight)

Then a Sparsifier says which layer, when, and what did it. With "stop" it raises; with "hold" it
gives the layer twice its floor back, the largest of its weights, and keeps it there:

    masks       the largest of the weights that an update would drop stay
    thresholds  all of the layer's are lowered by one amount, and may not rise again until the
                layer lies well above its floor by itself

Supports that are learned move all the time. They are counted when accounts are taken anew (after
every step of a short run, about 1000 times in a long one): on other steps nothing is done here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.exploration import sizes
from gossamer.method import Method, Progress, SupportChange
from gossamer.ops import keep_largest, kth_largest
from gossamer.site import Site
from gossamer.sparse_weight import LearnedThreshold, Masked

__all__ = ["COLLAPSE_BELOW", "CollapseError", "CollapseWarning", "Guard", "OnCollapse"]

OnCollapse = Literal["warn", "hold", "stop"]
COLLAPSE_BELOW = 1e-3
_HELD_AT = 2  # floors; a held layer is free again when it has twice that by itself


class CollapseWarning(UserWarning):
    """A layer fell below its floor."""


class CollapseError(RuntimeError):
    """A layer fell below its floor, and the run was to stop then, or the layer cannot be held."""


class Guard:
    """Watches over the floors of a model's sites.

    Args:
        action: "warn", "hold" or "stop".
        method: Says what it does to supports, and what to change about it.
        sites: Of the model.
        counts: Weights that the method has given each of them to start with.

    Attributes:
        said: What was said so far.

    Raises:
        ValueError: An unknown action; or "hold" of sites that it is not known how to hold.
    """

    def __init__(
        self, action: str, method: Method, sites: Sequence[Site], counts: Sequence[int]
    ) -> None:
        if action not in ("warn", "hold", "stop"):
            raise ValueError(f'on_collapse={action!r}: choose "warn", "hold" or "stop"')
        self.said: list[str] = []
        self._hold, self._stop = action == "hold", action == "stop"
        self._method = method
        self.bind(sites)
        for site in self._sites:
            if self._hold and not isinstance(site.sparse, (Masked, LearnedThreshold)):
                raise ValueError(
                    f'on_collapse="hold" knows how to hold masks and learned thresholds, and the '
                    f"{type(site.sparse).__name__} of {site.name} is neither: choose "
                    '"warn" or "stop"'
                )
        asked = [method.to_dict().get(name) for name in ("density", "target_density")]
        self._share = min([COLLAPSE_BELOW, *(value / 10 for value in asked if value)])
        self._given = {site.name: count for site, count in zip(sites, counts, strict=True)}
        self._last = dict(self._given)
        self._below: set[str] = set()
        self._caps: dict[str, Tensor] = {}
        self._spared: dict[str, int] = {}

    def bind(self, sites: Sequence[Site]) -> None:
        """Watch over these, whose parameters have been replaced."""
        self._sites = [site for site in sites if not site.sparse.keeps_count]

    def floor(self, site: Site) -> int:
        """Weights that the site must keep, as wide as it is now."""
        share: int = math.ceil(self._share * site.weight.numel())
        return max(1, min(share, self._given[site.name] // 2))

    def spare(self, sites: Sequence[Site], changes: list[SupportChange]) -> list[SupportChange]:
        """The changes, with as many of the largest weights kept as "hold" asks for."""
        if not self._hold:
            return changes
        supports = [change.kept | change.grown for change in changes]
        spared = []
        for site, change, left, now in zip(sites, changes, supports, sizes(supports), strict=True):
            floor = math.ceil(self.floor(site) / site.block)  # of places, as `now` is
            if now < floor:
                going = site.places & ~left
                back = min(_HELD_AT * floor - now, sizes([going])[0])
                (saved,) = keep_largest([site.magnitude], back, [going])
                change = change._replace(kept=change.kept | saved)
                self._spared[site.name] = now * site.block
            spared.append(change)
        return spared

    def cap(self) -> None:
        """Thresholds that are held do not rise. To be called after every step."""
        if not self._caps:
            return
        for site in self._sites:
            if site.name in self._caps:
                raw = _learned(site).raw
                raw.copy_(torch.minimum(raw, self._caps[site.name]))

    def look(self, progress: Progress) -> None:
        """Count the supports; say, hold or stop where one is below its floor.

        Raises:
            CollapseError: One is, and it was to stop then, or cannot be held.
        """
        for site, kept in zip(self._sites, self._counts(), strict=True):
            floor, before = self.floor(site), self._last[site.name]
            found = self._spared.pop(site.name, kept)
            learned = isinstance(site.sparse, LearnedThreshold)
            if self._hold and learned and (kept < floor or site.name in self._caps):
                kept = self._hold_thresholds(site, kept)
            self._last[site.name] = kept
            if found >= floor:
                if site.name not in self._caps:
                    self._below.discard(site.name)
                continue
            if site.name in self._below and not self._stop:
                continue
            self._below.add(site.name)
            self._say(site, progress, found, before, kept)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors to go on from."""
        return {
            "said": list(self.said),
            "last": dict(self._last),
            "below": sorted(self._below),
            "caps": dict(self._caps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.said, self._last = list(state["said"]), dict(state["last"])
        self._below = set(state["below"])
        self._caps = dict(state["caps"]) if self._hold else {}

    # ------------------------------------------------------------------ inside

    def _counts(self) -> list[int]:
        return sizes([site.support for site in self._sites]) if self._sites else []

    def _hold_thresholds(self, site: Site, kept: int) -> int:
        """Lower the site's thresholds until it keeps what it is held at; returns what it keeps."""
        sparse, places = _learned(site), site.weight.numel() // site.block
        goal = min(math.ceil(_HELD_AT * self.floor(site) / site.block), places - 1)
        if kept >= _HELD_AT * goal * site.block or goal < 1:
            self._caps.pop(site.name, None)
            return kept
        # Half-way between two places, so that rounding does not decide.
        margin = sparse.margin(site.weight)
        shift = (kth_largest([margin], goal) + kth_largest([margin], goal + 1)) / 2
        raw = sparse.raw
        cap = self._caps[site.name] = (raw + shift).detach()
        raw.copy_(torch.minimum(raw, cap))
        return sizes([site.support])[0]

    def _say(self, site: Site, progress: Progress, found: int, before: int, kept: int) -> None:
        weights, floor = site.weight.numel(), self.floor(site)
        told = (
            f"{site.name} has collapsed by step {progress.step} of {progress.total_steps}: it "
            f"keeps {found:,} of {weights:,} weights, {found / weights:.2g} (before: "
            f"{before / weights:.2g}; floor: {floor:,}). {self._method.remedy(progress)}"
        )
        failed = self._hold and kept < floor
        if self._hold and not failed:
            told += f". It is held at {kept:,} weights"
        elif not self._hold:
            told += '; or on_collapse="hold" keeps it at its floor'
        self.said.append(told)
        if self._stop:
            raise CollapseError(told)
        if failed:
            raise CollapseError(f"{told}. It cannot be held: too few of its weights are not zero")
        warnings.warn(told, CollapseWarning, stacklevel=5)  # the caller of Sparsifier.step


def _learned(site: Site) -> LearnedThreshold:
    assert isinstance(site.sparse, LearnedThreshold)
    return site.sparse
