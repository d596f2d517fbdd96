"""Is this model N:M, or zero in blocks? Which layers, and in those that are not: where, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.measure.macs import align

__all__ = [
    "BlockReport",
    "LayerBlocks",
    "LayerPattern",
    "PatternReport",
    "check_block",
    "check_nm",
]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# How full blocks are, at least, that were trained as blocks. Pruned weight by weight to a density
# of 0.1, blocks of 16 are 0.12 full. Trained ones have zeros too: weights that have grown, and
# learn nothing because no later layer reads their output.
_FULL = 0.5


@dataclass(frozen=True)
class LayerPattern:
    """One layer's weight, held against a pattern.

    name: of the layer.
    shape: of the weight, `(out, in, *kernel)`.
    groups: groups of M consecutive inputs, at one output and one kernel position; the last of a row
        may be shorter.
    violations: groups that hold more than N non-zeros.
    why: empty when there are none; else where, and what it looks like instead.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    violations: int
    why: str

    @property
    def fits(self) -> bool:
        """Whether the layer is N:M."""
        return self.violations == 0


@dataclass(frozen=True)
class PatternReport:
    """Every linear and convolution layer of a model, held against N:M."""

    n: int
    m: int
    layers: tuple[LayerPattern, ...]

    @property
    def fits(self) -> bool:
        """Whether all layers are N:M."""
        return all(layer.fits for layer in self.layers)

    def __getitem__(self, name: str) -> LayerPattern:
        """The layer of that name."""
        return {layer.name: layer for layer in self.layers}[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        layers = [{**asdict(layer), "fits": layer.fits} for layer in self.layers]
        return {"n": self.n, "m": self.m, "fits": self.fits, "layers": layers}

    def table(self) -> str:
        """One line per layer."""
        rows = [("layer", "shape", "groups over", f"{self.n}:{self.m}")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            over = f"{layer.violations:,} of {layer.groups:,}"
            rows.append((layer.name, shape, over, "yes" if layer.fits else f"no: {layer.why}"))
        return align(rows, text_columns=4)


@torch.no_grad()
def check_nm(model: nn.Module, n: int, m: int) -> PatternReport:
    """Hold every linear and convolution layer against N:M.

    A layer is N:M when no group of `m` consecutive inputs, at one output and one kernel position,
    has more than `n` non-zeros: what sparse matrix units need. Groups never reach from one row into
    the next; where the inputs are no multiple of `m`, the last group is shorter.

    Args:
        model: A plain model with zeros in it, or one in training: what counts is the weight that
            its layers compute with.
        n: Non-zeros allowed ...
        m: ... among so many consecutive inputs.

    Raises:
        ValueError: `n` and `m` are no pattern, or the model has no such layer.
    """
    if not 1 <= n < m:
        raise ValueError(f"{n}:{m} is no pattern: give 1 <= n < m, such as 2 and 4")
    layers = (_check(name, module.weight, n, m) for name, module in _layers(model))
    return PatternReport(n, m, tuple(layers))


@dataclass(frozen=True)
class LayerBlocks:
    """One layer's weight, held against blocks of consecutive outputs.

    name: of the layer.
    shape: of the weight, `(out, in, *kernel)`.
    density: share of the weights that are not zero.
    block_density: share of the weights that lie in blocks that are not all zero: what a kernel for
        blocks computes.
    why: empty when the layer is zero in blocks; else what it is instead.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    block_density: float
    why: str

    @property
    def fits(self) -> bool:
        """Whether the layer has zeros, and they come in whole blocks."""
        return not self.why


@dataclass(frozen=True)
class BlockReport:
    """Every linear and convolution layer of a model, held against blocks of `block` outputs."""

    block: int
    layers: tuple[LayerBlocks, ...]

    @property
    def fits(self) -> bool:
        """Whether some layers are zero in blocks, and all others next to dense."""
        others = [layer for layer in self.layers if not layer.fits]
        return len(others) < len(self.layers) and all(x.density >= _FULL for x in others)

    def __getitem__(self, name: str) -> LayerBlocks:
        """The layer of that name."""
        return {layer.name: layer for layer in self.layers}[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        layers = [{**asdict(layer), "fits": layer.fits} for layer in self.layers]
        return {"block": self.block, "fits": self.fits, "layers": layers}

    def table(self) -> str:
        """One line per layer."""
        rows = [("layer", "shape", "density", "of blocks", f"{self.block}x1")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            densities = (f"{layer.density:.4f}", f"{layer.block_density:.4f}")
            fits = "yes" if layer.fits else f"no: {layer.why}"
            rows.append((layer.name, shape, *densities, fits))
        return align(rows, text_columns=5)


@torch.no_grad()
def check_block(model: nn.Module, block: int = 16) -> BlockReport:
    """Hold every linear and convolution layer against blocks of consecutive outputs.

    A block is the weights of outputs 0 to 15, or 16 to 31 and so on, at one input and one kernel
    position: what kernels for so many outputs read at full speed. A layer fits when some of its
    blocks are zero and the others are full. Some zeros in them are values like any other (a weight
    that has grown and not learned yet); less than half full is another pattern.

    Args:
        model: A plain model with zeros in it, or one in training: what counts is the weight that
            its layers compute with.
        block: Outputs per block; those of two groups of a convolution are never in one.

    Raises:
        ValueError: The block is below 2, or the model has no such layer.
    """
    if block < 2:
        raise ValueError(f"block={block} is no pattern: give so many outputs, such as 16")
    return BlockReport(block, tuple(_check_block(*layer, block) for layer in _layers(model)))


def _check_block(name: str, layer: nn.Module, block: int) -> LayerBlocks:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    nonzero = torch.unflatten(weight != 0, 0, (getattr(layer, "groups", 1), -1))
    pieces = torch.split(nonzero, block, 1)  # the last of a group may be shorter
    computed = sum(int(piece.any(1).sum()) * piece.shape[1] for piece in pieces)
    kept = int(nonzero.sum())
    why = ""
    if kept == nonzero.numel():
        why = "dense: it has no zeros"
    elif computed == nonzero.numel():
        why = "no block is zero"
    elif kept < _FULL * computed:
        why = f"{kept / computed:.2f} of its blocks that are not zero is filled"
    numel = weight.numel()
    return LayerBlocks(name, tuple(weight.shape), kept / numel, computed / numel, why)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    found = [(n, module) for n, module in model.named_modules() if isinstance(module, _LAYERS)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer to check")
    return found


def _check(name: str, weight: Tensor, n: int, m: int) -> LayerPattern:
    nonzero = weight != 0
    counts = _per_group(nonzero, m)
    violations = int((counts > n).sum())
    why = _explain(nonzero, counts, n, m) if violations else ""
    return LayerPattern(name, tuple(weight.shape), counts.numel(), violations, why)


def _per_group(nonzero: Tensor, m: int) -> Tensor:
    """`(out, groups, *kernel)`: non-zeros of each group of `m` along dimension 1."""
    inputs = nonzero.shape[1]
    padding = nonzero.new_zeros(len(nonzero), -inputs % m, *nonzero.shape[2:])
    return torch.unflatten(torch.cat([nonzero, padding], 1), 1, (-1, m)).sum(2)


def _explain(nonzero: Tensor, counts: Tensor, n: int, m: int) -> str:
    if bool(nonzero.all()):
        return "dense: it has no zeros"
    row, group, *kernel = torch.nonzero(counts > n)[0].tolist()
    last = min((group + 1) * m, nonzero.shape[1]) - 1
    at = "".join(f", {position}" for position in kernel)
    found = int(counts[(row, group, *kernel)])
    where = f"[{row}, {group * m}-{last}{at}] holds {found} non-zeros"
    for otherwise, view in (
        ("along its outputs, not its inputs", nonzero.transpose(0, 1)),
        ("in flat memory order, not along its inputs", nonzero.reshape(1, -1)),
    ):
        if view.shape[1] >= m and bool((_per_group(view, m) <= n).all()):
            return f"{where}; it is {n}:{m} {otherwise}"
    return where
