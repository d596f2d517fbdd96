"""Where the time goes: the layers of a network, timed inside its own forward pass.

In eager mode, because only there a layer is something that begins and ends. What lies between the
layers (additions, functional activations, reshapes) is what remains of the whole. Beside another
network with the same layers, narrower, it says what limits the gain: a layer whose time falls as
its MACs do is limited by products; norms, activations and additions move memory, and fall with the
width of what they touch at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from gossamer.example import Example, call_arguments, evaluating, example_tensors
from gossamer.measure.latency import Clock, read_clock, using_threads
from gossamer.measure.macs import Account, account

__all__ = ["LayerShare", "Limits", "Role", "limits", "time_layers"]

Role = Literal["products", "norms", "other layers", "between layers"]

_BETWEEN = "(between layers)"
_PRODUCTS = (
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.conv._ConvNd,
)
# Called as a whole: their inner modules are not.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class LayerShare:
    """One layer in two networks.

    layer: its name; role: what it is.
    first, second: milliseconds in a call of each network.
    macs: MACs of the second over those of the first; None for what multiplies nothing.
    """

    layer: str
    role: Role
    first: float
    second: float
    macs: float | None

    @property
    def ratio(self) -> float:
        """Time of the second over that of the first."""
        return self.second / self.first if self.first else 1.0

    @property
    def excess(self) -> float:
        """Milliseconds that the second takes above what its MACs promise; 0 without MACs."""
        return 0.0 if self.macs is None else self.second - self.macs * self.first


@dataclass(frozen=True)
class Limits:
    """What keeps the second network from being as fast as its MACs promise.

    roles: all layers of a role together, with `layer` naming it; the whole call is their sum.
    layers: those that multiply, farthest above their MACs first, in milliseconds.
    """

    roles: tuple[LayerShare, ...]
    layers: tuple[LayerShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            name: [asdict(row) | {"ratio": row.ratio, "excess": row.excess} for row in rows]
            for name, rows in (("roles", self.roles), ("layers", self.layers))
        }


def time_layers(
    models: Mapping[str, nn.Module],
    example: Example,
    *,
    rounds: int = 9,
    threads: int | None = None,
    clock: Clock = "wall",
) -> dict[str, dict[str, float]]:
    """Milliseconds of every layer in one call of each model, the median over the rounds.

    The models take turns. What lies between the layers is under "(between layers)". On CUDA the
    device is waited for after every layer. Hooks turn off the fast path of `nn.Transformer` layers.

    Raises:
        ValueError: The CPU clock would not see the whole work, or a number is out of range.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: give at least 1")
    args, kwargs = call_arguments(example)
    device = example_tensors(example)[0].device
    read_clock(clock, device, threads)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with torch.inference_mode(), evaluating(*models.values()), using_threads(threads):
        for turn in range(rounds + 1):
            for name in list(models)[:: -1 if turn % 2 else 1]:
                with _timed(models[name], clock, device) as spent:
                    start = read_clock(clock, device)
                    models[name](*args, **kwargs)
                    whole = read_clock(clock, device) - start
                spent[_BETWEEN] = max(0.0, whole - sum(spent.values()))
                if turn:  # the first is the warm-up
                    found[name].append(spent)
    return {
        name: {layer: 1e3 * median(row[layer] for row in rows) for layer in rows[0]}
        for name, rows in found.items()
    }


def limits(
    first: nn.Module,
    second: nn.Module,
    example: Example,
    *,
    rounds: int = 9,
    threads: int | None = None,
    clock: Clock = "wall",
) -> Limits:
    """Where the second network's time is, against the first's and against its MACs.

    Raises:
        ValueError: The networks have other layers, or see `time_layers`.
    """
    models = {"first": first, "second": second}
    times = time_layers(models, example, rounds=rounds, threads=threads, clock=clock)
    one, other = times["first"], times["second"]
    if one.keys() != other.keys():
        differ = sorted(layer or "the model itself" for layer in one.keys() ^ other.keys())
        raise ValueError(
            f"the networks do not have the same layers ({', '.join(differ[:4])}): compare one "
            "network at two widths"
        )
    accounts = [account(model, example) for model in models.values()]
    rows = []
    for layer in one:
        role = _role(first, layer)
        dense, slim = (_macs(counted, layer) for counted in accounts)
        ratio = slim / dense if role == "products" and dense else None
        rows.append(LayerShare(layer, role, one[layer], other[layer], ratio))
    return Limits(
        roles=tuple(_together(rows, accounts)),
        layers=tuple(
            sorted((row for row in rows if row.macs is not None), key=lambda row: -row.excess)
        ),
    )


def _together(rows: list[LayerShare], accounts: list[Account]) -> Iterator[LayerShare]:
    roles: tuple[Role, ...] = ("products", "norms", "other layers", "between layers")
    for role in roles:
        own = [row for row in rows if row.role == role]
        if own:
            dense, slim = (counted.macs_executed for counted in accounts)
            macs = slim / dense if role == "products" and dense else None
            first, second = sum(row.first for row in own), sum(row.second for row in own)
            yield LayerShare(role, role, first, second, macs)


def _macs(counted: Account, layer: str) -> int:
    """Of one layer; attention and recurrent layers hold several counted weights."""
    own = (row for row in counted.layers if row.name == layer or row.name.startswith(f"{layer}."))
    return sum(row.macs_executed for row in own)


def _role(model: nn.Module, layer: str) -> Role:
    if layer == _BETWEEN:
        return "between layers"
    module = model.get_submodule(layer)
    if isinstance(module, _PRODUCTS):
        return "products"
    return "norms" if "Norm" in type(module).__name__ else "other layers"


@contextmanager
def _timed(model: nn.Module, clock: Clock, device: torch.device) -> Iterator[dict[str, float]]:
    """Collect the seconds of every layer while the context lasts."""
    spent: dict[str, float] = {}
    starts: list[float] = []

    def enter(*_: object) -> None:
        starts.append(read_clock(clock, device))

    with ExitStack() as stack:
        for name, module in _layers(model):

            def leave(*_: object, name: str = name) -> None:
                spent[name] += read_clock(clock, device) - starts.pop()

            spent[name] = 0.0
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield spent


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is timed as one: modules without modules of their own, and those called as a whole."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        whole = isinstance(module, _WHOLE)
        if module in inside or (any(True for _ in module.children()) and not whole):
            continue
        if whole:
            inside.update(module.modules())
        yield name, module
