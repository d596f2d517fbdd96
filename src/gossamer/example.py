"""Examples: what a model is run on, to trace it, to compare outputs, to count and to time.

An example is a tensor, a tuple of positional inputs or a mapping of keyword inputs, with the batch
in dimension 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Example",
    "batch_size",
    "call_arguments",
    "evaluating",
    "example_tensors",
    "first_samples",
    "map_tensors",
    "nested_tensors",
    "random_sample",
    "run",
]

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def call_arguments(example: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split an example into the positional and keyword arguments of the model's forward.

    Raises:
        TypeError: The example is no tensor, tuple, list or mapping.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise TypeError(
        f"the example is a {type(example).__name__}; pass a tensor, a tuple of positional inputs "
        "or a mapping of keyword inputs, with the batch first"
    )


def run(model: nn.Module, example: object) -> Any:
    """The model's output on the example."""
    args, kwargs = call_arguments(example)
    return model(*args, **kwargs)


def example_tensors(example: object) -> list[Tensor]:
    """The tensors among an example's inputs, in order."""
    args, kwargs = call_arguments(example)
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def batch_size(example: object) -> int:
    """Dimension 0 of the example's first tensor.

    Raises:
        ValueError: It holds no tensor, or its first tensor has no sample in it.
    """
    tensors = example_tensors(example)
    if not tensors:
        raise ValueError("the example holds no tensor; pass a batch, with the samples in dim 0")
    shape = tuple(tensors[0].shape)
    if not shape or not shape[0]:
        raise ValueError(
            f"the example's first tensor has shape {shape} and no batch in dim 0; pass one or more "
            "samples stacked in dim 0, as x.unsqueeze(0) does for one"
        )
    return shape[0]


def map_tensors(example: object, change: Callable[[Tensor], Tensor]) -> Any:
    """The example with every tensor changed, also inside nested tuples, lists and mappings."""
    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: map_tensors(value, change) for key, value in example.items()}
    if isinstance(example, (list, tuple)):
        return type(example)(map_tensors(value, change) for value in example)
    return example


def nested_tensors(value: object) -> Iterator[Tensor]:
    """All tensors in an output: a tensor, or mappings, sequences and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from nested_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nested_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from nested_tensors(getattr(value, field.name))


def first_samples(example: Example, count: int) -> Example:
    """The first `count` samples, as copies: enough to compare outputs on.

    The example as it is when its tensors do not all have the batch first.
    """
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in example_tensors(example)}
    if len(sizes) != 1 or 0 in sizes:
        return example
    cut: Example = map_tensors(example, lambda tensor: tensor[:count].detach().clone())
    return cut


def random_sample(example: Example) -> Example:
    """A batch of two: the first sample, and one of values drawn like those of the example.

    Floating-point values are normal with the example's mean and deviation, others are drawn among
    those there are. The example as it is when its tensors do not all have the batch first.
    """
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in example_tensors(example)}
    if len(sizes) != 1 or 0 in sizes:
        return example
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        first = tensor[:1].detach()
        if tensor.is_floating_point():
            noise = torch.randn(first.shape, generator=generator).to(first)
            spread = tensor.std() if tensor.numel() > 1 else 1.0
            return torch.cat([first, noise * spread + tensor.mean()])
        chosen = torch.randint(tensor.numel(), first.shape, generator=generator)
        return torch.cat([first, tensor.detach().flatten()[chosen.to(tensor.device)]])

    drawn: Example = map_tensors(example, draw)
    return drawn


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Put the modules among `models` into eval mode; afterwards every submodule is as it was."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    flags = [(module, module.training) for model in modules for module in model.modules()]
    try:
        for model in modules:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
