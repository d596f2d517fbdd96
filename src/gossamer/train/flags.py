"""The flags of `gossamer train`, made from the dataclasses and their docstrings."""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from gossamer.method import Method
from gossamer.registry import MethodInfo, method_info
from gossamer.train.config import TrainConfig, check_names, from_dict, nearest, read_yaml
from gossamer.train.folder import CHECKPOINTS, CONFIG

__all__ = ["Request", "UsageError", "parse"]

_EXAMPLES = """\
examples:
  gossamer train --method chase --density 0.1 --channel_sparsity 0.5 --model vgg-small --baseline
  gossamer train --config recipes/digits-chase.yaml --seed 1
  gossamer train --resume --out runs/digits-vgg-small-chase-s0
  gossamer train --method static --help
"""


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
        if not Path(given["config"]).is_file():
            raise FileNotFoundError(f"there is no configuration file {given['config']}")
        in_file = read_yaml(Path(given["config"]))

    info = method_info(given.get("method") or str(in_file.get("method", TrainConfig.method)))
    parser = _parser(info)
    try:
        check_names((key for key in in_file if key != "sparsity"), info)
    except ValueError as error:
        raise UsageError(f"{given['config']}: {error}") from error
    values = parser.parse_args(argv).as_dict()

    sparsity = values.pop("sparsity", None)
    if sparsity is not None and ("sparsity" in given or "density" not in given):
        if any({"density", "sparsity"} <= source.keys() for source in (given, in_file)):
            raise UsageError("density and sparsity say the same: give one of them")
        values["density"] = round(1 - sparsity, 12)
    resume, overwrite, as_json = (values.pop(name) for name in ("resume", "overwrite", "json"))
    del values["config"]
    if resume and "config" in given and "out" not in given:
        folder = Path(given["config"]).parent
        if Path(given["config"]).name == CONFIG and (folder / CHECKPOINTS).is_dir():
            values["out"] = str(folder)  # where the run is now, wherever it was started
    config, method = from_dict(values)
    return Request(config, method, resume, overwrite, as_json)


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The flags on the command line and the word after each: enough to choose the parser by."""
    given = {}
    for index, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = "".join(argv[index + 1 : index + 2])
            given[name] = value if equals else following
    return given


class _Parser(jsonargparse.ArgumentParser):
    print_config = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError, in words a user knows."""
        flag = re.search(r"unrecognized arguments: --([\w-]+)", message)
        if flag:
            known = [action.dest for action in self._actions]
            raise UsageError(f"there is no flag --{flag[1]}{nearest(flag[1], known)}")
        wrong = re.search(r'Parser key "(\w+)":\s*(.*)', message, re.DOTALL)
        if wrong:
            reason = re.sub(r"<class '(\w+)'>", r"\1", " ".join(wrong[2].split()))
            raise UsageError(f"{wrong[1]}: {reason.replace('typing.', '')}")
        raise UsageError(" ".join(message.split()))


def _parser(info: MethodInfo) -> _Parser:
    parser = _Parser(
        prog="gossamer train",
        description="Train one network sparse from scratch, cut it, and say what came of it.",
        epilog=_EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of settings; flags override it"
    )
    switches = (
        ("resume", "Go on from the newest checkpoint of the run folder."),
        ("overwrite", "Throw away what an earlier run has left in the run folder."),
        ("json", "Print the summary as JSON."),
    )
    for name, text in switches:
        parser.add_argument(f"--{name}", action="store_true", help=text)
    _add(parser.add_argument_group("the run"), TrainConfig)
    method = parser.add_argument_group(f"the method: {info.name}", f"{info.summary}. {info.paper}.")
    _add(method, info.cls)
    if "density" in info.cls.hyperparameters():
        method.add_argument("--sparsity", type=float, help="1 - density, for those who prefer it.")
    return parser


class _Help(jsonargparse.DefaultHelpFormatter, RawDescriptionHelpFormatter):
    pass


def _add(group: Any, cls: type) -> None:
    """One flag for each field of a dataclass: its type, its default, its line of the docstring."""
    hints = get_type_hints(cls)
    texts = {
        param.arg_name: " ".join((param.description or "").split())
        for param in docstring_parser.parse(cls.__doc__ or "").params
    }
    for field in fields(cls):
        options: dict[str, Any] = {"default": field.default, "help": texts[field.name]}
        kind = hints[field.name]
        item = _item_type(kind)
        if kind is bool:
            options["action"] = jsonargparse.ActionYesNo
        elif item is not None:
            options |= {"type": item, "nargs": "+"}
        else:
            options["type"] = kind
        group.add_argument(f"--{field.name}", **options)


def _item_type(kind: Any) -> Any:
    """The type of the items when `kind` is `tuple[item, ...]` or that or None; else None."""
    for option in (kind, *get_args(kind)):
        if get_origin(option) is tuple:
            return get_args(option)[0]
    return None
