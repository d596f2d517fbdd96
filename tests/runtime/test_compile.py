"""compile_sparse: the same outputs, whatever the network, and a choice for every layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gossamer
from gossamer.runtime import compile as compiling
from gossamer.runtime import compile_sparse, kernels
from gossamer.runtime.compile import Compiled
from gossamer.runtime.fuse import Fusion, fuse
from gossamer.runtime.layers import (
    CsrLayer,
    DenseLayer,
    Geometry,
    Layer,
    MaxPool,
    PackedLayer,
    SparseLayer,
)
from nets import NETS, SKIP_NETS, net

needs_kernels = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))


class Vit(nn.Module):
    """Patches, attention that reads its weights itself, linear layers with a residual sum."""

    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size, 4, stride=4)
        self.norm = nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.dropout(self.down(F.gelu(self.up(x))))
        return self.head(x.mean(1))


class Branching(nn.Module):
    """Its path depends on a value: no graph can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        x = self.layers(x)
        if x.sum() > 1e9:
            x = -x
        return {"logits": self.fc(scale * x.mean((2, 3)))}


BUILD: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(net, name, dtype=torch.float32) for name in NETS | SKIP_NETS},
    "vit": Vit,
    "branching": Branching,
}
QUICK = ["vgg", "basic", "mobilenet", "vit", "branching"]
BY_DEFAULT = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in BUILD
]


def sparsified(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """In eval mode, with random zeros, and norms that do something."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.data *= torch.rand_like(module.weight) < density
    return model.eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quick(model: nn.Module, x: Tensor, **settings: object) -> Compiled:
    return compile_sparse(model, x, rounds=1, **settings)  # type: ignore[arg-type]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    found = y["logits"] if isinstance(y, dict) else y
    assert isinstance(found, Tensor)
    return found


def assert_same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    a, b = outputs(model, x), outputs(other, x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the sparse format wherever there is one, so that a test does not hang on times."""

    def best(self: compiling._Tried, plan: compiling._Plan) -> str:
        sparse = [path for path in self.ways if path not in compiling.DENSE]
        return sparse[-1] if sparse and plan.sparse else "eager"

    times = compiling._milliseconds

    def flattering(calls: dict[object, Callable[[], object]], rounds: int) -> dict[Any, float]:
        found = times(calls, rounds)
        sparse = [call for call in found if isinstance(call, compiling._Plan) and call.sparse]
        return found | dict.fromkeys(sparse, 1e-9)

    monkeypatch.setattr(compiling._Tried, "best", best)
    monkeypatch.setattr(compiling, "_milliseconds", flattering)


@needs_kernels
@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("name", BY_DEFAULT)
def test_sparse_networks_compute_the_same(name: str) -> None:
    model = sparsified(BUILD[name](), 0.1)
    before = copy.deepcopy(model.state_dict())
    compiled = quick(model, images())
    assert len(compiled.sparse_layers) >= 3
    for x in (images(2), images(1), images(5)):  # other batch sizes than that of the example
        assert_same(model, compiled.model, x)
    assert compiled.error < 1e-4
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert {"as it was", "dense", "compiled"} == set(compiled.milliseconds)
    assert all(choice.reason for choice in compiled.choices)
    assert compiled.sparse_layers[0] in compiled.table()


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_what_is_measured_computes_the_same(density: float) -> None:
    model = sparsified(BUILD["basic"](), density)
    assert_same(model, quick(model, images()).model, images(3))


def test_a_dense_network_stays_dense() -> None:
    model = sparsified(BUILD["vgg"](), 1.0)
    compiled = quick(model, images())
    assert compiled.sparse_layers == ()
    assert compiled.density == 1
    assert {choice.path for choice in compiled.choices} <= {"eager", "onednn"}
    assert "too few zeros" in compiled.choices[0].reason
    assert_same(model, compiled.model, images())


@needs_kernels
def test_below_break_even_stays_dense_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"eager": 1.0, "onednn": 2.0, "rows": 1.5, "lanes": 3.0, "block16": 3.0}
    monkeypatch.setattr(
        compiling, "_milliseconds", lambda calls, _: {name: times.get(name, 1.0) for name in calls}
    )
    [choice] = quick(sparsified(nn.Sequential(nn.Linear(32, 32)), 0.3), torch.randn(8, 32)).choices
    assert (choice.path, choice.dense, choice.sparse) == ("eager", 1.0, 1.5)
    assert choice.reason == "below break-even: sparse would be 0.67x as fast"


# ------------------------------------------------------------------ fusing


class Tails(nn.Module):
    """Layers with everything that can follow one, and what must not be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.e, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))  # norm and ReLU
        x = F.relu(self.b(x) + x)  # sum and ReLU
        y = self.c(x)
        x = y.relu() + y  # read twice: nothing
        z = self.d(x)
        x.mul_(2)  # d must not run after this
        x = z + x
        x = x.add_(self.e(x))  # changes x itself: no sum
        x = self.twice(self.twice(x)).relu()  # runs twice: nothing
        return self.wide(x) + x  # a sum over other shapes


def test_what_is_fused_in_a_graph() -> None:
    model = sparsified(Tails(), 0.5)
    x = torch.randn(4, 8)
    fused, recipe, note = fuse(model, x)
    assert (recipe.by, note) == ("graph", "")
    assert dict(recipe.layers) == {
        "a": Fusion(norm="norm", relu=True),
        "b": Fusion(add=True, relu=True),
        **dict.fromkeys("cde", Fusion()),
        "twice": Fusion(),
        "wide": Fusion(),
    }
    assert_same(model, fused, x)


def test_what_is_fused_module_by_module() -> None:
    model = sparsified(Branching(), 0.5)
    fused, recipe, note = fuse(model, images())
    assert recipe.by == "modules"
    assert note.startswith("sums and ReLU functions are not fused (TraceError: ")
    assert recipe.layers["layers.0"] == Fusion(norm="layers.1", relu=True)
    assert recipe.dropped == ("layers.1", "layers.2")
    assert_same(model, fused, images(3))


def test_attention_that_reads_its_weights_is_left_alone() -> None:
    model = sparsified(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 0.1)
    x = torch.randn(2, 5, 16)
    compiled = quick(model, x)
    assert compiled.choices == ()
    assert_same(model, compiled.model, x)


def test_layers_with_hooks_or_a_forward_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].register_forward_hook(lambda module, args, y: 2 * y)
    compiled = quick(model.eval(), torch.randn(2, 8))
    assert [choice.layer for choice in compiled.choices] == ["2"]
    assert_same(model, compiled.model, torch.randn(3, 8))


# ------------------------------------------------------------------ layers


GEOMETRIES = {
    "linear": (nn.Linear(20, 37), (3, 20)),
    "tokens": (nn.Linear(20, 37, bias=False), (2, 3, 20)),
    "one vector": (nn.Linear(20, 37), (20,)),
    "3x3": (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 9, 8)),
    "one image": (nn.Conv2d(6, 10, 3), (6, 9, 8)),
    "strided": (
        nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (1, 6, 11, 12),
    ),
    "groups": (nn.Conv2d(6, 12, 1, groups=3, bias=False), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(8, 8, 3, padding="same", groups=8), (2, 8, 5, 5)),
    "1d": (nn.Conv1d(6, 10, 5, stride=2, padding=2), (2, 6, 21)),
}


def layer_of(module: nn.Module, relu: bool) -> DenseLayer:
    geometry = Geometry.of(module)
    assert isinstance(geometry, Geometry)
    assert isinstance(module.weight, Tensor)
    bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
    return DenseLayer(geometry, module.weight.detach(), bias, relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_way_computes_the_layer(name: str, relu: bool) -> None:
    module, shape = GEOMETRIES[name]
    module = sparsified(module, 0.3)
    dense = layer_of(module, relu)
    x = torch.randn(shape)
    wanted = module(x).detach()
    add = torch.randn(wanted.shape)
    ways: list[Layer] = [dense, PackedLayer(dense.geometry, dense.weight, dense.bias, relu)]
    if kernels.missing() is None:
        ways += [SparseLayer.of(dense, "rows"), SparseLayer.of(dense, "block16")]
    if dense.geometry.maps == 0 and x.dim() > 1:
        ways.append(CsrLayer.of(dense))
    with torch.no_grad():
        for way in ways:
            for extra in (None, add):
                expected = wanted if extra is None else wanted + extra
                expected = expected.relu() if relu else expected
                found = way(x) if extra is None else way(x, extra)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(way.weight, dense.weight)
            copy.deepcopy(way)


@needs_kernels
@pytest.mark.parametrize("name", GEOMETRIES)
def test_operators_have_shapes_for_tracing(name: str) -> None:
    module, shape = GEOMETRIES[name]
    sparse = SparseLayer.of(layer_of(module, relu=True), "rows")
    x = torch.randn(shape)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = sparse(mode.from_tensor(x))
    with torch.no_grad():
        real = sparse(x)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    "settings",
    [(2,), (3, 2, 1), ((2, 3), (1, 2), (0, 1)), (1, 3), (2, 1, 0, 2), (3, 2, 0, 1, False, True)],
)
def test_pools_are_the_same(settings: tuple[Any, ...]) -> None:
    plain = nn.MaxPool2d(*settings)
    x = torch.randn(2, 3, 10, 9)
    x[0, 0, 4, 4] = torch.nan
    pool = MaxPool.of(plain)
    assert (pool is None) == (len(settings) > 3)
    if pool is not None:
        last = x.contiguous(memory_format=torch.channels_last)
        for image in (x, x.abs().neg(), last, x[0]):
            torch.testing.assert_close(pool(image), plain(image), rtol=0, atol=0, equal_nan=True)
        with pytest.raises((ValueError, RuntimeError)):
            MaxPool((3, 3), (1, 1), (0, 0))(x[..., :2])


def test_layers_that_no_kernel_can_be() -> None:
    for module, reason in (
        (nn.Conv3d(2, 2, 1), "Conv3d"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(2, 2, 2, padding="same"), "one side"),
    ):
        assert reason in str(Geometry.of(module))


# ------------------------------------------------------------------ what is refused


def test_training_is_refused() -> None:
    compiled = quick(sparsified(nn.Sequential(nn.Linear(8, 8)), 0.1), torch.randn(2, 8))
    compiled.model.eval()
    with pytest.raises(RuntimeError, match="for inference"):
        compiled.model.train()
    assert not list(compiled.model.parameters())


@needs_kernels
@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_gradients_are_refused(name: str) -> None:
    module, shape = GEOMETRIES[name]
    sparse = SparseLayer.of(layer_of(module, relu=False), "rows")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sparse(torch.randn(shape, requires_grad=True))


def test_other_types_devices_and_unfinished_models_are_refused() -> None:
    x = torch.randn(2, 8)
    for model, example, message in (
        (nn.Linear(8, 8).double(), x.double(), "weight is torch.float64.*model.float"),
        (nn.Linear(8, 8).to("meta"), x, "weight is on meta.*model.cpu"),
        (nn.Linear(8, 8), x.half(), "the example is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            compile_sparse(model, example)
    model = nn.Sequential(nn.Linear(8, 8))
    gossamer.Sparsifier(model, gossamer.RigL(density=0.5), total_steps=10)
    with pytest.raises(ValueError, match=r"0 is parametrized: call sparsifier\.finalize"):
        compile_sparse(model, x)
    with pytest.raises(ValueError, match="storage='fp8'"):
        compile_sparse(nn.Linear(8, 8), x, storage="fp8")  # type: ignore[arg-type]


def test_training_mode_of_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model = sparsified(model, 0.1).train()
    model[0].eval()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    compiled = quick(model, torch.randn(4, 8, generator=torch.Generator()))
    assert [module.training for module in model] == [False, True, True, True]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert compiled.error < 1e-4


@needs_kernels
@pytest.mark.usefixtures("sparse_wins")
def test_storages_that_round_say_by_how_much() -> None:
    model = sparsified(BUILD["vgg"](), 0.1)
    exact, half = quick(model, images()), quick(model, images(), storage="bfloat16")
    assert exact.error < 1e-5 < half.error < 0.1
    assert {choice.path for choice in half.choices} & {"rows-bfloat16", "lanes-bfloat16"}


# ------------------------------------------------------------------ without kernels


def test_without_kernels_linear_layers_have_csr(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("sparse_wins")
    line = "the sparse kernels were not built: install a C++ compiler"
    monkeypatch.setattr(kernels, "_load", lambda: line)
    model = sparsified(BUILD["branching"](), 0.1)
    compiled = quick(model, images(8))
    assert compiled.note.startswith(line)
    assert compiled.lines()[0] == compiled.note
    paths = {choice.layer: (choice.path, choice.reason) for choice in compiled.choices}
    assert paths["fc"][0] == "csr"
    assert paths["layers.0"] == ("eager", "only the kernels have sparse convolutions")
    assert_same(model, compiled.model, images(3))


# ------------------------------------------------------------------ PyTorch's own tracers


@needs_kernels
@pytest.mark.slow
@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("name", ["basic", "vit"])
def test_export_with_a_free_batch(name: str) -> None:
    model = sparsified(BUILD[name](), 0.1)
    compiled = quick(model, images())
    batch = torch.export.Dim("batch")
    program = torch.export.export(compiled.model, (images(),), dynamic_shapes=({0: batch},))
    assert "gossamer.sparse_convolution" in str(program.graph)
    assert_same(model, program.module(), images(5))


@needs_kernels
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch._inductor
@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("name", ["basic", "mobilenet"])
def test_torch_compile(name: str) -> None:
    model = sparsified(BUILD[name](), 0.1)
    compiled = quick(model, images())
    traced = torch.compile(compiled.model, fullgraph=True)
    assert_same(model, traced, images())  # type: ignore[arg-type]


def pointwise(weight: Tensor, bias: Tensor) -> SparseLayer:
    geometry = Geometry(maps=2, outputs=4, inputs=3)
    return SparseLayer.of(DenseLayer(geometry, weight, bias, relu=True), "rows")


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:.*Profiler clears")
def test_who_watches_sees_the_operators() -> None:
    layer, x = pointwise(torch.randn(4, 3, 1, 1), torch.randn(4)), images()
    with torch.profiler.profile() as seen:
        y = layer(x)
    assert "gossamer::sparse_convolution" in {event.key for event in seen.key_averages()}
    traced = torch.jit.trace(layer, 0 * x, check_trace=False)
    assert torch.equal(traced(x), y)


@needs_kernels
def test_a_prepared_call_follows_the_layer() -> None:
    """Other shapes, other weights in the place of its own, copies, and what cannot be prepared."""
    weight, bias = torch.randn(4, 3, 1, 1), torch.randn(4)
    layer = pointwise(weight, bias)

    def wanted(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias).relu()

    for x in (images(2), images(2), images(3), images(2).transpose(2, 3), images(1)[0]):
        torch.testing.assert_close(layer(x), wanted(x))
    x, add = images(1), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(layer(x, add), (F.conv2d(x, weight, bias) + add).relu())
    twin = pickle.loads(pickle.dumps(layer))
    layer.load_state_dict(pointwise(2 * weight, 2 * bias).state_dict(), assign=True)
    torch.testing.assert_close(layer(x), 2 * wanted(x))
    torch.testing.assert_close(twin(x), wanted(x))
    for bad in (x[:, :2], x.double()):
        with pytest.raises(ValueError, match=r"wanted|needs|float32|channels"):
            layer(bad)
