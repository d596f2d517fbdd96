"""Rivals of a slim network: dense networks that are as small from the start.

slim             the slim network's widths, for as many epochs
slim-wall-time   the same, for as many epochs as fit into the time that the sparse training took, or
                 would have taken on an idle machine
uniform          the slim network's executed MACs, every layer narrowed by the same share
uniform-nonzeros as many weights as the slim network has non-zeros, narrowed likewise

Each is trained by the dense twin's recipe, from weights of its own. (Liu et al., ICLR 2019, arXiv
1810.05270, call the first Scratch-E; their Scratch-B has the dense network's work, not time.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from gossamer.method import Method
from gossamer.reading import read_json
from gossamer.shrink.file import read_plan
from gossamer.train.compare.cell import Cell
from gossamer.train.config import TrainConfig, read_yaml
from gossamer.train.narrowing import Widths, digest, nothing_cut

__all__ = ["RIVALS", "SLIM", "WALL_TIME", "check_origin", "launched", "rivals_of", "unneeded"]

SLIM, WALL_TIME, UNIFORM, NONZEROS = RIVALS = (
    *("slim", "slim-wall-time"),
    *("uniform", "uniform-nonzeros"),
)
_MATCH: dict[str, Literal["macs", "nonzeros"]] = {UNIFORM: "macs", NONZEROS: "nonzeros"}


def rivals_of(
    cell: Cell, names: Sequence[str], dense: TrainConfig, method: Method, *, optional: bool
) -> list[Cell]:
    """The rivals of one cell, in the order of RIVALS.

    Args:
        cell: A sparse run.
        names: Of RIVALS.
        dense: Settings of the dense twin; epochs and kept channels are the cell's.
        method: The dense twin's.
        optional: Whether those that need cut channels are left out where nothing was cut; else that
            is an error.
    """
    made: dict[str, Cell] = {}
    for name in RIVALS:
        if name in names:
            config = replace(
                dense,
                widths_of=str(cell.config.folder),
                widths_match=_MATCH.get(name, "widths"),
                epochs=cell.config.epochs,
                keep_channels=cell.config.keep_channels,
                seed=cell.seed,
                out=f"{cell.config.folder}-{name}",
            )
            after = (cell, made[SLIM]) if name == WALL_TIME else (cell,)
            made[name] = replace(
                cell,
                config=config,
                method=method,
                rival=name,
                after=after,
                optional=optional,
            )
    return list(made.values())


def unneeded(cell: Cell) -> bool:
    """Whether an optional rival has no network to be the rival of: nothing was cut there."""
    return cell.optional and cell.after[0].finished and _nothing_cut(cell)


def launched(cell: Cell) -> TrainConfig:
    """The settings with which a cell's run is started, or was, once `after` is finished.

    Raises:
        ValueError: Nothing was cut, or the time is not enough for the warm-up.
    """
    config = cell.config
    if not cell.rival or (cell.rival != WALL_TIME and cell.run.config.exists()):
        return config
    if cell.run.config.exists():  # its epochs were counted when it was started
        return replace(config, epochs=int(read_yaml(cell.run.config).get("epochs", 0)))
    if _nothing_cut(cell):
        raise ValueError(nothing_cut(cell.after[0].config.folder))
    if cell.rival != WALL_TIME:
        return config
    (sparse, _), (slim, _) = (other.training() for other in cell.after)
    return replace(config, epochs=max(1, int(sparse / slim * config.epochs)))


def check_origin(cell: Cell) -> None:
    """Raise ValueError when a rival was trained for another network than its cell now has."""
    file = cell.run.widths
    if not (cell.rival and file.exists()):
        return
    origin, anew = cell.after[0], f"remove {cell.config.folder} to train it anew"
    widths = Widths.from_dict(read_json(file, anew), str(file))
    if not origin.finished or digest(origin.run.model) != widths.sha256:
        raise ValueError(
            f"{cell.config.folder} has the widths that {origin.config.folder} had, which has been "
            f"removed or trained anew since: {anew}"
        )


def _nothing_cut(cell: Cell) -> bool:
    """Whether a rival needs narrower layers than there are; fewer weights there are in any case."""
    return cell.rival != NONZEROS and not len(read_plan(cell.after[0].run.model))
