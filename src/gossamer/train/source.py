"""What the command line calls a MODEL: a run folder, a model file, a name, or a factory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from gossamer.reading import read_json, reading, short, whole_number
from gossamer.shrink.file import load, read_plan
from gossamer.shrink.plan import Plan
from gossamer.train.folder import RunFolder
from gossamer.train.models import build_model, weigh

__all__ = ["Architecture", "Source", "model_file", "open_model"]

_HEADER_KEY = "gossamer_model"
_NAME_IT = "name the network with --model NAME"
# What a file may ask for by itself; larger networks are named on the command line.
_MOST_WEIGHTS = 1 << 28
_MOST_PIXELS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What makes a full-width network.

    Attributes:
        name: Of a built-in network, or `package.module:factory`.
        num_classes: Of its output.
        in_shape: `(c, h, w)` of one image.
        width: Factor on every layer's number of channels.
        data: What it was trained on; empty when that is not known.
    """

    name: str
    num_classes: int
    in_shape: tuple[int, int, int]
    width: float = 1.0
    data: str = ""

    def build(self) -> nn.Module:
        """The network with fresh weights, the same each time, in eval mode.

        Raises:
            ValueError, TypeError: There is no such network; see `build_model`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_model(
                self.name,
                num_classes=self.num_classes,
                in_shape=self.in_shape,
                width=self.width,
            ).eval()

    def metadata(self) -> dict[str, str]:
        """For the header of a model file, so that the file says what it was made from."""
        return {_HEADER_KEY: json.dumps(asdict(self))}


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A model that the command line was given.

    Attributes:
        name: What to call it in a table: as it was given.
        model: Plain, in eval mode, on the CPU, with the widths and the dtype that it was saved in.
        example: Random images that it accepts, `(batch, c, h, w)`, the same each time.
        dense: The full-width network with fresh weights; None where `model` is that itself.
        plan: What was cut from the full-width network; empty where nothing was.
        architecture: What `dense` is made from.
    """

    name: str
    model: nn.Module
    example: Tensor
    dense: nn.Module | None
    plan: Plan
    architecture: Architecture


def open_model(
    spec: str,
    *,
    model: str | None = None,
    in_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    width: float = 1.0,
    batch: int = 2,
) -> Source:
    """Open what the command line calls a MODEL.

    A run folder and a file written by `gossamer train` say what network they hold. The other
    arguments say it of any other file, and of a name; where they are given, they win.

    A file's header can name a built-in network only: a factory is code, which runs only when the
    caller (or the user's own run folder) names it.

    Args:
        spec: A folder that `gossamer train` wrote, a .safetensors file of Gossamer's, the name of a
            built-in network, or `package.module:factory`.
        model: Name or factory of the full-width network that a file was made from.
        in_shape: `(c, h, w)` of the images. For a name: 3 x 32 x 32 if not given (ImageNet
            networks 3 x 224 x 224, LeNets 1 x 28 x 28).
        num_classes: For a name: 10 if not given (ImageNet networks 1000).
        width: Factor on the channels of `model`, or of the built-in network.
        batch: Images in the example.

    Raises:
        ValueError: There is no such thing, or the file is not of the network that was named.
        TypeError: A factory makes something else than a model.
        OSError: A file could not be read.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: give at least 1")
    path, file = Path(spec), None
    said: Architecture | None = None
    if path.is_dir():
        file, said = _run(path)
    elif path.is_file():
        file, said = path, _header(path, model)
    elif path.suffix == ".safetensors" or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no file or run folder {spec}")
    elif model is not None:
        raise ValueError(f"model={model} says what a file was made from, and {spec} is no file")
    if said is not None and model is None and width not in (1.0, said.width):
        raise ValueError(f"{spec} was made with width={said.width}, not {width}: leave it out")
    asked: dict[str, Any] = {"in_shape": in_shape, "num_classes": num_classes}
    given = {key: value for key, value in asked.items() if value is not None}
    if said is None:
        architecture = _named(model or spec, given, width)
    elif model is None:
        architecture = replace(said, **given)
    else:
        architecture = replace(said, name=model, width=width, **given)
    try:
        network = architecture.build()
    except ValueError as error:
        if file is None and ":" not in spec and str(error).startswith("no model is called"):
            raise ValueError(f"there is no file or run folder {spec}, and {error}") from error
        raise
    plan, dtype = (Plan(), torch.float32) if file is None else (read_plan(file), _dtype(file))
    shape = (batch, *architecture.in_shape)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Source(
        name=spec,
        model=network if file is None else load(file, network.to(dtype)),
        example=images.to(dtype),
        dense=None if file is None else architecture.build().to(dtype),
        plan=plan,
        architecture=architecture,
    )


def model_file(spec: str, model: str) -> tuple[Path, Architecture | None]:
    """The model file that a run folder or a path names, and of what network it says that it is.

    Args:
        spec: A folder that `gossamer train` wrote, or a .safetensors file of Gossamer's.
        model: Name or factory of what it is taken for.

    Raises:
        ValueError: The run has not ended, or the file is none of Gossamer's.
        OSError: It is not there, or cannot be read.
    """
    path = Path(spec)
    if path.is_dir():
        return _run(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or run folder {spec}")
    return path, _header(path, model)


def _run(path: Path) -> tuple[Path, Architecture]:
    """The model file of a finished run, and what it is."""
    folder = RunFolder(path)
    if not folder.config.exists():
        raise ValueError(f"{path} holds no run: give a folder that `gossamer train` wrote")
    if not (folder.summary.exists() and folder.model.exists()):
        raise ValueError(
            f"the run in {path} has not ended: "
            f"`gossamer train --resume --out {path}` goes on with it"
        )
    remedy = "train again, or give the model file itself with --model NAME"
    summary = read_json(folder.summary, remedy)
    with reading(str(folder.summary), remedy):
        about = summary["model"] | {"data": summary["data"]["name"]}
        return folder.model, _architecture(about)


def _header(path: Path, model: str | None) -> Architecture | None:
    """What the header of a model file says of it; None when it says nothing."""
    read_plan(path)  # it is one of ours, and whole
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_HEADER_KEY)
    if text is None:
        if model is None:
            raise ValueError(
                f"{path} does not say what network it holds: name it with --model NAME or "
                "--model package.module:factory"
            )
        return None
    try:
        with reading(f"the header of {path}", _NAME_IT):
            found = _architecture(json.loads(text))
            _check_size(found)
    except ValueError:
        if model is None:
            raise
        return None
    if ":" in found.name and model is None:
        raise ValueError(
            f"{path} was made by {found.name}, which is code: if you trust it, say so with "
            f"--model {found.name}"
        )
    return found


def _architecture(values: Any) -> Architecture:
    shape = dict(zip(("channels", "height", "width"), values["in_shape"], strict=True))
    channels, height, width = (whole_number(shape, name, 1, 1 << 14) for name in shape)
    if type(values["name"]) is not str:
        raise ValueError(f"name is {short(values['name'])}, wanted text")
    return Architecture(
        name=values["name"],
        num_classes=whole_number(values, "num_classes", 1, 1 << 24),
        in_shape=(channels, height, width),
        width=float(values["width"]),
        data=str(values.get("data", "")),
    )


def _check_size(said: Architecture) -> None:
    """Raise ValueError where a network would fill the memory, whoever has written that it is so."""
    if math.prod(said.in_shape) > _MOST_PIXELS:
        raise ValueError(f"images of {said.in_shape} are too large to be true")
    if ":" in said.name:
        return
    weights = weigh(
        said.name, num_classes=said.num_classes, in_shape=said.in_shape, width=said.width
    )
    if weights > _MOST_WEIGHTS:
        raise ValueError(f"{said.name} with {weights:.3g} weights is too large to be true")


def _named(name: str, given: Mapping[str, Any], width: float) -> Architecture:
    """A name or factory, with the usual sizes of what it names where none are given."""
    if ":" in name and "in_shape" not in given:
        raise ValueError(f"{name}: say what images it takes, with --in_shape C H W")
    usual: dict[str, Any] = {"num_classes": 10, "in_shape": (3, 32, 32)}
    if name.endswith("-imagenet"):
        usual = {"num_classes": 1000, "in_shape": (3, 224, 224)}
    elif name.startswith("lenet"):
        usual = {"num_classes": 10, "in_shape": (1, 28, 28)}
    return Architecture(**{**usual, **given, "name": name, "width": width})


def _dtype(path: Path) -> torch.dtype:
    """The narrowest dtype that holds all floating-point tensors of the file exactly."""
    with safetensors.safe_open(path, framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return reduce(torch.promote_types, floating) if floating else torch.float32
