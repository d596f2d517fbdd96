"""What a comparison is told: one YAML file of common settings, methods, densities and seeds.

methods x densities x seeds, and the dense twin once per seed: each of these is a cell, and a run
of its own. Methods that take a density get each one of the list, or of the entry's own; an entry
that sets a single one, and a method that has none, run once per seed. Rivals of a cell follow it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from gossamer.method import Method
from gossamer.reading import short
from gossamer.registry import METHODS, method_info
from gossamer.train.compare.cell import DENSE, Cell
from gossamer.train.compare.rivals import RIVALS, SLIM, WALL_TIME, check_origin, launched, rivals_of
from gossamer.train.config import TrainConfig, check_unchanged, read_yaml
from gossamer.train.flags import UsageError, typed

__all__ = ["CELLS", "COPY", "Comparison", "read"]

CELLS = "cells"
COPY = "compare.yaml"

_LISTS = ("methods", "densities", "seeds", "rivals")
# Settings of a run that cannot be given for all, and what to do instead.
_DECIDED = {
    "method": "list methods under `methods`",
    "seed": "list seeds under `seeds`",
    "density": "list densities under `densities`, or give one to the entry of a method",
    "baseline": "the dense twin is always trained, once per seed",
    **dict.fromkeys(
        ("threshold_decay", "threshold_clip"),
        "give it to the entries of methods that learn thresholds",
    ),
    "widths_of": "give it to an entry; dense networks of the slim ones' widths are `rivals`",
    "widths_match": "give it to an entry, with widths_of; or list `rivals: [uniform]`",
}
_DATA = ("data", "val_fraction", "image_size")
_COMMON = ("model", "width", *_DATA, "channels_last", "threads", "device", "out")
_T = TypeVar("_T", int, float)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """All cells, in the order in which they run: the dense twins, then seed by seed.

    Attributes:
        name: Of the YAML file.
        text: What was in it.
        folder: Everything is written below it.
        cells: The runs.
        threads: CPU threads of each run, and of the timing.
        notes: What is to be said about methods that run without the list of densities.
    """

    name: str
    text: str
    folder: Path
    cells: tuple[Cell, ...]
    threads: int
    notes: tuple[str, ...]

    def check_unchanged(self) -> None:
        """Raise ValueError when a cell's folder holds a run with other settings."""
        for cell in self.cells:
            check_origin(cell)
            if cell.run.config.exists():
                try:
                    check_unchanged(cell.run.config, launched(cell), cell.method)
                except ValueError as error:
                    anew = f"or remove {cell.config.folder} to train it anew"
                    raise ValueError(f"{error}, {anew}") from error


def read(file: Path, out: str | None = None) -> Comparison:
    """Read a comparison.

    Args:
        file: YAML: `methods`, `densities`, `seeds`, `rivals`, and settings of `gossamer train` for
            all.
        out: Folder, instead of the file's `out`; without both it is runs/<name of the file>.

    Raises:
        UsageError: An unknown name, a value of another type, or entries that cannot be told apart.
        ValueError: A value that is refused.
        OSError: The file cannot be read.
    """
    values = read_yaml(file)
    if "methods" not in values:
        raise UsageError(
            f"{file} has no list `methods`: name the methods to compare in it; a single run is "
            f"made by gossamer train --config {file}"
        )
    common = {name: value for name, value in values.items() if name not in _LISTS}
    try:
        _check_common(common)
        densities = (
            _numbers(values["densities"], "densities", float) if "densities" in values else ()
        )
        seeds = _numbers(values.get("seeds", (0, 1, 2)), "seeds", int)
        rivals = _rivals(values.get("rivals", ()), "rivals")
        entries = _entries(values["methods"])
        own_densities, own_rivals = _own_lists(entries)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error

    folder = _folder(file, out or common.pop("out", None))
    common["threads"] = common.get("threads") or 1
    dense = _typed(file, DENSE, {**common, "method": "static", "density": 1.0})
    kinds: list[tuple[str, float | None, TrainConfig, Method]] = []
    notes = []
    for label, settings in entries.items():
        field = _density_field(str(settings["method"]))
        several = own_densities.get(label, densities)
        listed = bool(several) and field is not None and field not in settings
        for density in several if listed else (None,):
            own = settings if density is None else {**settings, str(field): density}
            kinds.append((label, density, *_typed(file, label, {**common, **own})))
        if densities and not listed:
            why = f"its entry sets {field}" if field else "it has no density to set"
            notes.append(f"{label} runs once per seed: {why}.")

    def cell(label: str, density: float | None, config: TrainConfig, method: Method) -> Cell:
        name = re.sub(r"[^\w.-]+", "-", label) + ("" if density is None else f"-d{density:g}")
        path = folder / CELLS / f"{name}-s{config.seed}"
        return Cell(
            label=label, density=density, config=replace(config, out=str(path)), method=method
        )

    cells = [cell(DENSE, None, replace(dense[0], seed=seed), dense[1]) for seed in seeds]
    for seed in seeds:
        for label, density, config, method in kinds:
            made = cell(label, density, replace(config, seed=seed), method)
            wanted, optional = own_rivals.get(label, rivals), label not in own_rivals
            cells += [made, *rivals_of(made, wanted, *dense, optional=optional)]
    _check_folders(file, cells)
    return Comparison(
        name=file.stem,
        text=file.read_text(),
        folder=folder,
        cells=tuple(cells),
        threads=dense[0].threads or 1,
        notes=tuple(notes),
    )


def _folder(file: Path, out: object) -> Path:
    if out is not None:
        return Path(str(out)).expanduser()
    if file.name == COPY and (file.parent / CELLS).is_dir():
        return file.parent  # where the comparison is now, wherever it was started
    return Path("runs") / file.stem


def _check_common(common: Mapping[str, Any]) -> None:
    """Raise UsageError for a name that is no setting of the comparison's runs."""
    known = {field.name for field in fields(TrainConfig)} - _DECIDED.keys() | set(_LISTS)
    for name in common:
        if name in known:
            continue
        if name in _DECIDED:
            raise UsageError(f"{name!r} is not given for all runs: {_DECIDED[name]}")
        owners = [row.name for row in METHODS.values() if name in row.cls.hyperparameters()]
        if owners:
            raise UsageError(
                f"{name!r} is a setting of {', '.join(owners)}: give it to the entry of the method"
            )
        near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"there is no setting {name!r}{hint}")


def _rivals(given: Any, where: str) -> tuple[str, ...]:
    """Names of rivals."""
    if not isinstance(given, list | tuple):
        shown = short(given).strip("'")
        raise UsageError(f"{where}: got {short(given)}; wanted a list, [{shown}]")
    for name in given:
        if name not in RIVALS:
            near = difflib.get_close_matches(str(name), RIVALS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(
                f"{where}: there is no rival {short(name)}{hint}: choose of {', '.join(RIVALS)}"
            )
        if list(given).count(name) > 1:
            raise UsageError(f"{where}: {name} is there twice")
    if WALL_TIME in given and SLIM not in given:
        raise UsageError(
            f"{where}: {WALL_TIME} needs {SLIM}, whose epochs say how many fit: list both"
        )
    return tuple(given)


def _numbers(given: Any, where: str, kind: Callable[[Any], _T]) -> tuple[_T, ...]:
    """A list of different numbers."""
    wanted = f"wanted a list of {'whole ' if kind is int else ''}numbers"
    if not isinstance(given, list | tuple) or not given:
        raise UsageError(f"{where}: got {given!r}; {wanted}")
    numbers = []
    for value in given:
        try:
            number = kind(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}: got {value!r}; {wanted}") from error
        if isinstance(value, bool) or (kind is int and number != value):
            raise UsageError(f"{where}: got {value!r}; {wanted}")
        if number in numbers:
            raise UsageError(f"{where}: {value} is there twice")
        numbers.append(number)
    return tuple(numbers)


def _entries(given: Any) -> dict[str, dict[str, Any]]:
    """The settings of each entry, `method` among them, by label."""
    if not isinstance(given, list) or not given:
        raise UsageError(
            f"methods: got {given!r}; wanted a list, one `- name` or `- method: name` with the "
            "method's settings for each"
        )
    entries: dict[str, dict[str, Any]] = {}
    for position, entry in enumerate(given, 1):
        settings = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(settings, dict) or "method" not in settings:
            raise UsageError(
                f"methods, entry {position}: got {entry!r}; wanted a name, or `method: name` with "
                "the method's settings"
            )
        settings = dict(settings)
        label = settings.pop("label", settings["method"])
        if not isinstance(label, str) or not label.strip() or label == DENSE:
            raise UsageError(
                f"methods, entry {position}: label {label!r} cannot be used: give another text; "
                f"{DENSE!r} is the dense twin's"
            )
        for name in settings:
            if name in ("seed", "baseline"):
                raise UsageError(f"methods, {label}: {name!r}: {_DECIDED[name]}")
            if name in _COMMON:
                raise UsageError(
                    f"methods, {label}: {name!r} must be the same for all: set it beside `methods`"
                )
        if label in entries:
            raise UsageError(
                f"methods: two entries are called {label!r}: give one of them a `label`"
            )
        entries[label] = settings
    return entries


def _own_lists(
    entries: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[str, ...]]]:
    """Densities and rivals of entries that have lists of their own, which are taken out of them."""
    densities, rivals = {}, {}
    for label, settings in entries.items():
        where = f"methods, {label}"
        if "rivals" in settings:
            rivals[label] = _rivals(settings.pop("rivals"), f"{where}: rivals")
        if "densities" in settings:
            densities[label] = _numbers(settings.pop("densities"), f"{where}: densities", float)
            method = str(settings["method"])
            field = _density_field(method)
            if method in METHODS and field is None:
                raise UsageError(f"{where}: {method} has no density to set: leave densities out")
            if field in settings:
                raise UsageError(f"{where}: got {field} and densities; wanted one of them")
    return densities, rivals


def _density_field(method: str) -> str | None:
    """The hyperparameter that a density of the list goes to; None when the method has none."""
    if method not in METHODS:
        return None
    names = method_info(method).cls.hyperparameters()
    return next((name for name in ("density", "target_density") if name in names), None)


def _typed(file: Path, label: str, settings: Mapping[str, Any]) -> tuple[TrainConfig, Method]:
    try:
        return typed(settings)
    except UsageError as error:
        raise UsageError(f"{file}, {label}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}, {label}: {error}") from error


def _check_folders(file: Path, cells: list[Cell]) -> None:
    """Raise UsageError when two cells would share a folder, also where case is not told apart."""
    taken: dict[str, Cell] = {}
    for cell in cells:
        other = taken.setdefault(str(cell.config.folder).lower(), cell)
        if other is not cell:
            raise UsageError(
                f"{file}: ({other}) and ({cell}) would share the folder {cell.config.folder}: give "
                "one of them another `label`"
            )
