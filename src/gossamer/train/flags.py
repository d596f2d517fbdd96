"""The flags of `gossamer train`, made from the dataclasses and their docstrings."""

from __future__ import annotations

import re
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from gossamer.method import Method
from gossamer.reading import short
from gossamer.registry import MethodInfo, method_info
from gossamer.train.config import TrainConfig, check_names, from_dict, read_yaml
from gossamer.train.folder import CHECKPOINTS, CONFIG
from gossamer.train.models import model_names
from gossamer.train.recipes import settings_file
from gossamer.train.trace import dense_losses

__all__ = ["Request", "UsageError", "parse", "typed"]

_EXAMPLES = """\
examples:
  gossamer train --method chase --density 0.1 --channel_sparsity 0.5 --model vgg-small --baseline
  gossamer train --config digits-chase --seed 1
  gossamer train --resume --out runs/digits-vgg-small-chase-s0
  gossamer train --method static --help
"""


# Flags that are no settings: they are not kept in config.yaml.
_SWITCHES = (
    ("resume", "go on from the newest checkpoint of the run folder"),
    ("auto_resume", "go on with the run in the folder, or start it: for jobs that are restarted"),
    ("overwrite", "throw away what an earlier run has left in the run folder"),
    ("json", "print the summary as JSON on stdout"),
)
_NOT_SETTINGS = {
    "config",
    "dense_trace",
    "help",
    "sparsity",
    *(name for name, _ in _SWITCHES),
    *(f"no_{field.name}" for field in fields(TrainConfig) if field.default in (True, False)),
}


class UsageError(ValueError):
    """A command line or a configuration file that cannot be understood."""


@dataclass(frozen=True)
class Request:
    """What one command line asks for."""

    config: TrainConfig
    method: Method
    resume: bool
    overwrite: bool
    as_json: bool


def parse(argv: Sequence[str]) -> Request:
    """Read the arguments of `gossamer train`.

    Raises:
        UsageError: An unknown flag or key, or a value of another type.
        ValueError, OSError: A value that is refused, or a file that cannot be read.
    """
    argv = list(argv)
    given = _given(argv)
    if "resume" in given and "config" not in given and "out" in given:
        saved = Path(given["out"]) / CONFIG
        if saved.exists():
            argv = ["--config", str(saved), *argv]
            given["config"] = str(saved)
    in_file: dict[str, Any] = {}
    if "config" in given:
        in_file = read_yaml(settings_file(given["config"]))

    name = given.get("method") or str(in_file.get("method", TrainConfig.method))
    try:
        info = method_info(name)
        check_names(given.keys() - _NOT_SETTINGS, info)
        if "dense_trace" in given:
            check_names(["dense_losses"], info)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "methods" in in_file:
        raise UsageError(
            f"{given['config']} lists several methods: gossamer compare {given['config']}"
        )
    try:
        check_names(in_file.keys() - {"sparsity"}, info)
        _check_lists(in_file, info)
    except ValueError as error:
        raise UsageError(f"{given['config']}: {error}") from error
    parser = _parser(info)
    try:
        values = parser.parse_args(_with_files(argv, empty=not in_file)).as_dict()
    except UsageError as error:
        name = str(error).partition(":")[0]
        if name in in_file and name not in given:
            raise UsageError(f"{given['config']}: {error}") from error
        raise

    sparsity = values.pop("sparsity", None)
    if sparsity is not None and ("sparsity" in given or "density" not in given):
        if any({"density", "sparsity"} <= source.keys() for source in (given, in_file)):
            raise UsageError("density and sparsity say the same: give one of them")
        values["density"] = round(1 - sparsity, 12)
    resume, auto, overwrite, as_json = (values.pop(name) for name, _ in _SWITCHES)
    if overwrite and (resume or auto):
        raise UsageError("overwrite throws away what resume would go on with: give one of them")
    del values["config"]
    if resume and "config" in given and "out" not in given:
        folder = Path(given["config"]).parent
        if Path(given["config"]).name == CONFIG and (folder / CHECKPOINTS).is_dir():
            values["out"] = str(folder)  # where the run is now, wherever it was started
    trace = values.pop("dense_trace", None)
    config, method = from_dict(values)
    if trace is not None:
        if values["dense_losses"]:
            raise UsageError("dense_trace and dense_losses say the same: give one of them")
        losses = dense_losses(Path(trace), config, values["tune_end"])
        config, method = from_dict({**values, "dense_losses": losses})
    resume = resume or (auto and (config.folder / CONFIG).exists())
    return Request(config, method, resume, overwrite, as_json)


def typed(values: Mapping[str, Any]) -> tuple[TrainConfig, Method]:
    """The settings of one run, as a YAML file has them, each as the type it must have.

    Raises:
        UsageError: An unknown name, or a value of another type.
        ValueError: A value that is refused.
    """
    try:
        info = method_info(str(values.get("method", TrainConfig.method)))
        check_names(values, info)
        _check_lists(values, info)
    except ValueError as error:
        raise UsageError(str(error)) from error
    parsed = _parser(info).parse_object(dict(values)).as_dict()
    return from_dict({name: parsed[name] for name in parsed.keys() - _NOT_SETTINGS})


def _check_lists(values: Mapping[str, Any], info: MethodInfo) -> None:
    """Raise ValueError where a list is wanted and something else is given."""
    hints = get_type_hints(TrainConfig) | get_type_hints(info.cls)
    for name, value in values.items():
        kind = _plain(hints.get(name))
        if get_origin(kind) is tuple and not isinstance(value, list | None):
            shown, listed = short(value), short(value).strip("'")
            raise ValueError(f"{name}: got {shown}; wanted a list, [{listed}]")


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The flags on the command line and the word after each: enough to choose the parser by."""
    given = {}
    for index, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = "".join(argv[index + 1 : index + 2])
            given[name] = value if equals else following
    return given


def _with_files(argv: Sequence[str], *, empty: bool) -> list[str]:
    """The arguments with the file of a recipe where `--config` names one; an `empty` one goes."""
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        name, equals, file = word.partition("=")
        if name != "--config" or (given := file if equals else next(rest, None)) is None:
            words.append(word)
        elif not empty:  # the parser takes no file without settings
            words.append(f"--config={settings_file(given)}")
    return words


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError, in words a user knows."""
        wrong = re.search(r'Parser key "(\w+)":\s*(.*)', message, re.DOTALL)
        if wrong:
            reason = " ".join(wrong[2].split())
            expected = re.fullmatch(r"Expected an? (.*)\. Got value: (.*)", reason)
            if expected:
                kind = re.sub(r"<class '(\w+)'>|typing\.|Literal", r"\1", expected[1])
                reason = f"got {expected[2]!r}; wanted {kind}"
            raise UsageError(f"{wrong[1]}: {reason}")
        raise UsageError(" ".join(message.split()))


def _parser(info: MethodInfo) -> _Parser:
    parser = _Parser(
        prog="gossamer train",
        usage="gossamer train [--config FILE] [--SETTING VALUE ...]",
        description="Train one network sparse from scratch, cut it, and say what came of it.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of settings, or the name of a recipe; flags override it",
    )
    for name, text in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true", help=text)
    names = f" Names: {', '.join(model_names())}."
    _add(parser.add_argument_group("settings of the run"), TrainConfig, {"model": names})
    about = textwrap.fill(f"{info.summary}. {info.paper}.", 76)
    method = parser.add_argument_group(f"settings of the method {info.name}", about)
    _add(method, info.cls)
    if "density" in info.cls.hyperparameters():
        method.add_argument("--sparsity", type=float, metavar="float", help="1 - density")
    if "dense_losses" in info.cls.hyperparameters():
        text = "take dense_losses from a run made with --baseline, for as many epochs as tune_end"
        method.add_argument("--dense_trace", metavar="RUN_FOLDER", help=text)
    return parser


def _add(group: Any, cls: type, more: Mapping[str, str] = MappingProxyType({})) -> None:
    """One flag for each field of a dataclass: its type, its default, its line of the docstring.

    `more` says more about a field than its docstring does.
    """
    hints = get_type_hints(cls)
    texts = {
        param.arg_name: " ".join((param.description or "").split())
        for base in cls.__mro__
        if is_dataclass(base)
        for param in docstring_parser.parse(base.__doc__ or "").params
    }
    for field in fields(cls):
        kind, default = _plain(hints[field.name]), field.default
        options: dict[str, Any] = {
            "default": list(default) if isinstance(default, tuple) else default,
            "help": (texts[field.name] + more.get(field.name, "")).replace("%", "%%"),
        }
        if default is not None and default is not False and default != ():
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            options["help"] += f" (default: {'yes' if default is True else shown})"
        if kind is bool:
            options |= {"action": jsonargparse.ActionYesNo, "nargs": "?"}
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            options |= {"type": item, "nargs": "+", "metavar": _WORDS[item]}
        elif get_origin(kind) is Literal:
            choices = "{" + ",".join(get_args(kind)) + "}"
            options |= {"type": hints[field.name], "metavar": choices}
        else:
            options |= {"type": hints[field.name], "metavar": _WORDS[kind]}
        action = group.add_argument(f"--{field.name}", **options)
        if kind is bool:
            action.metavar = "yes|no"  # jsonargparse overrules the option


_WORDS = {int: "int", float: "float", str: "text"}


def _plain(kind: Any) -> Any:
    """`kind`, or what it is when it is not None."""
    options = [option for option in get_args(kind) if option is not type(None)]
    return options[0] if isinstance(kind, UnionType) else kind
