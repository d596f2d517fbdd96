"""Plan: which positions of each layer were kept, as data that rebuilds the slim network.

A plan and the user's own full-width class are all it takes: no pickle, no source of ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.channels import Axis, Cut
from gossamer.shrink.slice import Undo, apply_cuts, axis_size

__all__ = ["Plan"]

_FORMAT = "gossamer-plan"
_VERSION = 1


class Plan:
    """Kept positions per layer and axis, in the numbering of the full-width network."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Axis], Tensor] = {}
        self._full: dict[tuple[str, Axis], int] = {}

    def __len__(self) -> int:
        """How many layer axes are narrower than in the full network."""
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        """Plans are equal when they keep the same positions."""
        return isinstance(other, Plan) and self._sorted() == other._sorted()

    __hash__ = None  # type: ignore[assignment]

    def _sorted(self) -> list[tuple[str, str, int, list[int]]]:
        rows = ((*key, self._full[key], keep.tolist()) for key, keep in self._kept.items())
        return sorted(rows)

    def kept(self, layer: str, axis: Axis) -> Tensor | None:
        """Positions of the full network that `layer` kept along `axis`; None when all."""
        return self._kept.get((layer, axis))

    def record(self, cuts: Sequence[Cut]) -> None:
        """Add cuts that were made together, numbered as the model was just before them."""
        for cut in cuts:
            key = (cut.layer, cut.axis)
            self._full.setdefault(key, cut.width)
            kept = self._kept.get(key, torch.arange(cut.width))
            self._kept[key] = kept[cut.keep]

    @property
    def cuts(self) -> list[Cut]:
        """The cuts that narrow the full network to this plan."""
        return [
            Cut(layer, axis, keep, self._full[layer, axis])
            for (layer, axis), keep in self._kept.items()
        ]

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Undo:
        """Cut a full-width `model` in place to the widths of this plan; returns what undoes it.

        Raises:
            ValueError: The model lacks a layer of the plan or has another width; names it.
        """
        modules = dict(model.named_modules())
        for cut in self.cuts:
            if cut.layer not in modules:
                raise ValueError(
                    f"the plan cuts layer {cut.layer!r}, which {type(model).__name__} lacks: "
                    "build the model with the class and arguments it was trained with"
                )
            size = axis_size(cut.layer, modules[cut.layer], cut.axis)
            if size != cut.width:
                raise ValueError(
                    f"{cut.layer} has {size} {cut.axis}put channels, the plan was made for "
                    f"{cut.width}: build the full-width model the training started from"
                )
        return apply_cuts(model, self.cuts, optimizer)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "layers": [
                {"layer": layer, "axis": axis, "of": self._full[layer, axis], "kept": keep.tolist()}
                for (layer, axis), keep in self._kept.items()
            ],
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that `to_dict` wrote. Raises ValueError when `data` is anything else."""
        plan = cls()
        try:
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
            for row in data["layers"]:
                key = (str(row["layer"]), row["axis"])
                full, kept = row["of"], row["kept"]
                if row["axis"] not in ("out", "in") or not isinstance(full, int):
                    raise ValueError(f"axis {row['axis']!r} of {full!r}")
                ascending = all(a < b for a, b in pairwise(kept))
                if not all(type(position) is int for position in kept):
                    raise ValueError(f"kept positions of {key[0]!r} are not whole numbers")
                if not kept or not ascending or kept[0] < 0 or kept[-1] >= full:
                    raise ValueError(
                        f"kept positions of {key[0]!r} are not ascending in [0, {full})"
                    )
                plan._full[key] = full
                plan._kept[key] = torch.tensor(kept, dtype=torch.int64)
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"this is not a plan that Gossamer reads ({_FORMAT} version {_VERSION}): {error}"
            ) from error
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError when `text` is anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from error
        return cls.from_dict(data)
