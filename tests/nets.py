"""Small networks of every topology a cut has to survive, and a plain training loop.

All image nets take `(batch, 3, 8, 8)` and give `(batch, 4)`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer

Batch = tuple[Tensor, Tensor]
Step = Callable[[int], None]

IMAGE = (3, 8, 8)
CLASSES = 4


def _conv_bn(c_in: int, c_out: int, kernel: int = 3, bias: bool = False) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]


class Vgg(nn.Module):
    """Convolutions with bias and batch norm, two max pools, a global pool."""

    def __init__(self, widths: Sequence[int] = (12, 16, 20, 20)) -> None:
        super().__init__()
        one, two, three, four = widths
        self.features = nn.Sequential(
            *_conv_bn(3, one, bias=True),
            *_conv_bn(one, two, bias=True),
            nn.MaxPool2d(2),
            *_conv_bn(two, three, bias=True),
            *_conv_bn(three, four, bias=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(four, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.shortcut = nn.Sequential()
        if c_in != c:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 2 * c, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * c)
        self.shortcut = nn.Sequential()
        if c_in != 2 * c:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class Residual(nn.Module):
    """A stem, two blocks with a projection each, one without, a pool and a classifier."""

    def __init__(self, block: type[nn.Module], widths: tuple[int, int], expansion: int) -> None:
        super().__init__()
        one, two = widths
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(block(8, one), block(one * expansion, one))
        self.layer2 = nn.Sequential(block(one * expansion, two))
        self.fc = nn.Linear(two * expansion, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.layer1(x), 2)
        return self.fc(self.layer2(x).mean((2, 3)))


class MobileNet(nn.Module):
    """Depthwise convolutions (one with bias) between pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 12))
        self.depthwise1 = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm1 = nn.BatchNorm2d(12)
        self.pointwise1 = nn.Sequential(*_conv_bn(12, 20, 1))
        self.depthwise2 = nn.Conv2d(20, 20, 3, stride=2, padding=1, groups=20, bias=False)
        self.norm2 = nn.BatchNorm2d(20)
        self.pointwise2 = nn.Sequential(*_conv_bn(20, 24, 1))
        self.classifier = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm1(self.depthwise1(self.stem(x))))
        x = self.pointwise1(x)
        x = F.relu6(self.norm2(self.depthwise2(x)))
        return self.classifier(self.pointwise2(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """MobileNetV2: widen, filter each channel, narrow without an activation, add."""

    def __init__(self, c_in: int, c: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(*_conv_bn(c_in, wide, 1))
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, c, 1)
        self.project_norm = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.norm(self.depthwise(self.expand(x))))
        out = self.project_norm(self.project(out))
        return x + out if out.shape == x.shape else out


class MobileNetV2(nn.Module):
    """A stream without projections: whoever adds to it writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 8))
        self.block1 = InvertedResidual(8, 8, 16)
        self.block2 = InvertedResidual(8, 12, 20)
        self.block3 = InvertedResidual(12, 12, 16)
        self.last = nn.Sequential(*_conv_bn(12, 16, 1))
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block1(self.stem(x)), 2)
        return self.classifier(self.last(self.block3(self.block2(x))).mean((2, 3)))


class DenseNet(nn.Module):
    """Every layer reads all before it, behind a norm of its own; a transition; a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(10)
        self.conv1 = nn.Conv2d(10, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(18)
        self.conv2 = nn.Conv2d(18, 8, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(26)
        self.transition = nn.Conv2d(26, 12, 1)
        self.norm4 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        x = F.avg_pool2d(self.transition(F.relu(self.norm3(x))), 2)
        x = torch.cat([x, self.conv3(F.relu(self.norm4(x)))], 1)
        return self.fc(F.relu(x).mean((2, 3)))


class ConvFlattenLinear(nn.Module):
    """No norm; every channel of the last convolution feeds 16 inputs of the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4 * 4, 24)
        self.fc2 = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Sequence1d(nn.Module):
    """Conv1d with BatchNorm1d, then linear layers on `(batch, positions, features)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(12, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm1d(16)
        self.conv2 = nn.Conv1d(16, 20, 3, padding=1)
        self.fc1 = nn.Linear(20, 24)
        self.fc2 = nn.Linear(24, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x.flatten(2).reshape(len(x), 12, 16))))
        x = F.relu(self.conv2(x)).transpose(1, 2)
        return self.head(self.fc2(F.gelu(self.fc1(x))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 24),
        nn.ReLU(),
        nn.Linear(24, 20),
        nn.ReLU(),
        nn.Linear(20, CLASSES),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": Vgg,
    "basic": lambda: Residual(BasicBlock, (12, 20), 1),
    "bottleneck": lambda: Residual(Bottleneck, (10, 14), 2),
    "mobilenet": MobileNet,
    "mlp": mlp,
    "conv_flatten_linear": ConvFlattenLinear,
    "sequence1d": Sequence1d,
}


# Nets with streams that many layers write or read.
SKIP_NETS: dict[str, Callable[[], nn.Module]] = {
    "basic": NETS["basic"],
    "bottleneck": NETS["bottleneck"],
    "mobilenetv2": MobileNetV2,
    "densenet": DenseNet,
}


def net(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with norms away from their start values, so that a wrong cut shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {**NETS, **SKIP_NETS}[name]().to(dtype)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(count: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *IMAGE, generator=generator, dtype=torch.float64).to(dtype)


def batches(
    steps: int, size: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Random images whose label can be learnt: the class of largest mean in a fixed projection."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(192, CLASSES, generator=generator, dtype=torch.float64)
    made = []
    for _ in range(steps):
        x = torch.randn(size, *IMAGE, generator=generator, dtype=torch.float64)
        made.append((x.to(dtype), (x.flatten(1) @ teacher).argmax(1)))
    return made


def train(
    model: nn.Module,
    sparsifier: "gossamer.Sparsifier",
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    *,
    before_backward: Callable[[Tensor], Tensor] | None = None,
    before_step: Step | None = None,
    after_step: Step | None = None,
) -> list[float]:
    """The plain loop of the README; `before_step` and `after_step` get the sparsifier's step."""
    losses = []
    model.train()
    for x, y in data:
        loss = F.cross_entropy(model(x), y) + sparsifier.penalty()
        if before_backward is not None:
            loss = before_backward(loss)
        loss.backward()
        optimizer.step()
        if before_step is not None:
            before_step(sparsifier.step_count + 1)
        sparsifier.step(optimizer)
        if after_step is not None:
            after_step(sparsifier.step_count)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    training = [module for module in model.modules() if module.training]
    model.eval()
    out = model(x)
    for module in training:
        module.training = True
    return out


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](model.parameters())


class Reader(NamedTuple):
    """Who reads a producer's channels: the layer, its inputs per channel, depthwise on the way.

    `start`: the first of those inputs, behind a concatenation.
    """

    layer: str
    per_channel: int = 1
    depthwise: str = ""
    start: int = 0


class Stream(NamedTuple):
    """Channels that several layers write or read, or one each."""

    producers: tuple[str, ...]
    readers: tuple[Reader, ...]


# Producer -> its only reader, written by hand from the classes above: what may lose channels.
READERS: dict[str, dict[str, Reader]] = {
    "vgg": {
        "features.0": Reader("features.3"),
        "features.3": Reader("features.7"),
        "features.7": Reader("features.10"),
        "features.10": Reader("classifier"),
    },
    "basic": {
        f"{block}.conv1": Reader(f"{block}.conv2") for block in ("layer1.0", "layer1.1", "layer2.0")
    },
    "bottleneck": {
        f"{block}.conv{i}": Reader(f"{block}.conv{i + 1}")
        for block in ("layer1.0", "layer1.1", "layer2.0")
        for i in (1, 2)
    },
    "mobilenet": {
        "stem.0": Reader("pointwise1.0", depthwise="depthwise1"),
        "pointwise1.0": Reader("pointwise2.0", depthwise="depthwise2"),
        "pointwise2.0": Reader("classifier"),
    },
    "mlp": {"1": Reader("3"), "3": Reader("5")},
    "conv_flatten_linear": {
        "conv1": Reader("conv2"),
        "conv2": Reader("fc1", per_channel=16),
        "fc1": Reader("fc2"),
    },
    "sequence1d": {
        "conv1": Reader("conv2"),
        "conv2": Reader("fc1"),
        "fc1": Reader("fc2"),
        "fc2": Reader("head"),
    },
}


def _inside(blocks: Sequence[str], convolutions: int) -> dict[str, Stream]:
    """conv1 -> conv2 (-> conv3) of residual blocks."""
    return {
        f"{block}.conv{i}": Stream((f"{block}.conv{i}",), (Reader(f"{block}.conv{i + 1}"),))
        for block in blocks
        for i in range(1, convolutions)
    }


def _residual_streams(last: str) -> dict[str, Stream]:
    """Of `Residual`, whose blocks end with convolution `last`."""
    conv, shortcut = f"{{}}.{last}".format, "{}.shortcut.0".format
    stage2 = (Reader("layer2.0.conv1"), Reader(shortcut("layer2.0")))
    return {
        "conv1": Stream(("conv1",), (Reader("layer1.0.conv1"), Reader(shortcut("layer1.0")))),
        conv("layer1.0"): Stream(
            (conv("layer1.0"), shortcut("layer1.0"), conv("layer1.1")),
            (Reader("layer1.1.conv1"), *stage2),
        ),
        conv("layer2.0"): Stream((conv("layer2.0"), shortcut("layer2.0")), (Reader("fc"),)),
    }


def _inverted(block: str) -> Stream:
    expand = f"{block}.expand.0"
    reader = Reader(f"{block}.project", depthwise=f"{block}.depthwise")
    return Stream((expand,), (reader,))


# First producer -> the stream: what may lose channels with `prune_residual`. By hand, like READERS.
STREAMS: dict[str, dict[str, Stream]] = {
    "basic": {
        **_residual_streams("conv2"),
        **_inside(("layer1.0", "layer1.1", "layer2.0"), 2),
    },
    "bottleneck": {
        **_residual_streams("conv3"),
        **_inside(("layer1.0", "layer1.1", "layer2.0"), 3),
    },
    "mobilenetv2": {
        "stem.0": Stream(
            ("stem.0", "block1.project"), (Reader("block1.expand.0"), Reader("block2.expand.0"))
        ),
        "block1.expand.0": _inverted("block1"),
        "block2.expand.0": _inverted("block2"),
        "block2.project": Stream(
            ("block2.project", "block3.project"), (Reader("block3.expand.0"), Reader("last.0"))
        ),
        "block3.expand.0": _inverted("block3"),
        "last.0": Stream(("last.0",), (Reader("classifier"),)),
    },
    "densenet": {
        "stem": Stream(("stem",), (Reader("conv1"), Reader("conv2"), Reader("transition"))),
        "conv1": Stream(("conv1",), (Reader("conv2", start=10), Reader("transition", start=10))),
        "conv2": Stream(("conv2",), (Reader("transition", start=18),)),
        "transition": Stream(("transition",), (Reader("conv3"), Reader("fc"))),
        "conv3": Stream(("conv3",), (Reader("fc", start=12),)),
    },
}
