"""Every sparse kernel on every instruction set against float64, over random layers."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.runtime import kernels
from gossamer.runtime.kernels import Format, Isa, Storage

if kernels.missing():
    pytest.skip(str(kernels.missing()), allow_module_level=True)


@pytest.fixture(params=get_args(Isa))
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    before = kernels.get_isa()
    if request.param not in kernels.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def sparse(*shape: int, density: float) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) < density)


def blocks(out: int, *rest: int, density: float) -> Tensor:
    """Zeros in columns of 16 outputs."""
    mask = (torch.rand((out + 15) // 16, 1, *rest) < density).expand(-1, 16, *rest)
    return torch.randn(out, *rest) * mask.reshape(-1, *rest)[:out]


def n_of_m(out: int, channels: int, n: int, m: int) -> Tensor:
    scores = torch.rand(out, channels // m, m)
    mask = torch.zeros_like(scores).scatter_(2, scores.topk(n).indices, 1)
    return torch.randn(out, channels) * mask.view(out, channels)


def unaligned(tensor: Tensor) -> Tensor:
    """A copy that starts four bytes after a 64-byte boundary."""
    memory = torch.empty(tensor.numel() + 32)
    skip = (-memory.data_ptr() // 4) % 16 + 1
    return memory[skip : skip + tensor.numel()].view(tensor.shape).copy_(tensor)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_random_layer(rng: random.Random, format: Format) -> None:
    """One random layer on one random input, with the sizes and pointers that kernels trip over."""
    pick = rng.randint
    linear = format == "lanes" or rng.random() < 0.4
    groups = 1 if format == "lanes" else rng.choice([1, 1, 1, 2, 3])
    out, channels = groups * pick(1, 40), groups * pick(1, 70)
    kernel, stride, dilation = (
        (1, 1) if linear else (pick(1, most), pick(1, most)) for most in (4, 3, 2)
    )
    padding = (0, 0) if linear else (pick(0, 3), pick(0, 3))
    height, width = (1, 1) if linear else (pick(1, 14), pick(1, 30))
    batch = pick(0, 6) if not linear or rng.random() < 0.5 else pick(1, 300)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if height + 2 * padding[0] < reach[0] or width + 2 * padding[1] < reach[1]:
        return
    storage = rng.choice(get_args(Storage))

    density = rng.choice([0, 0.02, 0.1, 0.5, 1])
    make = blocks if format == "block16" and rng.random() < 0.7 else sparse
    weight = make(out, channels // groups, *kernel, density=density)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    packed = kernels.pack(weight, format=format, storage=storage, **geometry)
    kernels.check(packed)
    stored = kernels.unpack(packed)
    if storage == "float32":
        assert torch.equal(stored, weight)
    elif storage == "bfloat16":
        assert torch.equal(stored, weight.bfloat16().float())
    else:
        step = weight.flatten(1).abs().amax(1) / 127
        assert ((stored - weight).abs() <= 0.501 * step.view(-1, 1, 1, 1)).all()

    x = unaligned(torch.randn(batch, channels, height, width))
    wanted = F.conv2d(x.double(), stored.double(), None, *geometry.values())
    bias = unaligned(torch.randn(out)) if rng.random() < 0.5 else None
    add = unaligned(torch.randn(wanted.shape)) if rng.random() < 0.5 else None
    relu = rng.random() < 0.5
    wanted = wanted if bias is None else wanted + bias.view(-1, 1, 1)
    wanted = wanted if add is None else wanted + add
    wanted = wanted.relu() if relu else wanted
    result = unaligned(torch.full(wanted.shape, torch.nan))
    kernels.run(packed, x, bias, add=add, relu=relu, out=result, threads=pick(1, 3))
    assert_close(result, wanted)


@pytest.mark.parametrize("format", get_args(Format))
def test_random_layers(isa: Isa, format: Format) -> None:
    rng = random.Random(f"{isa} {format}")
    for _ in range(40):
        check_random_layer(rng, format)


@pytest.mark.slow
@pytest.mark.parametrize("format", get_args(Format))
def test_many_random_layers(isa: Isa, format: Format) -> None:
    rng = random.Random(f"many {isa} {format}")
    for _ in range(3000):
        check_random_layer(rng, format)


@pytest.mark.parametrize("format", get_args(Format))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (1, 16), (2, 8), (4, 8), (3, 5)])
def test_n_of_m(isa: Isa, format: Format, n: int, m: int) -> None:
    weight = n_of_m(37, 12 * m, n, m)
    packed = kernels.pack(weight, format=format)
    for batch in (1, 5, 33):
        x = torch.randn(batch, 12 * m)
        assert_close(kernels.run(packed, x), x.double() @ weight.double().T)


def test_n_of_m_lanes_have_no_padding() -> None:
    # 4 bytes of value and 1 of place per non-zero, 2 bytes of mask per 16, and the headers.
    weight = n_of_m(256, 1024, 2, 4)
    size = kernels.pack(weight, format="lanes").numel()
    assert size < (4 + 1 + 2 / 16) * 256 * 512 + 4 * 16 * 64 + 1024


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_storage_halves_and_quarters_blocks(storage: Storage) -> None:
    weight = blocks(512, 512, density=0.1)
    full, small = (
        kernels.pack(weight, format="block16", storage=name) for name in ("float32", storage)
    )
    assert small.numel() < (0.55 if storage == "bfloat16" else 0.31) * full.numel()


@pytest.mark.parametrize("format", get_args(Format))
def test_many_channels(isa: Isa, format: Format) -> None:
    """Several blocks of channels, more than 16 columns, sizes that are multiples of nothing."""
    weight = sparse(50, 1100, density=0.1)
    packed = kernels.pack(weight, format=format)
    for batch in (1, 2, 3, 4, 7, 8, 9, 31, 130):
        x = torch.randn(batch, 1100)
        assert_close(kernels.run(packed, x), x.double() @ weight.double().T)


@pytest.mark.parametrize("format", ["rows", "block16"])
def test_several_strips(isa: Isa, format: Format) -> None:
    """A map of more columns than stay in the cache at once."""
    weight = sparse(20, 40, 3, 3, density=0.1)
    packed = kernels.pack(weight, padding=(1, 1), format=format)
    x = torch.randn(2, 40, 60, 67)
    assert_close(kernels.run(packed, x), F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("format", ["rows", "block16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_inputs_read_in_place_and_copied_give_the_same(
    isa: Isa, format: Format, threads: int
) -> None:
    weight = sparse(40, 48, 1, 1, density=0.1)
    packed = kernels.pack(weight, groups=2, format=format)
    x, add = torch.randn(3, 96, 12, 20), torch.randn(3, 40, 12, 20)
    memory = torch.empty(x.numel() + 1)
    moved = memory[1:].view(x.shape).copy_(x)
    assert (x.data_ptr() % 64, moved.data_ptr() % 64) == (0, 4)
    settings = {"add": add, "relu": True, "threads": threads}
    in_place, copied = (kernels.run(packed, each, **settings) for each in (x, moved))
    assert torch.equal(in_place, copied)
    wanted = F.conv2d(x.double(), weight.double(), groups=2) + add.double()
    assert_close(in_place, wanted.relu())


@pytest.mark.parametrize("channels", [3, 16, 40])
def test_max_pool(isa: Isa, channels: int) -> None:
    x = torch.randn(3, channels, 9, 37)
    x[0, 0, 4, 4], x[1, 1] = torch.nan, -torch.inf
    last = x.contiguous(memory_format=torch.channels_last)
    for kernel, stride, padding in (
        ((3, 3), (2, 2), (1, 1)),
        ((2, 5), (1, 3), (0, 2)),
        ((9, 1), (1, 1), (4, 0)),
    ):
        wanted = F.max_pool2d(x, kernel, stride, padding)
        for image in (x, last):
            found = kernels.max_pool(image, kernel, stride, padding, threads=2)
            assert found.is_contiguous()
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_max_pool_refuses() -> None:
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="channels_last"):
        kernels.max_pool(x[..., :3], (2, 2), (2, 2), (0, 0))
    last = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="kernel"):
        kernels.max_pool(last, (2, 2), (2, 2), (2, 0))
    with pytest.raises(ValueError, match="kernel"):
        kernels.max_pool(last, (5, 5), (1, 1), (0, 0))
    with pytest.raises(ValueError, match="float64"):
        kernels.max_pool(last.double(), (2, 2), (2, 2), (0, 0))


@pytest.mark.parametrize("format", get_args(Format))
def test_nan_and_infinity_go_where_the_weight_is_not_zero(isa: Isa, format: Format) -> None:
    weight = torch.zeros(32, 40)
    weight[3, 5], weight[20, 39], weight[20, 5] = 1.0, -1.0, 0.5
    packed = kernels.pack(weight, format=format)
    for batch in (1, 4, 40):
        x = torch.ones(batch, 40)
        x[0, 39], x[-1, 5] = torch.inf, torch.nan
        for relu in (False, True):
            wanted = torch.zeros(batch, 32)
            wanted[:, 3], wanted[:, 20] = x[:, 5], 0.5 * x[:, 5] - x[:, 39]
            got = kernels.run(packed, x, relu=relu)
            wanted = wanted.relu() if relu else wanted
            rows = [3, 20] if format == "block16" else list(range(32))
            torch.testing.assert_close(got[:, rows], wanted[:, rows], equal_nan=True)


def test_padding_columns_and_images_do_not_mix(isa: Isa) -> None:
    """One infinite pixel reaches its neighbours, and nothing across the edges of its image."""
    weight = torch.ones(1, 1, 3, 3)
    packed = kernels.pack(weight, padding=(1, 1))
    for pixel in [(0, 0), (0, 4), (3, 0), (3, 4)]:
        x = torch.ones(3, 1, 4, 5)
        x[1, 0, pixel[0], pixel[1]] = torch.inf
        wanted = F.conv2d(x, weight, padding=1)
        torch.testing.assert_close(kernels.run(packed, x), wanted)


@pytest.mark.parametrize("format", get_args(Format))
def test_equal_bits_for_every_number_of_threads(format: Format) -> None:
    weight = sparse(100, 300, density=0.1)
    packed = kernels.pack(weight, format=format)
    for batch in (1, 6, 200):
        x = torch.randn(batch, 300)
        results = [kernels.run(packed, x, threads=threads) for threads in (1, 2, 3, 8)]
        assert all(torch.equal(results[0], other) for other in results[1:])
    conv = kernels.pack(sparse(48, 36, 3, 3, density=0.1), format="rows")
    x = torch.randn(3, 36, 20, 20)
    one = kernels.run(conv, x, threads=1)
    assert all(torch.equal(one, kernels.run(conv, x, threads=n)) for n in (2, 5))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_the_threads_are_those_of_pytorch() -> None:
    """Not one thread is started: the pool that PyTorch's own operators made does the work."""
    torch.set_num_threads(2)
    torch.ones(1_000_000).exp_()
    packed = kernels.pack(sparse(64, 64, 3, 3, density=0.1))
    x = torch.randn(2, 64, 20, 20)
    kernels.run(packed, x)
    done, seen = threading.Event(), set()

    def watch() -> None:
        while not done.is_set():
            seen.update(os.listdir("/proc/self/task"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = set(os.listdir("/proc/self/task"))
    for _ in range(20):
        kernels.run(packed, x)
    done.set()
    watcher.join()
    assert seen <= before


def test_add_may_be_the_output() -> None:
    weight = sparse(24, 17, 3, 3, density=0.3)
    packed = kernels.pack(weight)
    x, residual = torch.randn(2, 17, 9, 9), torch.randn(2, 24, 7, 7)
    wanted = (F.conv2d(x.double(), weight.double()) + residual).relu()
    assert_close(kernels.run(packed, x, add=residual, out=residual, relu=True), wanted)


def test_describe() -> None:
    packed = kernels.pack(
        torch.ones(6, 2, 3, 1),
        stride=(2, 3),
        padding=(1, 0),
        dilation=(1, 2),
        groups=2,
        format="block16",
        storage="int8",
    )
    assert kernels.describe(packed) == kernels.Layer(
        out_channels=6,
        in_channels=4,
        kernel=(3, 1),
        stride=(2, 3),
        padding=(1, 0),
        dilation=(1, 2),
        groups=2,
        format="block16",
        storage="int8",
    )


def test_damaged_bytes_are_found() -> None:
    """Whatever byte of the lists is wrong, check() refuses or run() stays inside its memory."""
    weight = sparse(20, 50, density=0.2)
    for format in get_args(Format):
        packed = kernels.pack(weight, format=format)
        kernels.check(packed)
        with pytest.raises(ValueError, match="not a packed layer"):
            kernels.check(packed[:-64])
        for position in (0, 52, 56, 64, 68, 72, *range(80, 136, 8)):  # of the header
            damaged = packed.clone()
            damaged[position] += 1
            with pytest.raises(ValueError, match="not a packed layer"):
                kernels.check(damaged)
        refused = 0
        for position in range(128, packed.numel(), 7):
            damaged = packed.clone()
            damaged[position] = 255
            try:
                kernels.check(damaged)
            except ValueError:
                refused += 1
                continue
            kernels.run(damaged, torch.randn(5, 50))
        assert refused


def test_without_the_library_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "_kernels.so")
    kernels._load.cache_clear()
    try:
        assert "install a C++ compiler" in str(kernels.missing())
        with pytest.raises(RuntimeError, match="install a C\\+\\+ compiler"):
            kernels.pack(torch.ones(2, 2))
        (tmp_path / "_kernels.so").write_text("not a library")
        kernels._load.cache_clear()
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            kernels.get_isa()
    finally:
        kernels._load.cache_clear()


def test_wrong_arguments_are_named() -> None:
    weight = sparse(8, 12, density=0.5)
    packed = kernels.pack(weight)
    x = torch.randn(3, 12)
    with pytest.raises(ValueError, match="float64"):
        kernels.pack(weight.double())
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        kernels.pack(weight[0])
    with pytest.raises(ValueError, match="cannot be packed"):
        kernels.pack(weight.view(8, 12, 1, 1), stride=(0, 1))
    with pytest.raises(ValueError, match="cannot be packed"):
        kernels.pack(torch.randn(8, 3, 3, 3), format="lanes")
    with pytest.raises(ValueError, match="one of rows, block16, lanes"):
        kernels.pack(weight, format="csr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be packed"):
        kernels.pack(torch.full((2, 2), torch.inf), storage="int8")
    with pytest.raises(ValueError, match="does not fit"):
        kernels.run(packed, torch.randn(3, 13))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.run(packed, torch.randn(12, 3).T)
    with pytest.raises(ValueError, match="float64"):
        kernels.run(packed, x.double())
    with pytest.raises(ValueError, match="bias has shape"):
        kernels.run(packed, x, torch.randn(7))
    with pytest.raises(ValueError, match="does not run"):
        kernels.run(packed, x, threads=0)
    with pytest.raises(ValueError, match="does not run"):
        kernels.run(kernels.pack(weight, format="lanes"), torch.randn(2, 12, 4, 4))
    with pytest.raises(ValueError, match="row of bytes"):
        kernels.run(torch.zeros(512), x)
    with pytest.raises(ValueError, match="one of portable, avx2, avx512"):
        kernels.set_isa("sse9")  # type: ignore[arg-type]
