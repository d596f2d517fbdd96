"""Tiny networks of every kind that users cut, written the ways users write them.

Each says which channel groups must be cut (a tool that keeps everything is exact too, and useless)
and which must stay, with a word of the reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.example import Example

CLASSES = 4
VOCABULARY = 23
Build = Callable[[], nn.Module]
Sample = Callable[[torch.Generator, int], Example]


def image(channels: int = 3, *size: int) -> Sample:
    """Batches of random images, `(batch, channels, *size)`."""

    def make(generator: torch.Generator, batch: int) -> Tensor:
        return torch.randn(batch, channels, *(size or (8, 8)), generator=generator)

    return make


def vector(width: int) -> Sample:
    """Batches of random vectors, `(batch, width)`."""
    return lambda generator, batch: torch.randn(batch, width, generator=generator)


def sequence(length: int, width: int) -> Sample:
    """Batches of random sequences, `(batch, length, width)`."""
    return lambda generator, batch: torch.randn(batch, length, width, generator=generator)


def tokens(length: int = 7) -> Sample:
    """Batches of token ids, `(batch, length)`."""

    def make(generator: torch.Generator, batch: int) -> Tensor:
        return torch.randint(VOCABULARY, (batch, length), generator=generator)

    return make


def padding(length: int = 7) -> Sample:
    """Batches of masks, `(batch, length)`: 1 for tokens, 0 for the padding behind them."""

    def make(generator: torch.Generator, batch: int) -> Tensor:
        ends = torch.randint(1, length + 1, (batch, 1), generator=generator)
        return (torch.arange(length) < ends).long()

    return make


def keywords(**samples: Sample) -> Sample:
    """Batches of keyword inputs."""

    def make(generator: torch.Generator, batch: int) -> dict[str, Any]:
        return {name: sample(generator, batch) for name, sample in samples.items()}

    return make


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network and what is to become of it.

    Attributes:
        build: Makes it.
        sample: Makes an input of a batch size.
        cut: Names of groups that must be cut.
        kept: Layers whose channels must stay, with a word of the reason.
        sparse: Whether a Sparsifier can train it: layers of PyTorch, no tied weights.
        exclude: What that leaves dense.
        dynamic: Whether one export serves any batch size.
    """

    build: Build
    sample: Sample
    cut: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    sparse: bool = True
    exclude: tuple[str, ...] = ()
    dynamic: bool = True


def _conv_bn(
    c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


# ---------------------------------------------------------------------- convolutions


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.BatchNorm1d(12),
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Linear(12, CLASSES),
    )


def vgg() -> nn.Module:
    def block(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(3, 8),
        *block(8, 10),
        nn.MaxPool2d(2),
        *block(10, 12),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 14),
        nn.ReLU(inplace=True),
        nn.Linear(14, CLASSES),
    )


class Residual(nn.Module):
    """relu(x + branch), with a projection where shapes differ."""

    def __init__(self, branch: nn.Module, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity()
        if c_in != c_out or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three blocks of two widths, a pool and a classifier."""

    def __init__(self, block: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8)
        self.layer1 = block(8, 8, 1)
        self.layer2 = block(8, 12, 2)
        self.layer3 = block(12, 12, 1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def basic(c_in: int, c: int, stride: int) -> nn.Module:
    last = [nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)]
    return Residual(nn.Sequential(*_conv_bn(c_in, c, 3, stride), *last), c_in, c, stride)


def bottleneck(c_in: int, c: int, stride: int, groups: int = 1) -> nn.Module:
    last = [nn.Conv2d(8, c, 1, bias=False), nn.BatchNorm2d(c)]
    inner = [*_conv_bn(c_in, 8, 1), *_conv_bn(8, 8, 3, stride, groups)]
    return Residual(nn.Sequential(*inner, *last), c_in, c, stride)


class PreActivation(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a bare convolution as the projection."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(out))))


class DenseNet(nn.Module):
    """Growing concatenations, a transition, and a flatten behind the last concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(14)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(14, 6, 3, padding=1)])
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1))
        self.last = nn.Conv2d(10, 6, 3, padding=1)
        self.fc = nn.Linear(16 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)
        x = torch.cat([x, self.last(F.relu(x))], 1)
        return self.fc(F.max_pool2d(x, 2).flatten(1))


class MobileNetV1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8)
        self.depthwise1 = _conv_bn(8, 8, groups=8)
        self.pointwise1 = _conv_bn(8, 12, 1)
        self.depthwise2 = nn.Conv2d(12, 12, 3, 2, 1, groups=12)
        self.pointwise2 = _conv_bn(12, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise1(self.depthwise1(self.stem(x)))
        return self.fc(self.pointwise2(F.relu6(self.depthwise2(x))).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


class InvertedResidual(nn.Module):
    """Widen, filter every channel, gate it or not, narrow, add."""

    def __init__(self, c_in: int, c: int, wide: int, stride: int, gate: bool) -> None:
        super().__init__()
        self.expand = _conv_bn(c_in, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 5, stride, 2, groups=wide, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.gate = SqueezeExcite(wide, 6) if gate else nn.Identity()
        self.project = nn.Conv2d(wide, c, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(c)
        self.add = c_in == c and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(F.hardswish(self.norm(self.depthwise(self.expand(x)))))
        out = self.project_norm(self.project(out))
        return x + out if self.add else out


class MobileNet(nn.Module):
    """Versions 2 and 3."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8)
        self.block1 = InvertedResidual(8, 8, 16, 1, gate)
        self.block2 = InvertedResidual(8, 10, 14, 2, gate)
        self.block3 = InvertedResidual(10, 10, 16, 1, gate)
        self.last = _conv_bn(10, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))


class UNet(nn.Module):
    """Two levels down and up again, skips by concatenation, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _conv_bn(3, 8), _conv_bn(8, 10)
        self.bottom = _conv_bn(10, 12)
        self.up2 = nn.ConvTranspose2d(12, 10, 2, 2)
        self.merge2 = _conv_bn(20, 10)
        self.up1 = nn.ConvTranspose2d(10, 8, 4, 2, 1, bias=False)
        self.merge1 = _conv_bn(16, 8)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.bottom(F.max_pool2d(two, 2)))
        x = self.up1(self.merge2(torch.cat([two, x], 1)))
        return self.head(self.merge1(torch.cat([x, one], 1)))


class Decoder(nn.Module):
    """A generator of images: transposed convolutions with batch norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 10 * 4)
        self.grow = nn.Sequential(
            nn.BatchNorm2d(10),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(10, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.grow(self.start(x).reshape(x.shape[0], -1, 2, 2))


class Wavenet(nn.Module):
    """Conv1d, dilated, gated by tanh and sigmoid; a stream, and a sum of skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 1)
        self.filters = nn.ModuleList([nn.Conv1d(8, 8, 3, padding=d, dilation=d) for d in (1, 2)])
        self.gates = nn.ModuleList([nn.Conv1d(8, 8, 3, padding=d, dilation=d) for d in (1, 2)])
        self.skips = nn.ModuleList([nn.Conv1d(8, 10, 1) for _ in range(2)])
        self.mix = nn.Conv1d(8, 8, 1)
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Conv1d(10, CLASSES, 1)

    def _unit(self, i: int, x: Tensor) -> Tensor:
        return torch.tanh(self.filters[i](x)) * torch.sigmoid(self.gates[i](x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one = self._unit(0, x)
        two = self._unit(1, x + self.mix(one))
        skips = self.skips[0](one) + self.skips[1](two)
        return self.head(F.relu(self.norm(skips))).mean(2)


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, padding=1, groups=8),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 10, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(10, CLASSES),
    )


class ConvNextBlock(nn.Module):
    """Depthwise, LayerNorm over channels that lie last, two linear layers, a scale per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 16), nn.Linear(16, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.scale * self.down(F.gelu(self.up(out)))
        return x + out.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(ConvNextBlock(8), ConvNextBlock(8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class GroupNormNet(nn.Module):
    """A ResNet block with group norms outside, and a bottleneck without a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.squeeze = nn.Conv2d(8, 10, 1)
        self.widen = nn.Conv2d(10, 8, 3, padding=1)
        self.last = nn.GroupNorm(2, 8)
        self.hidden = nn.Linear(8, 12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = x + self.last(self.widen(F.silu(self.squeeze(x))))
        return self.fc(F.silu(self.hidden(x.mean((2, 3)))))


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels pass, the other half is worked on, then all mix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = _conv_bn(half, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = _conv_bn(8, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        two = self.second(self.norm(self.depthwise(self.first(two))))
        x = torch.cat([one, two], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8)
        self.units = nn.Sequential(ShuffleUnit(8), ShuffleUnit(8))
        self.last = _conv_bn(8, 12, 1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.units(self.stem(x))).mean([2, 3]))


class Inception(nn.Module):
    """Four branches side by side, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8)
        self.branches = nn.ModuleList([self._block(8), self._block(22)])
        self.fc = nn.Linear(22, CLASSES)

    @staticmethod
    def _block(c_in: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "one": _conv_bn(c_in, 4, 1),
                "three": nn.Sequential(_conv_bn(c_in, 6, 1), _conv_bn(6, 8)),
                "cross": nn.Sequential(
                    nn.Conv2d(c_in, 6, (1, 5), padding=(0, 2)),
                    nn.ReLU(),
                    nn.Conv2d(6, 6, (5, 1), padding=(2, 0)),
                ),
                "pool": nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv_bn(c_in, 4, 1)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.branches:
            x = torch.cat([branch(x) for branch in block.values()], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# ---------------------------------------------------------------------- attention


class MhaBlock(nn.Module):
    """nn.MultiheadAttention before an MLP, both behind LayerNorms."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(x)
        x = x + self.attention(out, out, out, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class MhaEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(MhaBlock(16, 4, 20), MhaBlock(16, 4, 24))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class TokenEncoder(nn.Module):
    """nn.TransformerEncoder on tokens, with a mask of what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(
            16, 4, 24, dropout=0.0, batch_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding)[:, 0])


class Translator(nn.Module):
    """nn.Transformer: an encoder, a decoder that looks at it, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(VOCABULARY, 16) for _ in range(2))
        self.transformer = nn.Transformer(16, 4, 1, 1, 20, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        inputs = self.source(source), self.target(target)
        return self.head(self.transformer(*inputs, tgt_mask=causal, tgt_is_causal=True))


class FusedAttention(nn.Module):
    """As in timm's ViT: one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class SeparateAttention(nn.Module):
    """Written out: three linear layers, a softmax, widths from the model's width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Vit(nn.Module):
    """Patches, a class token, positions, pre-norm blocks."""

    def __init__(self, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.attention = nn.ModuleList([attention(16, 4) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(5)])
        self.fc1 = nn.ModuleList([nn.Linear(16, 20) for _ in range(2)])
        self.fc2 = nn.ModuleList([nn.Linear(20, 16) for _ in range(2)])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.fc2[i](F.gelu(self.fc1[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[4](x)[:, 0])


class GatedMlp(nn.Module):
    """GEGLU: the halves of one linear layer multiply; SwiGLU: two linear layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.both, self.down = nn.Linear(12, 32), nn.Linear(16, 12)
        self.gate, self.up, self.last = nn.Linear(12, 14), nn.Linear(12, 14), nn.Linear(14, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        x = x + self.down(F.gelu(gate) * up)
        x = x + self.last(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)


# ---------------------------------------------------------------------- Hugging Face


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_inner=20,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        max_position_embeddings=32,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def _swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=8,
        patch_size=1,
        num_channels=3,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        mlp_ratio=2.0,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config)


# ---------------------------------------------------------------------- recurrent, shared


class Recurrent(nn.Module):
    """Embedding, a linear layer, a recurrent layer, the last state through a hidden layer."""

    def __init__(self, layer: Callable[[int, int], nn.RNNBase], directions: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 10)
        self.project = nn.Linear(10, 8)
        self.rnn = layer(8, 6)
        self.hidden = nn.Linear(6 * directions, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.rnn(torch.tanh(self.project(self.embed(ids))))
        return self.head(F.relu(self.hidden(states[:, -1])))


def _lstm(**options: Any) -> Build:
    directions = 2 if options.get("bidirectional") else 1
    return lambda: Recurrent(lambda i, h: nn.LSTM(i, h, batch_first=True, **options), directions)


def _gru(**options: Any) -> Build:
    directions = 2 if options.get("bidirectional") else 1
    return lambda: Recurrent(lambda i, h: nn.GRU(i, h, batch_first=True, **options), directions)


class Siamese(nn.Module):
    """One tower for both inputs, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            _conv_bn(3, 8), nn.Conv2d(8, 10, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(90, 12)
        )
        self.head = nn.Linear(12, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.tower(left) - self.tower(right)).abs())


class Albert(nn.Module):
    """One block used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = MhaBlock(16, 4, 20)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean(1))


class TiedLanguageModel(nn.Module):
    """The head is the embedding; a causal convolution and an MLP between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.conv = nn.Conv1d(12, 12, 3)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + torch.tanh(self.conv(F.pad(x.transpose(1, 2), (2, 0)))).transpose(1, 2)
        return self.head(x + self.down(F.gelu(self.up(x))))


def _pair(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    return image()(generator, batch), image()(generator, batch)


def _each(prefix: str, layers: str, *more: str) -> tuple[str, ...]:
    """The named layers of `prefix`.0 and `prefix`.1."""
    return (*(f"{prefix}.{i}.{layer}" for i in (0, 1) for layer in layers.split()), *more)


def _stages(block: str, last: str) -> tuple[str, ...]:
    """Inner layers of `ResNet`'s blocks, and its three streams (layer3 adds to layer2's)."""
    inner = tuple(f"layer{i}.branch.{place}" for i in (1, 2, 3) for place in block.split())
    return ("stem.0", f"layer2.branch.{last}", *inner)


ARCHITECTURES: dict[str, Architecture] = {
    "mlp": Architecture(build=mlp, sample=image(), cut=("1", "3")),
    "vgg": Architecture(build=vgg, sample=image(), cut=("0", "3", "7", "13")),
    "resnet basic": Architecture(
        build=lambda: ResNet(basic), sample=image(), cut=_stages("0", "3")
    ),
    "resnet bottleneck": Architecture(
        build=lambda: ResNet(bottleneck), sample=image(), cut=_stages("0 3", "6")
    ),
    "resnet pre-activation": Architecture(
        build=lambda: ResNet(PreActivation),
        sample=image(),
        cut=("stem.0", "layer1.conv1", "layer2.conv1", "layer2.conv2", "layer3.conv1"),
    ),
    "resnext": Architecture(
        build=lambda: ResNet(lambda *a: bottleneck(*a, groups=4)),
        sample=image(),
        cut=("stem.0", "layer2.branch.6"),
    ),
    "densenet": Architecture(
        build=DenseNet,
        sample=image(),
        cut=("stem", "convs.0", "convs.1", "transition.2", "last"),
    ),
    "mobilenet v1": Architecture(
        build=MobileNetV1, sample=image(), cut=("stem.0", "pointwise1.0", "pointwise2.0")
    ),
    "mobilenet v2": Architecture(
        build=lambda: MobileNet(gate=False),
        sample=image(),
        cut=(
            *("stem.0", "block2.project", "last.0"),
            *("block1.expand.0", "block2.expand.0", "block3.expand.0"),
        ),
    ),
    "mobilenet v3": Architecture(
        build=lambda: MobileNet(gate=True),
        sample=image(),
        cut=(
            *("stem.0", "block2.project", "last.0"),
            *("block1.expand.0", "block2.expand.0", "block3.expand.0"),
            *("block1.gate.reduce", "block2.gate.reduce", "block3.gate.reduce"),
        ),
    ),
    "unet": Architecture(
        build=UNet,
        sample=image(),
        cut=("down1.0", "down2.0", "bottom.0", "up2", "merge2.0", "up1", "merge1.0"),
    ),
    "decoder": Architecture(
        build=Decoder, sample=vector(6), cut=("start", "grow.2", "grow.5"), sparse=False
    ),
    "wavenet (1d)": Architecture(
        build=Wavenet,
        sample=image(2, 16),
        cut=("stem", "filters.0", "filters.1", "skips.0"),
    ),
    "volume (3d)": Architecture(build=volume, sample=image(2, 4, 4, 4), cut=("0", "5")),
    "convnext": Architecture(
        build=ConvNext,
        sample=image(),
        cut=("blocks.0.up", "blocks.1.up"),
        kept={"stem": "norm"},
    ),
    "group norm": Architecture(
        build=GroupNormNet,
        sample=image(),
        cut=("squeeze", "hidden"),
        kept={"stem": "norm"},
    ),
    "shufflenet": Architecture(
        build=ShuffleNet,
        sample=image(),
        cut=("units.0.first.0", "units.1.first.0", "last.0"),
    ),
    "inception": Architecture(
        build=Inception,
        sample=image(),
        cut=_each("branches", "one.0 three.0.0 three.1.0 cross.0 cross.2 pool.1.0", "stem.0"),
    ),
    "nn.MultiheadAttention": Architecture(
        build=MhaEncoder,
        sample=image(),
        cut=_each("blocks", "attention.in_proj_weight mlp.0"),
        kept={"patches": "norm"},
    ),
    "nn.TransformerEncoder": Architecture(
        build=TokenEncoder,
        sample=tokens(),
        cut=_each("encoder.layers", "self_attn.in_proj_weight linear1"),
    ),
    "nn.Transformer": Architecture(
        build=Translator,
        sample=keywords(source=tokens(6), target=tokens(5)),
        cut=(
            "transformer.encoder.layers.0.self_attn.in_proj_weight",
            "transformer.encoder.layers.0.linear1",
            "transformer.decoder.layers.0.self_attn.in_proj_weight",
            "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
            "transformer.decoder.layers.0.linear1",
        ),
    ),
    "vit, fused qkv": Architecture(
        build=lambda: Vit(FusedAttention),
        sample=image(),
        cut=("attention.0.qkv", "attention.1.qkv", "fc1.0", "fc1.1"),
        kept={"patches": "norm"},
    ),
    "vit, separate qkv": Architecture(
        build=lambda: Vit(SeparateAttention),
        sample=image(),
        cut=("attention.0.q", "attention.1.q", "fc1.0", "fc1.1"),
        kept={"patches": "norm"},
    ),
    "gated mlp": Architecture(
        build=GatedMlp, sample=vector(12), cut=("both", "gate"), kept={"down": "input"}
    ),
    "swin": Architecture(
        build=_swin,
        sample=keywords(pixel_values=image()),
        cut=(
            *_each("swin.encoder.layers.0.blocks", "attention.q_proj mlp.fc1"),
            *_each("swin.encoder.layers.1.blocks", "attention.q_proj mlp.fc1"),
        ),
        kept={"swin.encoder.layers.0.downsample.reduction": "norm"},
    ),
    "bert": Architecture(
        build=_bert,
        sample=keywords(input_ids=tokens(), attention_mask=padding()),
        cut=_each(
            "bert.encoder.layer", "attention.self.query intermediate.dense", "bert.pooler.dense"
        ),
        kept={"bert.embeddings.word_embeddings": "norm"},
    ),
    "gpt2": Architecture(
        build=_gpt2,
        sample=keywords(input_ids=tokens()),
        cut=_each("transformer.h", "attn.c_attn mlp.c_fc"),
        sparse=False,  # its layers are transformers' own Conv1D
    ),
    "llama": Architecture(
        build=_llama,
        sample=keywords(input_ids=tokens()),
        cut=_each("model.layers", "self_attn.q_proj mlp.gate_proj"),
        kept={"lm_head": "output"},
    ),
    "vit, hugging face": Architecture(
        build=_hf_vit,
        sample=keywords(pixel_values=image()),
        cut=_each("vit.layers", "attention.q_proj mlp.fc1"),
    ),
    "lstm": Architecture(
        build=_lstm(), sample=tokens(), cut=("rnn.weight_ih_l0", "project", "hidden")
    ),
    "lstm, two layers": Architecture(
        build=_lstm(num_layers=2), sample=tokens(), cut=("rnn.weight_ih_l0", "project", "hidden")
    ),
    "lstm, bidirectional": Architecture(
        build=_lstm(bidirectional=True),
        sample=tokens(),
        cut=("rnn.weight_ih_l0", "project", "hidden"),
    ),
    "gru": Architecture(
        build=_gru(), sample=tokens(), cut=("rnn.weight_ih_l0", "project", "hidden")
    ),
    "gru, two layers, bidirectional": Architecture(
        build=_gru(num_layers=2, bidirectional=True),
        sample=tokens(),
        cut=("rnn.weight_ih_l0", "project", "hidden"),
    ),
    "siamese": Architecture(build=Siamese, sample=_pair, cut=("tower.0.0", "tower.1", "tower.4")),
    "albert": Architecture(
        build=Albert, sample=image(), cut=("block.attention.in_proj_weight", "block.mlp.0")
    ),
    "tied language model": Architecture(
        build=TiedLanguageModel,
        sample=tokens(),
        cut=("up", "embed[0:12]"),
        kept={"embed[0:23]": "output"},
        exclude=("head",),
    ),
}


# ---------------------------------------------------------------------- what defies a tool


class Awkward(nn.Module):
    """conv1 -> `middle` -> conv2 -> a pool -> fc; `reads` inputs of conv2, 16 outputs of conv1."""

    def __init__(self, reads: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(reads, 12, 3, padding=1)
        self.fc = nn.Linear(12, CLASSES)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(self.middle(self.conv1(x)))).mean((2, 3)))


def through(middle: Callable[[Tensor], Tensor], reads: int = 16) -> Build:
    """conv1 -> `middle` -> conv2."""

    class Through(Awkward):
        def middle(self, x: Tensor) -> Tensor:
            return middle(x)

    return lambda: Through(reads)


def _uneven_chunk(x: Tensor) -> Tensor:
    """16 in 3 chunks: 6, 6 and 4."""
    one, two, three = x.chunk(3, 1)
    return torch.cat([one * two.sigmoid(), F.relu(three)], 1)


def _uneven_gate(x: Tensor) -> Tensor:
    one, two = x.split([5, 11], 1)
    return torch.cat([F.relu(one), two[:, :5].sigmoid() * two[:, 6:]], 1)


class HardCodedUnflatten(nn.Module):
    """A layer of PyTorch that spells a width."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 40)
        self.shape = nn.Unflatten(1, (10, 2, 2))
        self.conv = nn.Conv2d(10, 8, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(F.relu(self.shape(self.start(x))))).mean((2, 3)))


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 16)
        self.middle = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.middle(F.relu(self.encode(x))))
        return F.linear(hidden, self.encode.weight.t())


class TiedLayers(nn.Module):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(F.relu(self.first(x))))
        return self.last(F.relu(self.two(x)))


class DataDependentBranch(Awkward):
    """Which layer reads the channels depends on the input: one run shows one way."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv1(x))
        reader = self.conv2 if x.mean() > 0 else self.other
        return self.fc(F.relu(reader(features)).mean((2, 3)))


class DataDependentSkip(Awkward):
    """Some inputs skip a layer of equal width: cut alike, both ways would run, and one be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return F.relu(self.extra(x)) if x[:, :, 0, 0].mean() > x[:, :, 7, 7].mean() else x


class DataDependentDepth(Awkward):
    """As many steps as the data ask for; the layers are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x.detach().abs().mean() > 0.1)):
            x = torch.tanh(self.again(x))
        return x


class SlicedWeight(Awkward):
    """A layer's weight is used in part, by hand."""

    def __init__(self) -> None:
        super().__init__(8)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x[:, :8])

    def forward(self, x: Tensor) -> Tensor:
        half = F.conv2d(x, self.conv1.weight[8:], self.conv1.bias[8:], padding=1)
        return super().forward(x) + half.mean((1, 2, 3))[:, None]


class HeadWeights(nn.Module):
    """The attention weights of every head are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x, average_attn_weights=False)
        return self.down(F.relu(self.up(out))), weights


class WidthInABuffer(Awkward):
    """Features against fixed random ones, and a mask with a place for every channel."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.register_buffer("anchors", torch.randn(16, 16, generator=generator))
        self.register_buffer("mask", torch.rand(1, 16, 1, 1, generator=generator) > 0.3)

    def middle(self, x: Tensor) -> Tensor:
        x = x.masked_fill(self.mask, 0.0)
        return F.relu(torch.einsum("bchw,cd->bdhw", x, self.anchors))


class Expert(Awkward):
    """Every sample goes to one of two experts, chosen by its features."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 12), nn.Linear(16, 12)])

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv1(x)).mean((2, 3))
        chosen = self.route(features).argmax(1)
        out = features.new_zeros(len(x), 12)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero().squeeze(1)
            out = out.index_add(0, mine, expert(features[mine]))
        return self.fc(F.relu(out))


class CustomNorm(Awkward):
    """A layer norm over channels that is written out."""

    def middle(self, x: Tensor) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True)
        return F.relu((x - mean) / (var + 1e-5).sqrt())


# Whatever becomes of these, outputs stay; `kept` says which layers no tool could cut.
AWKWARD: dict[str, Architecture] = {
    "uneven chunk": Architecture(
        build=through(_uneven_chunk, 10),
        sample=image(),
        cut=("conv1[0:12]", "conv1[12:16]", "conv2"),
    ),
    "uneven split": Architecture(
        build=through(_uneven_gate, 10),
        sample=image(),
        cut=("conv2",),
        kept={"conv1[0:5]": "fails once they are cut", "conv1[5:16]": "fails once they are cut"},
    ),
    "slices": Architecture(
        build=through(lambda x: F.relu(x[:, ::2] + x[:, 1::2]), 8), sample=image(), cut=("conv2",)
    ),
    "chosen channels": Architecture(
        build=through(lambda x: F.relu(x[:, [0, 3, 3, 15, 7, 8]]), 6),
        sample=image(),
        cut=("conv2",),
    ),
    "one channel for all": Architecture(
        build=through(lambda x: F.relu(x * x[:, :1].sigmoid())), sample=image(), cut=("conv2",)
    ),
    "hard-coded view": Architecture(
        build=through(lambda x: F.relu(x.view(-1, 4, 4, 8, 8)).reshape(-1, 16, 8, 8)),
        sample=image(),
        cut=("conv2",),
        kept={"conv1": "fails once they are cut"},
    ),
    "hard-coded unflatten": Architecture(
        build=HardCodedUnflatten,
        sample=vector(6),
        cut=("conv",),
        kept={"start": "fails once they are cut"},
    ),
    "hard-coded mean": Architecture(
        build=through(lambda x: F.relu(x - x.sum(1, keepdim=True) / 16)),
        sample=image(),
        cut=("conv2",),
        kept={"conv1": "mixes"},
    ),
    "sort": Architecture(
        build=through(lambda x: x.sort(1).values),
        sample=image(),
        cut=("conv2",),
        kept={"conv1": "sort"},
    ),
    "cumulated": Architecture(
        build=through(lambda x: x.cumsum(1).tanh()),
        sample=image(),
        cut=("conv2",),
        kept={"conv1": "cumsum"},
    ),
    "fourier": Architecture(
        build=through(lambda x: torch.fft.rfft(x, dim=1).abs(), 9),
        sample=image(),
        cut=("conv2",),
        kept={"conv1": "fft"},
    ),
    "custom norm": Architecture(
        build=CustomNorm, sample=image(), cut=("conv2",), kept={"conv1": "mixes"}
    ),
    "tied autoencoder": Architecture(
        build=TiedAutoencoder,
        sample=vector(12),
        cut=("encode[0:16]",),
        kept={"encode[0:12]": "output"},
    ),
    "tied layers": Architecture(build=TiedLayers, sample=vector(12), cut=("first",)),
    "data-dependent branch": Architecture(
        build=DataDependentBranch, sample=image(), cut=(), kept={"conv1": "looks at a value"}
    ),
    "data-dependent skip": Architecture(
        build=DataDependentSkip, sample=image(), cut=(), kept={"conv2": "looks at a value"}
    ),
    "data-dependent depth": Architecture(
        build=DataDependentDepth, sample=image(), cut=(), kept={"conv2": "looks at a value"}
    ),
    "sliced weight": Architecture(build=SlicedWeight, sample=image(), cut=("conv2",)),
    "head weights": Architecture(
        build=HeadWeights,
        sample=sequence(5, 16),
        cut=("up",),
        kept={"attention.in_proj_weight": "output"},
    ),
    "width in a buffer": Architecture(build=WidthInABuffer, sample=image(), cut=("conv2",)),
    "experts": Architecture(build=Expert, sample=image(), cut=()),
}
