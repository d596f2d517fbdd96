"""Bake: turn parametrized layers back into plain ones that hold their effective weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from gossamer.sparse_weight import SparseWeight

__all__ = ["finalize", "sparse_layers"]


def sparse_layers(model: nn.Module) -> dict[str, SparseWeight]:
    """The SparseWeight of every layer that has one, by layer name."""
    found = {}
    for name, module in model.named_modules():
        parametrized = _parametrized_weight(module)
        if parametrized is not None:
            sparse = parametrized[0]
            assert isinstance(sparse, SparseWeight)
            found[name] = sparse
    return found


@torch.no_grad()
def finalize(model: nn.Module) -> nn.Module:
    """Make `model` a plain model again, in place: every weight holds its effective value.

    Weights off the support are exact zeros. The latent Parameter objects become the weights, so an
    optimizer still refers to them. Works on copies too: `finalize(ema_copy)`. Returns `model`.

    PyTorch's own `remove_parametrizations` edits the class that a layer shares with its deep
    copies, and so breaks the original when a copy is baked; this resets `__class__` instead.
    """
    for module in model.modules():
        parametrized = _parametrized_weight(module)
        if parametrized is None:
            continue
        sparse = parametrized[0]
        latent = parametrized.original
        assert isinstance(sparse, SparseWeight)
        assert isinstance(latent, nn.Parameter)
        effective = sparse(latent)
        latent.data = torch.where(sparse.support(latent), effective, torch.zeros_like(effective))
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        module.register_parameter("weight", latent)
        # Parameters keep the order of a fresh layer: weight, then bias.
        module._parameters["bias"] = module._parameters.pop("bias", None)
    return model


def _parametrized_weight(module: nn.Module) -> ParametrizationList | None:
    parametrizations = module._modules.get("parametrizations")
    if not isinstance(parametrizations, nn.ModuleDict) or "weight" not in parametrizations:
        return None
    parametrized = parametrizations["weight"]
    assert isinstance(parametrized, ParametrizationList)
    return parametrized if isinstance(parametrized[0], SparseWeight) else None
