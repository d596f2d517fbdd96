"""Plan: which positions of each tensor were kept, as data that rebuilds the slim network.

A plan and the user's own full-width class are all it takes: no pickle, no source of ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.channels import Change, Cut, Setting
from gossamer.reading import reading, short
from gossamer.shrink.slice import Undo, apply_cuts, size_of

__all__ = ["Plan"]

_FORMAT = "gossamer-plan"
_VERSION = 2


class Plan:
    """Kept positions per tensor and dimension, in the numbering of the full-width network."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._full: dict[tuple[str, int], int] = {}
        self._settings: dict[tuple[str, str], tuple[int, int]] = {}

    def __len__(self) -> int:
        """How many dimensions of tensors are narrower than in the full network."""
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        """Plans are equal when they keep the same positions."""
        return isinstance(other, Plan) and self._sorted() == other._sorted()

    __hash__ = None  # type: ignore[assignment]

    def _sorted(self) -> list[tuple[object, ...]]:
        rows = sorted((*key, self._full[key], keep.tolist()) for key, keep in self._kept.items())
        return [*rows, *sorted((*key, *values) for key, values in self._settings.items())]

    def kept(self, tensor: str, dim: int) -> Tensor | None:
        """Positions of the full network that `tensor` kept along `dim`; None when all."""
        return self._kept.get((tensor, dim))

    def record(self, changes: Sequence[Change]) -> None:
        """Add changes that were made together, numbered as the model was just before them."""
        for change in changes:
            if isinstance(change, Setting):
                place = (change.module, change.attribute)
                before, _ = self._settings.get(place, (change.before, 0))
                self._settings[place] = (before, change.after)
                continue
            key = (change.tensor, change.dim)
            self._full.setdefault(key, change.width)
            kept = self._kept.get(key, torch.arange(change.width))
            self._kept[key] = kept[change.keep]

    @property
    def changes(self) -> list[Change]:
        """What narrows the full network to this plan."""
        return [
            *(Cut(*key, keep, self._full[key]) for key, keep in self._kept.items()),
            *(Setting(*key, *values) for key, values in self._settings.items()),
        ]

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Undo:
        """Cut a full-width `model` in place to the widths of this plan; returns what undoes it.

        Raises:
            ValueError: The model lacks a tensor of the plan or has another width; names it.
        """
        name = type(model).__name__
        for change in self.changes:
            try:
                if isinstance(change, Setting):
                    what, wanted = f"{change.module}.{change.attribute}", change.before
                    size = getattr(model.get_submodule(change.module), change.attribute)
                else:
                    what, wanted = change.tensor, change.width
                    size = size_of(model, change.tensor, change.dim)
            except AttributeError as error:
                raise ValueError(
                    f"the plan cuts {what!r}, which {name} lacks: build the model with the class "
                    "and arguments it was trained with"
                ) from error
            if type(size) is not int or size != wanted:
                raise ValueError(
                    f"{what} is {size} wide in this {name}, the plan was made for {wanted}: build "
                    "the full-width model the training started from"
                )
        return apply_cuts(model, self.changes, optimizer)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "cuts": [
                {"of": full, "kept": list(kept), "places": [list(place) for place in places]}
                for (full, kept), places in self._alike().items()
            ],
            "settings": [
                {"module": module, "attribute": attribute, "of": before, "now": after}
                for (module, attribute), (before, after) in self._settings.items()
            ],
        }

    def _alike(self) -> dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]]:
        """Places that keep the same positions: a weight's, its bias's, its norm's."""
        alike: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
        for place, keep in self._kept.items():
            alike.setdefault((self._full[place], tuple(keep.tolist())), []).append(place)
        return alike

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that `to_dict` wrote. Raises ValueError when `data` is anything else."""
        plan = cls()
        with reading(
            f"this is not a plan that Gossamer reads ({_FORMAT} version {_VERSION}): it",
            "take one that Plan.to_dict() or to_json() wrote",
        ):
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                said = short(data["format"]), short(data["version"])
                raise ValueError(f"format {said[0]}, version {said[1]}")
            for row in data["cuts"]:
                full, kept, places = row["of"], row["kept"], short(str(row["places"]))
                if not all(type(position) is int for position in (full, *kept)):
                    raise ValueError(f"kept positions of {places} are not whole numbers")
                ascending = all(a < b for a, b in pairwise(kept))
                if not kept or not ascending or kept[0] < 0 or kept[-1] >= full:
                    raise ValueError(f"kept positions of {places} are not ascending below {full}")
                for tensor, dim in row["places"]:
                    if type(tensor) is not str or type(dim) is not int or dim < 0:
                        raise ValueError(f"dimension {short(dim)} of {short(tensor)}")
                    if (tensor, dim) in plan._kept:
                        raise ValueError(f"dimension {dim} of {tensor!r} is there twice")
                    plan._full[tensor, dim] = full
                    plan._kept[tensor, dim] = torch.tensor(kept, dtype=torch.int64)
            for row in data["settings"]:
                place, before, after = (row["module"], row["attribute"]), row["of"], row["now"]
                if not all(type(name) is str for name in place):
                    raise ValueError(f"a setting of {short(place[0])}: {short(place[1])}")
                if not all(type(value) is int and value > 0 for value in (before, after)):
                    raise ValueError(f"{place[1]} from {short(before)} to {short(after)}")
                plan._settings[place] = (before, after)
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError when `text` is anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"the plan is not JSON: {error}; take one that Plan.to_json() wrote"
            ) from error
        return cls.from_dict(data)
