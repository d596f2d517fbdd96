"""2:4 export: the probe, the verification and the refusals on a CPU; the real thing on a GPU."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import gossamer
from gossamer.export import semi_structured, to_semi_structured
from gossamer.export.semi_structured import (
    Machine,
    SemiStructuredConv1x1,
    SemiStructuredLinear,
    choose_backends,
    misfit,
    probe,
)
from gossamer.measure import check_nm
from gossamer.ops import n_of_m

BOTH = ("cusparselt", "cutlass")


class Net(nn.Module):
    """Every case: fitting, strided, not 2:4, a kernel, a remainder, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 64, 1, bias=False)
        self.strided = nn.Conv2d(64, 64, 1, stride=2)
        self.full = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 64)
        self.last = nn.Linear(64, 10)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.full(self.strided(self.wide(self.stem(x)).relu()).relu()).relu()
        return self.last(self.head(x.mean((2, 3))).relu())


def _net() -> tuple[nn.Module, Tensor]:
    model = Net().to(torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for name, module in model.named_children():
            if name != "full":
                module.weight.mul_(n_of_m(module.weight, 2, 4))
    images = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    return model, images.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine that runs "packed" weights dense; its value is the ratio the timing finds."""
    found = {"ratio": 0.5}
    monkeypatch.setattr(semi_structured, "probe", lambda device: Machine("fake:0", BOTH))
    monkeypatch.setattr(semi_structured, "_pack", lambda weight, backend: weight.clone())
    monkeypatch.setattr(semi_structured, "_times", lambda *_: (1.0, found["ratio"], found["ratio"]))
    return found


def test_the_packer_drops_what_does_not_fit() -> None:
    """Why the pattern is verified first."""
    row = torch.tensor([1.0, 2, 3, 4], dtype=torch.float16).repeat(32, 16)
    unpacked = sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(row)
    )
    assert unpacked[0, :4].tolist() == [1, 2, 0, 0]
    kept = row * n_of_m(row, 2, 4)
    unpacked = sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(kept)
    )
    assert torch.equal(unpacked, kept)


# The probe


def test_a_cpu_is_refused() -> None:
    model, images = _net()
    result = to_semi_structured(model, images)
    assert result.converted == ()
    assert {row.why for row in result.layers} == {"the model is on cpu, and 2:4 kernels need CUDA"}
    assert torch.equal(result.model(images), model(images))
    assert "0 of 7 layers run 2:4 on cpu" in result.table()
    assert not probe(torch.device("cpu")).backends


@pytest.mark.parametrize(
    ("capability", "cusparselt", "expected"),
    [
        ((7, 5), True, ()),
        ((8, 0), True, BOTH),
        ((8, 6), False, ("cutlass",)),
        ((9, 0), True, ("cusparselt",)),
        ((9, 0), False, ()),
        ((12, 0), True, ("cusparselt",)),
    ],
)
def test_backends(capability: tuple[int, int], cusparselt: bool, expected: tuple[str, ...]) -> None:
    assert choose_backends(capability, cusparselt=cusparselt) == expected


@pytest.mark.parametrize(
    ("layer", "backends", "message"),
    [
        (nn.Conv2d(64, 64, 3), BOTH, "only linear layers and 1x1"),
        (nn.Conv1d(64, 64, 1), BOTH, "only linear layers and 1x1"),
        (nn.Conv2d(64, 64, 1, groups=2), BOTH, "2 groups"),
        (nn.Conv2d(64, 64, 1, padding=1), BOTH, r"padding \(1, 1\)"),
        (nn.Linear(64, 64, dtype=torch.float32), BOTH, "float32; 2:4 needs float16 or bfloat16"),
        (nn.Linear(24, 64), ("cusparselt",), r"64 x 24 weights; .*of 16 and 16 \(cusparselt\)"),
        (nn.Linear(32, 64), ("cutlass",), r"64 x 32 weights; .*of 32 and 64 \(cutlass\)"),
        (nn.Linear(64, 64), BOTH, "not 2:4, the packer would drop weights: dense"),
    ],
)
def test_misfits(layer: nn.Module, backends: tuple[str, ...], message: str) -> None:
    if layer.weight.dtype == torch.float32 and "float32" not in message:
        layer.to(torch.bfloat16)
    (pattern,) = check_nm(layer, 2, 4).layers
    assert re.search(message, misfit(layer, pattern, backends))


def test_what_fits() -> None:
    for layer in (nn.Linear(32, 16), nn.Conv2d(32, 16, 1, padding="same")):
        layer.to(torch.float16)
        with torch.no_grad():
            layer.weight.mul_(n_of_m(layer.weight, 2, 4))
        (pattern,) = check_nm(layer, 2, 4).layers
        assert misfit(layer, pattern, ("cusparselt",)) == ""
        assert "multiples" in misfit(layer, pattern, ("cutlass",))


# Conversion, with dense weights in place of packed ones


def test_fitting_layers_are_replaced_and_compute_the_same(fake_gpu: dict[str, float]) -> None:
    model, images = _net()
    before = copy.deepcopy(model.state_dict())
    result = to_semi_structured(model, images)
    assert result.converted == ("wide", "strided", "head")
    whys = {row.name: row.why for row in result.layers}
    assert "1x1" in whys["stem"]
    assert "not 2:4" in whys["full"]
    assert "10 x 64 weights" in whys["last"]
    assert whys["unused"] == "the example does not reach it"
    rows = {row.name: row.rows for row in result.layers}
    assert (rows["wide"], rows["strided"], rows["head"]) == (4 * 8 * 8, 4 * 4 * 4, 4)
    torch.testing.assert_close(result.model(images), model(images), rtol=0.02, atol=0.02)
    assert isinstance(result.model.wide, SemiStructuredConv1x1)
    assert isinstance(result.model.head, SemiStructuredLinear)
    assert isinstance(model.wide, nn.Conv2d), "the model itself was changed"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert "cusparselt" in result.table()
    assert result.to_dict()["layers"][1]["backend"] == "cusparselt"


def test_what_is_not_faster_stays_dense(fake_gpu: dict[str, float]) -> None:
    fake_gpu["ratio"] = 0.97
    model, images = _net()
    result = to_semi_structured(model, images)
    assert result.converted == ()
    (head,) = (row for row in result.layers if row.name == "head")
    assert head.why == "not faster: 0.97 of the dense time on cusparselt"
    assert head.dense_ms == 1.0
    assert to_semi_structured(model, images, max_ratio=0.98).converted == (
        "wide",
        "strided",
        "head",
    )


def test_what_fails_or_computes_something_else_stays_dense(
    fake_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weight: Tensor, backend: str) -> Tensor:
        if backend == "cutlass":
            raise RuntimeError("sparse kernel says no\nand more")
        return 2 * weight

    monkeypatch.setattr(semi_structured, "_pack", broken)
    model, images = _net()
    result = to_semi_structured(model, images)
    whys = {row.name: row.why for row in result.layers}
    assert whys["head"] == "cutlass fails: sparse kernel says no"
    assert whys["wide"].startswith("cusparselt computes something else (by ")
    assert result.converted == ()


def test_a_model_that_is_one_layer(fake_gpu: dict[str, float]) -> None:
    layer = nn.Linear(64, 64, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.mul_(n_of_m(layer.weight, 2, 4))
    x = torch.randn(5, 3, 64, dtype=torch.float16).transpose(0, 1)
    result = to_semi_structured(layer, x)
    assert isinstance(result.model, SemiStructuredLinear)
    assert result.layers[0].rows == 15
    torch.testing.assert_close(result.model(x), layer(x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_on_channels_last_rows(
    stride: int | tuple[int, int], memory_format: torch.memory_format
) -> None:
    conv = nn.Conv2d(16, 8, 1, stride=stride)
    x = torch.randn(2, 16, 7, 5).to(memory_format=memory_format)
    rows = SemiStructuredConv1x1(conv.weight.detach().flatten(1), conv.bias, conv.stride)
    torch.testing.assert_close(rows(x), conv(x))
    assert rows(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(rows(x[0]), conv(x[0]))


def test_a_model_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    gossamer.Sparsifier(model, gossamer.SRSTE(), total_steps=5)
    with pytest.raises(ValueError, match="0 is still parametrized: call sparsifier"):
        to_semi_structured(model, torch.zeros(1, 16))
    with pytest.raises(ValueError, match="max_ratio=0"):
        to_semi_structured(nn.Linear(16, 16), torch.zeros(1, 16), max_ratio=0)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    device = torch.device("cuda")
    if probe(device).why:
        pytest.skip(probe(device).why)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(512, 2048, 1), nn.ReLU(), nn.Conv2d(2048, 2048, 1, stride=2, bias=False),
        nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten(2),
    )  # fmt: skip
    sparsifier = gossamer.Sparsifier(model, gossamer.SRSTE(), total_steps=5)
    sparsifier.finalize()
    model = model.to(device, torch.bfloat16).to(memory_format=torch.channels_last).eval()
    x = torch.randn(32, 512, 32, 32, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    result = to_semi_structured(model, x, max_ratio=1e9)  # whatever the time: does it run?
    assert result.converted == ("0", "2"), result.table()
    with torch.no_grad():
        wanted, got = model(x).float(), result.model(x).float()
    assert (wanted - got).abs().max() <= 0.02 * wanted.abs().max()
    timed = to_semi_structured(model, x)
    for row in timed.layers:
        assert row.dense_ms is not None
        assert row.sparse_ms is not None
        assert bool(row.backend) != bool(row.why)
