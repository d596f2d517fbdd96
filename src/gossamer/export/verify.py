"""Verification: a file that was written is read back, run, and held against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.example import map_tensors
from gossamer.export.capture import Inputs, Subject, call, flat, resized

__all__ = ["Check", "Exported", "Verified", "check_outputs"]

# Of the largest output. Engines fold norms into convolutions and add in another order: that costs
# float32 about 1e-6 in networks of 50 layers; a wrong kernel, layout or padding 1e-2 and more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

Engine = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class Check:
    """One comparison: what the inputs were, the batch size, the largest absolute difference."""

    inputs: str
    batch: int
    difference: float


@dataclass(frozen=True)
class Verified:
    """What was compared with the model's own outputs.

    engine: that ran the file.
    checks: one per input.
    scale: largest absolute output of the model.
    tolerance: difference up to which the outputs count as equal.
    """

    engine: str
    checks: tuple[Check, ...]
    scale: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Largest absolute difference of all checks."""
        return max(check.difference for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written.

    Attributes:
        path: Of the file.
        format: "onnx", "program" or "safetensors".
        bytes: Of the file, and of a second one beside it where there is one.
        inputs, outputs: Names and shapes; a dimension that may have any size is "batch".
        verified: What was compared; None when nothing was.
        versions: Of the packages that wrote and ran it, and `opset` of ONNX.
        notes: What else there is to know, such as what its zeros bring.
    """

    path: str
    format: str
    bytes: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    verified: Verified | None
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        data = asdict(self)
        if self.verified is not None:
            data["verified"]["difference"] = self.verified.difference
        return data

    def text(self) -> str:
        """Everything in a few lines."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.path}: {self.bytes:,} bytes, {self.format} ({versions})"]
        for title, named in (("inputs", self.inputs), ("outputs", self.outputs)):
            shown = ", ".join(f"{n} ({' x '.join(map(str, s))})" for n, s in named.items())
            lines += [f"{title}: {shown}"] if named else []
        if self.verified is None:
            lines.append("not verified")
        else:
            found = self.verified
            example, *others = (str(check.batch) for check in found.checks)
            lines.append(
                f"verified in {found.engine} against the model, on the example (batch {example}) "
                f"and random inputs (batch {', '.join(others)}): outputs differ by at most "
                f"{found.difference:.3g}, largest output {found.scale:.3g}"
            )
        return "\n".join([*lines, *self.notes])


def check_outputs(subject: Subject, engine: Engine, name: str) -> Verified:
    """Run a file and the model it was made from on the same inputs.

    Compared are the example, random inputs like it and, where the batch is dynamic, random inputs
    in two other batch sizes, 1 among them.

    Args:
        subject: The model.
        engine: Runs the file; returns its output tensors in the order of the model's.
        name: Of the engine.

    Raises:
        ValueError: The file fails, or gives something else than the model.
    """
    checks: list[Check] = []
    scale = limit = 0.0
    for about, batch, inputs in _cases(subject):
        where = f"{about} (batch {batch})"
        wanted = list(flat(call(subject.model, inputs)).values())
        if not checks and not any(value.isfinite().any() for value in wanted):
            raise ValueError(
                f"nothing was written: on {where} the model gives no finite number to compare; "
                "give one that it can compute with"
            )
        try:
            got = engine(inputs)
        except Exception as error:
            raise ValueError(
                f"nothing was written: {name} fails on {where}: {' '.join(str(error).split())}"
            ) from error
        if len(got) != len(wanted):
            raise ValueError(
                f"nothing was written: {name} gives {len(got)} outputs, the model {len(wanted)}"
            )
        difference = _difference(wanted, got)
        checks.append(Check(about, batch, difference))
        scale = max([scale, *map(_scale, wanted)])
        limit = scale * max((_TOLERANCE.get(value.dtype, 0.0) for value in wanted), default=0.0)
        if not difference <= limit:
            raise ValueError(
                f"nothing was written: on {where} {name} differs from the model by "
                f"{difference:.3g}, and outputs are up to {scale:.3g} (allowed: {limit:.3g})"
            )
    return Verified(name, tuple(checks), scale, limit)


def _cases(subject: Subject) -> Iterator[tuple[str, int, Inputs]]:
    inputs, batch = subject.inputs, subject.batch
    generator = torch.Generator().manual_seed(0)

    def like(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():  # labels, token ids and masks stay within their range
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            return tensor.flatten()[order].view(tensor.shape)
        spread = float(tensor.double().std()) if tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return (float(tensor.double().mean()) + (spread or 1.0) * noise).to(tensor)

    yield "the example", batch, inputs
    yield "random inputs", batch, map_tensors(inputs, like)
    if subject.dynamic:
        for size in (1 if batch > 1 else 2, batch + 1 if batch > 1 else 3):
            yield "random inputs", size, map_tensors(resized(inputs, batch, size), like)


def _difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Largest absolute difference; infinite when shapes differ or only one is infinite or NaN."""
    worst = 0.0
    for mine, theirs in zip(wanted, got, strict=True):
        if mine.shape != theirs.shape:
            return float("inf")
        if mine.numel():
            one, other = mine.double().cpu(), theirs.double().cpu()
            same = (one == other) | (one.isnan() & other.isnan())
            apart = (one - other).abs().nan_to_num(nan=float("inf"))
            worst = max(worst, float(apart[~same].max()) if not same.all() else 0.0)
    return worst


def _scale(value: Tensor) -> float:
    """Largest finite absolute value."""
    finite = value.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0
