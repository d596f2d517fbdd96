"""Channel groups: what is traced, what is locked and why; and a zoo of awkward models.

The rule for every model of the zoo: channels are locked with a reason, or cutting them is exact.
Never a crash, never another function.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gossamer
from gossamer.channels import ChannelGroup, Cut, find_groups
from nets import CLASSES, NETS, READERS, batches, images, net


def _groups(model: nn.Module, example=None) -> dict[str, ChannelGroup]:
    example = images(2) if example is None else example
    return {group.name: group for group in find_groups(model, example)}


def _layers(slices) -> set[tuple[str, str]]:
    return {(part.layer, part.axis) for part in slices}


# The helper nets, against tables written by hand


@pytest.mark.parametrize("name", NETS)
def test_internal_groups(name: str) -> None:
    groups = _groups(net(name))
    internal = {key for key, group in groups.items() if group.internal and not group.locked}
    assert internal == set(READERS[name])
    for producer, reader in READERS[name].items():
        group = groups[producer]
        width = len(net(name).get_submodule(producer).weight)
        assert group.channels == width
        assert _layers(group.producers) == {(producer, "out")}
        assert _layers(group.consumers) == {(reader.layer, "in")}
        carriers = {part.layer for part in group.carriers}
        assert not reader.depthwise or reader.depthwise in carriers
        for part in (*group.producers, *group.carriers):
            assert part.index.tolist() == [[channel] for channel in range(width)]
        expected = torch.arange(width * reader.per_channel).reshape(width, reader.per_channel)
        assert torch.equal(group.consumers[0].index, expected)


def test_tracing_does_not_change_the_model() -> None:
    model = net("vgg")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_groups(model, images(2))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_norms_are_carriers() -> None:
    groups = _groups(net("vgg"))
    assert _layers(groups["features.0"].carriers) == {("features.0", "out"), ("features.1", "out")}
    assert {part.tensor for part in groups["features.0"].carriers} == {
        "features.0.bias",
        *(f"features.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    }
    groups = _groups(net("mobilenet"))
    assert _layers(groups["stem.0"].carriers) == {
        ("stem.1", "out"),
        ("depthwise1", "out"),
        ("norm1", "out"),
    }


def test_residual_streams_are_one_group_each() -> None:
    groups = _groups(net("basic"))
    stream = groups["layer1.0.conv2"]
    assert _layers(stream.producers) == {
        ("layer1.0.conv2", "out"),
        ("layer1.0.shortcut.0", "out"),
        ("layer1.1.conv2", "out"),
    }
    assert _layers(stream.consumers) == {
        ("layer1.1.conv1", "in"),
        ("layer2.0.conv1", "in"),
        ("layer2.0.shortcut.0", "in"),
    }
    assert not stream.locked
    assert not stream.internal
    assert not {"layer1.0.shortcut.0", "layer1.1.conv2"} & set(groups)  # named once


@pytest.mark.parametrize("name", NETS)
def test_the_last_layer_is_locked(name: str) -> None:
    groups = _groups(net(name))
    last = list(groups)[-1]
    assert groups[last].locked
    assert groups[last].channels == CLASSES


def test_after_a_cut_positions_are_renumbered() -> None:
    group = _groups(net("conv_flatten_linear"))["conv2"]
    keep = torch.tensor([0, 2, 5, 15])
    rows = group.consumers[0].index[keep].flatten()
    slim = group.after(
        [
            Cut("conv2.weight", 0, keep, 16),
            Cut("conv2.bias", 0, keep, 16),
            Cut("fc1.weight", 1, rows, 256),
        ]
    )
    assert slim.channels == 4
    assert slim.producers[0].index.tolist() == [[0], [1], [2], [3]]
    assert torch.equal(slim.consumers[0].index, torch.arange(64).reshape(4, 16))
    # Cuts of other layers leave it alone.
    same = group.after([Cut("conv1.weight", 0, torch.tensor([1]), 12)])
    assert same.channels == 16
    assert torch.equal(same.consumers[0].index, group.consumers[0].index)


# The zoo


class Base(nn.Module):
    """conv1 -> `middle` -> conv2 -> pool -> fc."""

    reads = 16

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(self.reads, 12, 3, padding=1)
        self.fc = nn.Linear(12, CLASSES)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def last(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.last(self.middle(self.conv1(x)))


def _with(module: Callable[[], nn.Module], reads: int = 16) -> type[Base]:
    """conv1 -> relu -> module -> relu -> conv2."""

    class WithModule(Base):
        def __init__(self) -> None:
            super().__init__()
            self.extra = module()

        def middle(self, x: Tensor) -> Tensor:
            return F.relu(self.extra(F.relu(x)))

    WithModule.reads = reads
    return WithModule


def _through(function: Callable[[Tensor], Tensor], reads: int = 16) -> type[Base]:
    """conv1 -> function -> conv2."""

    class Through(Base):
        def middle(self, x: Tensor) -> Tensor:
            return function(x)

    Through.reads = reads
    return Through


class Flattened(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12 * 64, CLASSES)

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def last(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(F.relu(self.conv2(x))))


class ViewOfBatch(Flattened):
    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


class ViewOfChannels(Flattened):
    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, 768)


class PixelsFirst(Flattened):
    def flat(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class PixelsFirstZeroHead(PixelsFirst):
    """Outputs are zero at first, whatever is cut: only a trained head shows a mistake."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.fc.weight)


class PixelsFirstTinyOutput(PixelsFirst):
    def last(self, x: Tensor) -> Tensor:
        return super().last(x) * 1e-13


class AlsoAnOutput(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = F.relu(self.conv1(x))
        return self.last(features), features


class AlsoAnOutputRaw(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.conv1(x)
        return self.last(F.relu(features)), features


class AlsoAnOutputAveraged(Base):
    """The shape of the second output does not tell how many channels went in."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = F.relu(self.conv1(x))
        return self.last(features), features.mean((1, 2, 3))


class TwoHeads(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = F.relu(self.conv1(x))
        return self.last(features), self.other(features.mean((2, 3)))


class Concatenated(Base):
    reads = 32

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(torch.cat([self.other(x), self.conv1(x)], 1)))


class GrowingConcat(nn.Module):
    """DenseNet: every layer reads all before it, behind norms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm_b = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.norm_c = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 8, 3, padding=1)
        self.bottle = nn.Conv2d(24, 12, 1)
        self.d = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(self.norm_b(x)))], 1)
        x = torch.cat([x, self.c(F.relu(self.norm_c(x)))], 1)
        x = torch.cat([x, self.d(F.relu(self.bottle(x)))], 1)
        return self.fc(F.relu(x).mean((2, 3)))


class Permuted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(16))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x[:, self.order])


class ScaledByBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 16, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x * self.scale)


class ScaledByParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x * self.scale)


class CalledTwice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.again(F.relu(self.again(F.relu(x)))))


class ReaderCalledTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv1(x))
        both = F.relu(self.conv2(features)) + F.relu(self.conv2(features.roll(1, 2)))
        return self.fc(both.mean((2, 3)))


class MakerCalledTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.conv1(x)) * self.conv1(x.flip(2)).sigmoid())


class SqueezeExcite(Base):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(16, 10)
        self.up = nn.Linear(10, 16)

    def middle(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class OneChannelAdded(Base):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.conv1(x) + self.one(x)))


class ReadOnlyInTraining(Base):
    """An auxiliary head, as in GoogLeNet: no trace in eval mode shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv1(x))
        out = self.last(features)
        return out + self.auxiliary(features.mean((2, 3))) if self.training else out


class ReadOnlyInTrainingWithDropout(ReadOnlyInTraining):
    """Two runs in train mode differ anyway; that one of them fails must still be seen."""

    def last(self, x: Tensor) -> Tensor:
        return F.dropout(super().last(x), 0.1, self.training)


class Temperature(Base):
    """A parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.01), requires_grad=False)

    def last(self, x: Tensor) -> Tensor:
        return super().last(x) * self.temperature.log().exp()


class PositiveParameter(Base):
    """Computes NaN where its parameter is drawn below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.full((CLASSES,), 0.01), requires_grad=False)

    def last(self, x: Tensor) -> Tensor:
        return super().last(x) / self.variance.sqrt()


class GeneralizedMean(Base):
    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(3.0))

    def last(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(x)).clamp(min=1e-6).pow(self.power)
        return self.fc(x.mean((2, 3)).pow(1 / self.power))


class DetachedReader(Base):
    """A second reader that no trace through autograd can see."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv1(x))
        return self.last(features) + self.probe(features.detach().mean((2, 3)))


class GatedByData(Base):
    """What is read after the branch may be read elsewhere in the branch that was not taken."""

    def last(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(x))
        return self.fc((x * 2 if x.mean() > 0 else x).mean((2, 3)))


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        features = checkpoint(lambda t: F.relu(self.conv1(t)), x, use_reentrant=False)
        return self.last(features)


class ConvNext(Base):
    """Depthwise, then linear layers over pixels, a layer scale near zero, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.full((16,), 1e-6))

    def middle(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.down(F.gelu(self.up(y))) * self.scale).permute(0, 3, 1, 2)


class NormOverTheBatch(Base):
    """Batch norm of vectors: in train mode it needs more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(12, 14)
        self.norm = nn.BatchNorm1d(14)
        self.fc = nn.Linear(14, CLASSES)

    def last(self, x: Tensor) -> Tensor:
        x = self.hidden(F.relu(self.conv2(x)).mean((2, 3)))
        return self.fc(F.relu(self.norm(x)))


class FixedWidthInTraining(Base):
    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.linspace(0.9, 1.1, 16, dtype=x.dtype).view(1, 16, 1, 1)
        return F.relu(x)


class GramMatrix(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(16, 4, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def last(self, x: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 2).flatten(2)
        return self.fc((features @ features.transpose(1, 2)).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.fc(x.mean(1))


class HandMadeAttention(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.qkv = nn.Linear(16, 48) if fused else None
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        b, n, _ = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(x).view(b, n, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(x)))
        return self.fc(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.hidden = nn.Linear(12, 10)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.embed(x.flatten(2).transpose(1, 2)))[0][:, -1]
        return self.fc(F.relu(self.hidden(x)))


def _shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return F.relu(x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w))


def _gate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first * second.sigmoid()


def _swap_uneven(x: Tensor) -> Tensor:
    first, second = x.split([4, 12], 1)
    return torch.cat([F.relu(second), first], 1)


# Model -> layers that must be cut, layers that must stay. Others may do as they like, exactly.
ZOO: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "plain": (Base, {"conv1", "conv2"}, {"fc"}),
    "flatten": (Flattened, {"conv1", "conv2"}, set()),
    "view of the batch": (ViewOfBatch, {"conv1", "conv2"}, set()),
    "hard-coded view": (_through(lambda x: x.view(len(x), 16, 8, 8)), {"conv2"}, {"conv1"}),
    "hard-coded view, any batch": (_through(lambda x: x.view(-1, 16, 8, 8)), {"conv2"}, {"conv1"}),
    "hard-coded flatten": (ViewOfChannels, {"conv1"}, {"conv2"}),
    "pixels first": (PixelsFirst, {"conv1", "conv2"}, set()),
    "pixels first, zero head": (PixelsFirstZeroHead, {"conv1", "conv2"}, set()),
    "pixels first, tiny outputs": (PixelsFirstTinyOutput, {"conv1", "conv2"}, set()),
    "also an output": (AlsoAnOutput, {"conv2"}, {"conv1"}),
    "also an output, raw": (AlsoAnOutputRaw, {"conv2"}, {"conv1"}),
    "also an output, averaged": (AlsoAnOutputAveraged, {"conv2"}, {"conv1"}),
    "two heads": (TwoHeads, {"conv2"}, set()),
    "concatenation": (Concatenated, {"conv1", "conv2"}, set()),
    "concatenation with itself": (
        _through(lambda x: F.relu(torch.cat([x, x], 1)), 32),
        {"conv2"},
        set(),
    ),
    "densenet": (GrowingConcat, {"bottle"}, set()),
    "softmax over channels": (_through(lambda x: x.softmax(1)), {"conv2"}, {"conv1"}),
    "channel mean": (_through(lambda x: x - x.mean(1, keepdim=True)), {"conv2"}, {"conv1"}),
    "channel max": (_through(lambda x: x * x.amax(1, keepdim=True)), {"conv2"}, {"conv1"}),
    "channel norm": (_through(lambda x: F.normalize(x, dim=1)), {"conv2"}, {"conv1"}),
    "functional layer norm": (
        _through(lambda x: F.layer_norm(x, x.shape[1:])),
        {"conv2"},
        {"conv1"},
    ),
    "chunk": (_through(_gate, 8), {"conv1", "conv2"}, set()),
    "glu": (_through(lambda x: F.glu(x, 1), 8), {"conv1", "conv2"}, set()),
    "slice": (_through(lambda x: F.relu(x[:, :8]), 8), {"conv2"}, {"conv1[0:8]", "conv1[8:16]"}),
    "uneven split": (_through(_swap_uneven), {"conv2"}, {"conv1"}),
    "channel shuffle": (_through(_shuffle), {"conv2"}, {"conv1"}),
    "flip": (_through(lambda x: F.relu(x.flip(1))), {"conv1", "conv2"}, set()),
    "roll": (_through(lambda x: F.relu(x.roll(3, 1))), {"conv2"}, {"conv1"}),
    "permuted": (Permuted, {"conv2"}, {"conv1"}),
    "pixel shuffle": (
        _through(lambda x: F.relu(F.pixel_shuffle(x, 2)), 4),
        {"conv1", "conv2"},
        set(),
    ),
    "unflatten": (
        _through(lambda x: F.relu(x.unflatten(1, (4, 4)).mean(2)), 4),
        {"conv2"},
        {"conv1"},
    ),
    "upsampling": (
        _through(lambda x: F.interpolate(F.relu(x), scale_factor=2)),
        {"conv1", "conv2"},
        set(),
    ),
    "scaled by a buffer": (ScaledByBuffer, {"conv1", "conv2"}, set()),
    "scaled by a parameter": (ScaledByParameter, {"conv1", "conv2"}, set()),
    "prelu": (_with(lambda: nn.PReLU(16)), {"conv1", "conv2"}, set()),
    "dropout": (_with(lambda: nn.Dropout2d(0.0)), {"conv1", "conv2"}, set()),
    "group norm": (_with(lambda: nn.GroupNorm(4, 16)), {"conv2"}, {"conv1"}),
    "layer norm": (_with(lambda: nn.LayerNorm([16, 8, 8])), {"conv2"}, {"conv1"}),
    "instance norm": (_with(lambda: nn.InstanceNorm2d(16, affine=True)), {"conv1", "conv2"}, set()),
    "grouped": (
        _with(lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4)),
        {"conv1", "conv2"},
        set(),
    ),
    "depth multiplier": (
        _with(lambda: nn.Conv2d(16, 32, 3, padding=1, groups=16), 32),
        {"conv1", "conv2"},
        set(),
    ),
    "transposed": (_with(lambda: nn.ConvTranspose2d(16, 16, 1)), {"conv2"}, set()),
    "called twice": (CalledTwice, {"conv2"}, {"conv1"}),
    "reader called twice": (ReaderCalledTwice, {"conv2"}, set()),
    "maker called twice": (MakerCalledTwice, {"conv2"}, set()),
    "squeeze and excite": (SqueezeExcite, {"conv2"}, set()),
    "one channel added to all": (OneChannelAdded, {"conv2"}, set()),
    "read only in training": (ReadOnlyInTraining, {"conv2"}, {"conv1"}),
    "read only in training, dropout": (ReadOnlyInTrainingWithDropout, {"conv2"}, {"conv1"}),
    "temperature": (Temperature, {"conv1", "conv2"}, set()),
    "positive parameter": (PositiveParameter, {"conv1", "conv2"}, set()),
    "generalized mean": (GeneralizedMean, {"conv1", "conv2"}, set()),
    "detached reader": (DetachedReader, {"conv2"}, {"conv1"}),
    "gated by data": (GatedByData, {"conv1"}, {"conv2"}),
    "checkpointed": (Checkpointed, {"conv1", "conv2"}, set()),
    "convnext": (ConvNext, {"conv2", "up"}, set()),
    "norm over the batch": (NormOverTheBatch, {"conv1", "conv2", "hidden"}, set()),
    "fixed width in training": (FixedWidthInTraining, {"conv2"}, {"conv1"}),
    "gram matrix": (GramMatrix, {"conv1"}, {"conv2"}),
    "attention": (Attention, {"up"}, {"embed"}),
    "hand-made attention": (HandMadeAttention, {"up"}, {"embed", "q"}),
    "fused qkv": (lambda: HandMadeAttention(fused=True), {"up"}, {"embed", "qkv"}),
    "lstm": (Recurrent, {"hidden"}, set()),
}


def _zoo_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name][0]().double()


def _loss(output: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return F.cross_entropy(outputs[0], y) + sum(out.square().mean() for out in outputs[1:])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ZOO)
def test_locked_or_exact(name: str) -> None:
    _, cut_layers, kept_layers = ZOO[name]
    runs = []
    chase = gossamer.Chase(
        density=0.4,
        channel_sparsity=0.4,
        update_interval=4,
        min_channels=2,
        min_channel_factor=0.8,
    )
    for cut in ("end", "during"):
        model = _zoo_model(name)
        sparsifier = gossamer.Sparsifier(model, chase, total_steps=24, example=images(2), cut=cut)
        pools = {pool.name for pool in sparsifier.pools}
        assert cut_layers <= pools, sparsifier.locked
        assert not kept_layers & pools
        assert all(sparsifier.locked[layer] for layer in kept_layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        model.train()
        for x, y in batches(24):
            loss = _loss(model(x), y)
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((model, sparsifier, losses))
    assert runs[0][2] == pytest.approx(runs[1][2], abs=1e-10)
    slim = runs[1][1]
    assert len(slim.plan) > 0
    # What was eligible at the start could in fact be cut.
    for pool in slim.pools:
        assert pool.group.channels == int(pool.live.sum()), slim.locked.get(pool.name)
    x = images(4, seed=8)
    outputs = []
    for model, sparsifier, _ in runs:
        sparsifier.finalize()
        with torch.no_grad():
            outputs.append(model.eval()(x))
    for one, other in zip(*(o if isinstance(o, tuple) else (o,) for o in outputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ZOO)
def test_shrink_is_exact_or_leaves_it(name: str) -> None:
    """Zeros planted in what layers read: whatever is cut for them, outputs stay, in both modes."""
    model = _zoo_model(name)
    generator = torch.Generator().manual_seed(3)
    first = True
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for parameter in module.parameters():
                    if not parameter.any():  # a zero head would hide everything
                        parameter.normal_(generator=generator)
                inputs = module.weight.shape[1]
                if not first and inputs > 1:
                    dead = torch.randperm(inputs, generator=generator)[: max(1, inputs // 2)]
                    module.weight[:, dead] = 0
                first = False
    slim = gossamer.shrink(model, images(2)).model
    x = images(4, seed=8)
    for training in (False, True):
        model.train(training)
        slim.train(training)
        outputs = []
        for network in (model, slim):
            torch.manual_seed(0)  # the same dropout
            with torch.no_grad():
                out = network(x)
            outputs.append(out if isinstance(out, tuple) else (out,))
        for one, other in zip(*outputs, strict=True):
            scale = float(one.abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("name", ZOO)
def test_groups_of_the_zoo_lie_inside_their_tensors(name: str) -> None:
    model = _zoo_model(name)
    tensors = model.state_dict()
    for group in find_groups(model, images(2)):
        if not group.locked:
            for part in group.slices:
                width = tensors[part.tensor].shape[part.dim]
                assert part.index.shape[0] == group.channels
                assert int(part.index.min()) >= 0
                assert int(part.index.max()) < width, (group.name, part.tensor)
                assert part.index.unique().numel() == part.index.numel()


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("group norm", "conv1", ["extra", "GroupNorm", "mean"]),
        ("layer norm", "conv1", ["extra", "LayerNorm", "mean"]),
        ("also an output", "conv1", ["output of the model"]),
        ("also an output, averaged", "conv1", ["mean", "mixes all"]),
        ("hard-coded view", "conv1", ["fails once they are cut", "shape"]),
        ("roll", "conv1", ["changes the outputs"]),
        ("uneven split", "conv1", ["split"]),
        ("squeeze and excite", "conv1", ["several layers"]),
        ("plain", "fc", ["output of the model"]),
    ],
)
def test_reasons(name: str, layer: str, words: list[str]) -> None:
    chase = gossamer.Chase(channel_sparsity=0.2)
    sparsifier = gossamer.Sparsifier(_zoo_model(name), chase, total_steps=100, example=images(2))
    reason = sparsifier.locked[layer]
    for word in words:
        assert word in reason, reason


def test_what_passes_the_channels_is_cut_with_them() -> None:
    for name, tensor, dim in (
        ("scaled by a parameter", "scale", 1),
        ("scaled by a buffer", "scale", 1),
        ("prelu", "extra.weight", 0),
        ("instance norm", "extra.bias", 0),
        ("plain", "conv1.bias", 0),
    ):
        carriers = _groups(_zoo_model(name))["conv1"].carriers
        assert (tensor, dim) in {(part.tensor, part.dim) for part in carriers}


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(5, 12)
            self.right = nn.Linear(7, 14)
            self.join = nn.Linear(26, 10)
            self.one = nn.Linear(10, 3)
            self.two = nn.Linear(10, 2)

        def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            both = torch.cat([F.relu(self.left(a)), F.relu(self.right(b))], 1)
            hidden = F.relu(self.join(both)) * scale
            return {"one": self.one(hidden), "two": self.two(hidden)}

    a, b = torch.randn(4, 5), torch.randn(4, 7)
    for example in ((a, b), [a, b, 2.0], {"a": a, "b": b}, {"b": b, "a": a, "scale": 0.5}):
        groups = _groups(Two(), example)
        assert torch.equal(groups["left"].consumers[0].index, torch.arange(12)[:, None])
        assert torch.equal(groups["right"].consumers[0].index, torch.arange(12, 26)[:, None])
        assert _layers(groups["join"].consumers) == {("one", "in"), ("two", "in")}
        assert groups["one"].locked
        assert groups["two"].locked
        model = Two()
        with torch.no_grad():
            model.join.weight[:, [0, 3, 12, 25]] = 0
            model.one.weight[:, 1] = 0  # read by the other head
        shrunk = gossamer.shrink(model, example)
        widths = {row.layer: row.after for row in shrunk.report}
        assert widths == {"left": 10, "right": 12, "join": 10, "one": 3, "two": 2}
