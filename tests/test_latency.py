import json
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gossamer.measure.latency import LatencyComparison, Quartiles, compare_latency


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _wait(seconds: float) -> Callable[[Tensor], None]:
    """A callable of known duration, whatever else the machine does in the meantime."""

    def call(x: Tensor) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def test_a_model_against_itself() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    result = compare_latency(
        {"once": model, "again": model}, torch.randn(8, 64), rounds=9, min_round_ms=5
    )
    assert result["once"].ratio == Quartiles(1.0, 1.0, 1.0)
    assert 0.5 < result["again"].ratio.median < 2


def test_a_model_with_more_work() -> None:
    models = {"narrow": nn.Linear(128, 128), "wide": nn.Linear(1024, 1024)}
    inputs = {"narrow": torch.randn(64, 128), "wide": torch.randn(64, 1024)}
    calls = {name: lambda x, name=name: models[name](inputs[name]) for name in models}
    result = compare_latency(calls, torch.zeros(64), rounds=7, min_round_ms=5)
    assert result["wide"].ratio.median > 2
    assert result["wide"].milliseconds.median > result["narrow"].milliseconds.median


def test_times_are_per_call() -> None:
    models = {"short": _wait(0.001), "long": _wait(0.004)}
    result = compare_latency(models, torch.zeros(1), rounds=5, min_round_ms=10)
    # The clock can only add to the waiting; how much depends on the machine.
    assert result["short"].milliseconds.low >= 1
    assert result["long"].milliseconds.low >= 4
    for model in result.models:
        assert model.milliseconds.low <= model.milliseconds.median <= model.milliseconds.high
        assert model.ratio.low <= model.ratio.median <= model.ratio.high


def test_the_models_take_turns_and_the_order_alternates() -> None:
    calls: list[str] = []

    def model(name: str) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            calls.append(name)
            time.sleep(0.002)

        return call

    models = {name: model(name) for name in "abc"}
    result = compare_latency(models, torch.zeros(1), rounds=4, warmup=2, min_round_ms=1)
    assert [row.repeats for row in result.models] == [1, 1, 1]
    warmup_and_calibration = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert calls == warmup_and_calibration + list("abc" + "cba" + "abc" + "cba")


def test_a_short_model_is_repeated() -> None:
    count = 0

    def call(x: Tensor) -> None:
        nonlocal count
        count += 1
        time.sleep(0.0005)

    result = compare_latency({"only": call}, torch.zeros(1), rounds=2, warmup=0, min_round_ms=40)
    assert 2 <= result["only"].repeats <= 80
    assert count > 2 * result["only"].repeats  # and those of the calibration


# The models and torch are left as they were


class _Watch(nn.Module):
    """Records the state it runs in; fails on demand."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.drop = nn.Dropout()
        self.weight = nn.Parameter(torch.zeros(1))
        self.fails = fails
        self.seen: set[tuple[bool, bool, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        inference = torch.is_inference_mode_enabled()
        self.seen.add((self.drop.training, inference, torch.get_num_threads()))
        if self.fails:
            raise RuntimeError("forward failed")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_state_is_restored(fails: bool) -> None:
    first, second = _Watch(), _Watch(fails)
    first.train()
    second.train()
    second.drop.eval()
    threads = torch.get_num_threads()
    models = {"first": first, "second": second}
    if fails:
        with pytest.raises(RuntimeError, match="forward failed"):
            compare_latency(models, torch.zeros(1), rounds=1, min_round_ms=0.1, threads=2)
    else:
        result = compare_latency(models, torch.zeros(1), rounds=1, min_round_ms=0.1, threads=2)
        assert result.conditions.threads == 2
    assert first.seen == second.seen == {(False, True, 2)}
    flags = [module.training for model in (first, second) for module in model.modules()]
    assert flags == [True, True, True, False]
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


# The clocks


def test_the_cpu_clock_does_not_count_waiting() -> None:
    def work(x: Tensor) -> None:
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    models = {"works": work, "sleeps": lambda x: time.sleep(0.02)}
    result = compare_latency(models, torch.zeros(1), rounds=5, min_round_ms=4, clock="cpu")
    assert result["works"].milliseconds.median > 2 * result["sleeps"].milliseconds.median
    assert result.conditions.clock == "cpu"
    wall = compare_latency(models, torch.zeros(1), rounds=5, min_round_ms=4)
    assert wall["sleeps"].milliseconds.low >= 20
    assert wall.conditions.clock == "wall"


def test_any_two_models_compare() -> None:
    models = {"one": _wait(0.001), "two": _wait(0.002), "four": _wait(0.004)}
    result = compare_latency(models, torch.zeros(1), rounds=5, min_round_ms=4)
    assert result.ratio("four", "one") == result["four"].ratio
    assert result.ratio("two", "two") == Quartiles(1.0, 1.0, 1.0)
    pairs = zip(result["two"].rounds, result["four"].rounds, strict=True)
    ratios = sorted(two / four for two, four in pairs)
    assert result.ratio("two", "four").median == pytest.approx(ratios[2])


# Inputs, conditions, reports


def test_positional_and_keyword_inputs() -> None:
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    x, y = torch.zeros(5, 3), torch.ones(5, 3)
    for example in ((x, y), {"y": y, "x": x}):
        result = compare_latency({"add": add}, example, rounds=1, min_round_ms=0.1)
        assert result.conditions.batch == 5


def _quick(models: dict[str, object], example: Tensor) -> LatencyComparison:
    return compare_latency(models, example, rounds=2, warmup=1, min_round_ms=0.1)


def test_conditions() -> None:
    image = torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)
    model = nn.Conv2d(3, 4, 3)
    conditions = _quick({"model": model}, image).conditions
    assert (conditions.device, conditions.gpu) == ("cpu", None)
    assert conditions.cpu
    assert (conditions.dtype, conditions.batch) == ("float32", 2)
    assert conditions.memory_format == "channels_last"
    assert conditions.mode == "eager"
    assert conditions.threads == torch.get_num_threads()
    assert conditions.torch == torch.__version__
    assert (conditions.rounds, conditions.warmup, conditions.min_round_ms) == (2, 1, 0.1)

    assert _quick({"model": model}, image.contiguous()).conditions.memory_format == "contiguous"
    mixed = _quick({"model": nn.Conv2d(3, 4, 3), "call": lambda x: x}, image.contiguous())
    assert mixed.conditions.mode == "callable/eager"
    tokens = torch.zeros(2, 3, dtype=torch.long)
    embed = {"f32": nn.Embedding(4, 2), "bf16": nn.Embedding(4, 2).bfloat16()}
    assert _quick(embed, tokens).conditions.dtype == "bfloat16/float32"


def test_compiled_models_are_said_to_be() -> None:
    compiled = nn.Linear(3, 3)
    compiled.compile(backend="eager")
    assert _quick({"model": compiled}, torch.zeros(2, 3)).conditions.mode == "compiled"
    wrapped = torch.compile(nn.Linear(3, 3), backend="eager")
    assert _quick({"model": wrapped}, torch.zeros(2, 3)).conditions.mode == "compiled"


def test_table_and_dict() -> None:
    models = {"dense": _wait(0.001), "slim": _wait(0.0005)}
    result = compare_latency(models, torch.zeros(4, 2), rounds=3, min_round_ms=2)
    columns, dense, slim, conditions = result.table().splitlines()
    assert columns.split()[:4] == ["model", "ms", "per", "call"]
    assert "time / dense" in columns
    assert dense.split()[0] == "dense"
    assert "1.000" in dense.split()
    assert slim.split()[0] == "slim"
    assert "batch 4" in conditions
    assert "threads 1" in conditions
    assert "gpu" not in conditions

    plain = json.loads(json.dumps(result.to_dict()))
    assert [model["name"] for model in plain["models"]] == ["dense", "slim"]
    assert plain["models"][0]["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert plain["conditions"]["rounds"] == 3


# Errors


@pytest.mark.parametrize(
    ("models", "example", "options", "error", "message"),
    [
        ({}, torch.zeros(1), {}, ValueError, "got no model; pass {name: model}"),
        ({"a": "file.onnx"}, torch.zeros(1), {}, TypeError, "model 'a' is a str, which cannot"),
        ({"a": abs}, "text", {}, TypeError, "the example is a str; pass a tensor"),
        ({"a": abs}, (), {}, ValueError, "the example holds no tensor"),
        ({"a": abs}, torch.tensor(1.0), {}, ValueError, "no batch in dim 0"),
        ({"a": abs}, torch.zeros(1), {"rounds": 0}, ValueError, "got rounds=0"),
        ({"a": abs}, torch.zeros(1), {"warmup": -1}, ValueError, "warmup=-1"),
        ({"a": abs}, torch.zeros(1), {"min_round_ms": 0}, ValueError, "min_round_ms=0"),
        ({"a": abs}, torch.zeros(1), {"threads": 0}, ValueError, "threads=0"),
        ({"a": abs}, torch.zeros(1), {"clock": "sun"}, ValueError, 'wanted "wall" or "cpu"'),
        (
            {"a": abs},
            torch.zeros(1),
            {"clock": "cpu", "threads": 2},
            ValueError,
            "adds up 2 threads, their waiting too: pass threads=1",
        ),
        (
            {"a": abs},
            torch.zeros(1, device="meta"),
            {"clock": "cpu"},
            ValueError,
            "does not see what meta does",
        ),
    ],
)
def test_errors(models, example, options, error, message) -> None:
    with pytest.raises(error, match=message):
        compare_latency(models, example, **options)


def test_models_on_different_devices() -> None:
    models = {"here": nn.Linear(2, 2), "there": nn.Linear(2, 2, device="meta")}
    with pytest.raises(ValueError, match="the example on cpu; here on cpu; there on meta: move"):
        compare_latency(models, torch.zeros(1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_waits_for_the_device() -> None:
    models = {"narrow": nn.Linear(4096, 512).cuda(), "wide": nn.Linear(4096, 65536).cuda()}
    result = compare_latency(models, torch.randn(4096, 4096, device="cuda"), rounds=5)
    assert result["wide"].ratio.median > 2  # would be 1 if only the launches were timed
    assert result.conditions.device == "cuda:0"
    assert result.conditions.gpu
