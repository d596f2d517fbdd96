"""What a training run is told: its own settings, and the hyperparameters of its method.

Both are flat: one name for a setting, on the command line, in YAML and here. The method's part is
whatever its dataclass says; nothing about a method is written down in this room.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from gossamer.method import Method
from gossamer.registry import METHODS, MethodInfo, method_info

__all__ = [
    "TrainConfig",
    "check_names",
    "check_unchanged",
    "from_dict",
    "read_yaml",
    "to_dict",
    "to_yaml",
]

# What may differ when a run is resumed: it changes neither network nor schedule.
_FREE = ("out", "baseline", "threads", "device", "tensorboard", "checkpoint_minutes", "on_collapse")


_MOST_THREADS = 1024  # far more than cores would crash the process


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Args:
        method: Sparse training method; `gossamer methods` lists them.
        model: Network by name, or a factory of your own, `package.module:factory`.
        width: Factor on every layer's number of channels.
        widths_of: Run folder or model file: the network gets the widths of the slim network there,
            before training, and weights of its own. With the method static at density 1 a dense
            network of those widths is trained from scratch.
        widths_match: What of `widths_of` the network gets: its "widths"; or its executed "macs", or
            as many weights as it has "nonzeros", with every layer narrowed by the same share.
        data: "digits", a Parquet file or folder, an image folder, or `owner/name` on the hub.
        val_fraction: Share of the training images held out for validation, where the set has none.
        image_size: Resize images to this many pixels a side; None leaves them.
        epochs: Passes over the training images.
        batch_size: Images per step; an incomplete last batch is left out.
        lr: Highest learning rate.
        momentum: Of sgd.
        weight_decay: On all parameters.
        threshold_decay: Weight decay of learned thresholds; None: as of all parameters.
        threshold_clip: Norm to which the gradients of all learned thresholds together are clipped;
            None: not at all. It keeps DST's where they learn (docs/choose.md).
        optimizer: "sgd" (with momentum) or "adamw".
        warmup_epochs: Epochs in which the learning rate rises to `lr`.
        schedule: Learning rate after the warm-up: "cosine" to 0, "constant", or "multistep".
        milestones: Fractions of the run at which "multistep" divides the rate by 10.
        label_smoothing: Of the cross entropy.
        augment: Crop training images at random, padded by an eighth of their shorter side (4
            pixels of 32); with `flip`, mirror half.
        flip: Whether `augment` mirrors images; no for digits and letters.
        precision: "32", or "bf16": autocast in training, weights stay in 32 bits.
        channels_last: Memory format of convolutions; faster with bf16 and on GPUs.
        threads: CPU threads; None leaves PyTorch's choice.
        latency_batch: Images at a time when latency is measured, for the report and for budgets:
            PyTorch as it is, in 32 bits, on `device` with `threads`.
        seed: Of the weights, the masks, the batches, and the validation images.
        device: "auto", "cpu" or "cuda".
        cut: "during": removed channels are cut at once, so that training gets faster; "end": they
            are only masked until training ends.
        include: Patterns of layer names to make sparse; None means all.
        exclude: Patterns of layer names to leave dense.
        keep_channels: Patterns of layer names whose output channels all stay.
        baseline: Train the dense twin as well: same network, seed, data and epochs.
        tensorboard: Write the columns of metrics.csv for TensorBoard too, in the run folder.
        checkpoint_minutes: Time between checkpoints within an epoch, and so what a crash can cost;
            0 writes one after every step. There is one after every epoch anyway.
        on_collapse: What to do about a layer that keeps next to no weight: "warn", "hold" it at its
            floor, or "stop" the run.
        out: Run folder; None: runs/<data>-<model>-<method>-s<seed>.
    """

    method: str = "chase"
    model: str = "resnet20"
    width: float = 1.0
    widths_of: str | None = None
    widths_match: Literal["widths", "macs", "nonzeros"] = "widths"
    data: str = "digits"
    val_fraction: float = 0.1
    image_size: int | None = None
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    threshold_decay: float | None = None
    threshold_clip: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warmup_epochs: int = 0
    schedule: Literal["cosine", "constant", "multistep"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    label_smoothing: float = 0.0
    augment: bool = False
    flip: bool = True
    precision: Literal["32", "bf16"] = "32"
    channels_last: bool = False
    threads: int | None = None
    latency_batch: int = 32
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cut: Literal["during", "end"] = "during"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    keep_channels: tuple[str, ...] = ()
    baseline: bool = False
    tensorboard: bool = False
    checkpoint_minutes: float = 10.0
    on_collapse: Literal["warn", "hold", "stop"] = "warn"
    out: str | None = None

    def __post_init__(self) -> None:
        method_info(self.method)
        leasts = {"epochs": 1, "batch_size": 1, "latency_batch": 1, "warmup_epochs": 0, "seed": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is not None:
                raise ValueError(f"{field.name} has no value: give one, or leave it out")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}={value}: give a finite number")
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise ValueError(f"threads={self.threads}: give 1 to {_MOST_THREADS}")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: give a learning rate above 0")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a value in [0, 1)")
        for name in ("weight_decay", "threshold_decay", "checkpoint_minutes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 0")
        if self.threshold_clip is not None and self.threshold_clip <= 0:
            raise ValueError(f"threshold_clip={self.threshold_clip}: give a norm above 0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} of {self.epochs} epochs leaves none to train "
                "in: give fewer"
            )
        if self.widths_match != "widths" and self.widths_of is None:
            raise ValueError(
                f"widths_match={self.widths_match}: say with widths_of of which network"
            )
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(
                f"milestones={list(self.milestones)}: give fractions of the run, in (0, 1)"
            )

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.out is not None:
            return Path(self.out).expanduser()
        data = Path(self.data).stem if Path(self.data).exists() else self.data
        name = f"{data}-{self.model}-{self.method}-s{self.seed}"
        return Path("runs") / re.sub(r"[^\w.-]+", "-", name)


def to_dict(config: TrainConfig, method: Method) -> dict[str, Any]:
    """Both parts as one flat dict of plain data."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in {**asdict(config), **asdict(method)}.items()
    }


def from_dict(values: Mapping[str, Any]) -> tuple[TrainConfig, Method]:
    """The settings and the method that `to_dict` made one dict of; what is missing gets defaults.

    Raises:
        ValueError: An unknown name or a value that is refused.
    """
    info = method_info(str(values.get("method", TrainConfig.method)))
    check_names(values, info)
    theirs = info.cls.hyperparameters()
    settings = {key: _frozen(value) for key, value in values.items() if key not in theirs}
    hyperparameters = {key: _frozen(value) for key, value in values.items() if key in theirs}
    return TrainConfig(**settings), info.cls(**hyperparameters)


def check_names(names: Iterable[str], info: MethodInfo) -> None:
    """Raise ValueError, with the nearest name, when a run of this method has no such setting."""
    known = {field.name for field in fields(TrainConfig)} | set(info.cls.hyperparameters())
    for name in names:
        if name not in known:
            others = [row.name for row in METHODS.values() if name in row.cls.hyperparameters()]
            if others:
                raise ValueError(
                    f"{name!r} is a setting of {', '.join(others)}, not of {info.name}: leave it "
                    "out, or choose the method"
                )
            near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"there is no setting {name!r}{hint}: "
                f"`gossamer train --method {info.name} --help` lists them"
            )


def check_unchanged(file: Path, config: TrainConfig, method: Method) -> None:
    """Raise ValueError, with what differs, unless `file` holds the settings of this same run."""
    now = to_dict(config, method)
    # What an older version did not know, it did as is done by default.
    before = to_dict(TrainConfig(), type(method)()) | read_yaml(file)
    for key in (*now, *before):
        if key == "widths_of" and None not in (before.get(key), now.get(key)):
            continue  # a folder may have moved: what is in it is compared when it is read
        if key not in _FREE and before.get(key) != now.get(key):
            raise ValueError(
                f"{file} says {key}: {before.get(key)}, and now it is {now.get(key)}: "
                "resume with the settings the run was started with, or choose another folder "
                "with --out"
            )


def telling(config: TrainConfig, method: Method) -> dict[str, Any]:
    """Of the settings that `check_unchanged` compares, those that are not the default."""
    default = to_dict(TrainConfig(), type(method)())
    return {
        key: value
        for key, value in to_dict(config, method).items()
        if key not in _FREE and value != default[key]
    }


def to_yaml(config: TrainConfig, method: Method) -> str:
    """A file that repeats the run: `gossamer train --config FILE --out ANOTHER`."""
    return yaml.safe_dump(to_dict(config, method), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked. Raises ValueError when it holds anything else."""
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted lines of `name: value`")
    return values


class _Loader(yaml.SafeLoader):
    """Without aliases (*name): settings need none, and a few of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The node; raises YAMLError where it is an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*name): write the value out")
        return super().compose_node(parent, index)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
