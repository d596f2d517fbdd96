"""The contract every method keeps, as checks that anyone can run on a method of their own.

    from gossamer.testing import check_method
    check_method(MyMethod(density=0.2))

Each promise trains a small network for a few dozen steps on fixed random data in float64, on one
thread, and raises AssertionError when the promise is broken.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gossamer.bake import finalize, sparse_layers
from gossamer.method import Method
from gossamer.sparse_weight import Masked
from gossamer.sparsifier import Sparsifier

__all__ = ["CONTRACT", "check_method"]

STEPS = 40
_SHAPE = (2, 8, 8)
_CLASSES = 4

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def check_method(method: Method) -> None:
    """Run every promise of `CONTRACT` on a method.

    Raises:
        AssertionError: A promise is broken; the message starts with its name.
    """
    for name, promise in CONTRACT.items():
        try:
            promise(method)
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


@dataclass
class _Run:
    """A network in training: model, sparsifier, optimizer, and the data of every step."""

    model: nn.Module
    sparsifier: Sparsifier
    optimizer: torch.optim.Optimizer
    chunks: int = 1
    compiled: bool = False

    @classmethod
    def start(
        cls,
        method: Method,
        optimizer: MakeOptimizer = _sgd,
        *,
        seed: int = 0,
        chunks: int = 1,
        compiled: bool = False,
        cut: Literal["during", "end"] = "during",
    ) -> _Run:
        torch.manual_seed(7)
        model = _network()
        example = torch.zeros(2, *_SHAPE, dtype=torch.float64)
        sparsifier = Sparsifier(
            model,
            method,
            total_steps=STEPS,
            example=example,
            seed=seed,
            cut=cut,
        )
        return cls(model, sparsifier, optimizer(model), chunks, compiled)

    def steps(self, first: int, last: int) -> list[float]:
        """Train steps first+1 ... last; returns their losses."""
        losses = []
        forward = self.model
        if self.compiled:
            forward = torch.compile(self.model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
        for step in range(first, last):
            images, labels = _batch(step)
            total = 0.0
            for x, y in zip(images.chunk(self.chunks), labels.chunk(self.chunks), strict=True):
                loss = F.cross_entropy(forward(x), y) + self.sparsifier.penalty()
                (loss / self.chunks).backward()  # type: ignore[no-untyped-call]
                total += loss.item() / self.chunks
            self.optimizer.step()
            self.sparsifier.step(self.optimizer)
            self.optimizer.zero_grad()
            losses.append(total)
        return losses


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(0, _CLASSES, (16,), generator=generator)
    images = torch.randn(16, *_SHAPE, generator=generator, dtype=torch.float64)
    return images + labels.view(-1, 1, 1, 1) / 2, labels


def _supports(run: _Run) -> list[Tensor]:
    return [site.support.clone() for site in run.sparsifier.sites]


def exact_density(method: Method) -> None:
    """Masks start with exactly the method's budget; no effective weight lies off the support."""
    run = _Run.start(method)
    budget = method.budget([site.original_shape for site in run.sparsifier.sites])
    for site, wanted in zip(run.sparsifier.sites, budget, strict=True):
        if isinstance(site.sparse, Masked):
            assert site.nonzeros == wanted, f"{site.name}: {site.nonzeros} weights, not {wanted}"
    run.steps(0, STEPS)
    _check_zeros(run)


def _check_zeros(run: _Run) -> None:
    for site in run.sparsifier.sites:
        off = ~site.support
        assert not site.effective[off].any(), f"{site.name} is not zero off its support"
        if not isinstance(site.sparse, Masked):
            continue  # its latent weight lives on off the support
        for key, value in run.optimizer.state[site.weight].items():
            if isinstance(value, Tensor) and value.shape == site.weight.shape:
                assert not value[off].any(), f"{site.name}: state {key!r} is not zero off support"


def any_optimizer(method: Method) -> None:
    """SGD, AdamW, RMSprop and a Muon-like optimizer keep zeros off the support, loss finite."""
    for optimizer in (_sgd, _adamw, _rmsprop, _whitened):
        run = _Run.start(method, optimizer)
        losses = run.steps(0, STEPS)
        assert all(loss == loss and loss < 1e3 for loss in losses), f"{optimizer.__name__} diverges"
        _check_zeros(run)


def accumulation(method: Method) -> None:
    """Gradients accumulated over two half batches train as one big batch does, norms frozen."""
    losses = []
    for chunks in (1, 2):
        run = _Run.start(method, chunks=chunks)
        for module in run.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        losses.append(run.steps(0, STEPS // 2))
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-9, f"losses differ by {worst:.3g}"


def bitwise_resume(method: Method) -> None:
    """Saved and resumed at any quarter, training continues bit for bit."""
    whole = _Run.start(method)
    expected = whole.steps(0, STEPS)
    for stop in (1, STEPS // 4, STEPS // 2, 3 * STEPS // 4):
        first = _Run.start(method)
        first.steps(0, stop)
        file = io.BytesIO()
        torch.save(
            [first.sparsifier.state_dict(), first.model.state_dict(), first.optimizer.state_dict()],
            file,
        )
        file.seek(0)
        sparsifier, model, optimizer = torch.load(file, weights_only=True)
        second = _Run.start(method)
        second.sparsifier.load_state_dict(sparsifier)
        second.model.load_state_dict(model)
        second.optimizer.load_state_dict(optimizer)
        assert second.steps(stop, STEPS) == expected[stop:], f"not after step {stop}"
        for name, value in whole.model.state_dict().items():
            same = torch.equal(second.model.state_dict()[name], value)
            assert same, f"{name} differs after resuming at {stop}"


def compiled_equals_eager(method: Method) -> None:
    """Compiled with fullgraph, the losses are the same, and changing masks recompile nothing."""
    # Masks only: a new width is a new graph.
    expected = _Run.start(method, cut="end").steps(0, STEPS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = _Run.start(method, compiled=True, cut="end").steps(0, STEPS)
    worst = max(abs(a - b) for a, b in zip(expected, got, strict=True))
    assert worst < 1e-9, f"losses differ by {worst:.3g}"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"{graphs} graphs were compiled, one was expected"


def copies_survive(method: Method) -> None:
    """Deep copies and EMA copies compute sparsely, bake to exact zeros, and harm nothing."""
    run, twin = _Run.start(method, cut="end"), _Run.start(method, cut="end")
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    half = STEPS // 2
    for step in range(half):
        run.steps(step, step + 1)
        average.update_parameters(run.model)
    twin.steps(0, half)
    copied = copy.deepcopy(run.model).eval()
    x, _ = _batch(0)
    expected = copy.deepcopy(run.model).eval()(x)
    assert torch.equal(copied(x), expected), "a deep copy computes something else"
    finalize(copied)
    assert torch.equal(copied(x), expected), "finalize changes the outputs of a copy"
    averaged = copy.deepcopy(average.module)
    supports = {
        name: sparse.support(averaged.get_submodule(name).parametrizations.weight.original)  # type: ignore[union-attr, arg-type]
        for name, sparse in sparse_layers(averaged).items()
    }
    finalize(averaged)
    for site in run.sparsifier.sites:
        weight = averaged.get_submodule(site.name).weight
        assert isinstance(weight, Tensor)
        assert not weight[~supports[site.name]].any(), f"the EMA copy of {site.name} is not sparse"
        if isinstance(site.sparse, Masked):
            same = torch.equal(supports[site.name], site.support)
            assert same, f"the EMA copy of {site.name} has another mask"
    assert run.steps(half, STEPS) == twin.steps(half, STEPS), "copying changed the original"


def reproducible(method: Method) -> None:
    """The same seed gives the same supports and losses."""
    one, two = _Run.start(method, seed=1), _Run.start(method, seed=1)
    assert one.steps(0, STEPS) == two.steps(0, STEPS), "losses differ"
    for first, second in zip(_supports(one), _supports(two), strict=True):
        assert torch.equal(first, second), "supports differ"


def finalize_is_plain(method: Method) -> None:
    """After finalize: plain classes, a plain state dict, exact zeros, the same outputs."""
    run = _Run.start(method)
    run.steps(0, STEPS)
    x, _ = _batch(0)
    run.model.eval()
    expected, supports = run.model(x), _supports(run)
    plain = run.sparsifier.finalize()
    assert torch.equal(plain(x), expected), "outputs change"
    fresh = _network()
    assert list(plain.state_dict()) == list(fresh.state_dict()), "the state dict has other keys"
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()], "other classes"
    for site, support in zip(run.sparsifier.sites, supports, strict=True):
        weight = plain.get_submodule(site.name).weight
        assert isinstance(weight, Tensor)
        assert not weight[~support].any(), f"{site.name} is not zero off its support"


CONTRACT: dict[str, Callable[[Method], None]] = {
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
