"""The contract every method keeps, as checks that anyone can run on a method of their own.

    from gossamer.testing import check_method
    check_method(MyMethod(density=0.2))

Each promise trains a small network for a few dozen steps on fixed random data in float64, on one
thread, and raises AssertionError when the promise is broken. `Trial` has it tried on a network of
your own.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adamax
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gossamer.bake import finalize, sparse_layers
from gossamer.method import Method
from gossamer.sparse_weight import Masked
from gossamer.sparsifier import Sparsifier

__all__ = ["CONTRACT", "Trial", "check_method"]

_SHAPE = (2, 8, 8)
_CLASSES = 4

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def check_method(method: Method, trial: Trial | None = None) -> None:
    """Run every promise of `CONTRACT` on a method, as in `trial` (None: a network of our own).

    Raises:
        AssertionError: A promise is broken; the message starts with its name.
    """
    for name, promise in CONTRACT.items():
        try:
            promise(method, trial or Trial())
        except AssertionError as error:
            raise AssertionError(f"{type(method).__name__} breaks {name!r}: {error}") from error


class _Whitened(torch.optim.Optimizer):
    """Orthogonalised momentum, as in Muon: updates reach elements that have no gradient."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(0.9).add_(parameter.grad)
                update = momentum
                if parameter.dim() > 1:
                    u, _, v = torch.linalg.svd(momentum.flatten(1), full_matrices=False)
                    update = (u @ v).reshape(momentum.shape)
                parameter.sub_(update, alpha=group["lr"])


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def _rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=0.001, momentum=0.9)


def _whitened(model: nn.Module) -> torch.optim.Optimizer:
    return _Whitened(model.parameters())


def _network() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(_SHAPE[0], 24),
        nn.MaxPool2d(2),
        *block(24, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4, 24),
        nn.ReLU(),
        nn.Linear(24, _CLASSES),
    ).double()


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(0, _CLASSES, (16,), generator=generator)
    images = torch.randn(16, *_SHAPE, generator=generator, dtype=torch.float64)
    return images + labels.view(-1, 1, 1, 1) / 2, labels


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a method is tried on.

    Attributes:
        network: Makes the network, with fresh weights of the global generator, seeded before.
        batch: Inputs and labels of a step; the network's outputs are their logits.
        optimizer: Of the network, made after the Sparsifier.
        scheduler: Of the optimizer's learning rate.
        steps: Length of the run.
        stops: Fractions of it after which it is saved and resumed.
        chunks: Micro-batches that a batch is split into.
        cut, exclude, seed: Of the Sparsifier.
    """

    network: Callable[[], nn.Module] = _network
    batch: Callable[[int], tuple[Tensor, Tensor]] = _batch
    optimizer: MakeOptimizer = _sgd
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    steps: int = 40
    stops: tuple[float, ...] = (0.025, 0.25, 0.5, 0.75)
    chunks: int = 1
    cut: Literal["during", "end"] = "during"
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def fresh(self) -> nn.Module:
        """The network as training starts from it."""
        torch.manual_seed(7)
        return self.network()

    def start(self, method: Method, *, compiled: bool = False) -> Run:
        """A run of `method`, before its first step. Raises what the Sparsifier refuses with."""
        model = self.fresh()
        sparsifier = Sparsifier(
            model,
            method,
            total_steps=self.steps,
            example=torch.zeros_like(self.batch(0)[0][:2]),
            exclude=self.exclude,
            cut=self.cut,
            seed=self.seed,
        )
        optimizer = self.optimizer(model)
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        return Run(self, model, sparsifier, optimizer, scheduler, compiled)


@dataclass
class Run:
    """A network in training."""

    trial: Trial
    model: nn.Module
    sparsifier: Sparsifier
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    compiled: bool

    def steps(self, first: int, last: int) -> list[float]:
        """Train steps first+1 ... last; returns their losses."""
        losses = []
        forward, chunks = self.model, self.trial.chunks
        if self.compiled:
            forward = torch.compile(self.model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
        for step in range(first, last):
            inputs, labels = self.trial.batch(step)
            total = 0.0
            for x, y in zip(inputs.chunk(chunks), labels.chunk(chunks), strict=True):
                loss = F.cross_entropy(forward(x), y) + self.sparsifier.penalty()
                (loss / chunks).backward()  # type: ignore[no-untyped-call]
                total += loss.item() / chunks
            self.optimizer.step()
            self.sparsifier.step(self.optimizer)
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
            losses.append(total)
        return losses

    def state(self) -> list[dict[str, Any]]:
        """Of all parts, in the order in which `load` takes them."""
        return [part.state_dict() for part in self._parts]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Go on from a `state`."""
        for part, one in zip(self._parts, state, strict=True):
            part.load_state_dict(one)

    @property
    def _parts(self) -> list[Any]:
        parts = [self.sparsifier, self.model, self.optimizer]
        return [*parts, self.scheduler] if self.scheduler is not None else parts


def _supports(run: Run) -> list[Tensor]:
    return [site.support.clone() for site in run.sparsifier.sites]


_OURS = Trial()


def exact_density(method: Method, trial: Trial = _OURS) -> None:
    """Masks start with exactly the method's budget; no effective weight lies off the support."""
    run = trial.start(method)
    budget = method.budget([site.original_places for site in run.sparsifier.sites])
    for site, places in zip(run.sparsifier.sites, budget, strict=True):
        if isinstance(site.sparse, Masked):
            wanted = places * site.block
            assert site.nonzeros == wanted, f"{site.name}: {site.nonzeros} weights, not {wanted}"
    _check_zeros(run)
    for step in range(trial.steps):
        run.steps(step, step + 1)
        _check_zeros(run)


def _check_zeros(run: Run) -> None:
    for site in run.sparsifier.sites:
        off = ~site.support
        assert not site.effective[off].any(), f"{site.name} is not zero off its support"
        if not isinstance(site.sparse, Masked):
            continue  # its latent weight lives on off the support
        assert not site.weight[off].any(), f"{site.name}: its latent weight is not zero off it"
        # Adamax adds its eps to the state of a weight without gradient.
        least = run.optimizer.defaults["eps"] if isinstance(run.optimizer, Adamax) else 0.0
        for key, value in run.optimizer.state[site.weight].items():
            if isinstance(value, Tensor) and value.shape == site.weight.shape:
                zero = (value[off].abs() <= least).all()
                assert zero, f"{site.name}: state {key!r} is not zero off the support"


def any_optimizer(method: Method, trial: Trial = _OURS) -> None:
    """SGD, AdamW, RMSprop and a Muon-like optimizer keep zeros off the support, loss finite."""
    for optimizer in (_sgd, _adamw, _rmsprop, _whitened):
        run = replace(trial, optimizer=optimizer).start(method)
        losses = run.steps(0, trial.steps)
        assert all(loss == loss and loss < 1e3 for loss in losses), f"{optimizer.__name__} diverges"
        _check_zeros(run)


def accumulation(method: Method, trial: Trial = _OURS) -> None:
    """Gradients accumulated over two half batches train as one big batch does, norms frozen."""
    losses = []
    for chunks in (1, 2):
        run = replace(trial, chunks=chunks).start(method)
        for module in run.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        losses.append(run.steps(0, trial.steps // 2))
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-9, f"losses differ by {worst:.3g}"


def bitwise_resume(method: Method, trial: Trial = _OURS) -> None:
    """Saved and resumed at any quarter, training continues bit for bit."""
    whole = trial.start(method)
    expected = whole.steps(0, trial.steps)
    for stop in sorted({round(fraction * trial.steps) for fraction in trial.stops}):
        first = trial.start(method)
        first.steps(0, stop)
        file = io.BytesIO()
        torch.save(first.state(), file)
        file.seek(0)
        second = trial.start(method)
        second.load(torch.load(file, weights_only=True))
        assert second.steps(stop, trial.steps) == expected[stop:], f"not after step {stop}"
        for name, value in whole.model.state_dict().items():
            same = torch.equal(second.model.state_dict()[name], value)
            assert same, f"{name} differs after resuming at {stop}"


def compiled_equals_eager(method: Method, trial: Trial = _OURS) -> None:
    """Compiled with fullgraph, the losses are the same, and changing masks recompile nothing."""
    trial = replace(trial, cut="end")  # masks only: a new width is a new graph
    expected = trial.start(method).steps(0, trial.steps)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = trial.start(method, compiled=True).steps(0, trial.steps)
    worst = max(abs(a - b) for a, b in zip(expected, got, strict=True))
    assert worst < 1e-9, f"losses differ by {worst:.3g}"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"{graphs} graphs were compiled, one was expected"


def copies_survive(method: Method, trial: Trial = _OURS) -> None:
    """Deep copies and EMA copies compute sparsely, bake to exact zeros, and harm nothing."""
    trial = replace(trial, cut="end")
    run, twin = trial.start(method), trial.start(method)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    half = trial.steps // 2
    for step in range(half):
        run.steps(step, step + 1)
        average.update_parameters(run.model)
    twin.steps(0, half)
    copied = copy.deepcopy(run.model).eval()
    x, _ = trial.batch(0)
    expected = copy.deepcopy(run.model).eval()(x)
    assert torch.equal(copied(x), expected), "a deep copy computes something else"
    finalize(copied)
    assert torch.equal(copied(x), expected), "finalize changes the outputs of a copy"
    averaged = copy.deepcopy(average.module)
    supports = {}
    for site in run.sparsifier.sites:
        layer = averaged.get_submodule(site.tensor_name.rpartition(".")[0])
        latent = layer.parametrizations[site.tensor].original  # type: ignore[index, union-attr]
        supports[site.name] = sparse_layers(averaged)[site.name].support(latent)
    finalize(averaged)
    for site in run.sparsifier.sites:
        weight = averaged.get_parameter(site.tensor_name)
        off = ~supports[site.name]
        assert not weight[off].any(), f"the EMA copy of {site.name} is not sparse"
        if isinstance(site.sparse, Masked):
            same = torch.equal(supports[site.name], site.support)
            assert same, f"the EMA copy of {site.name} has another mask"
    assert run.steps(half, trial.steps) == twin.steps(half, trial.steps), (
        "copying changed the original"
    )


def reproducible(method: Method, trial: Trial = _OURS) -> None:
    """The same seed gives the same supports and losses."""
    one, two = (replace(trial, seed=1).start(method) for _ in range(2))
    assert one.steps(0, trial.steps) == two.steps(0, trial.steps), "losses differ"
    for first, second in zip(_supports(one), _supports(two), strict=True):
        assert torch.equal(first, second), "supports differ"


def finalize_is_plain(method: Method, trial: Trial = _OURS) -> None:
    """After finalize: plain classes, a plain state dict, exact zeros, the same outputs."""
    run = trial.start(method)
    run.steps(0, trial.steps)
    x, _ = trial.batch(0)
    run.model.eval()
    expected, supports = run.model(x), _supports(run)
    plain = run.sparsifier.finalize()
    assert torch.equal(plain(x), expected), "outputs change"
    fresh = trial.fresh()
    assert list(plain.state_dict()) == list(fresh.state_dict()), "the state dict has other keys"
    for module, before in zip(plain.modules(), fresh.modules(), strict=True):
        assert isinstance(module, type(before)), f"{type(before)} has become {type(module)}"
    for site, support in zip(run.sparsifier.sites, supports, strict=True):
        weight = plain.get_parameter(site.tensor_name)
        assert not weight[~support].any(), f"{site.name} is not zero off its support"


CONTRACT: dict[str, Callable[[Method, Trial], None]] = {
    promise.__name__: promise
    for promise in (
        exact_density,
        any_optimizer,
        accumulation,
        bitwise_resume,
        compiled_equals_eager,
        copies_survive,
        reproducible,
        finalize_is_plain,
    )
}
