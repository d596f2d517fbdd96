"""Reading what may be damaged, forged or of something else: right, or a ValueError that says so.

Nothing here runs code from a file, and no number from one is believed before it is looked at.
"""

from __future__ import annotations

import json
import pickle
import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "reading", "reason", "short", "whole_number"]

_LONGEST = 80  # characters of a value that a message shows
_repr = reprlib.Repr()
_repr.maxlevel = 2  # a few bytes of YAML can nest lists without end


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Whatever wrong data leads to inside becomes one ValueError: what, why, and what to do.

    Errors of the operating system stay as they are: they name the file themselves.

    Args:
        what: Is read: a file, or "the checkpoint's plan".
        remedy: What the user can do about it.
    """
    try:
        yield
    except (OSError, NameError, ImportError):  # the latter two are mistakes of ours
        raise
    except Exception as error:  # whatever the damage happens to lead to
        raise ValueError(f"{what} is damaged ({reason(error)}): {remedy}") from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: The file holds anything else; names it, and ends with `remedy`.
        OSError: The file cannot be read.
    """
    with reading(str(path), remedy):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, wanted an object")
        return found


def whole_number(data: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """The whole number `data[name]`. Raises ValueError unless it is in [least, most]."""
    value = data[name]
    if type(value) is not int or not least <= value <= most:
        limit = "" if most >= sys.maxsize else f" to {most}"
        raise ValueError(f"{name} is {short(value)}, wanted a whole number from {least}{limit}")
    return value


def short(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = _repr.repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def reason(error: Exception) -> str:
    """Why something could not be read, in one line that is not too long."""
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's own advice is to run the code in it
        return "it is cut short, or holds something else than tensors and plain data"
    if isinstance(error, KeyError):
        return f"{short(error.args[0] if error.args else None)} is missing"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 4 * _LONGEST else f"{text[: 4 * _LONGEST]}..."
