"""Image classifiers by name: the networks of the sparse-training papers, or the user's own.

Convolutions in front of a norm have no bias and start from He's initialisation (fan out, ReLU);
linear layers start as PyTorch makes them. `width` multiplies the number of channels (or hidden
units) of every layer and rounds it, to at least 1; the number of classes stays.
"""

import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, int, int]
Builder: TypeAlias = Callable[[int, Shape, float], nn.Module]


def build_model(
    name: str, *, num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0
) -> nn.Module:
    """The network `name` for images of `in_shape` (c, h, w); its output is (b, num_classes).

    `name` is one of `model_names()`, any `wrn-DEPTH-WIDEN` (depth 10, 16, 22, ...), or a factory
    `package.module:factory`, which may lie in the current directory and gets `num_classes` and
    `in_shape` where its signature names them. `width` scales every width by that factor (rounded,
    at least 1): ResNet-18 at 0.25 has 16, 32, 64, 128 channels.

    Raises:
        ValueError: unknown name, too small an input, a `width` for a factory, sizes that are not
            positive or that memory does not hold.
        TypeError: the factory cannot be called, or returns something else than an `nn.Module`.
    """
    _check_sizes(num_classes, in_shape, width)
    if ":" in name:
        if width != 1.0:
            raise ValueError(
                f"width={width} scales the built-in models only: let {name} choose its widths"
            )
        return _from_factory(name, num_classes, in_shape)
    weights = weigh(name, num_classes=num_classes, in_shape=in_shape, width=width)
    memory = _memory()
    if 4 * weights > memory:
        raise ValueError(
            f"{name} would have {weights:.3g} weights with num_classes={num_classes}, "
            f"in_shape={in_shape}, width={width:g}, and 4 bytes each are more than the "
            f"{memory / 1e9:.3g} GB of this machine: give smaller ones"
        )
    model = _builder(name)(num_classes, in_shape, width)
    _start_convolutions(model)
    return model


def draw_again(model: nn.Module) -> None:
    """Draw the weights of a built-in network anew, as `build_model` does, by its widths now."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.LSTM)):
            module.reset_parameters()
    _start_convolutions(model)


def _start_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def weigh(
    name: str, *, num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0
) -> float:
    """How many weights a built-in network would have; inf where they cannot be counted.

    Raises:
        ValueError: unknown name, too small an input, not positive sizes.
    """
    _check_sizes(num_classes, in_shape, width)
    builder = _builder(name)
    least = _SMALLEST_INPUT.get(name, 1)
    if min(in_shape[1:]) < least:
        raise ValueError(
            f"{name} pools its input away at {in_shape[1]}x{in_shape[2]} pixels; it needs at "
            f"least {least}x{least}: enlarge the images or choose a model with fewer poolings"
        )
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in builder(num_classes, in_shape, width).parameters())
    except (RuntimeError, OverflowError, TypeError):  # sizes that no tensor can have
        return math.inf


def _check_sizes(num_classes: int, in_shape: tuple[int, int, int], width: float) -> None:
    if len(in_shape) != 3 or min(*in_shape, num_classes) < 1 or not 0 < width < math.inf:
        raise ValueError(
            f"got num_classes={num_classes}, in_shape={in_shape}, width={width}; wanted at least "
            "one class, in_shape=(channels, height, width) and a finite width above 0"
        )


def _memory() -> float:
    """Bytes of this machine's memory; inf where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def _builder(name: str) -> Builder:
    wide = re.fullmatch(r"wrn-(\d{1,4})-(\d{1,4})", name)
    if wide:
        return partial(_wide_resnet, int(wide[1]), int(wide[2]))
    if name in _BUILDERS:
        return _BUILDERS[name]
    near = difflib.get_close_matches(name, model_names())
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"no model is called {name!r}{hint} gossamer.train.models.model_names() lists them; "
        "a model of your own is given as package.module:factory"
    )


def model_names() -> list[str]:
    """The names `build_model` knows; of the `wrn-DEPTH-WIDEN` family, the usual ones."""
    return [*_BUILDERS, "wrn-16-8", "wrn-22-2", "wrn-28-10"]


def _from_factory(name: str, num_classes: int, in_shape: Shape) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    # A console script does not put the current directory on the path, `python -m` does. It stays
    # there: what the user's module imports later, or in a worker process, must be found as well.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ValueError(
            f"{name}: there is no module {error.name!r} in {os.getcwd()} or among the installed "
            "packages; wanted package.module:factory"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        near = difflib.get_close_matches(attribute, dir(module))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name}: module {module_name} has no {attribute!r}{hint}")
    if not callable(factory):
        raise TypeError(
            f"{name} is a {type(factory).__name__}; wanted a function or class that makes the model"
        )
    offered = {"num_classes": num_classes, "in_shape": in_shape}
    wanted = inspect.signature(factory).parameters
    model = factory(**{key: value for key, value in offered.items() if key in wanted})
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} returned a {type(model).__name__}; wanted a torch.nn.Module: return the model"
        )
    return model


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)


def _conv_bn_relu(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = _conv(c_in, c_out, kernel, stride, groups)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def _pooled_classifier(features: list[nn.Module], channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, num_classes),
        )
    )


def _lenet_300_100(num_classes: int, in_shape: Shape, width: float) -> nn.Module:
    c, h, w = in_shape
    hidden1, hidden2 = _scaled(300, width), _scaled(100, width)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(c * h * w, hidden1),
            relu1=nn.ReLU(inplace=True),
            fc2=nn.Linear(hidden1, hidden2),
            relu2=nn.ReLU(inplace=True),
            fc3=nn.Linear(hidden2, num_classes),
        )
    )


def _lenet5(num_classes: int, in_shape: Shape, width: float) -> nn.Module:
    """LeNet-5-Caffe, with a ReLU after each convolution as in the sparse-training papers' code."""
    c, h, w = in_shape
    conv1, conv2, hidden = (_scaled(channels, width) for channels in (20, 50, 500))
    pooled_h, pooled_w = (((size - 4) // 2 - 4) // 2 for size in (h, w))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(c, conv1, 5),
            relu1=nn.ReLU(inplace=True),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(conv1, conv2, 5),
            relu2=nn.ReLU(inplace=True),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(conv2 * pooled_h * pooled_w, hidden),
            relu3=nn.ReLU(inplace=True),
            fc2=nn.Linear(hidden, num_classes),
        )
    )


class RowLSTM(nn.Module):
    """Two LSTM layers that read an image row by row, and a classifier of the last output.

    (b, c, h, w) -> (b, num_classes); a row is c * w numbers. With 128 and 256 units these are DST's
    LSTM-a and LSTM-b (2005.06870).
    """

    def __init__(self, num_classes: int, in_shape: Shape, units: int):
        super().__init__()
        c, _, w = in_shape
        self.lstm = nn.LSTM(c * w, units, num_layers=2, batch_first=True)
        self.fc = nn.Linear(units, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, num_classes) for `x` (b, c, h, w)."""
        outputs, _ = self.lstm(x.transpose(1, 2).flatten(2))
        logits: Tensor = self.fc(outputs[:, -1])
        return logits


def _lstm(num_classes: int, in_shape: Shape, width: float) -> nn.Module:
    return RowLSTM(num_classes, in_shape, _scaled(128, width))


def _vgg(plan: tuple[int | str, ...], num_classes: int, in_shape: Shape, width: float) -> nn.Module:
    """VGG with batch norm (Simonyan and Zisserman, 1409.1556); in `plan`, "M" is a max pool."""
    channels = in_shape[0]
    features: list[nn.Module] = []
    for item in plan:
        if isinstance(item, str):
            features.append(nn.MaxPool2d(2))
        else:
            features += _conv_bn_relu(channels, _scaled(item, width), 3)
            channels = _scaled(item, width)
    return _pooled_classifier(features, channels, num_classes)


class BasicBlock(nn.Module):
    """relu(x + two 3x3 convolutions) (He et al., 1512.03385); the first one has the stride.

    (b, c_in, h, w) -> (b, c, h / stride, w / stride).
    """

    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1 = _conv(c_in, c, 3, stride)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = _conv(c, c, 3)
        self.bn2 = nn.BatchNorm2d(c)
        self.shortcut = _shortcut(c_in, c, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x` (b, c_in, h, w)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """relu(x + 1x1, 3x3, 1x1 convolutions) (He et al., 1512.03385); the 3x3 has the stride.

    (b, c_in, h, w) -> (b, 4 * c, h / stride, w / stride).
    """

    expansion = 4

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1 = _conv(c_in, c, 1)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = _conv(c, c, 3, stride)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = _conv(c, 4 * c, 1)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.shortcut = _shortcut(c_in, 4 * c, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x` (b, c_in, h, w)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """x + two 3x3 convolutions, each behind norm and ReLU (Zagoruyko and Komodakis, 1605.07146).

    Where the shape changes, the shortcut is a plain 1x1 convolution of the activated input.
    (b, c_in, h, w) -> (b, c, h / stride, w / stride).
    """

    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv(c_in, c, 3, stride)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = _conv(c, c, 3)
        self.shortcut = _conv(c_in, c, 1, stride) if c_in != c or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x` (b, c_in, h, w)."""
        out = F.relu(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(out)
        branch: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return shortcut + branch


Block: TypeAlias = type[BasicBlock] | type[Bottleneck] | type[PreActivationBlock]


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    if c_in == c_out and stride == 1:
        return nn.Identity()
    return nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


def _stages(
    block: Block, depths: tuple[int, ...], c_in: int, first: int, width: float
) -> tuple[OrderedDict[str, nn.Module], int]:
    """layer1, layer2, ... and their output channels; each stage doubles `first` and halves h, w."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, depth in enumerate(depths):
        c = _scaled(first * 2**stage, width)
        blocks: list[nn.Module] = []
        for position in range(depth):
            stride = 2 if stage > 0 and position == 0 else 1
            blocks.append(block(c_in, c, stride))
            c_in = c * block.expansion
        stages[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    return stages, c_in


def _resnet(
    block: Block,
    depths: tuple[int, ...],
    first: int,
    large: bool,
    num_classes: int,
    in_shape: Shape,
    width: float,
) -> nn.Module:
    """ResNet (He et al., 1512.03385); `large` has ImageNet's stem: 7x7 stride 2, max pool."""
    stem = _scaled(first, width)
    net: OrderedDict[str, nn.Module] = OrderedDict()
    net["conv1"] = _conv(in_shape[0], stem, 7, 2) if large else _conv(in_shape[0], stem, 3)
    net["bn1"] = nn.BatchNorm2d(stem)
    net["relu"] = nn.ReLU(inplace=True)
    if large:
        net["maxpool"] = nn.MaxPool2d(3, 2, 1)
    stages, channels = _stages(block, depths, stem, first, width)
    return nn.Sequential(net | stages | _head(channels, num_classes))


def _wide_resnet(
    depth: int, widen: int, num_classes: int, in_shape: Shape, width: float
) -> nn.Module:
    """Wide ResNet without dropout (Zagoruyko and Komodakis, 1605.07146)."""
    if depth < 10 or depth % 6 != 4 or widen < 1:
        raise ValueError(
            f"wrn-{depth}-{widen}: the depth must be 6 n + 4 (10, 16, 22, 28, ...) and the "
            "widening factor at least 1, as in wrn-28-10"
        )
    stem = _scaled(16, width)
    net: OrderedDict[str, nn.Module] = OrderedDict(conv1=_conv(in_shape[0], stem, 3))
    depths = (depth // 6,) * 3
    stages, channels = _stages(PreActivationBlock, depths, stem, 16 * widen, width)
    norm = OrderedDict(bn=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True))
    return nn.Sequential(net | stages | norm | _head(channels, num_classes))


def _head(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes)
    )


def _mobilenet_v1(num_classes: int, in_shape: Shape, width: float) -> nn.Module:
    """MobileNetV1 (Howard et al., 1704.04861).

    Inputs of 32 pixels or less keep their size through the first convolution and the first
    strided block, so that 32x32 arrives at the global pool as 4x4 (224x224 as 7x7).
    """
    early = 1 if max(in_shape[1:]) <= 32 else 2
    channels = _scaled(32, width)
    features = _conv_bn_relu(in_shape[0], channels, 3, early)
    plan = [(64, 1), (128, early), (128, 1), (256, 2), (256, 1), (512, 2)]
    plan += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
    for unscaled, stride in plan:
        c_out = _scaled(unscaled, width)
        features += _conv_bn_relu(channels, channels, 3, stride, groups=channels)
        features += _conv_bn_relu(channels, c_out, 1)
        channels = c_out
    return _pooled_classifier(features, channels, num_classes)


def _vgg_plan(*depths: int) -> tuple[int | str, ...]:
    widths = (64, 128, 256, 512, 512)
    return sum(((width,) * depth + ("M",) for width, depth in zip(widths, depths, strict=True)), ())


_BUILDERS: dict[str, Builder] = {
    "lenet-300-100": _lenet_300_100,
    "lenet5": _lenet5,
    "lstm": _lstm,
    "vgg-small": partial(_vgg, (32, 32, "M", 64, 64, "M", 128, 128)),
    "vgg16": partial(_vgg, _vgg_plan(2, 2, 3, 3, 3)),
    "vgg19": partial(_vgg, _vgg_plan(2, 2, 4, 4, 4)),
    "resnet20": partial(_resnet, BasicBlock, (3, 3, 3), 16, False),
    "resnet32": partial(_resnet, BasicBlock, (5, 5, 5), 16, False),
    "resnet56": partial(_resnet, BasicBlock, (9, 9, 9), 16, False),
    "resnet18": partial(_resnet, BasicBlock, (2, 2, 2, 2), 64, False),
    "resnet50": partial(_resnet, Bottleneck, (3, 4, 6, 3), 64, False),
    "resnet18-imagenet": partial(_resnet, BasicBlock, (2, 2, 2, 2), 64, True),
    "resnet50-imagenet": partial(_resnet, Bottleneck, (3, 4, 6, 3), 64, True),
    "mobilenetv1": _mobilenet_v1,
}

# Pixels a side below which a pool would leave nothing.
_SMALLEST_INPUT = {"lenet5": 16, "vgg-small": 4, "vgg16": 32, "vgg19": 32}
