import json
import math
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from gossamer.measure.macs import (
    Account,
    LayerMacs,
    TrainingMacs,
    account,
    bytes_on_disk,
    training_products,
)
from gossamer.train.models import build_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # a random weight is exactly 0 now and then, and would not be counted


def _layers(counted: Account) -> dict[str, LayerMacs]:
    return {layer.name: layer for layer in counted.layers}


def _torch_macs(model: nn.Module, *inputs: Tensor) -> int:
    """MACs of one example by torch's counter: train mode, for there the fast paths are off."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(*inputs)
    return counter.get_total_flops() // 2 // len(inputs[0])


# Layers by hand


@pytest.mark.parametrize(
    ("layer", "shape", "positions", "weights"),
    [
        (nn.Linear(5, 3), (4, 5), 1, 15),
        (nn.Linear(5, 3), (4, 7, 5), 7, 15),
        (nn.Conv1d(2, 3, 5, padding=2), (4, 2, 11), 11, 30),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 9, 9), 25, 288),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9), 25, 144),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=4), (2, 4, 9, 9), 25, 36),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 4, 5), 24, 16),
        (nn.ConvTranspose1d(3, 2, 4, stride=4), (2, 3, 6), 6, 24),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 25, 96),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 25, 108),
        (nn.ConvTranspose3d(1, 2, 2), (2, 1, 2, 3, 4), 24, 16),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_one_layer(layer: nn.Module, shape: tuple[int, ...], positions: int, weights: int) -> None:
    counted = account(nn.Sequential(layer), torch.zeros(shape))
    (row,) = counted.layers
    assert (row.name, row.kind) == ("0", type(layer).__name__)
    assert (row.positions, row.weights) == (positions, weights)
    assert row.shape == tuple(layer.weight.shape)
    assert counted.macs_executed == counted.macs_sparse == positions * weights
    assert counted.flops_executed == 2 * positions * weights
    assert counted.other_macs == 0
    assert counted.other_nonzeros == layer.bias.count_nonzero()


def test_zeros_are_skipped_by_sparse_hardware_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 5))
    nn.init.ones_(model[0].weight)
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight.fill_(1.0)[:, 2:] = 0
        model[2].bias.zero_()[0] = 1
    counted = account(model, torch.zeros(3, 1, 4, 4))
    assert counted.macs_executed == 18 * 4 + 40
    assert counted.macs_sparse == 9 * 4 + 10
    assert counted.flops_sparse == 2 * (9 * 4 + 10)
    assert counted.other_nonzeros == 1
    assert counted.nonzeros == 9 + 10 + 1
    assert counted.density == 19 / 58
    assert [layer.density for layer in counted.layers] == [0.5, 0.25]


def test_a_layer_called_twice_adds_its_positions() -> None:
    layer = nn.Linear(6, 6)
    (row,) = account(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(2, 3, 6)).layers
    assert (row.name, row.positions) == ("0", 6)


def test_a_weight_shared_by_two_layers_is_one_row() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    counted = account(model, torch.zeros(2, 6))
    assert [(row.name, row.positions) for row in counted.layers] == [("0", 2)]
    assert (counted.nonzeros, counted.other_macs) == (36, 0)


class _LanguageModel(nn.Module):
    """The head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


def test_a_weight_shared_with_an_embedding_is_counted_once() -> None:
    counted = account(_LanguageModel(), torch.zeros(2, 3, dtype=torch.long))
    assert counted.macs_executed == 3 * 40
    assert counted.nonzeros == 40 + 4
    assert [row.positions for row in counted.layers] == [3]


def test_a_layer_that_runs_once_for_a_whole_batch_is_shared_by_its_examples() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Linear(2, 3, bias=False)
            self.head = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.bias(x.new_ones(2))

    layers = _layers(account(Positions(), torch.zeros(4, 3)))
    assert layers["bias"].positions == 0.25
    assert layers["bias"].macs_executed == 2  # 6 weights / 4 examples, rounded
    assert layers["head"].positions == 1


def test_a_layer_that_never_runs_keeps_its_nonzeros() -> None:
    class Auxiliary(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = Auxiliary(nn.Linear(3, 3), nn.Linear(3, 3))
    counted = account(model, torch.zeros(2, 3), supports={"1": 4})
    assert [row.name for row in counted.layers] == ["0"]
    assert counted.other_nonzeros == 3 + 4 + 3


# Recurrent layers and attention


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind: type[nn.RNNBase]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(8, 16, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x)
            scores = out @ out.transpose(1, 2)  # 5 x 32 x 5 MACs that belong to no layer
            return self.head(scores @ out)  # and again

    counted = account(Net(), torch.zeros(3, 5, 8))
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    first, second = 16 * (8 + 16), 16 * (32 + 16)
    assert counted.macs_executed == 2 * gates * 5 * (first + second) + 5 * 32 * 3 + 2 * 5 * 5 * 32
    assert counted.other_macs == 2 * 5 * 5 * 32
    row = _layers(counted)["rnn.weight_ih_l1_reverse"]
    assert (row.kind, row.shape) == (kind.__name__, (16 * gates, 32))
    assert row.positions == 5


def test_recurrent_packed_projected_and_cells() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, proj_size=2, batch_first=True, bias=False)
            self.cell = nn.GRUCell(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([5, 3])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            _, (state, _) = self.lstm(packed)
            return self.cell(state[-1])

    counted = account(Net(), torch.zeros(2, 5, 4))
    lstm = 4 * 6 * (4 + 2) + 2 * 6
    assert counted.macs_executed == lstm * (5 + 3) // 2 + 3 * 3 * (2 + 3)
    assert counted.other_macs == 0
    assert "lstm.weight_hr_l0" in _layers(counted)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = _Attention(16, 4)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=4),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


@pytest.mark.parametrize("build", [_convolutional, _VisionTransformer])
@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_torch(build: Callable[[], nn.Module], batch: int) -> None:
    model, x = build(), torch.randn(batch, 3, 16, 16)
    counted = account(model, x)
    assert counted.macs_executed == _torch_macs(model, x)
    scores = 2 * 16 * 16 * 16 if build is _VisionTransformer else 0
    assert counted.other_macs == scores


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_the_fused_encoder_is_seen() -> None:
    model, x = _encoder(), torch.randn(2, 5, 16)
    assert torch.backends.mha.get_fastpath_enabled()
    counted = account(model, x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert counted.macs_executed == _torch_macs(model, x)
    assert counted.other_macs == 2 * 2 * 5 * 5 * 16
    names = {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert set(_layers(counted)) == {f"layers.{i}.{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "apart"])
def test_cross_attention(sizes: dict[str, int]) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, value=value, key=key)[0]

    model = Cross()
    inputs = torch.randn(2, 3, 8), *(torch.randn(2, 5, n) for n in sizes.values() or (8, 8))
    counted = account(model, inputs)
    assert counted.other_macs == 2 * 3 * 5 * 8
    assert counted.macs_executed == _torch_macs(model, *inputs)
    layers = _layers(counted)
    assert layers["attention.out_proj"].positions == 3
    if sizes:
        assert layers["attention.k_proj_weight"].macs_executed == 5 * 8 * 6
    else:
        assert layers["attention.in_proj_weight"].positions == pytest.approx((3 + 5 + 5) / 3)


# Parametrized weights and supports


class _Threshold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * (weight.abs() > self.threshold)


def test_parametrized_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 1.0], [0.2, 0.0], [2.0, 0.3]]))
    rule = _Threshold()
    parametrize.register_parametrization(model[0], "weight", rule)
    rule.calls = 0
    counted = account(model, torch.zeros(2, 2))
    assert rule.calls == 2  # the forward, and one look at the weight
    row = counted.layers[0]
    assert (row.name, row.kind, row.nonzeros, row.macs_sparse) == ("0", "Linear", 2, 2)
    assert counted.nonzeros == 2 + 3  # neither the latent weight nor the threshold
    assert counted.macs_executed == 9


def test_supports_stand_for_values() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    x = torch.zeros(2, 1, 4, 4)
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[2].weight)
    counted = account(model, x, supports={"0": 6})
    assert [row.nonzeros for row in counted.layers] == [6, 40]
    assert counted.macs_sparse == 6 * 4 + 40
    assert account(model, x, supports={"0.weight": 6}) == counted
    with pytest.raises(ValueError, match="supports names convolution, which the model does not"):
        account(model, x, supports={"convolution": 6})
    with pytest.raises(ValueError, match=r"supports\['2'\] is 41; 2 has 40 weights, shape \(5, 8"):
        account(model, x, supports={"2": 41})


def test_weights_that_are_no_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"0\.weight is no parameter .* prune\.remove"):
        account(model, torch.zeros(1, 4))
    assert _hooks(model) == 1  # prune's own
    prune.remove(model[0], "weight")
    assert account(model, torch.zeros(1, 4)).macs_sparse == 8


# The model is left as it was


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class _Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("forward failed")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Dropout(), _Fails() if fails else nn.ReLU())
    model.train()
    norm.eval()
    model[0].weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="forward failed"):
            account(model, torch.randn(2, 3))
    else:
        account(model, torch.ones(2, 3))
        assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert _hooks(model) == 0
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Examples


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float, shift: Tensor | None = None) -> Tensor:
        y = self.layer(x) * scale
        return y if shift is None else y + shift


def test_examples() -> None:
    model, x = _TwoInputs(), torch.zeros(4, 3)
    expected = account(model, (x, 2.0))
    assert expected.macs_executed == 6
    assert account(model, [x, 2.0, torch.ones(())]) == expected
    assert account(model, {"scale": 2.0, "x": x}) == expected


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ("text", TypeError, "the example is a str; pass a tensor"),
        (None, TypeError, "the example is a NoneType"),
        ((), ValueError, "the example holds no tensor"),
        ({"scale": 2.0}, ValueError, "the example holds no tensor"),
        (torch.tensor(1.0), ValueError, r"shape \(\) and no batch"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"shape \(0, 3, 8, 8\) and no batch"),
        (torch.zeros(3, 8, 8), ValueError, r"0 got an input of shape \(3, 8, 8\), without a batch"),
    ],
)
def test_bad_examples(example: object, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(error, match=message):
        account(model, example)
    assert _hooks(model) == 0


# Bytes


def test_bytes_on_disk(tmp_path) -> None:
    model = _convolutional().to(memory_format=torch.channels_last)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert bytes_on_disk(model) == (tmp_path / "model.safetensors").stat().st_size
    assert account(model, torch.zeros(1, 3, 16, 16)).bytes_on_disk == bytes_on_disk(model)


def test_bytes_on_disk_of_shared_tensors(tmp_path) -> None:
    model = _LanguageModel()
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    # save_model writes which names it dropped into the header; the data are the same.
    difference = (tmp_path / "model.safetensors").stat().st_size - bytes_on_disk(model)
    assert 0 <= difference < 4 * 40

    views = nn.Module()
    flat = torch.zeros(10)
    views.register_buffer("low", flat[:6])
    views.register_buffer("high", flat[4:])
    views.register_buffer("none", torch.zeros(0))
    views.register_buffer("also_none", torch.zeros(0))
    apart = {"low": flat[:6].clone(), "high": flat[4:].clone()}
    empty = {"none": torch.zeros(0), "also_none": torch.zeros(0)}
    assert bytes_on_disk(views) == len(safetensors.torch.save(apart | empty))


# Reports


def test_table_and_dict() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    counted = account(model, torch.zeros(2, 1, 4, 4), supports={"0": 9})
    table = counted.table()
    head, columns, *rows, total, size = table.splitlines()
    assert head == "MACs for one example (FLOPs are 2 per MAC)"
    assert columns.split()[:4] == ["layer", "kind", "shape", "positions"]
    assert rows[0].split() == ["0", "Conv2d", "2x1x3x3", "4", "0.5000", "9", "72", "36"]
    assert rows[2].split() == ["(other)", "7", "0", "0"]
    assert total.split() == ["total", "0.8448", "56", "112", "76"]
    assert size == f"bytes on disk: {counted.bytes_on_disk:,}"
    assert len({len(line) for line in (columns, *rows, total)}) == 1

    figures = json.loads(json.dumps(counted.to_dict()))
    assert figures["macs_executed"] == 112
    assert figures["macs_sparse"] == 76
    assert figures["nonzeros"] == 56
    assert figures["layers"][0] == {
        "name": "0",
        "kind": "Conv2d",
        "shape": [2, 1, 3, 3],
        "positions": 4,
        "weights": 18,
        "nonzeros": 9,
        "density": 0.5,
        "macs_executed": 72,
        "macs_sparse": 36,
    }


def test_a_model_without_layers() -> None:
    counted = account(nn.Sequential(nn.ReLU()), torch.zeros(2, 3))
    assert (counted.macs_executed, counted.nonzeros, counted.density) == (0, 0, 1.0)
    assert "total" in counted.table()


# Training


def test_training_products() -> None:
    row = LayerMacs("fc", "Linear", (10, 10), positions=2, weights=100, nonzeros=10)
    counted = Account((row,), other_macs=7, other_nonzeros=0, bytes_on_disk=0)
    products = training_products(
        counted, sparse_forward=True, sparse_grad_input=False, sparse_grad_weight=True
    )
    assert products == (27.0, 207.0, 27.0)


def test_training_macs_add_up_and_resume() -> None:
    run = TrainingMacs()
    run.add(10, forward=1.0, grad_input=2.0, grad_weight=3.0)
    resumed = TrainingMacs()
    resumed.load_state_dict(run.state_dict())
    for macs in (run, resumed):
        macs.add(5, forward=1.0, grad_input=0.5, grad_weight=0.5)
    assert run.total == resumed.total == 70.0
    with pytest.raises(ValueError, match="examples=-1"):
        run.add(-1, forward=1.0, grad_input=1.0, grad_weight=1.0)
    with pytest.raises(ValueError, match=r"got a state with \['macs'\]"):
        run.load_state_dict({"macs": 1.0})


# ResNet-50, against published figures


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_block(inputs, inner, 1),
            nn.ReLU(),
            *_block(inner, inner, 3, stride),
            nn.ReLU(),
            *_block(inner, outputs, 1),
        )
        same = inputs == outputs
        self.shortcut = nn.Sequential(*(() if same else _block(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _block(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def _resnet50(keep: float = 1.0) -> nn.Module:
    """ResNet-50 (stride in the 3x3); `keep`: share of the channels inside each block."""
    layers: list[nn.Module] = [*_block(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            inner = round(keep * width)
            layers.append(_Bottleneck(inputs, width, inner, 1 if index else stride))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _erk(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """Densities in proportion to sum(shape) / prod(shape), layers above 1 made dense."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raw[i] * sizes[i] for i in free)
        above = {i for i in free if scale * raw[i] > 1}
        if not above:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        # One at a time, the largest first: dropping all at once would make too many dense.
        dense.add(max(above, key=lambda i: raw[i]))


@pytest.fixture(scope="module")
def resnet50() -> tuple[nn.Module, Tensor, Account]:
    model, image = _resnet50(), torch.zeros(1, 3, 224, 224)
    return model, image, account(model, image)


def test_resnet50_dense(resnet50: tuple[nn.Module, Tensor, Account]) -> None:
    _, _, dense = resnet50
    assert dense.macs_executed == 4_089_184_256
    assert dense.macs_sparse == pytest.approx(4_089_184_256, rel=1e-5)  # see _seed
    assert dense.flops_executed == 8_178_368_512
    assert dense.other_macs == 0
    assert sum(layer.weights for layer in dense.layers) == 25_502_912
    products = training_products(
        dense, sparse_forward=False, sparse_grad_input=False, sparse_grad_weight=False
    )
    assert sum(products) == 3 * 4_089_184_256
    run = TrainingMacs()
    forward, grad_input, grad_weight = products
    run.add(128_000_000, forward=forward, grad_input=grad_input, grad_weight=grad_weight)
    assert 2 * run.total == pytest.approx(3.14e18, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "in_shape", "num_classes", "weights", "ratios"),
    [
        ("resnet50-imagenet", (3, 224, 224), 1000, 25_502_912, {0.1: 0.2418, 0.2: 0.4138}),
        ("resnet50", (3, 32, 32), 100, 23_652_032, {0.1: 0.2247, 0.2: 0.3851}),
        ("vgg19", (3, 32, 32), 100, 20_070_080, {0.1: 0.2180, 0.2: 0.4028}),
    ],
)
def test_erk_ratios_of_the_papers_networks(
    resnet50: tuple[nn.Module, Tensor, Account],
    name: str,
    in_shape: tuple[int, int, int],
    num_classes: int,
    weights: int,
    ratios: dict[float, float],
) -> None:
    model = build_model(name, num_classes=num_classes, in_shape=in_shape)
    image = torch.zeros(1, *in_shape)
    dense = account(model, image)
    assert sum(layer.weights for layer in dense.layers) == weights
    if name == "resnet50-imagenet":
        assert dense.macs_executed == resnet50[2].macs_executed
    for density, ratio in ratios.items():
        densities = _erk([layer.shape for layer in dense.layers], density)
        supports = {
            layer.name: round(kept * layer.weights)
            for layer, kept in zip(dense.layers, densities, strict=True)
        }
        sparse = account(model, image, supports=supports)
        assert sparse.macs_executed == dense.macs_executed
        assert sparse.macs_sparse / dense.macs_executed == pytest.approx(ratio, abs=5e-5)
        assert sparse.density == pytest.approx(density, abs=1e-5)


@pytest.mark.parametrize(("keep", "ratio"), [(0.7, 0.641), (0.6, 0.538), (0.5, 0.446)])
def test_resnet50_narrow(
    resnet50: tuple[nn.Module, Tensor, Account], keep: float, ratio: float
) -> None:
    _, image, dense = resnet50
    narrow = account(_resnet50(keep), image)
    assert narrow.macs_executed / dense.macs_executed == pytest.approx(ratio, abs=5e-4)
    assert narrow.bytes_on_disk < 0.75 * dense.bytes_on_disk


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [_convolutional, _VisionTransformer])
def test_cuda_counts_what_the_cpu_does(build: Callable[[], nn.Module]) -> None:
    model, x = build(), torch.randn(2, 3, 16, 16)
    assert account(model, x) == account(model.cuda(), x.cuda())
    lstm = nn.LSTM(4, 8, batch_first=True)
    x = torch.randn(2, 5, 4)
    assert account(lstm, x) == account(lstm.cuda(), x.cuda())
