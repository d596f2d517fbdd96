"""What zeros that are left in a model bring: an honest line for reports."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.measure.pattern import check_nm

__all__ = ["zeros_note"]

_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@torch.no_grad()
def zeros_note(model: nn.Module) -> str:
    """What the zeros in a plain model's weights bring, and where; empty when it has next to none.

    Measured at 90 % zeros and at 2:4 on CPUs: PyTorch, ONNX Runtime (`benchmarks/zeros.py`) and
    OpenVINO 2026.4 take as long as for dense weights.
    """
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    weights = [p for layer in layers for p in layer.parameters(recurse=False) if p.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    zeros = total - sum(int(weight.count_nonzero()) for weight in weights)
    if zeros < 0.01 * total or not total:
        return ""
    note = (
        f"{zeros / total:.1%} of the weights are zero, and as values zeros bring nothing: PyTorch "
        "(eager and compiled), ONNX Runtime and OpenVINO multiply by them as by any number, and "
        "the file is as large. Speed comes from channels that gossamer.shrink cuts."
    )
    if fit := _two_of_four(model):
        note += (
            f" {fit} linear layers and 1x1 convolutions are 2:4: on a CUDA GPU with sparse tensor "
            "cores gossamer.export.to_semi_structured runs them sparse, where it measures that to "
            "be faster; on a CPU 2:4 brings nothing."
        )
    return note


def _two_of_four(model: nn.Module) -> int:
    """How many layers, of the kinds that 2:4 hardware serves, have the pattern."""
    if not any(isinstance(module, (nn.Linear, nn.Conv2d)) for module in model.modules()):
        return 0
    return sum(
        row.fits and row.shape[1] % 4 == 0 and all(size == 1 for size in row.shape[2:])
        for row in check_nm(model, 2, 4).layers
    )
