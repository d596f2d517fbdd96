"""Bake: turn parametrized layers back into plain ones that hold their effective weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from gossamer.sparse_weight import SparseWeight

__all__ = ["finalize", "sparse_layers"]


def sparse_layers(model: nn.Module) -> dict[str, SparseWeight]:
    """Every SparseWeight by site name: the layer's, and in recurrent layers the matrix's."""
    return {
        f"{name}.{tensor}".removesuffix(".weight").lstrip("."): sparse
        for name, module in model.named_modules()
        for tensor, (_, sparse) in _parametrized_weights(module).items()
    }


@torch.no_grad()
def finalize(model: nn.Module) -> nn.Module:
    """Make `model` a plain model again, in place: every weight holds its effective value.

    Weights off the support are exact zeros. The latent Parameter objects become the weights, so an
    optimizer still refers to them. Works on copies too: `finalize(ema_copy)`. Returns `model`.

    PyTorch's own `remove_parametrizations` edits the class that a layer shares with its deep
    copies, and so breaks the original when a copy is baked; this resets `__class__` instead.
    """
    for module in model.modules():
        found = _parametrized_weights(module)
        if not found:
            continue
        for latent, sparse in found.values():
            effective = sparse(latent)
            latent.data = torch.where(
                sparse.support(latent), effective, torch.zeros_like(effective)
            )
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        # Parameters get the order of a fresh layer: weights, then biases; or layer by layer.
        latents = {tensor: latent for tensor, (latent, _) in found.items()}
        parameters = {**latents, **module._parameters}
        order = module._flat_weights_names if isinstance(module, nn.RNNBase) else parameters
        module._parameters.clear()
        for tensor in order:
            module.register_parameter(tensor, parameters[tensor])
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return model


def _parametrized_weights(module: nn.Module) -> dict[str, tuple[nn.Parameter, SparseWeight]]:
    parametrizations = module._modules.get("parametrizations")
    if not isinstance(parametrizations, nn.ModuleDict):
        return {}
    found = {}
    for tensor, parametrized in parametrizations.items():
        assert isinstance(parametrized, ParametrizationList)
        if isinstance(parametrized[0], SparseWeight):
            assert isinstance(parametrized.original, nn.Parameter)
            found[tensor] = (parametrized.original, parametrized[0])
    return found
