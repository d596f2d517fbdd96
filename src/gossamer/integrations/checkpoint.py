"""Checkpoints that other people's code writes and reads: a model that carries its Sparsifiers.

    carry(sparsifier)                       # right after it was made
    torch.save(model.state_dict(), path)    # holds the Sparsifier's state too
    ...                                     # later, in a new process: made as before, carried, then
    model.load_state_dict(torch.load(path)) # cuts the model to its widths, and then loads

So Accelerate's `save_state` and `load_state`, the checkpoints of Hugging Face's Trainer, and
whatever else goes through `state_dict` resume a network that was cut while it trained.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from gossamer.bake import sparse_layers
from gossamer.measure.topology import TopologyTracker
from gossamer.reading import reading, short
from gossamer.sparsifier import Sparsifier

__all__ = ["carry"]

_KEY = "gossamer_state"
_carried: WeakKeyDictionary[nn.Module, WeakSet[Sparsifier]] = WeakKeyDictionary()


def carry(
    *sparsifiers: Sparsifier,
    topology: TopologyTracker | None = None,
    restored: Callable[[], None] = lambda: None,
) -> None:
    """Have `state_dict` of the Sparsifiers' model hold their state, and `load_state_dict` resume.

    The state is one more tensor of bytes, plain data inside. It is there until `finalize()`; copies
    of the model hold none. Loading a checkpoint into Sparsifiers that have made steps already
    leaves their count as it is (that is how a trainer goes back to its best weights).

    Args:
        sparsifiers: All on one model; on resuming the same, in the same order.
        topology: A tracker to save and resume too.
        restored: Called when Sparsifiers were resumed.

    Raises:
        ValueError: They are on several models, or the model carries some already. Later, in
            `load_state_dict`: the checkpoint is of other settings, or of a network cut to other
            widths than this one is by now.
    """
    model = sparsifiers[0].model
    if any(sparsifier.model is not model for sparsifier in sparsifiers):
        raise ValueError("the Sparsifiers are on several models: carry those of one at a time")
    if _training(model, _carried.get(model, ())):
        raise ValueError(
            f"this {type(model).__name__} carries a Sparsifier already: name all of its "
            "Sparsifiers in one call (or one SparsifyCallback)"
        )
    _carried[model] = WeakSet(sparsifiers)

    def save(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if module is sparsifiers[0].model and _training(module, sparsifiers):
            state: dict[str, Any] = {"sparsifiers": [one.state_dict() for one in sparsifiers]}
            if topology is not None:
                state["topology"] = topology.state_dict()
            state_dict[prefix + _KEY] = _to_bytes(state)

    def load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        data = state_dict.pop(prefix + _KEY, None)
        if data is None or module is not sparsifiers[0].model:
            return  # a copy of the model: it holds the hooks too
        state = _from_bytes(data)
        if len(state["sparsifiers"]) != len(sparsifiers):
            raise ValueError(
                f"the checkpoint is of {len(state['sparsifiers'])} Sparsifiers, and "
                f"{len(sparsifiers)} are carried here: make all that the interrupted run had"
            )
        pairs = list(zip(sparsifiers, state["sparsifiers"], strict=True))
        if any(sparsifier.step_count for sparsifier in sparsifiers):
            _check_widths(pairs)
            return
        undo: list[Callable[[], None]] = []
        try:
            for sparsifier, one in pairs:
                undo.append(sparsifier.load_state_dict(one))
            if topology is not None and "topology" in state:
                topology.load_state_dict(state["topology"])
        except BaseException:
            for take_back in reversed(undo):
                take_back()
            raise
        restored()

    model.register_state_dict_post_hook(save)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(load)  # type: ignore[no-untyped-call]


def _training(model: nn.Module, sparsifiers: Iterable[Sparsifier]) -> bool:
    """Whether these train the model, and it is not finalized."""
    there = {id(sparse) for sparse in sparse_layers(model).values()}
    return any(id(site.sparse) in there for sparsifier in sparsifiers for site in sparsifier.sites)


def _check_widths(pairs: list[tuple[Sparsifier, dict[str, Any]]]) -> None:
    for sparsifier, state in pairs:
        if state["plan"] != sparsifier.plan.to_dict():
            raise ValueError(
                f"the checkpoint is of step {state['step']}, and the network has been cut to other "
                f"widths by step {sparsifier.step_count}: load it into a new model with a new "
                'Sparsifier, or use Sparsifier(..., cut="end"), which keeps all widths in training'
            )


def _to_bytes(state: dict[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> dict[str, Any]:
    with reading(f"the checkpoint's {_KEY!r}", "resume from an earlier one"):
        state = torch.load(io.BytesIO(data.cpu().numpy().tobytes()), weights_only=True)
        if not isinstance(state["sparsifiers"], list):
            raise ValueError(f"sparsifiers is {short(state['sparsifiers'])}, wanted a list")
        found: dict[str, Any] = state
        return found
