"""The five figures of a model, counted so that they cannot be mixed up.

    nonzeros        parameters that are not zero (for a sparse weight: its support)
    bytes_on_disk   the safetensors file of the model
    macs_executed   what dense-format hardware runs for one example: zeros cost as much as the rest
    macs_sparse     what hardware that skips every zero would run for one example
    macs_training   a whole run: the forward and both backward products (`TrainingMacs.total`)

A MAC is one multiply-add and FLOPs are 2 per MAC. Biases, norms, activations, pooling and
additions are not counted: the published figures leave them out, and beside the products they are
small (ResNet-50 on 224 x 224 images: 4,089,184,256 MACs, the literature's 8.2 GFLOPs).

Layers are counted from the shapes they meet in one forward pass, because every element of a weight
is used equally often: MACs = elements x uses. What belongs to no layer (attention scores,
functional products) comes from `torch.utils.flop_counter`, which sees products but no zeros and
misses fused attention and recurrent kernels; hence the settings in `_run`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from gossamer.example import Example, batch_size, evaluating, run

__all__ = [
    "Account",
    "LayerMacs",
    "TrainingMacs",
    "account",
    "bytes_on_disk",
    "training_products",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_COUNTED = (*_CONVOLUTIONS, *_TRANSPOSED, *_RECURRENT, nn.Linear, nn.MultiheadAttention)

# What a weight comes from: the same object wherever the weight is shared.
_Source = nn.Parameter | nn.Module


@dataclass(frozen=True)
class LayerMacs:
    """One weight of the model and how often one example uses it.

    name: as in `model.named_parameters()`, without a final `.weight`.
    kind: class of the layer.
    shape: of the weight.
    positions: uses of each weight element per example. Convolution: output pixels; transposed
        convolution: input pixels; linear: rows; recurrent: time steps. Fractional only where the
        uses do not divide evenly, as in a layer that runs once for a whole batch.
    weights: elements of the weight.
    nonzeros: elements on the support.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    positions: float
    weights: int
    nonzeros: int

    @property
    def density(self) -> float:
        """Share of the weight that is kept."""
        return self.nonzeros / self.weights if self.weights else 1.0

    @property
    def macs_executed(self) -> int:
        """MACs of one example on hardware that multiplies by zeros too."""
        return round(self.weights * self.positions)

    @property
    def macs_sparse(self) -> int:
        """MACs of one example on hardware that skips zeros."""
        return round(self.nonzeros * self.positions)


@dataclass(frozen=True)
class Account:
    """Size and work of a model; work is MACs for one example.

    layers: the counted weights.
    other_macs: products that use no counted weight, as attention scores; dense everywhere.
    other_nonzeros: non-zero parameters outside the counted weights: biases, norms, embeddings,
        layers that never ran.
    bytes_on_disk: see `bytes_on_disk`.
    """

    layers: tuple[LayerMacs, ...]
    other_macs: int
    other_nonzeros: int
    bytes_on_disk: int

    @property
    def nonzeros(self) -> int:
        """Non-zero parameters of the whole model."""
        return sum(layer.nonzeros for layer in self.layers) + self.other_nonzeros

    @property
    def density(self) -> float:
        """Share of the counted weights that is kept."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.nonzeros for layer in self.layers) / weights if weights else 1.0

    @property
    def macs_executed(self) -> int:
        """MACs of one example on hardware that multiplies by zeros too."""
        return sum(layer.macs_executed for layer in self.layers) + self.other_macs

    @property
    def macs_sparse(self) -> int:
        """MACs of one example on hardware that skips zeros."""
        return sum(layer.macs_sparse for layer in self.layers) + self.other_macs

    @property
    def flops_executed(self) -> int:
        """Twice `macs_executed`."""
        return 2 * self.macs_executed

    @property
    def flops_sparse(self) -> int:
        """Twice `macs_sparse`."""
        return 2 * self.macs_sparse

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and one entry per layer, ready for JSON."""
        figures = ("nonzeros", "bytes_on_disk", "macs_executed", "macs_sparse")
        derived = ("density", "macs_executed", "macs_sparse")
        return {
            **{figure: getattr(self, figure) for figure in figures},
            "density": self.density,
            "other_macs": self.other_macs,
            "other_nonzeros": self.other_nonzeros,
            "layers": [
                {**asdict(layer), **{figure: getattr(layer, figure) for figure in derived}}
                for layer in self.layers
            ],
        }

    def table(self) -> str:
        """Return the account as plain text: one line per layer, and the totals."""
        head = ("layer", "kind", "shape", "positions", "density", "nonzeros")
        rows = [(*head, "MACs executed", "MACs sparse")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            work = (f"{layer.macs_executed:,}", f"{layer.macs_sparse:,}")
            kept = (f"{layer.density:.4f}", f"{layer.nonzeros:,}")
            rows.append((layer.name, layer.kind, shape, f"{layer.positions:,}", *kept, *work))
        other = f"{self.other_macs:,}"
        rows.append(("(other)", "", "", "", "", f"{self.other_nonzeros:,}", other, other))
        kept = (f"{self.density:.4f}", f"{self.nonzeros:,}")
        work = (f"{self.macs_executed:,}", f"{self.macs_sparse:,}")
        rows.append(("total", "", "", "", *kept, *work))
        return (
            "MACs for one example (FLOPs are 2 per MAC)\n"
            f"{align(rows, text_columns=3)}\n"
            f"bytes on disk: {self.bytes_on_disk:,}"
        )


def account(
    model: nn.Module,
    example: Example,
    *,
    supports: Mapping[str, int] | None = None,
) -> Account:
    """Count the model's non-zeros, its bytes and the MACs of one example.

    Runs the model once, in eval mode and without gradients; the model is left as it was. Counted
    are convolutions, transposed convolutions, linear and recurrent layers and
    `nn.MultiheadAttention`, whose projections are its rows `in_proj_weight` and `out_proj`. Weights
    may come through `torch.nn.utils.parametrize`; what a parametrization itself holds (thresholds)
    is no parameter of the plain model and is not counted, but stays in `bytes_on_disk` until the
    parametrization is removed. A weight shared by several layers is one row, with all its uses.

    Packed query, key and value projections of unequal lengths (cross-attention) have the mean of
    the three as their positions: exact for `macs_executed`, and for `macs_sparse` if the three
    parts are equally dense.

    Args:
        model: the plain module, not its `torch.compile` or data-parallel wrapper, so that the
            layers have their own names.
        example: a tensor, a tuple of positional inputs or a mapping of keyword inputs, on the
            model's device. Dimension 0 of its first tensor is the batch.
        supports: number of weights on the support, by layer name; a layer that is not named counts
            its non-zero values. A grown weight starts at 0, so that values alone say too little.

    Raises:
        TypeError: the example is no tensor, tuple or mapping.
        ValueError: the example has no batch, `supports` does not fit the model, or the weight of a
            layer is not a parameter.
    """
    batch = batch_size(example)
    calls, flops = _run(model, example)
    uses: defaultdict[_Source, float] = defaultdict(int)
    for call in calls:
        for source, count in call.uses:
            uses[source] += count

    counts = {name.removesuffix(".weight"): count for name, count in (supports or {}).items()}
    names: set[str] = set()
    rows: dict[_Source, LayerMacs | None] = {}  # None: a parameter that no counted call used
    other_nonzeros = 0
    for name, module, parameter in _parameters(model):
        names.add(name)
        source = _source(module, parameter)
        if source in rows:
            continue
        with torch.no_grad():
            weight: Tensor = getattr(module, parameter)
            nonzeros = counts[name] if name in counts else int(weight.count_nonzero())
        if not 0 <= nonzeros <= weight.numel():
            raise ValueError(
                f"supports[{name!r}] is {nonzeros}; {name} has {weight.numel()} weights, shape "
                f"{tuple(weight.shape)}: pass a count from 0 to {weight.numel()}"
            )
        if source in uses:
            kind = parametrize.type_before_parametrizations(module).__name__
            positions = _whole(uses[source] / batch)
            shape = tuple(weight.shape)
            rows[source] = LayerMacs(name, kind, shape, positions, weight.numel(), nonzeros)
        else:
            rows[source] = None
            other_nonzeros += nonzeros
    if unknown := sorted(counts.keys() - names):
        raise ValueError(
            f"supports names {', '.join(unknown)}, which the model does not have; name layers as "
            f"in model.named_parameters(), without '.weight': {', '.join(sorted(names)[:8])}, ..."
        )

    for call in calls:
        # A fused kernel (CPU LSTM) is invisible to the flop counter, an attention module does more
        # than its projections: take off what was both seen and counted.
        counted = sum(row.weights * n for source, n in call.uses if (row := rows[source]))
        flops -= min(call.flops, round(2 * counted))
    return Account(
        layers=tuple(row for row in rows.values() if row),
        other_macs=max(0, round(flops / 2 / batch)),
        other_nonzeros=other_nonzeros,
        bytes_on_disk=bytes_on_disk(model),
    )


def bytes_on_disk(model: nn.Module) -> int:
    """Bytes of the safetensors file of the model's `state_dict`; a shared tensor is stored once."""
    tensors: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):  # a module's extra state may be anything
            place = (value.device, value.data_ptr() or name, value.shape, value.stride())
            tensors.setdefault(place, (name, value))
    # Clones: safetensors refuses tensors that are views of one storage.
    copies = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.values()
    }
    return len(safetensors.torch.save(copies))


def training_products(
    account: Account,
    *,
    sparse_forward: bool,
    sparse_grad_input: bool,
    sparse_grad_weight: bool,
) -> tuple[float, float, float]:
    """Return the MACs per example of the forward, input-gradient and weight-gradient products.

    A sparse product costs `macs_sparse`, a dense one `macs_executed`. Each of the three uses every
    weight as often as the forward does; the input gradient of the first layer, which nobody needs,
    is counted too, as in the published figures (dense training = 3 x forward).
    """
    sparse = (sparse_forward, sparse_grad_input, sparse_grad_weight)
    forward, grad_input, grad_weight = (
        float(account.macs_sparse if skip else account.macs_executed) for skip in sparse
    )
    return forward, grad_input, grad_weight


class TrainingMacs:
    """`macs_training`: the MACs of a training run, added up as its density changes.

        macs = TrainingMacs()
        forward, grad_input, grad_weight = training_products(account, ...)
        macs.add(len(batch), forward=forward, grad_input=grad_input, grad_weight=grad_weight)

    Its `state_dict` goes into a checkpoint, so that a resumed run reports the whole.
    """

    def __init__(self) -> None:
        self._total = 0.0

    @property
    def total(self) -> float:
        """MACs of everything added so far."""
        return self._total

    def add(self, examples: int, *, forward: float, grad_input: float, grad_weight: float) -> None:
        """Add `examples` examples, each with these MACs in its three products.

        Raises:
            ValueError: a number is negative.
        """
        if min(examples, forward, grad_input, grad_weight) < 0:
            raise ValueError(
                f"got examples={examples}, forward={forward}, grad_input={grad_input}, "
                f"grad_weight={grad_weight}: pass numbers that are not negative"
            )
        self._total += examples * (forward + grad_input + grad_weight)

    def state_dict(self) -> dict[str, float]:
        """Return the total, for a checkpoint."""
        return {"total": self._total}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a total that `state_dict` returned.

        Raises:
            ValueError: the state is not one of `state_dict`.
        """
        if state.keys() != {"total"}:
            raise ValueError(
                f"got a state with {sorted(state)}; pass what TrainingMacs.state_dict() returned, "
                "which holds 'total' alone"
            )
        self._total = float(state["total"])


# Shared with `latency`


def align(rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Lay out rows of equal length; the first `text_columns` to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if column < text_columns else ">" for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    )


# The forward pass


class _Call(NamedTuple):
    """One call of a counted layer: the FLOPs the counter saw in it, and its use of weights."""

    flops: int
    uses: list[tuple[_Source, float]]


def _run(model: nn.Module, example: object) -> tuple[list[_Call], int]:
    """Run the model once; return the calls of counted layers and all FLOPs that were seen."""
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        # Fused attention and the fused encoder layer have no FLOP formula on CPU, and the latter
        # never calls its linear layers: both must run as plain products.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        mha = torch.backends.mha
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        calls = stack.enter_context(_recorded(model, counter))
        run(model, example)
    return calls, counter.get_total_flops()


@contextmanager
def _recorded(model: nn.Module, counter: FlopCounterMode) -> Iterator[list[_Call]]:
    """Collect the calls of the counted layers while the context lasts."""
    calls: list[_Call] = []
    before: dict[nn.Module, int] = {}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        before[module] = counter.get_total_flops()

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        uses = _uses(name, module, args, kwargs, output)
        calls.append(_Call(counter.get_total_flops() - before[module], uses))

    with ExitStack() as stack:
        for name, module in _modules(model):
            if isinstance(module, _COUNTED):
                _check_weight(name, module)
                hook = module.register_forward_hook(partial(leave, name), with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(module.register_forward_pre_hook(enter).remove)
        yield calls


def _check_weight(name: str, module: nn.Module) -> None:
    one_weight = isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))
    if one_weight and "weight" not in _own_parameters(module):
        raise ValueError(
            f"{name}.weight is no parameter (torch.nn.utils.prune and the hook-based weight_norm "
            "put a plain tensor there): make it one first, as prune.remove and remove_weight_norm "
            "do"
        )


def _uses(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> list[tuple[_Source, float]]:
    """Return the weights that this call used, and how often it used each of their elements."""
    if isinstance(module, nn.MultiheadAttention):
        inputs = (*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))
        query, key, value = (_rows(x) for x in inputs[:3])
        names = _own_parameters(module)
        packed = {"in_proj_weight": _whole((query + key + value) / 3)}
        apart = {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}
        projections = packed if "in_proj_weight" in names else apart
        return [
            *((_source(module, weight), uses) for weight, uses in projections.items()),
            (_source(module.out_proj, "weight"), query),
        ]
    x = args[0] if args else kwargs["input"]
    if isinstance(module, _RECURRENT):
        weights = [weight for weight in _own_parameters(module) if weight.startswith("weight")]
        steps = _rows(x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x)
        return [(_source(module, weight), steps) for weight in weights]
    if isinstance(module, nn.Linear):
        return [(_source(module, "weight"), _rows(output))]
    assert isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
    if x.dim() != len(module.kernel_size) + 2:
        raise ValueError(
            f"{name} got an input of shape {tuple(x.shape)}, without a batch dimension; pass an "
            "example with the batch in dim 0, as x.unsqueeze(0) does for one input"
        )
    pixels = (x if isinstance(module, _TRANSPOSED) else output).shape
    return [(_source(module, "weight"), pixels[0] * pixels[2:].numel())]


def _rows(x: Tensor) -> int:
    """Return the number of vectors along the last dimension."""
    return x.shape[:-1].numel()


def _whole(number: float) -> float:
    """Return a whole number as an int, which prints and stores as one."""
    return int(number) if number == int(number) else number


# Effective parameters: what the layers compute with, through parametrizations


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules as they are without their parametrizations."""
    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):
            yield name, module


def _own_parameters(module: nn.Module) -> list[str]:
    """Return the names of the module's own parameters, parametrized or not."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        own += module.parametrizations
    return own


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield each parameter as (name without a final `.weight`, module, attribute)."""
    for prefix, module in _modules(model):
        for parameter in _own_parameters(module):
            name = f"{prefix}.{parameter}" if prefix else parameter
            yield name.removesuffix(".weight"), module, parameter


def _source(module: nn.Module, parameter: str) -> _Source:
    """Return the parameter, or the parametrization that it comes through."""
    if parametrize.is_parametrized(module, parameter):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        return module.parametrizations[parameter]
    source = getattr(module, parameter)
    assert isinstance(source, nn.Parameter)
    return source
