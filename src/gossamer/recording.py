"""Recording: every ATen operation of one forward, as it is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer.example import Example, evaluating, nested_tensors, run

__all__ = ["READS", "Call", "needed_calls", "record", "storage_of"]

# A number leaves the tensors.
READS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero"})


def record(
    model: nn.Module, example: Example, running: Callable[[], str]
) -> tuple[list[Call], list[Tensor]]:
    """Run a model once, in eval mode; its operations, in order, and the tensors of its output.

    Arguments and errors are those of `gossamer.provenance.trace`.
    """
    recorder = _Recorder(running)
    with evaluating(model), torch.no_grad(), _plain_kernels(model), recorder:
        output = list(nested_tensors(run(model, example)))
    return recorder.calls, output


class Call(NamedTuple):
    """One operation of the run: its name, what it was called with, what came out, and where.

    `shape`: of the result as it was then; a later operation may have turned it in place.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    shape: torch.Size
    where: str

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors among its arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def result(self) -> Tensor:
        """The first tensor that came out."""
        return self.outputs[0]

    @property
    def at(self) -> str:
        """Operation and place, for a reason."""
        return f"{self.name.strip('_').removeprefix('native_')} in {self.place}"

    @property
    def place(self) -> str:
        """The module that was running."""
        return self.where or "the model's forward"

    def argument(self, name: str) -> Any:
        """The argument of that name, or None."""
        for place, argument in enumerate(self.function._schema.arguments):
            if argument.name == name:
                return self.args[place] if place < len(self.args) else self.kwargs.get(name)
        return None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, running: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._running = running

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if outputs or name in READS:
            shape = outputs[0].shape if outputs else torch.Size()
            call = Call(name, func, args, kwargs or {}, outputs, shape, self._running())
            self.calls.append(call)
        return result


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers in single steps instead of one fused operation."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    mkldnn, fast = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if recurrent:
                torch._C._set_mkldnn_enabled(False)
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch._C._set_mkldnn_enabled(mkldnn)
            torch.backends.mha.set_fastpath_enabled(fast)


def needed_calls(calls: Sequence[Call], output: Sequence[Tensor]) -> set[int]:
    """Places of the calls that the output hangs on; memory that is shared counts as a whole."""
    needed = {storage_of(tensor) for tensor in output}
    live = set()
    for place, call in reversed(list(enumerate(calls))):
        if any(storage_of(tensor) in needed for tensor in call.outputs):
            needed.update(storage_of(tensor) for tensor in call.inputs)
            live.add(place)
    return live


def storage_of(tensor: Tensor) -> int:
    """A number of its memory: the same for all views of it."""
    return int(tensor.untyped_storage()._cdata)
