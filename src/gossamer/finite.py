"""When a loss is NaN or infinite: which layer it began in, said before the weights are changed.

    loss = criterion(model(x), y) + sparsifier.penalty()
    loss.backward()
    check_loss(loss, model, lambda: model(x))   # raises FloatingPointError, and names the layer
    optimizer.step()

Asked for after `backward`, the value is there before a GPU has done its work, so that the question
costs next to nothing. With a GradScaler do not ask: it skips such steps by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["check_loss", "check_weights"]


def check_loss(
    loss: Tensor, model: nn.Module, again: Callable[[], object], step: int | None = None
) -> None:
    """Raise FloatingPointError unless the loss is finite; says where what is not finite began.

    Args:
        loss: 0-d, of one batch.
        model: Whose layers to look at.
        again: Runs the model on that batch once more; called only if the loss is not finite.
        step: Of the optimizer step that this batch belongs to, for the message.
    """
    if bool(loss.detach().isfinite()):
        return
    when = "" if step is None else f" of step {step}"
    raise FloatingPointError(f"the loss{when} is {loss.item():g}: {_origin(model, again)}")


def check_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise FloatingPointError unless all weights, and what the optimizer remembers, are finite."""
    for name, parameter in model.named_parameters():
        _check(f"{_plain(name)} is", parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                _check(f"{key} of {_plain(name)} in the optimizer is", value)


def _check(what: str, tensor: Tensor) -> None:
    if not _finite(tensor):
        raise FloatingPointError(f"{what} no longer finite")


@torch.no_grad()
def _origin(model: nn.Module, again: Callable[[], object]) -> str:
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return (
                f"{_plain(name)} is not finite, so an earlier gradient was not. Lower the learning "
                "rate, or clip gradients"
            )
    with _watched(model) as found:
        again()
    if not found:
        return (
            "all layers give finite values, so it is the loss itself, or a penalty: look at what "
            "it divides by and takes logarithms of"
        )
    name, what, fed, largest = found[0]
    if not fed:
        return f"the input of {name} ({what}), the first layer to get such, is not finite"
    return (
        f"{name} ({what}) is the first layer to give values that are not finite, from inputs of up "
        f"to {largest:.3g} and weights that are finite. Lower the learning rate, clip gradients, "
        "or compute this layer in 32 bits"
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, str, bool, float]]]:
    """Lists layers that do not give finite values, in order: name, type, whether their input was
    finite, and its largest magnitude.
    """
    found: list[tuple[str, str, bool, float]] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                given = _tensors(inputs)
                largest = max((float(x.abs().max()) for x in given if x.numel()), default=0.0)
                kind = type(module).__name__.removeprefix("Parametrized")
                found.append((name, kind, all(map(_finite, given)), largest))

        return hook

    handles = [
        module.register_forward_hook(look(name or "the model"))
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".")
        and not any(key != "parametrizations" for key, _ in module.named_children())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _plain(name: str) -> str:
    """The parameter's name in the plain model; of thresholds, the layer's and their own."""
    return name.replace("parametrizations.", "").replace(".original", "")
