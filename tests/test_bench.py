"""Benchmarks of models in engines, the layers behind them, and predictions before training."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.channels import find_groups
from gossamer.measure.bench import Bench, Best, Skipped, Timed, bench, with_batch
from gossamer.measure.latency import Conditions, Quartiles
from gossamer.measure.layers import LayerShare, Limits, limits, time_layers
from gossamer.measure.macs import account
from gossamer.narrow import narrowed
from gossamer.shrink.file import save
from gossamer.shrink.plan import Plan
from gossamer.shrink.slice import apply_cuts, cuts_for
from gossamer.train.cli import main
from gossamer.train.commands.bench import (
    limit_lines,
    odd_lines,
    outcome_lines,
    prediction_lines,
    prediction_table,
)
from gossamer.train.models import build_model


class Spin(nn.Module):
    """Takes as many milliseconds of CPU time as it is told, and passes its input on."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x: Tensor) -> Tensor:
        end = time.process_time() + self.milliseconds / 1e3
        while time.process_time() < end:
            pass
        return x


def net(spin: float = 0.0, width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        Spin(spin),
        nn.Conv2d(width, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 6, 6)


# Models in engines


def test_bench() -> None:
    models = {"slow": net(spin=4), "quick": net(width=8)}
    said: list[str] = []
    timed = bench(
        models,
        images(),
        engines=["channels_last", "fp16", "eager"],
        batches=[1, 3],
        rounds=3,
        min_round_ms=1,
        say=said.append,
    )
    assert [(row.batch, row.engine, row.model) for row in timed.rows] == [
        (batch, engine, model)
        for batch in (1, 3)
        for engine in ("channels_last", "eager")
        for model in models
    ]
    for row in timed.rows:
        assert row.ratio == Quartiles(1, 1, 1) if row.model == "slow" else row.ratio.median < 0.5
        assert row.error < 1e-5
    assert timed.skipped == (Skipped("fp16", None, None, "it is for cuda, the example is on cpu"),)
    assert timed.macs["slow"] == account(models["slow"], images(1)).macs_executed
    assert timed.macs_ratio("quick") == timed.macs["quick"] / timed.macs["slow"]
    assert [conditions.batch for conditions in timed.conditions] == [1, 3]
    assert {conditions.clock for conditions in timed.conditions} == {"cpu"}
    assert "batch 3: quick in eager" in said
    best = {(row.batch, row.model): row for row in timed.best}
    assert best[1, "quick"].ratio.median < 0.5
    assert best[1, "slow"].first_engine == best[1, "slow"].engine
    plain = json.loads(json.dumps(timed.to_dict()))
    assert len(plain["rows"]) == len(timed.table()) - 1 == 8
    assert plain["rows"][1]["macs_executed"] == timed.macs["quick"]


class _OnlyTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"any": nn.Flatten(), "two": _OnlyTwo()}
    timed = bench(models, images(1), engines=["eager"], batches=[2], rounds=1, min_round_ms=0.1)
    assert {row.model for row in timed.rows} == {"any", "two"}

    from gossamer.measure import engines

    def refuses(model: nn.Module, *_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(engines, "_in_onnxruntime", refuses)
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    timed = bench(
        models, images(1), engines=["eager", "onnx"], batches=[2], rounds=1, min_round_ms=0.1
    )
    assert {row.engine for row in timed.rows} == {"eager"}
    [skipped] = timed.skipped
    assert str(skipped) == (
        "onnx, any, batch 2: the engine onnx cannot run Flatten (RuntimeError: no kernel)"
    )
    with pytest.raises(ValueError, match="none of the engines runs any: onnx, any, batch 2: the"):
        bench(models, images(1), engines=["onnx"], batches=[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, r"got 1 models, batches=\(\)"),
        ({"batches": [0]}, r"batches=\(0,\)"),
        ({"threads": 0}, "threads=0"),
        ({"threads": 2, "clock": "cpu"}, "adds up 2 threads"),
        ({"engines": ["none"]}, "there is no engine 'none'"),
    ],
)
def test_bench_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench({"model": nn.Flatten()}, images(), **options)


def test_with_batch() -> None:
    x, scale = torch.arange(6).reshape(3, 2), torch.ones(5)
    more = with_batch({"x": x, "scale": scale}, 4)
    assert torch.equal(more["x"], x[[0, 1, 2, 0]])
    assert more["scale"] is scale
    assert torch.equal(with_batch(x, 1), x[:1])


# Layers


def test_time_layers() -> None:
    models = {"slow": net(spin=6), "quick": net()}
    times = time_layers(models, images(), rounds=3, threads=1, clock="cpu")
    assert list(times["slow"]) == ["0", "1", "2", "3", "4", "5", "(between layers)"]
    assert times["slow"]["2"] > 5
    assert times["quick"]["2"] < 3
    assert models["slow"].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models["slow"].modules())
    with pytest.raises(ValueError, match="rounds=0"):
        time_layers(models, images(), rounds=0)


def test_attention_and_recurrent_layers_are_timed_as_a_whole() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    names = list(time_layers({"model": model}, torch.randn(2, 3, 8), rounds=1)["model"])
    assert "self_attn" in names
    assert not any(name.startswith("self_attn.") for name in names)
    assert "linear1" in names


def test_limits() -> None:
    dense, slim = net(spin=3), net(spin=12, width=8)
    found = limits(dense, slim, images(), rounds=3, threads=1, clock="cpu")
    roles = {row.layer: row for row in found.roles}
    assert list(roles) == ["products", "norms", "other layers", "between layers"]
    assert roles["other layers"].ratio > 2
    assert roles["norms"].macs is None
    macs = [account(model, images()).macs_executed for model in (dense, slim)]
    assert roles["products"].macs == macs[1] / macs[0]
    assert {row.layer: row.macs for row in found.layers} == {"0": 0.5, "3": 0.5, "5": 1.0}
    assert [row.excess for row in found.layers] == sorted(
        (row.excess for row in found.layers), reverse=True
    )
    assert json.dumps(found.to_dict())
    with pytest.raises(ValueError, match=r"the same layers \(0, 1, 2, 3\)"):
        limits(dense, nn.Flatten(), images(), rounds=1)


# Narrower before training


def _widths(model: nn.Module) -> dict[str, int]:
    return {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def test_narrowed() -> None:
    torch.manual_seed(0)
    dense = build_model("resnet20", num_classes=10, in_shape=(3, 8, 8), width=3)
    x = torch.randn(2, 3, 8, 8)
    before = _widths(dense)
    inner = narrowed(dense, x, 0.5)
    assert _widths(dense) == before
    after = _widths(inner.model)
    for name, width in before.items():
        # 48, 96, 192: the nearest multiple of 8, of 16 from 64
        half = {48: 24, 96: 48, 192: 96}[width]
        assert after[name] == (half if name.endswith("conv1") and "layer" in name else width)
    assert inner.channel_sparsity == pytest.approx(0.5)
    assert inner.layers == 9
    skip = narrowed(dense, x, 0.5, residual=True, groups=find_groups(dense, x))
    assert set(_widths(skip.model).values()) == {24, 48, 96}
    assert inner.model(x).shape == skip.model(x).shape == (2, 10)


def test_narrowed_widths_are_multiples() -> None:
    dense, x = build_model("vgg-small", num_classes=4, in_shape=(3, 8, 8)), torch.randn(2, 3, 8, 8)
    for share in (0.1, 0.3, 0.6, 0.97):
        widths = _widths(narrowed(dense, x, share).model)
        assert all(width % 8 == 0 for width in widths.values())
    assert set(_widths(narrowed(dense, x, 0.97).model).values()) == {8, 16}
    odd = narrowed(dense, x, 0.3, multiple=1)
    assert 45 in _widths(odd.model).values()
    assert narrowed(dense, x, 0.0).channel_sparsity == 0.0
    with pytest.raises(ValueError, match="channel_sparsity=1"):
        narrowed(dense, x, 1.0)


# What is said


def _bench(ratio: float, spread: float = 0.01, macs: int = 50, error: float = 0.0) -> Bench:
    where = Conditions(
        device="cpu", gpu=None, cpu="a", threads=1, dtype="f", batch=1, memory_format="c",
        mode="eager", torch="2", rounds=3, warmup=1, min_round_ms=1.0, clock="cpu",
    )  # fmt: skip
    around = Quartiles(ratio - spread, ratio, ratio + spread)
    one, times = Quartiles(1, 1, 1), Quartiles(1, 2, 3)
    return Bench(
        macs={"dense": 100, "slim": macs},
        rows=(
            Timed(1, "onnx", "dense", times, one, error),
            Timed(1, "onnx", "slim", times, around, error),
        ),
        best=(
            Best(1, "dense", "onnx", "onnx", 8.0, one),
            Best(1, "slim", "onnx", "onnx", 8.0 * ratio, around),
        ),
        skipped=(),
        conditions=(where,),
    )


def test_the_outcome_in_words() -> None:
    assert outcome_lines(_bench(0.8)) == [
        "batch 1: dense is fastest in onnx, 8 ms",
        "batch 1: slim is fastest in onnx, 6.4 ms: 0.800 of the time, 1.25x the throughput; MACs "
        "promise 0.500 of the time, 2.00x the throughput",
        "no model with fewer MACs than dense took longer, in any row",
    ]
    slower = outcome_lines(_bench(1.25))[-1]
    assert slower.startswith("SLOWER than dense, though with fewer MACs; do not use it there: slim")
    assert "onnx at batch 1 (1.250 of the time with 0.500 of the MACs)" in slower
    within = outcome_lines(_bench(1.005))[-1]  # the spread reaches below 1
    assert within.startswith("no model")
    assert "SLOWER" not in str(outcome_lines(_bench(1.25, macs=120)))
    assert outcome_lines(_bench(0.8, error=0.02))[-1] == (
        "changes the outputs (of the largest): onnx by 2.0%"
    )


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.8, "will pay here"), (0.995, "will not pay here"), (1.2, "will not")]
)
def test_the_prediction_in_words(ratio: float, verdict: str) -> None:
    x = images()
    cuts = {"slim": narrowed(net(), x, 0.5)}
    timed = _bench(ratio)
    assert verdict in prediction_lines(timed, cuts)[0]
    head, row = prediction_table(timed, cuts)
    assert head == ("channel sparsity", "in these widths", "MACs", "best, batch 1", "pays in")
    paying = int(ratio < 0.99)
    assert row == ("slim", "0.50", "0.500", f"{ratio:.3f} onnx", f"{paying} of 1 rows")


def test_the_limits_in_words() -> None:
    found = Limits(
        roles=(
            LayerShare("products", "products", 8.0, 5.0, 0.5),
            LayerShare("norms", "norms", 2.0, 2.0, None),
        ),
        layers=(LayerShare("conv1", "products", 4.0, 3.0, 0.5),),
    )
    assert limit_lines(found, "dense", "slim", 8) == [
        "eager, batch 8: the time of dense is products 80%, norms 20%; slim takes of each: "
        "products 0.625, norms 1.000",
        "if its products took what their MACs promise, the rest would hold it at 0.600 of the time",
        "farthest above their MACs: conv1 (0.750 of the time with 0.500 of the MACs, 1 ms too "
        "long)",
    ]


def test_odd_widths_are_named() -> None:
    dense, x = build_model("vgg-small", num_classes=4, in_shape=(3, 8, 8)), torch.randn(2, 3, 8, 8)
    aligned, odd = narrowed(dense, x, 0.3).model, narrowed(dense, x, 0.3, multiple=1).model
    [line] = odd_lines({"dense": dense, "aligned": aligned, "odd": odd}, x, 8)
    assert line.startswith("6 layers of odd have widths that are no multiples of 8: they may take")
    assert "features.0 (22)" in line
    [of_16, _] = odd_lines({"dense": dense, "aligned": aligned, "odd": odd}, x, 16)
    assert "2 layers of aligned have widths that are no multiples of 16" in of_16
    assert "features.0 (24)" in of_16


# The command


def test_the_command_predicts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    argv = ["vgg-small", "--width", "0.5", "--in_shape", "3", "8", "8", "--predict", "0.5"]
    argv += ["--engines", "eager,fp16", "--batch", "2", "--rounds", "2", "--out", str(out)]
    code = main(["bench", *argv])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "channel sparsity 0.5 will" in told.out
    assert "not timed: fp16: it is for cuda, the example is on cpu" in told.out
    assert "eager, batch 2: the time of dense is products" in told.out
    assert "kept whole: classifier" in told.out
    assert "batch 2: 0.5 cut in eager" in told.err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["engine"], row["model"]) for row in rows] == [
        ("eager", "dense"),
        ("eager", "0.5 cut"),
    ]
    assert float(rows[1]["macs_ratio"]) < 0.4


def test_the_command_times_a_file_against_its_dense_twin(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = build_model("vgg-small", num_classes=10, in_shape=(3, 8, 8), width=0.5)
    groups = [g for g in find_groups(model, torch.randn(2, 3, 8, 8)) if not g.locked]
    plan = Plan()
    cuts = cuts_for(model, [(groups[0], range(5))])  # 16 channels become 11
    apply_cuts(model, cuts)
    plan.record(cuts)
    file = tmp_path / "slim.safetensors"
    save(file, model, plan)
    about = ["--model", "vgg-small", "--width", "0.5", "--num_classes", "10"]
    about += ["--in_shape", "3", "8", "8", "--engines", "eager", "--batch", "1", "--rounds", "2"]
    assert main(["bench", str(file), *about, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["macs_executed"]) == ["dense", "slim"]
    assert found["macs_executed"]["slim"] < found["macs_executed"]["dense"]
    assert {row["layer"] for row in found["layers"]["roles"]} >= {"products", "norms"}
    assert any("1 layers of slim have widths" in line for line in found["statement"])

    assert main(["bench", "vgg-small", str(file), *about]) == 0
    told = capsys.readouterr().out
    assert "time / vgg-small" in told
    assert "slim.safetensors" in told


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["resnet20", "--batch", "0"], 2, "--batch 0: give whole numbers from 1"),
        (["resnet20", "--batch", "a"], 2, "--batch a: give"),
        (["resnet20", "--predict", "1.5"], 2, "--predict 1.5: give shares between 0 and 1"),
        (["resnet20", "resnet32", "--predict"], 2, "--predict is about one MODEL, not 2"),
        (["resnet20", "--residual"], 2, "give --predict too"),
        (["resnet20", "resnet20"], 1, "resnet20 is given twice"),
        (["resnet20", "--engines", "quick"], 1, "there is no engine 'quick'"),
        (["resnet20", "--engines", "fp16"], 1, "none of the engines runs resnet20: fp16: it is"),
        (["lenet5", "--model", "x"], 2, "--model x says what a file was made from, and none of"),
        (["lenet5", "--predict", "--device", "cuda"], 1, "PyTorch finds no CUDA device"),
    ],
)
def test_command_errors(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == code
    assert message in capsys.readouterr().err
