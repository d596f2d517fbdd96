"""The table of wrong inputs: what was done wrong, and the error that says so.

A row is what was done, the call, the words that its message must have (what was got, what was
wanted) and what to do about it. docs/errors.md is made from the rows and from the messages as they
really are, with `python tests/test_wrong_inputs.py`; a message that has changed since fails here.
Tests beside this one look at more than the message: at what is still there after an error, say.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.integrations.checkpoint import carry
from gossamer.measure.bench import bench
from gossamer.measure.pattern import check_nm
from nets import images, mlp, net, optimizer_for

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
STATIC = gossamer.Static(density=0.5)
CHASE = gossamer.Chase(density=0.2, channel_sparsity=0.5, min_channels=2)


@dataclass(frozen=True)
class Row:
    """One wrong input.

    Attributes:
        did: What the user did.
        call: Does it, in an empty folder.
        words: What the message must have, besides a value that was got.
        do: What the user is to do.
        error: Its class.
    """

    did: str
    call: Callable[[Path], object]
    words: tuple[str, ...]
    do: str
    error: type[Exception] = ValueError


class CommandError(Exception):
    """A command's one line of error."""


# ------------------------------------------------------------------ what the calls are made of


def chase(**changes: Any) -> gossamer.Chase:
    return gossamer.Chase(**{"density": 0.2, "channel_sparsity": 0.5, "min_channels": 2} | changes)


def sparsifier(model: Any = None, method: Any = STATIC, **options: Any) -> gossamer.Sparsifier:
    return gossamer.Sparsifier(
        net("mlp") if model is None else model, method, **{"total_steps": 100} | options
    )


def cutting(model: Any = None, **changes: Any) -> gossamer.Sparsifier:
    """With a method that removes channels."""
    return sparsifier(model or net("mlp"), chase(**changes), example=images(2))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = net("vgg")
    model.features[3].weight.requires_grad_(False)
    return model


def sparse() -> nn.Module:
    model = net("mlp")
    sparsifier(model)
    return model


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(192, 10)
        self.norm = nn.LayerNorm(10)
        self.two = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x.flatten(1))))


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


def stepped(
    backward: bool = True, finalize: bool = False, optimizer: Any = None, spoil: bool = False
) -> None:
    model = net("mlp")
    made = sparsifier(model, gossamer.SET(density=0.5, update_interval=1))
    own = optimizer_for("sgd", model)
    if backward:
        F.cross_entropy(model(images(2)), torch.tensor([0, 1])).backward()
    if spoil:
        with torch.no_grad():
            site = made.sites[0]
            site.weight[tuple(site.support.nonzero()[0])] = float("nan")
    if finalize:
        made.finalize()
    made.step(own if optimizer is None else optimizer(model))


class Wrapped(torch.optim.SGD):
    """As SAM is written: an optimizer with another inside."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, lr=0.1)
        self.base = torch.optim.SGD(params, lr=0.1)


def resumed(other: gossamer.Sparsifier | None = None, **changes: Any) -> None:
    """Resume a run from the state of another, or from one with changes."""
    state = (other or cutting()).state_dict()
    cutting().load_state_dict(
        {key: value for key, value in (state | changes).items() if value != "gone"}
    )


def resumed_late() -> None:
    model = net("mlp")
    made = sparsifier(model)
    F.cross_entropy(model(images(2)), torch.tensor([0, 1])).backward()
    made.step(optimizer_for("sgd", model))
    made.load_state_dict(sparsifier().state_dict())


def carried(loads: int) -> None:
    model = net("mlp")
    two = [
        sparsifier(model, include=["1"]),
        sparsifier(model, include=["3"]),
    ]
    carry(*two[:1])
    if not loads:
        carry(two[1])
    other = net("mlp")
    carry(sparsifier(other, include=["1"]), sparsifier(other, include=["3"]))
    other.load_state_dict(model.state_dict())


def saved(folder: Path, model: nn.Module | None = None, **metadata: str) -> Path:
    path = folder / "model.safetensors"
    gossamer.save(path, model or net("mlp"), metadata=metadata)
    return path


def cut_file(folder: Path) -> Path:
    model = net("mlp")
    with torch.no_grad():
        model[3].weight[:, 5:] = 0
    slim = gossamer.shrink(model, images(2))
    gossamer.save(folder / "slim.safetensors", slim.model, slim.plan)
    return folder / "slim.safetensors"


def loaded_twice(folder: Path) -> None:
    path, model = cut_file(folder), net("mlp")
    gossamer.load(path, model)
    gossamer.load(path, model)


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def others_file(folder: Path) -> Path:
    safetensors.torch.save_file(net("mlp").state_dict(), folder / "other.safetensors")
    return folder / "other.safetensors"


def wider() -> nn.Module:
    model = net("mlp")
    model[5] = nn.Linear(20, 9).double()
    return model


def blocked(folder: Path) -> Path:
    """A path below something that is no folder."""
    return text(folder / "file", "") / "below"


def command(words: str, code: int = 1, **files: str) -> Callable[[Path], None]:
    """A command line; FOLDER in it is the folder, which the `files` are written into first."""

    def call(folder: Path) -> None:
        from gossamer.train import cli

        for name, content in files.items():
            text(folder / name, content)
        before = sorted(folder.rglob("*"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = cli.main([word.replace("FOLDER", str(folder)) for word in words.split()])
        told = err.getvalue()
        assert (got, out.getvalue()) == (code, ""), told
        assert told.startswith("gossamer: error: ")
        assert told.count("\n") == 1, told
        assert sorted(folder.rglob("*")) == before, "a command that fails leaves no file behind"
        raise CommandError(told.removeprefix("gossamer: error: ").strip())

    return call


def cli_row(
    did: str, words: str, said: tuple[str, ...], do: str, code: int = 1, **files: str
) -> Row:
    return Row(f"{did}: `gossamer {words}`", command(words, code, **files), said, do, CommandError)


def pictures(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{index}.png")


def after(prepare: Callable[[Path], object], row: Row) -> Row:
    """The row, with something in the folder before."""

    def call(folder: Path) -> None:
        prepare(folder)
        row.call(folder)

    return Row(row.did, call, row.words, row.do, row.error)


TINY = "--model vgg-small --width 0.25 --epochs 1 --min_channels 2"

# ------------------------------------------------------------------ the table

TABLE: dict[str, tuple[Row, ...]] = {
    "Methods": (
        Row(
            "`Chase(density=1.5)`",
            lambda _: gossamer.Chase(density=1.5),
            ("density=1.5", "(0, 1]"),
            "give the share of weights to keep",
        ),
        Row(
            '`Chase(density="0.1")`',
            lambda _: gossamer.Chase(density="0.1"),
            ("density='0.1' is a str", "give a number"),
            "give a number, not text",
            TypeError,
        ),
        Row(
            "`Static(density=float('nan'))`",
            lambda _: gossamer.Static(density=float("nan")),
            ("density=nan", "(0, 1]"),
            "look where the value comes from",
        ),
        Row(
            "`Chase(update_interval=10.5)`",
            lambda _: gossamer.Chase(update_interval=10.5),
            ("update_interval=10.5 is a float", "whole number"),
            "give whole steps",
            TypeError,
        ),
        Row(
            '`Chase(distribution="erkk")`',
            lambda _: gossamer.Chase(distribution="erkk"),
            ("'erkk' is unknown", "did you mean 'erk'", "er"),
            "choose one of those listed",
        ),
        Row(
            "`Chase(channel_sparsity=1)`",
            lambda _: gossamer.Chase(channel_sparsity=1),
            ("channel_sparsity=1", "[0, 1)"),
            "leave some channels",
        ),
        Row(
            "`Chase(channel_sparsity=0.5, max_macs=1e6)`",
            lambda _: gossamer.Chase(channel_sparsity=0.5, max_macs=1e6),
            ("channel_sparsity=0.5", "max_macs", "both", "one of them"),
            "give the share or the budget",
        ),
        Row(
            "`Chase(channel_start=0.5, channel_end=0.4)`",
            lambda _: gossamer.Chase(channel_start=0.5, channel_end=0.4),
            ("from 0.5 to 0.4", "channel_start < channel_end <= explore_end"),
            "put the three in order",
        ),
        Row(
            "`SRSTE(n=4, m=2)`",
            lambda _: gossamer.SRSTE(n=4, m=2),
            ("n=4, m=2", "1 <= n < m"),
            "n of every m: n=2, m=4",
        ),
        Row(
            "`GMP(density=0.5, initial_density=0.2)`",
            lambda _: gossamer.GMP(density=0.5, initial_density=0.2),
            ("initial_density=0.2 is below density=0.5", "larger initial_density"),
            "start with more weights than it ends with",
        ),
        Row(
            "`MEST(density=0.1, mutation=0.2)`",
            lambda _: gossamer.MEST(density=0.1, mutation=0.2),
            ("mutation=0.2", "density=0.1", "smaller mutation"),
            "exchange fewer weights than there are",
        ),
        Row(
            "`TopKAST(density=0.5, backward_density=0.2)`",
            lambda _: gossamer.TopKAST(density=0.5, backward_density=0.2),
            ("backward_density=0.2", "[density=0.5, 1]"),
            "raise backward_density",
        ),
    ),
    "Sparsifier": (
        Row(
            '`Sparsifier("resnet20", method, ...)`',
            lambda _: sparsifier("resnet20"),
            ("model is a str", "torch.nn.Module"),
            "build the network first",
            TypeError,
        ),
        Row(
            "`Sparsifier(model, gossamer.Chase, ...)`",
            lambda _: sparsifier(method=gossamer.Chase),
            ("method is 'Chase'", "gossamer.Chase(density=0.1)"),
            "add the brackets",
            TypeError,
        ),
        Row(
            "`total_steps=0`",
            lambda _: sparsifier(total_steps=0),
            ("total_steps=0", "optimizer steps of the whole run"),
            "epochs times batches per epoch, over accumulated batches",
        ),
        Row(
            "`total_steps=97.5`",
            lambda _: sparsifier(total_steps=97.5),
            ("total_steps=97.5", "whole number"),
            "round it up",
        ),
        Row(
            '`cut="never"`',
            lambda _: sparsifier(cut="never"),
            ("cut='never'", '"during" or "end"'),
            '"end" only masks channels until training ends',
        ),
        Row(
            '`exclude="fc"`',
            lambda _: sparsifier(exclude="fc"),
            ("exclude='fc' is text", "['fc']"),
            "put it in a list",
            TypeError,
        ),
        Row(
            '`exclude=["clasifier"]`',
            lambda _: sparsifier(net("vgg"), exclude=["clasifier"]),
            ("'clasifier'", "matches no", "'classifier'"),
            "take a name of `model.named_modules()`, or a pattern such as `layer1.*`",
        ),
        Row(
            '`exclude=["*"]`',
            lambda _: sparsifier(mlp(), exclude=["*"]),
            ("no layer to make sparse", "3 weights", "include/exclude leave none"),
            "exclude fewer layers",
        ),
        Row(
            '`keep_channels=["features.99"]`',
            lambda _: sparsifier(
                net("vgg"), chase(), example=images(2), keep_channels=["features.99"]
            ),
            ("'features.99'", "matches no layer that has channels"),
            "take the name of a layer whose outputs are channels",
        ),
        Row(
            "A density that leaves a layer nothing",
            lambda _: sparsifier(mlp(), gossamer.Static(density=1e-5)),
            ("density=1e-05", "3 layers", "give at least 0.00058"),
            "give at least what the message says, or exclude small layers",
        ),
        Row(
            "A method that removes channels, without `example`",
            lambda _: sparsifier(method=chase()),
            ("Chase removes channels", "pass example="),
            "pass a batch of two inputs, as the model takes them",
        ),
        Row(
            '`example="images"`',
            lambda _: sparsifier(method=chase(), example="images"),
            ("str", "tensor"),
            "pass the tensor itself",
            TypeError,
        ),
        Row(
            "An example of another shape than the model takes",
            lambda _: sparsifier(
                net("conv_flatten_linear"), chase(), example=images(2)[..., :4, :4]
            ),
            ("cannot be traced", "'fc1'"),
            "pass an input of the size that is trained on",
        ),
        Row(
            "An example of another dtype than the model",
            lambda _: sparsifier(net("vgg"), chase(), example=images(2).float()),
            ("cannot be traced", "features.0"),
            "`example.to(dtype)`",
        ),
        Row(
            "A model whose forward pass fails",
            lambda _: cutting(nn.Sequential(net("mlp"), Failing())),
            ("cannot be traced", "no such kernel", "'1'"),
            "run the model on the example first, and mend what fails",
        ),
        Row(
            "A layer with a frozen weight",
            lambda _: sparsifier(frozen()),
            ("features.3 is frozen", "requires_grad", "exclude"),
            "exclude it, or unfreeze it",
        ),
        Row(
            "Two layers that share a weight",
            lambda _: sparsifier(tied()),
            ("0.weight and 1.weight", "tied", "xclude '0'"),
            "exclude them",
        ),
        Row(
            "A second Sparsifier on the same layers",
            lambda _: sparsifier(sparse()),
            ("parametrized already", "finalize"),
            "finalize the first, or give each its own layers with `include`",
        ),
        Row(
            "A lazy layer that has no weight yet",
            lambda _: sparsifier(nn.Sequential(nn.LazyLinear(4))),
            ("0 has no weight yet", "run the model once"),
            "run it on an example first",
        ),
        Row(
            "A model without linear or convolution layers",
            lambda _: sparsifier(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))),
            ("no layer to make sparse", "Sequential has 0"),
            "there is nothing that these methods could make sparse",
        ),
        Row(
            "`SRSTE()` on layers whose inputs are no multiple of 4",
            lambda _: sparsifier(nn.Sequential(nn.Linear(3, 5)), gossamer.SRSTE()),
            ("3 inputs per row", "2:4 needs a multiple of 4", 'remainder="pad"'),
            "other widths, or remainder=",
        ),
        Row(
            "Channels are to go, and none may",
            lambda _: cutting(Normed().double()),
            ("no layer of the model may lose channels", "LayerNorm"),
            "`channel_sparsity=0` trains it unstructured; the message says what holds each layer",
        ),
        Row(
            "More channels are to go than floors allow",
            lambda _: cutting(channel_sparsity=0.9, min_channels=8),
            ("4 of 44", "0.636", "min_channels=8"),
            "lower channel_sparsity or the floors",
        ),
        Row(
            "An update interval longer than the run",
            lambda _: sparsifier(method=chase(update_interval=100, channel_sparsity=0)),
            ("update_interval=100", "80 steps", "smaller"),
            "update more often, or train longer",
        ),
        Row(
            "A channel interval that is no multiple of the update interval",
            lambda _: sparsifier(
                method=chase(update_interval=10, channel_interval=25),
                example=images(2),
                total_steps=1000,
            ),
            ("channel_interval=25", "no multiple of update_interval=10"),
            "make it a multiple",
        ),
        Row(
            "A latency table for a method that does not follow it",
            lambda _: sparsifier(latency=object()),
            ("latency= is given", "Static does not follow it"),
            "leave it out, or set max_latency_ms",
        ),
    ),
    "In the loop": (
        Row(
            "`sparsifier.step(optimizer)` without `backward()`, or after `zero_grad()`",
            lambda _: stepped(backward=False),
            ("no gradient on any sparse weight", "after loss.backward()", "zero_grad"),
            "backward, optimizer.step, sparsifier.step, zero_grad, in this order",
        ),
        Row(
            "`sparsifier.step(scheduler)`",
            lambda _: stepped(optimizer=lambda model: object()),
            ("step() got a object", "pass the optimizer"),
            "pass the optimizer",
            TypeError,
        ),
        Row(
            "An optimizer that was built from another model, or from a part",
            lambda _: stepped(optimizer=lambda _: optimizer_for("sgd", net("mlp"))),
            ("the optimizer lacks 1.weight", "(24, 192)", "model.parameters()"),
            "build it from model.parameters(), after the Sparsifier",
        ),
        Row(
            "An optimizer with another inside, such as SAM",
            lambda _: stepped(optimizer=lambda model: Wrapped(model.parameters())),
            (".base", "call step(optimizer.base)"),
            "pass the inner one",
        ),
        Row(
            "`sparsifier.step` after `finalize()`",
            lambda _: stepped(finalize=True),
            ("step() after finalize()", "no longer masked"),
            "finalize when training has ended",
        ),
        Row(
            "Weights that have become NaN",
            lambda _: stepped(spoil=True),
            ("NaN", "learning rate"),
            "lower the learning rate, clip gradients, warm up",
        ),
    ),
    "Checkpoints": (
        Row(
            "The state of a run with another method",
            lambda _: resumed(sparsifier()),
            ("method: name is 'Static' in it and 'Chase' here", "settings of the interrupted run"),
            "resume with the method of that run",
        ),
        Row(
            "The state of a run with other hyperparameters",
            lambda _: resumed(cutting(density=0.3)),
            ("density is 0.3 in it and 0.2 here",),
            "resume with the settings of that run",
        ),
        Row(
            "The state of a run of another length",
            lambda _: resumed(total_steps=80),
            ("total_steps is 80 in it and 100 here",),
            "schedules are fractions of total_steps, so it cannot change",
        ),
        Row(
            "The state of another model",
            lambda _: resumed(cutting(net("vgg"))),
            ("shapes: 1 is None in it and [24, 192] here",),
            "build the model as it was",
        ),
        Row(
            "`sparsifier.load_state_dict(model.state_dict())`",
            lambda _: cutting().load_state_dict(net("mlp").state_dict()),
            ("not a Sparsifier's state", "Sparsifier.state_dict() returned"),
            "save and load both states",
        ),
        Row(
            "A state whose step is no number",
            lambda _: resumed(step="3"),
            ("the Sparsifier's state is damaged", "step is '3'", "whole number"),
            "resume from an earlier checkpoint",
        ),
        Row(
            "A state whose plan is damaged",
            lambda _: resumed(plan={"format": "gossamer-plan"}),
            ("plan that Gossamer reads", "'version' is missing"),
            "resume from an earlier checkpoint",
        ),
        Row(
            "`load_state_dict` in the middle of a run",
            lambda _: resumed_late(),
            ("fresh Sparsifier", "before its first step"),
            "make a new model and Sparsifier to resume",
        ),
        Row(
            "Two `carry` calls for one model",
            lambda _: carried(loads=0),
            ("carries a Sparsifier already", "in one call"),
            "`carry(one, other)`",
        ),
        Row(
            "A checkpoint of one Sparsifier for a model that carries two",
            lambda _: carried(loads=1),
            ("of 1 Sparsifiers, and 2 are carried",),
            "make all that the interrupted run had",
        ),
        Row(
            "A mask of another shape than its weight",
            lambda _: gossamer.Masked(nn.Parameter(torch.ones(3, 4)), torch.ones(3, 5)),
            ("(3, 5)", "(3, 4)"),
            "make the mask as large as the weight",
        ),
    ),
    "Files": (
        Row(
            "`gossamer.load` of a file that is not there",
            lambda folder: gossamer.load(folder / "none.safetensors", net("mlp")),
            ("none.safetensors",),
            "look at the path",
            FileNotFoundError,
        ),
        Row(
            "`gossamer.load` of a file that is damaged, or of another kind",
            lambda folder: gossamer.load(text(folder / "model.pt", "PK"), net("mlp")),
            ("model.pt is not a whole safetensors file", "copy it again"),
            "copy it again; pickled files (.pt, .bin) are never read",
        ),
        Row(
            "`gossamer.load` of a safetensors file that others wrote",
            lambda folder: gossamer.load(others_file(folder), net("mlp")),
            ("no plan in its header", "safetensors.torch.load_file"),
            "load it with safetensors",
        ),
        Row(
            "`gossamer.load` into another model",
            lambda folder: gossamer.load(cut_file(folder), net("vgg")),
            ("slim.safetensors", "Vgg lacks", "class and arguments"),
            "build the full-width model that training started from",
        ),
        Row(
            "`gossamer.load` into the model with another number of classes",
            lambda folder: gossamer.load(saved(folder), wider()),
            ("5.bias", "(4,) of float64 there and (9,)", "arguments it was trained with"),
            "build it with the arguments it was trained with",
        ),
        Row(
            '`Plan.from_json("{")`',
            lambda _: gossamer.Plan.from_json("{"),
            ("the plan is not JSON", "Plan.to_json()"),
            "the file was cut short: save it again",
        ),
        Row(
            "A file that is loaded into a model that was cut already",
            loaded_twice,
            ("is 5 wide in this", "plan was made for 24", "full-width"),
            "build the full-width model anew",
        ),
        Row(
            "`gossamer.save` below something that is no folder",
            lambda folder: gossamer.save(blocked(folder) / "model.safetensors", net("mlp")),
            ("file",),
            "choose a folder that can be written",
            OSError,
        ),
    ),
    "Shrink, export, bench": (
        Row(
            "`gossamer.shrink` before `finalize()`",
            lambda _: gossamer.shrink(sparse(), images(2)),
            ("1 is still parametrized", "finalize()"),
            "finalize first",
        ),
        Row(
            "`gossamer.shrink(model, example, multiple=0)`",
            lambda _: gossamer.shrink(net("mlp"), images(2), multiple=0),
            ("multiple=0", "give 1"),
            "8 and 16 suit most hardware",
        ),
        Row(
            "`gossamer.shrink` with an example that the model does not take",
            lambda _: gossamer.shrink(net("mlp"), images(2)[:, :1]),
            ("cannot be traced",),
            "pass an input of the model",
        ),
        Row(
            "`to_program` before `finalize()`",
            lambda folder: _to_program(folder / "model.pt2", sparse()),
            ("still parametrized", "finalize"),
            "finalize first",
        ),
        Row(
            "`bench` in an engine that there is not",
            lambda _: bench({"mlp": net("mlp")}, images(2), engines=["eagre"]),
            ("'eagre'", "eager"),
            "choose one of those listed",
        ),
        Row(
            "`bench` without models",
            lambda _: bench({}, images(2)),
            ("got 0 models", "at least one model"),
            "name what to time",
        ),
        Row(
            "`gossamer.latency` of a network without channels to cut",
            lambda _: gossamer.latency(Normed().double(), images(2)),
            ("no channels that can be cut", "says why"),
            "there is nothing that latency could follow",
        ),
        Row(
            "`check_nm(model, 4, 2)`",
            lambda _: check_nm(net("mlp"), 4, 2),
            ("4:2 is no pattern",),
            "n of every m: 2, 4",
        ),
    ),
    "Trainers": (
        Row(
            "`SparsifyCallback()` of Hugging Face's Trainer, without a Sparsifier",
            lambda _: _transformers("SparsifyCallback"),
            ("has no Sparsifier", "pass one"),
            "`SparsifyCallback(sparsifier)`",
        ),
        Row(
            "`save_pretrained` before `finalize()`",
            lambda folder: _transformers("save_pretrained", folder, sparse()),
            ("1 is still parametrized", "finalize()"),
            "finalize first",
        ),
        Row(
            "`load_pretrained` of a folder that Gossamer did not write",
            lambda folder: _transformers("load_pretrained", folder),
            ("gossamer_plan.json is not there", "from_pretrained"),
            "load it with `from_pretrained`",
        ),
    ),
    "Command line: train": (
        cli_row(
            "A command that there is not",
            "trian",
            ("no command 'trian'", "did you mean train?"),
            "choose one of those listed",
            2,
        ),
        cli_row(
            "A setting that there is not",
            "train --epoch 3",
            ("no setting 'epoch'", "did you mean epochs?"),
            "`gossamer train --help` lists them",
            2,
        ),
        cli_row(
            "A setting with a hyphen",
            "train --batch-size 3",
            ("no setting 'batch-size'", "did you mean batch_size?"),
            "settings are written with underscores, as in Python",
            2,
        ),
        cli_row(
            "A setting of another method",
            "train --method static --channel_score umm",
            ("'channel_score' is a setting of chase, not of static",),
            "leave it out, or choose that method",
            2,
        ),
        cli_row(
            "`--widths_match` without a network",
            "train --method static --density 1 --widths_match macs",
            ("widths_match=macs", "say with widths_of of which network"),
            "give the slim network too, with `--widths_of`",
        ),
        cli_row(
            "`--widths_of` something that is not there",
            "train --method static --density 1 --widths_of FOLDER/run",
            ("there is no file or run folder", "run"),
            "give the folder of a run that has ended, or its model.safetensors",
        ),
        cli_row(
            "A method that there is not",
            "train --method chaze",
            ("no method is called 'chaze'", "did you mean 'chase'?"),
            "`gossamer methods` lists them",
            2,
        ),
        cli_row(
            "Text for a number",
            "train --epochs many",
            ("epochs: got 'many'; wanted int",),
            "give a whole number",
            2,
        ),
        cli_row(
            "A choice that there is not",
            "train --optimizer lion",
            ("optimizer: got 'lion'; wanted ['sgd', 'adamw']",),
            "choose one of those listed",
            2,
        ),
        cli_row(
            "A word too many",
            "train stray",
            ("unrecognized arguments: stray",),
            "settings begin with two hyphens",
            2,
        ),
        cli_row(
            "A value out of range",
            "train --epochs 0",
            ("epochs=0: give at least 1",),
            "give a larger one",
        ),
        cli_row(
            "A learning rate that is no number",
            "train --lr nan",
            ("lr: got 'nan'; wanted float",),
            "look where the value comes from",
            2,
        ),
        cli_row(
            "Density and sparsity",
            "train --density 0.2 --sparsity 0.8",
            ("density and sparsity say the same", "one of them"),
            "give one of them",
            2,
        ),
        cli_row(
            "A configuration file that is not there",
            "train --config FOLDER/none.yaml",
            ("none.yaml",),
            "look at the path",
        ),
        cli_row(
            "An unknown name in the file",
            "train --config FOLDER/my.yaml",
            ("my.yaml: there is no setting 'epoch'", "did you mean epochs?"),
            "correct the file",
            2,
            **{"my.yaml": "epoch: 3\n"},
        ),
        cli_row(
            "A setting of another method in the file",
            "train --config FOLDER/my.yaml",
            ("my.yaml: 'channel_sparsity' is a setting of chase, not of static",),
            "leave it out, or choose that method",
            2,
            **{"my.yaml": "channel_sparsity: 0.5\nmethod: static\n"},
        ),
        cli_row(
            "A value out of range in the file",
            "train --config FOLDER/my.yaml",
            ("density=1.5 is out of range",),
            "correct the file",
            1,
            **{"my.yaml": "density: 1.5\n"},
        ),
        cli_row(
            "A file whose values stand for each other",
            "train --config FOLDER/my.yaml",
            ("my.yaml is not YAML", "alias"),
            "write the value out",
            1,
            **{"my.yaml": "exclude: &a [fc]\ninclude: *a\n"},
        ),
        cli_row(
            "A value of another type in the file",
            "train --config FOLDER/my.yaml",
            ("epochs: got 'many'; wanted int",),
            "correct the file",
            2,
            **{"my.yaml": "epochs: many\n"},
        ),
        cli_row(
            "Text in the file where a list is wanted",
            "train --config FOLDER/my.yaml",
            ("exclude: got 'fc'; wanted a list, [fc]",),
            "put it in brackets",
            2,
            **{"my.yaml": "exclude: fc\n"},
        ),
        cli_row(
            "A file that is not YAML",
            "train --config FOLDER/my.yaml",
            ("my.yaml is not YAML", "line 2"),
            "correct the file at the line that is named",
            1,
            **{"my.yaml": "a: [\n"},
        ),
        cli_row(
            "A file that is a list",
            "train --config FOLDER/my.yaml",
            ("holds a list", "lines of `name: value`"),
            "correct the file",
            1,
            **{"my.yaml": "[1, 2]\n"},
        ),
        cli_row(
            "A file of gossamer compare",
            "train --config FOLDER/my.yaml",
            ("lists several methods: gossamer compare",),
            "run that command",
            2,
            **{"my.yaml": "methods: [set]\n"},
        ),
        after(
            lambda folder: text(folder / "config.yaml", "epochs: 3\n"),
            cli_row(
                "A folder that holds a run",
                "train --out FOLDER",
                ("holds a run already", "--resume", "--overwrite", "--out"),
                "choose one of the three",
            ),
        ),
        cli_row(
            "Nothing to resume",
            "train --resume --out FOLDER/none",
            ("there is no run to resume in",),
            "look at the path, or leave --resume out",
        ),
        cli_row(
            "A data set that there is not",
            "train --data FOLDER/none --out FOLDER/run",
            ("no data set", "none"),
            "digits, a Parquet file or folder, an image folder, or owner/name on the hub",
        ),
        after(
            pictures,
            cli_row(
                "Images without classes",
                "train --data FOLDER/images --out FOLDER/run",
                ("label", "subfolder"),
                "one subfolder per class",
            ),
        ),
        cli_row(
            "A network that there is not",
            "train --model resnet2 --out FOLDER/run",
            ("no model is called 'resnet2'", "did you mean", "resnet20"),
            "the help of --model lists them",
        ),
        cli_row(
            "A batch larger than the data",
            f"train {TINY} --batch_size 100000 --out FOLDER/run",
            ("do not fill one batch of 100000", "lower batch_size"),
            "lower batch_size",
        ),
        after(
            lambda folder: text(folder / "file", ""),
            cli_row(
                "A run folder that cannot be made",
                f"train {TINY} --out FOLDER/file/run",
                ("file",),
                "choose a folder that can be written",
            ),
        ),
        cli_row(
            "A threshold decay for a method without thresholds",
            f"train {TINY} --threshold_decay 0.1 --out FOLDER/run",
            ("threshold_decay=0.1", "chase learns no thresholds"),
            "leave it out",
        ),
        cli_row(
            "A layer name that there is not",
            f"train {TINY} --exclude clasifier --out FOLDER/run",
            ("'clasifier'", "'classifier'"),
            "correct the name",
        ),
    ),
    "Command line: the other commands": (
        cli_row(
            "`gossamer compare` of one run's file",
            "compare FOLDER/my.yaml",
            ("no list `methods`", "gossamer train --config"),
            "list the methods, or run gossamer train",
            2,
            **{"my.yaml": "method: chase\n"},
        ),
        cli_row(
            "A comparison without any job",
            "compare FOLDER/my.yaml --jobs 0",
            ("--jobs 0: give at least 1",),
            "give at least 1",
            2,
        ),
        cli_row(
            "Two entries of one name",
            "compare FOLDER/my.yaml",
            ("two entries are called 'set'", "`label`"),
            "give one of them a label",
            2,
            **{"my.yaml": "methods: [set, set]\n"},
        ),
        cli_row(
            "A comparison with a setting that there is not",
            "compare FOLDER/my.yaml",
            ("there is no setting 'epoch'", "did you mean epochs?"),
            "correct the file",
            2,
            **{"my.yaml": "methods: [set]\nepoch: 3\n"},
        ),
        cli_row(
            "Rows to keep that are not of `gossamer compare`",
            "compare FOLDER/my.yaml --keep FOLDER/my.csv --out FOLDER/out",
            ("it has no column label", "leave out --keep"),
            "give the results.csv of a comparison",
            **{"my.yaml": "methods: [set]\n", "my.csv": "a,b\n1,2\n"},
        ),
        cli_row(
            "A model file that is not there",
            "shrink none.safetensors --out FOLDER/slim.safetensors",
            ("there is no file or run folder none.safetensors",),
            "look at the path",
        ),
        cli_row(
            "A network that there is not",
            "export resnet2",
            ("no file or run folder resnet2", "no model is called 'resnet2'"),
            "look at the path or the name",
        ),
        cli_row(
            "Safetensors without a name",
            "export lenet5 --to safetensors",
            ("--to safetensors", "--out FILE"),
            "say where to write",
            2,
        ),
        cli_row(
            "An opset for what is not ONNX",
            "export lenet5 --to program --opset 18",
            ("--opset 18 is for --to onnx, not --to program",),
            "leave it out",
            2,
        ),
        cli_row(
            "No images to verify on",
            "export lenet5 --batch 0 --out FOLDER/out",
            ("batch=0: give at least 1",),
            "give at least 1",
        ),
        cli_row(
            "A network without end",
            "check lenet5 --width inf",
            ("width=inf", "finite width above 0"),
            "give a factor on the channels",
        ),
        cli_row(
            "A pattern that is none",
            "check lenet5 --pattern 2of4",
            ("--pattern 2of4: give N:M",),
            "such as 2:4",
            2,
        ),
        cli_row(
            "More than all",
            "check lenet5 --pattern 4:2",
            ("4:2 is no pattern",),
            "such as 2:4",
        ),
        cli_row(
            "A factory that makes no model",
            "check os:getcwd --in_shape 1 8 8",
            ("os:getcwd returned a str", "torch.nn.Module"),
            "return the model",
        ),
        cli_row(
            "A factory without a shape",
            "check os:getcwd",
            ("say what images it takes", "--in_shape C H W"),
            "add --in_shape",
        ),
        after(
            lambda folder: saved(folder, gossamer_model="{"),
            cli_row(
                "A model file whose header is damaged",
                "check FOLDER/model.safetensors",
                ("header", "is damaged", "--model NAME"),
                "name the network with --model",
            ),
        ),
        after(
            lambda folder: saved(folder),
            cli_row(
                "A model file that does not say what it holds",
                "check FOLDER/model.safetensors",
                ("does not say what network it holds", "--model NAME"),
                "name the network with --model",
            ),
        ),
        cli_row(
            "A folder that holds no run",
            "check FOLDER",
            ("holds no run", "`gossamer train` wrote"),
            "give the run's folder",
        ),
        cli_row(
            "A batch that is no number",
            "bench lenet5 --batch few",
            ("--batch few", "whole numbers from 1"),
            "such as 1,8",
            2,
        ),
        cli_row(
            "An engine that there is not",
            "bench lenet5 --engines eagre --rounds 1",
            ("'eagre'", "eager"),
            "choose one of those listed",
        ),
        cli_row(
            "A forecast for two models",
            "bench lenet5 lenet5 --predict 0.5",
            ("--predict is about one MODEL, not 2",),
            "give one",
            2,
        ),
        cli_row(
            "One model twice",
            "bench lenet5 lenet5",
            ("lenet5 is given twice",),
            "give every MODEL once",
        ),
        cli_row(
            "A report of no run",
            "report FOLDER",
            ("holds no run", "`gossamer train` wrote"),
            "give the run's folder",
        ),
        cli_row(
            "A report of a run, twice",
            "report FOLDER FOLDER",
            ("is there twice", "once"),
            "give each run once",
        ),
        cli_row(
            "An analysis of no run",
            "analyze FOLDER",
            ("holds no run", "`gossamer train` wrote"),
            "give the run's folder",
        ),
        after(
            lambda folder: text(folder / "config.yaml", "epochs: 3\n"),
            cli_row(
                "An analysis of a run that has not ended",
                "analyze FOLDER",
                ("has not ended", "gossamer train --resume --out"),
                "end the run",
            ),
        ),
        cli_row(
            "The card of a method that there is not",
            "methods chaze",
            ("no method is called 'chaze'", "did you mean 'chase'?"),
            "`gossamer methods` lists them",
            2,
        ),
    ),
}
ROWS = [row for rows in TABLE.values() for row in rows]
OTHER_VERSIONS = {  # their words, and those of the versions in constraints.txt
    "RuntimeError: addmm: ": "RuntimeError: ",  # PyTorch 2.15
    "HeaderTooSmall": "header too small",  # safetensors 0.5
}


def _to_program(path: Path, model: nn.Module) -> None:
    from gossamer.export import to_program

    to_program(path, model, images(2))


def _transformers(name: str, *given: object) -> None:
    from gossamer.integrations import transformers

    getattr(transformers, name)(*given)


# ------------------------------------------------------------------ what is checked


def message(row: Row, folder: Path) -> str:
    """The message of a row, with a name instead of this machine's folder."""
    with pytest.raises(row.error) as caught:
        row.call(folder)
    assert isinstance(caught.value, row.error)
    shown = (
        str(caught.value).replace(str(folder), "FOLDER").replace(os.path.realpath(folder), "FOLDER")
    )
    for other, ours in OTHER_VERSIONS.items():
        shown = shown.replace(other, ours)
    return " ".join(shown.split())


def line(row: Row, shown: str) -> str:
    """A row of the page."""
    cells = (row.did, _code(shown), row.do)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code(shown: str) -> str:
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.did)
def test_wrong_input(row: Row, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shown = message(row, tmp_path)
    for word in row.words:
        assert word in shown, f"{word!r} is not in: {shown}"
    documented = PAGE.read_text().splitlines()
    assert line(row, shown) in documented, "run: python tests/test_wrong_inputs.py"


def test_the_table_is_large_and_the_page_has_no_other_rows() -> None:
    assert len(ROWS) >= 40
    listed = [
        one for one in PAGE.read_text().splitlines() if re.match(r"\| (?!what you did|-)", one)
    ]
    assert len(listed) == len({row.did for row in ROWS}) == len(ROWS)


HEAD = """\
# Errors

What you did, what Gossamer says, and what to do. Search this page for a part of your message;
names, numbers and paths are those of the example. Every message here is compared with the real one
by a test.

Errors of the command line are one line on stderr; the exit code is 2 when the command line or a
configuration file cannot be understood, and 1 when the command failed. A call that is refused
changes nothing: model, optimizer and files are as they were.
"""


def page() -> str:
    parts = [HEAD]
    for title, rows in TABLE.items():
        parts.append(
            f"\n## {title}\n\n| what you did | what you get | what to do |\n| --- | --- | --- |\n"
        )
        for row in rows:
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                parts.append(line(row, message(row, Path(folder))) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
    print(f"written: {PAGE}", file=sys.stderr)  # noqa: T201
