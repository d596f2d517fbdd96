"""Parallel: several processes that hold the whole model each, and must decide alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.sharding import is_sharded
from gossamer.site import Site

__all__ = ["DataParallel", "check_agreement", "fingerprint", "from_first_rank", "world_size"]

T = TypeVar("T")

_PRIME = 2654435761  # of Fibonacci hashing: spreads neighbouring positions


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_first_rank(measure: Callable[[], T]) -> T:
    """What the first process measures: no two clocks agree, and all processes must."""
    if world_size() == 1:
        return measure()
    found = [measure() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def fingerprint(support: Tensor) -> Tensor:
    """0-d int64 that tells supports apart, computed where the support is.

    Args:
        support: Bool, of any shape.
    """
    places = torch.arange(1, support.numel() + 1, device=support.device) * _PRIME
    return ((places ^ (places >> 15)) * support.flatten()).sum()  # wraps around, as is meant


def check_agreement(sites: Sequence[Site], step: int) -> None:
    """Raise RuntimeError unless all processes have the same supports, by their fingerprints.

    Sharded supports are left out: every process has another part of them.
    """
    held = [site for site in sites if not is_sharded(site.weight)]
    if world_size() == 1 or not held:
        return
    prints = torch.stack([fingerprint(site.support) for site in held])
    # The highest and, negated, the lowest in one reduction.
    extremes = torch.stack([prints, -prints])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    for site, apart in zip(held, (extremes[0] != -extremes[1]).tolist(), strict=True):
        if apart:
            raise RuntimeError(
                f"the processes disagree on the support of {site.name} after step {step}: they "
                "train different weights. Start all with the same weights, data of equal shape, "
                "and the same Sparsifier (method, seed, total_steps)"
            )


class DataParallel(nn.Module):
    """DistributedDataParallel, made anew whenever tensors of the model have been cut.

    It fixes the shapes of gradients when it is made, and holds on to them until it is gone.

    Attributes:
        module: The wrapped model, as it is now.
    """

    def __init__(
        self, model: nn.Module, cuts: Callable[[], int], settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module: DistributedDataParallel | None = None
        self._model = [model]  # in a list, so that its parameters are not listed twice
        self._cuts, self._settings = cuts, settings
        self._seen = -1
        self._current()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._current()(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedDataParallel's: gradients accumulate and are not reduced."""
        with self._current().no_sync():
            yield

    def _current(self) -> DistributedDataParallel:
        if self.module is None or self._cuts() != self._seen:
            self.module = None  # before there is a new one, for its hooks know the old shapes
            self._seen = self._cuts()
            self.module = DistributedDataParallel(self._model[0], **self._settings)
        return self.module
