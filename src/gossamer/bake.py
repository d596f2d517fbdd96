"""Bake: turn parametrized layers back into plain ones that hold their effective weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gossamer.sharding import is_sharded, reshard, whole
from gossamer.sparse_weight import SparseWeight

__all__ = ["finalize", "latent", "sparse_layers"]


def sparse_layers(model: nn.Module) -> dict[str, SparseWeight]:
    """Every SparseWeight by site name: the layer's, and in recurrent layers the matrix's."""
    return {
        f"{name}.{tensor}".removesuffix(".weight").lstrip("."): sparse
        for name, module in model.named_modules()
        for tensor, (_, sparse) in _parametrized_weights(module).items()
    }


def latent(module: nn.Module, tensor: str) -> nn.Parameter:
    """The latent weight of a layer's sparse weight, as the layer has it now."""
    return _parametrized_weights(module)[tensor][0]


@torch.no_grad()
def finalize(model: nn.Module, into: nn.Module | None = None) -> nn.Module:
    """Make `model` a plain model again, in place: every weight holds its effective value.

    Weights off the support are exact zeros. The latent Parameter objects become the weights, so an
    optimizer still refers to them. Works on copies too: `finalize(ema_copy)`. Returns `model`.

    PyTorch's own `remove_parametrizations` edits the class that a layer shares with its deep
    copies, and so breaks the original when a copy is baked; this resets `__class__` instead.

    Args:
        model: With sparse weights.
        into: A plain model of the same class that is filled and returned instead, `model` staying
            as it is. A sharded model (FSDP2) needs it, and all processes must call this then.

    Raises:
        ValueError: A sharded model without `into`, or an `into` of other tensors.
    """
    if into is not None:
        return _fill(into, model)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "the model is sharded over processes, and FSDP cannot give back a plain one: pass a "
            "fresh model of the same class to fill, finalize(into=MyModel())"
        )
    for module in model.modules():
        found = _parametrized_weights(module)
        if not found:
            continue
        for latent, sparse in found.values():
            latent.data = _effective(latent, sparse)
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


def _fill(into: nn.Module, model: nn.Module) -> nn.Module:
    """Copy all tensors of `model`, sparse weights as effective ones, to the plain `into`."""
    reshard(model)
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for tensor, (weight, sparse) in _parametrized_weights(module).items():
            found[prefix + tensor] = whole(_effective(weight, sparse))
    for name, value in model.state_dict().items():
        if ".parametrizations." not in f".{name}":
            found[name] = whole(value)
    wanted = into.state_dict()
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    for name in {**shapes, **found}:
        got = tuple(found[name].shape) if name in found else None
        if got != shapes.get(name):
            raise ValueError(
                f"into= does not fit: {name} is {got} in the sharded model and {shapes.get(name)} "
                "in it (shape, or None where there is none): pass a fresh model of the same class"
            )
    into.load_state_dict(found)
    return into


def _effective(latent: Tensor, sparse: SparseWeight) -> Tensor:
    """The effective weight, exact zeros off the support."""
    effective = sparse(latent)
    return torch.where(sparse.support(latent), effective, torch.zeros_like(effective))


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
