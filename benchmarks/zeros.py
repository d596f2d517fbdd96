"""What zeros bring by themselves: the time of sparse networks over their dense twin's, by engine.

    python benchmarks/zeros.py [--batch 8] [--rounds 15]

Four linear layers of 2048 with ReLU, and a ResNet-18 (CIFAR stem); random weights, float32, one
thread, process CPU time, in turns. Against dense weights: 90 % zeros at random places, 2:4, and as
dense as before with half the hidden channels (in the ResNet those inside its blocks). Times are in
the same engine; the file is ONNX.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from gossamer.export import to_onnx
from gossamer.measure import compare_latency
from gossamer.measure.engines import find_engine
from gossamer.train.models import build_model
from interleave import conditions

ENGINES = ("eager", "compiled", "frozen", "onnx")


def perceptron(hidden: int) -> nn.Module:
    widths = (2048, hidden, 2048, hidden, 2048)
    layers = [nn.Linear(one, other) for one, other in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def resnet(share: float) -> nn.Module:
    model = build_model("resnet18", num_classes=10, in_shape=(3, 32, 32))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            inner = round(block.conv1.out_channels * share)
            old, new = block.conv1, block.conv2
            block.conv1 = nn.Conv2d(old.in_channels, inner, 3, old.stride, 1, bias=False)
            block.bn1 = nn.BatchNorm2d(inner)
            block.conv2 = nn.Conv2d(inner, new.out_channels, 3, 1, 1, bias=False)
    return model


@torch.no_grad()
def masked(model: nn.Module, pattern: str) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight
            if pattern == "90 %":
                weight[torch.rand_like(weight) < 0.9] = 0
            elif weight.shape[1] % 4 == 0:  # two of four consecutive inputs
                weight.unflatten(1, (-1, 4))[:, :, :2] = 0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"batch {wanted.batch}, {conditions()}")
    cases = {
        "4 x linear 2048": (perceptron(2048), perceptron(1024), (2048,)),
        "ResNet-18": (resnet(1.0), resnet(0.5), (3, 32, 32)),
    }
    for name, (dense, half, shape) in cases.items():
        dense, half = dense.eval(), half.eval()
        x = torch.randn(wanted.batch, *shape)
        models = {
            "dense": dense,
            "90 % zeros": masked(dense, "90 %"),
            "2:4": masked(dense, "2:4"),
            "half the channels": half,
        }
        print(f"\n{name:<18}" + "".join(f"{model:>20}" for model in models))
        with tempfile.TemporaryDirectory() as folder:
            sizes = [
                to_onnx(Path(folder) / "model.onnx", model, x).bytes for model in models.values()
            ]
        print(f"{'file':<18}" + "".join(f"{size / sizes[0]:>19.2f}x" for size in sizes))
        for engine in ENGINES:
            ready = {
                key: find_engine(engine).prepare(model, x, threads=1).call
                for key, model in models.items()
            }
            times = compare_latency(ready, x, rounds=wanted.rounds, threads=1, clock="cpu")
            cells = [f"{times[key].ratio.median:.2f}x" for key in models]
            print(f"{engine:<18}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
