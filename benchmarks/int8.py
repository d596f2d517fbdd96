"""What is left for 8 bits after a cut: accuracy, file and time of runs in float32 and in int8.

    gossamer train --method static --density 1 --model vgg-small --data digits --out runs/dense
    gossamer train --config digits-chase --out runs/slim
    python benchmarks/int8.py runs/dense runs/slim [--batch 8] [--rounds 15]

Every run's model is exported to ONNX and quantised by ONNX Runtime, as docs/export.md shows:
weights per channel, activations by their range on 256 training images. Accuracy is on the test
images; files and latencies are over the first run's float32, the latter in ONNX Runtime, one
thread, process CPU time, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from gossamer.export import to_onnx
from gossamer.export.onnx import onnx_session
from gossamer.measure import compare_latency
from gossamer.train.config import read_yaml
from gossamer.train.data import Batches, Split, load_data
from gossamer.train.source import open_model
from interleave import conditions

IMAGES = 256


class Inputs(CalibrationDataReader):
    def __init__(self, name: str, batches: Batches) -> None:
        self.inputs = iter([{name: x.numpy()} for x, _ in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def runner(file: Path, name: str) -> Callable[[Tensor], Tensor]:
    session = onnx_session(file, threads=1)
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def accuracy(call: Callable[[Tensor], Tensor], batches: Batches) -> float:
    return float(torch.cat([call(x).argmax(1) == y for x, y in batches]).float().mean())


def quantised(run: Path, folder: Path) -> tuple[dict[str, Path], str, Batches]:
    """The run's network as two ONNX files, what they call their input, and the test images."""
    settings = read_yaml(run / "config.yaml")
    known = {key: settings[key] for key in ("val_fraction", "image_size") if settings.get(key)}
    data = load_data(settings["data"], seed=settings.get("seed", 0), **known)
    train = Split(data.train.images[:IMAGES], data.train.labels[:IMAGES])
    calibration, test = (
        Batches(split, batch_size=64, mean=data.mean, std=data.std) for split in (train, data.test)
    )
    files = {kind: folder / f"{run.name}-{kind}.onnx" for kind in ("float32", "int8")}
    model = open_model(str(run)).model
    x, _ = next(iter(calibration))
    (name,) = to_onnx(files["float32"], model, x[:4]).inputs
    prepared = folder / "prepared.onnx"
    quant_pre_process(files["float32"], prepared)
    quantize_static(prepared, files["int8"], Inputs(name, calibration), per_channel=True)
    return files, name, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one data set and shape")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(f"batch {wanted.batch}, {conditions()}")
    rows, calls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for run in wanted.runs:
            files, name, test = quantised(run, Path(folder))
            for kind, file in files.items():
                call = calls[f"{run.name} {kind}"] = runner(file, name)
                rows[f"{run.name} {kind}"] = accuracy(call, test), file.stat().st_size
    x = torch.randn(wanted.batch, *test.images.shape[1:])
    times = compare_latency(calls, x, rounds=wanted.rounds, threads=1, clock="cpu")
    _, first = next(iter(rows.values()))
    print(f"\n{'':<30}{'accuracy':>10}{'file':>8}{'latency':>9}")
    for name, (found, size) in rows.items():
        ratio = times[name].ratio.median
        print(f"{name:<30}{100 * found:>9.2f}%{size / first:>8.3f}{ratio:>9.2f}")


if __name__ == "__main__":
    main()
