"""Sharding: tensors of which every process holds a part, and what the processes tell each other.

FSDP2 and tensor parallelism turn parameters into DTensors. PyTorch computes with them elementwise,
and sums over them, as over any tensor. What it cannot do is select: the largest of all, so many of
them. Here a `Crowd` counts over all processes, and what travels is counts and samples, never
weights. Without DTensors everything here is the identity.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Crowd", "is_sharded", "like_local", "local", "placed", "reshard", "strip", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of `tensor`: it is a DTensor."""
    # Importing it takes longer than torch itself, and without it there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; all of a plain tensor."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process. All processes must call it.

    Also for sums and counts of a sharded tensor before they become numbers: `float` and `int` of
    such a sum give this process's share without a word.
    """
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape of `like`, sharded as `like` is: one that all processes have alike, or
    that is sharded in another way.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if is_sharded(tensor):
        moved: Tensor = tensor.redistribute(mesh, placements)  # type: ignore[attr-defined]
        return moved
    # No rank sends anything: each takes its part of its own copy.
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def like_local(part: Tensor, like: Tensor) -> Tensor:
    """The tensor sharded as `like` of which this process holds `part`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    return DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def strip(values: Tensor, like: Tensor) -> Tensor:
    """`(n,)` values of this process's part of `like`, as one sharded tensor of those of all."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = like
    placements = [p if p.is_replicate() else Shard(0) for p in sharded.placements]
    crowd = Crowd([like])
    mine = len(values) if crowd.owns(like) else 0
    return DTensor.from_local(
        values,
        sharded.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size([crowd.total(mine, values.device)]),
        stride=(1,),
    )


def reshard(model: nn.Module) -> None:
    """Have FSDP put its sharded parameters back where a forward pass has gathered them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


class Crowd:
    """The processes that hold parts of some tensors. Every element belongs to one of them.

    What several processes hold alike (a replicated or a plain tensor among sharded ones) belongs to
    the first of them.

    Args:
        tensors: DTensors on one device mesh, or plain tensors.

    Raises:
        ValueError: The tensors lie on several meshes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        meshes = {t.device_mesh for t in tensors if is_sharded(t)}  # type: ignore[attr-defined]
        if len(meshes) > 1:
            raise ValueError(
                f"sparse weights lie on {len(meshes)} device meshes, and a selection spans all of "
                "them: shard all on one mesh, or give each mesh a Sparsifier of its own (include=)"
            )
        self._mesh: Any = next(iter(meshes), None)

    @property
    def alone(self) -> bool:
        """Whether this process holds everything."""
        return self._mesh is None

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor, what belongs to this process: its local part, or none of it."""
        return [
            part if self.owns(tensor) else part[:0]
            for tensor, part in zip(tensors, map(local, tensors), strict=True)
        ]

    def owns(self, tensor: Tensor) -> bool:
        """Whether the local part of `tensor` belongs to this process."""
        return self._owner(tensor) == self._coordinate

    def sum(self, counts: Tensor) -> Tensor:
        """`counts` added up over all processes, in place."""
        if self._mesh is not None:
            for dim in range(self._mesh.ndim):
                dist.all_reduce(counts, group=self._mesh.get_group(dim))
        return counts

    def total(self, count: int, device: torch.device) -> int:
        """A number of this process, added up over all."""
        return count if self._mesh is None else int(self.sum(torch.tensor(count, device=device)))

    def counts(self, masks: Sequence[Tensor]) -> list[int]:
        """How many places of each mask are True."""
        counts = torch.stack([mask.count_nonzero() for mask in self.parts(masks)])
        found: list[int] = self.sum(counts).tolist()
        return found

    def gather(self, values: Tensor) -> Tensor:
        """`(n,)` values of all processes, one after the other; `n` may differ between them."""
        if self._mesh is None:
            return values
        for dim in reversed(range(self._mesh.ndim)):  # so that the first dimension is the outermost
            group = self._mesh.get_group(dim)
            world = dist.get_world_size(group)
            length = torch.tensor(len(values), device=values.device)
            lengths = [torch.empty_like(length) for _ in range(world)]
            dist.all_gather(lengths, length, group=group)
            ends: list[int] = torch.stack(lengths).tolist()
            padded = F.pad(values, (0, max(ends) - len(values)))  # all must send as much
            parts = [torch.empty_like(padded) for _ in ends]
            dist.all_gather(parts, padded, group=group)
            values = torch.cat([part[:end] for part, end in zip(parts, ends, strict=True)])
        return values

    def before(self, counts: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        """What precedes this process's part of each tensor, and what all have, in counts.

        Args:
            counts: 0-d, of this process's local part of each tensor.
            tensors: Whose parts were counted.
        """
        mine = torch.stack(list(counts))
        if self._mesh is None:
            return [(0, count) for count in mine.tolist()]
        owned = torch.tensor([self.owns(tensor) for tensor in tensors], device=mine.device)
        table = self.gather(mine * owned).view(-1, len(tensors)).cpu()
        places = [self._place(self._owner(tensor)) for tensor in tensors]
        return [
            (int(table[:place, n].sum()), int(table[:, n].sum())) for n, place in enumerate(places)
        ]

    @property
    def _coordinate(self) -> tuple[int, ...]:
        return () if self._mesh is None else tuple(self._mesh.get_coordinate())

    def _owner(self, tensor: Tensor) -> tuple[int, ...]:
        """Coordinate of the process to which this process's local part belongs."""
        if not is_sharded(tensor):
            return (0,) * len(self._coordinate)
        placements = tensor.placements  # type: ignore[attr-defined]
        return tuple(
            0 if placement.is_replicate() else index
            for index, placement in zip(self._coordinate, placements, strict=True)
        )

    def _place(self, coordinate: tuple[int, ...]) -> int:
        """Position in what `gather` returns."""
        place = 0
        for index, size in zip(coordinate, self._mesh.shape, strict=True):
            place = place * size + index
        return place
