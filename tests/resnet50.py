"""ResNet-50 on 224 x 224 images as the papers count it, without any arithmetic."""

from collections.abc import Collection
from dataclasses import replace
from functools import cache

import torch
from torch import nn

import gossamer
from gossamer.measure.macs import Account, LayerMacs, TrainingMacs, training_products
from gossamer.train.models import build_model


@cache
def layers() -> tuple[LayerMacs, ...]:
    """The dense layers, from a run on `meta`."""
    rows: list[LayerMacs] = []
    with torch.device("meta"):
        model = build_model("resnet50-imagenet", num_classes=1000, in_shape=(3, 224, 224)).eval()
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):

                def seen(module: nn.Module, _: object, out: torch.Tensor, name: str = name) -> None:
                    shape, size = tuple(module.weight.shape), module.weight.numel()
                    uses = out[0, 0].numel()
                    rows.append(LayerMacs(name, type(module).__name__, shape, uses, size, size))

                module.register_forward_hook(seen)
        with torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    return tuple(rows)


def factors(
    method: gossamer.Method, total_steps: int, counted: int, dense: Collection[str] = ()
) -> tuple[float, float]:
    """MACs of one forward pass, and of the first `counted` training steps, as shares of the dense.

    The supports are those that the method starts with; layers named in `dense` are excluded.
    """
    sparse = [row for row in layers() if row.name not in dense]
    counts = method.budget([torch.Size(row.shape) for row in sparse])
    kept = {row.name: count for row, count in zip(sparse, counts, strict=True)}
    rows = tuple(replace(row, nonzeros=kept.get(row.name, row.weights)) for row in layers())
    account = Account(rows, other_macs=0, other_nonzeros=0, bytes_on_disk=0)
    run = TrainingMacs()
    for step in range(1, counted + 1):
        cost = method.cost
        if method.wants_dense_grad(gossamer.Progress(step, total_steps)):
            cost = cost._replace(sparse_grad_weight=False)
        forward, grad_input, grad_weight = training_products(account, **cost._asdict())
        run.add(1, forward=forward, grad_input=grad_input, grad_weight=grad_weight)
    once = account.macs_executed
    return account.macs_sparse / once, run.total / (3 * counted * once)
