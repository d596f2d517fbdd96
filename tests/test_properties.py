"""The contract on random networks, methods, hyperparameters and optimizers.

Every example is a network nobody wrote, trained by a method with settings nobody chose. It keeps
the promises of `gossamer.testing`, and shrinks to the same outputs; or it is refused, in words of
ours. The default run draws a few examples, always the same; the slow one draws 500.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import gossamer
from gossamer.method import Method
from gossamer.ops import random_mask
from gossamer.registry import METHODS
from gossamer.testing import (
    Trial,
    bitwise_resume,
    copies_survive,
    exact_density,
    finalize_is_plain,
)

SOURCE = Path(gossamer.__file__).parent
CLASSES = 3

# ------------------------------------------------------------------ networks


@dataclass(frozen=True)
class Net:
    """A network in a few words: blocks, each a name with its settings, then a linear layer.

    It takes `(batch, features, *positions)`: images of two dimensions, sequences of one, or none.
    """

    blocks: tuple[tuple[Any, ...], ...]
    features: int
    positions: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    channels_last: bool = False

    def __call__(self) -> nn.Module:
        layers: list[nn.Module] = []
        width = self.features
        for name, *options in self.blocks:
            block = BLOCKS[name](width, len(self.positions), *options)
            width = _width(block, width, self.positions)
            layers.append(block)
        model = nn.Sequential(*layers, Pool(), nn.Linear(width, CLASSES)).to(self.dtype)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return nn.Sequential(model, Logits())

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        x = torch.randn(size, self.features, *self.positions, generator=generator)
        return (x + labels.view(-1, *[1] * (x.dim() - 1))).to(self.dtype), labels


@torch.no_grad()
def _width(block: nn.Module, width: int, positions: tuple[int, ...]) -> int:
    out = block.eval()(torch.zeros(1, width, *positions))
    block.train()
    return out.shape[1]


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Logits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() if x.element_size() < 4 else x


class Residual(nn.Module):
    """`x + inside(x)`, or what both are concatenated to."""

    def __init__(self, inside: nn.Module, *, concatenate: bool = False) -> None:
        super().__init__()
        self.inside, self.concatenate = inside, concatenate

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inside(x)], 1) if self.concatenate else x + self.inside(x)


class PerPosition(nn.Module):
    """A layer that takes `(batch, positions, features)`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = self.layer(x.flatten(2).transpose(1, 2) if len(shape) > 2 else x[:, None])
        if isinstance(x, tuple):
            x = x[0]
        return x.transpose(1, 2).reshape(shape[0], x.shape[2], *shape[2:])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "relu": lambda width: nn.ReLU(),
    "relu in place": lambda width: nn.ReLU(inplace=True),
    "gelu": lambda width: nn.GELU(),
    "prelu": nn.PReLU,
    "silu in place": lambda width: nn.SiLU(inplace=True),
    "sigmoid": lambda width: nn.Sigmoid(),
}


def _norm(name: str, width: int, dims: int) -> nn.Module:
    if name == "batch":
        return (nn.BatchNorm1d if dims < 2 else nn.BatchNorm2d)(width)
    if name == "group" and dims:
        return nn.GroupNorm(1, width)
    if name in ("layer", "group"):
        return PerPosition(nn.LayerNorm(width))
    return nn.Identity()


def _conv(dims: int, *sizes: int, **options: Any) -> nn.Module:
    if not dims:
        return nn.Linear(*sizes[:2], bias=options["bias"])
    return (nn.Conv1d, nn.Conv2d)[dims - 1](*sizes, padding=sizes[2] // 2, **options)


def _convolution(
    width: int,
    dims: int,
    out: int,
    kernel: int,
    groups: str,
    bias: bool,
    norm: str,
    act: str,
) -> nn.Module:
    parts = [_conv(dims, width, out, kernel, bias=bias)]
    if groups == "depthwise" and dims:
        parts.append(_conv(dims, out, out, kernel, groups=out, bias=not bias))
    if groups == "grouped" and dims:
        parts = [_conv(dims, width, 2 * out, 1, bias=bias)]
        parts.append(_conv(dims, 2 * out, 2 * out, kernel, groups=2, bias=bias))
        out *= 2
    return nn.Sequential(*parts, _norm(norm, out, dims), ACTIVATIONS[act](out))


def _transposed(width: int, dims: int, out: int, bias: bool) -> nn.Module:
    if not dims:
        return nn.Linear(width, out, bias=bias)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
    return nn.Sequential(kind(width, out, 3, padding=1, bias=bias), nn.ReLU())


def _residual(width: int, dims: int, hidden: int, norm: str, concatenate: bool) -> nn.Module:
    inside = nn.Sequential(
        _conv(dims, width, hidden, 3, bias=norm == "none"),
        _norm(norm, hidden, dims),
        nn.ReLU(),
        _conv(dims, hidden, hidden if concatenate else width, 1, bias=True),
    )
    return Residual(inside, concatenate=concatenate)


def _attention(width: int, dims: int, heads: int, size: int, bias: bool) -> nn.Module:
    wide = heads * size
    return nn.Sequential(
        PerPosition(nn.Linear(width, wide)), Residual(PerPosition(Attention(wide, heads, bias)))
    )


def _recurrent(
    width: int, dims: int, kind: str, hidden: int, layers: int, both: bool, bias: bool
) -> nn.Module:
    options = {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": True}
    return PerPosition(getattr(nn, kind)(width, hidden, **options))


def _mlp(width: int, dims: int, hidden: int, bias: bool) -> nn.Module:
    wide, narrow = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
    layers = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), narrow)
    return Residual(PerPosition(layers))


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "convolution": _convolution,
    "transposed": _transposed,
    "residual": _residual,
    "attention": _attention,
    "recurrent": _recurrent,
    "mlp": _mlp,
}

widths = st.sampled_from([8, 5, 12, 16, 7, 1, 3, 2])
flags = st.booleans()
norms = st.sampled_from(["none", "batch", "group", "layer"])
blocks = st.one_of(
    st.tuples(
        st.just("convolution"),
        widths,
        st.sampled_from([3, 1]),
        st.sampled_from(["one", "depthwise", "grouped"]),
        flags,
        norms,
        st.sampled_from(list(ACTIVATIONS)),
    ),
    st.tuples(st.just("residual"), widths, norms, flags),
    st.tuples(st.just("mlp"), widths, flags),
    st.tuples(st.just("attention"), st.sampled_from([1, 2, 3]), st.sampled_from([2, 3, 4]), flags),
    st.tuples(
        st.just("recurrent"),
        st.sampled_from(["GRU", "LSTM", "RNN"]),
        st.sampled_from([4, 5, 1]),
        st.sampled_from([1, 2]),
        flags,
        flags,
    ),
    st.tuples(st.just("transposed"), widths, flags),
)
networks = st.builds(
    Net,
    st.lists(blocks, min_size=1, max_size=4).map(tuple),
    st.sampled_from([3, 1, 4]),
    st.sampled_from([(4, 4), (5,), (), (3, 5)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    flags,
)

# ------------------------------------------------------------------ methods

fractions = st.sampled_from([0.5, 0.75, 1.0, 0.25])
intervals = st.sampled_from([1, 2, 3, None])
COMMON = {
    "density": st.sampled_from([0.5, 0.3, 0.2, 0.1, 0.9, 1.0, 0.03]),
    "distribution": st.sampled_from(["erk", "uniform", "er"]),
}
SCHEDULED = {**COMMON, "update_interval": intervals, "scope": st.sampled_from(["layer", "global"])}
GROWING = {**SCHEDULED, "drop_fraction": fractions, "drop_fraction_end": fractions}
PRUNED = {
    "initial_density": st.sampled_from([1.0, 0.6]),
    "prune_start": st.sampled_from([0.0, 0.25]),
    "prune_end": st.sampled_from([0.5, 0.75, 1.0]),
}
LEARNED = {
    "target_density": st.sampled_from([None, 0.5, 0.2, 0.05]),
    "target_reached": st.sampled_from([0.5, 0.75, 1.0]),
    "control_interval": st.sampled_from([1, 2, 5]),
}
ANNEALED = {
    "alpha": st.sampled_from([0.5, 1.0, 0.0, 0.25]),
    "alpha_schedule": st.sampled_from(["sigmoid_cosine", "cosine", "sigmoid", "linear", "none"]),
    "alpha_end": st.sampled_from([1.0, 0.5]),
    "alpha_reset": st.sampled_from([0.9, 1.0, 0.5, 0.0]),
}
rows = st.sampled_from(["layer", "row"])
starts = st.sampled_from([-2.0, -5.0, -0.5, -100.0])
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "static": COMMON,
    "set": {**GROWING, "drop": st.sampled_from(["signed", "magnitude"]), "t_end": fractions},
    "rigl": {**GROWING, "t_end": fractions},
    "snfs": {**GROWING, "t_end": fractions, "smoothing": st.sampled_from([0.9, 0.0, 0.5])},
    "gmp": {**SCHEDULED, **PRUNED},
    "granet": {**GROWING, **PRUNED, "t_end": st.sampled_from([1.0, 0.75])},
    "mest": {
        **SCHEDULED,
        "variant": st.sampled_from(["em", "ems", "vanilla"]),
        "mutation": st.sampled_from([None, 0.05, 0.2]),
        "gradient_weight": st.sampled_from([0.0, 1.0]),
        "halve_at": st.sampled_from([0.25, 0.5]),
    },
    "srigl": {
        **COMMON,
        "update_interval": intervals,
        "drop_fraction": fractions,
        "ablation": flags,
        "gamma_sal": fractions,
    },
    "chase": {
        **GROWING,
        "channel_sparsity": st.sampled_from([0.5, 0.3, 0.0, 0.8]),
        "channel_score": st.sampled_from(["umm", "masked_mean", "density"]),
        "channel_score_per": st.sampled_from(["channel", "macs", "bytes"]),
        "channel_multiple": st.sampled_from([1, None, 2, 4]),
        "min_channel_factor": st.sampled_from([0.2, 0.0, 1.0]),
        "grow": st.sampled_from(["gradient", "random"]),
        "memory_margin": st.sampled_from([None, 0.0, 0.5]),
        "prune_residual": flags,
        "channel_start": st.sampled_from([0.0, 0.25]),
        "channel_end": st.sampled_from([None, 0.5]),
        "explore_end": st.sampled_from([0.8, 0.5, 1.0]),
    },
    "dst": {
        **LEARNED,
        "alpha": st.sampled_from([1e-3, 0.1, 0.0]),
        "granularity": st.sampled_from(["row", "layer", "weight"]),
        "reset_below": st.sampled_from([0.01, 0.0, 0.5]),
        "clamp": flags,
    },
    "str": {**LEARNED, "s_init": starts, "granularity": rows},
    "autosparse": {
        **LEARNED,
        **ANNEALED,
        "s_init": starts,
        "granularity": rows,
        "backward_sparsity": st.sampled_from([0.0, 0.5]),
        "backward_interval": st.sampled_from([1, 3]),
    },
    "topkast": {
        **COMMON,
        **ANNEALED,
        "backward_density": st.sampled_from([1.0, 0.6]),
        "refresh_interval": st.sampled_from([None, 1, 3, 100]),
        "exploration_penalty": st.sampled_from([1e-4, 0.0, 0.1]),
    },
    "srste": {
        "n": st.sampled_from([2, 1, 3]),
        "m": st.sampled_from([4, 2, 8]),
        "lam": st.sampled_from([2e-4, 0.0, 0.1]),
        "mode": st.sampled_from(["gradient", "decoupled"]),
        "refresh_interval": st.sampled_from([1, 3]),
        "dense_until": st.sampled_from([0.0, 0.3, 1.0]),
        "anneal_until": st.sampled_from([0.0, 0.6]),
        "remainder": st.sampled_from(["pad", "dense", "exclude"]),
    },
}

ALWAYS = {"chase": {"min_channels": st.sampled_from([1, 2])}}  # its default refuses these nets

# ------------------------------------------------------------------ runs

# test_sparsifier.py has NAdam too, which itself resumes bit for bit in float32 alone (`mu_product`
# is cast), and Rprop, whose step sizes are never zero.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.02),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=3e-3, weight_decay=1e-2),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True),
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, foreach=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=3e-3),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=3e-3),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01, weight_decay=1e-2),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "groups": lambda m: torch.optim.SGD(
        [{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in m.parameters()],
        lr=0.02,
        momentum=0.9,
    ),
}
SCHEDULERS = {
    "constant": None,
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6]),
}


@dataclass(frozen=True)
class Case:
    """One example, in words that repeat it."""

    network: Net
    method: str
    hyperparameters: dict[str, Any]
    optimizer: str = "momentum"
    scheduler: str = "constant"
    steps: int = 8
    stop: float = 0.5
    size: int = 2  # of a micro-batch
    chunks: int = 1
    cut: str = "during"
    exclude: tuple[str, ...] = ()

    @property
    def trial(self) -> Trial:
        return Trial(
            network=self.network,
            batch=lambda step: self.network.batch(step, self.size * self.chunks),
            optimizer=OPTIMIZERS[self.optimizer],
            scheduler=SCHEDULERS[self.scheduler],
            steps=self.steps,
            stops=(self.stop,),
            chunks=self.chunks,
            cut=self.cut,
            exclude=self.exclude,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    method = draw(st.sampled_from([*METHODS, "chase", "chase"]))  # it also cuts
    return Case(
        draw(networks),
        method,
        draw(st.fixed_dictionaries(ALWAYS.get(method, {}), optional=SETTINGS[method])),
        draw(st.sampled_from(list(OPTIMIZERS))),
        draw(st.sampled_from(list(SCHEDULERS))),
        draw(st.sampled_from([8, 13, 5, 20, 2, 1])),
        draw(st.sampled_from([0.5, 0.0, 0.25, 0.75, 1.0])),
        draw(st.sampled_from([2, 3, 5])),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from(["during", "end"])),
        draw(st.sampled_from([(), (), (), ("0.?",)])),
    )


# ------------------------------------------------------------------ what must hold


def keeps_the_contract(case: Case) -> bool:
    """Whether the case was accepted: then it holds; a refusal is to be one of ours."""
    trial, made = case.trial, []
    try:
        method = METHODS[case.method].cls(**case.hyperparameters)
        replace(trial, network=lambda: made.append(trial.network()) or made[-1]).start(method)
    except (ValueError, TypeError) as error:
        _check_refusal(error)
        for model in made:
            assert not any(map(is_parametrized, model.modules())), "a refused model is changed"
        return False
    try:
        exact_density(method, trial)
    except ValueError as error:  # an optimizer whose state no cut can follow
        _check_refusal(error)
        return False
    bitwise_resume(method, trial)
    copies_survive(method, trial)
    finalize_is_plain(method, trial)
    shrinks_to_the_same_outputs(method, trial)
    return True


def _check_refusal(error: Exception) -> None:
    """Raised in our own source, in one line that says what to do."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    text = str(error)
    ours = where.is_relative_to(SOURCE) and "\n" not in text.strip() and len(text.split()) >= 5
    assert ours, f"not a refusal in our words: {error!r}"


@torch.no_grad()
def shrinks_to_the_same_outputs(method: Method, trial: Trial) -> None:
    run = trial.start(method)
    with torch.enable_grad():
        losses = run.steps(0, trial.steps)
    assert all(map(torch.isfinite, map(torch.tensor, losses))), f"losses {losses}"
    _check_end(run.sparsifier)
    model = run.sparsifier.finalize().eval()
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), f"{name} is not finite"
    x, _ = trial.batch(99)
    wanted = model(x)
    slim = gossamer.shrink(model, trial.batch(98)[0][:2], run.sparsifier.plan)
    again = gossamer.Plan.from_json(slim.plan.to_json())
    rebuilt = trial.fresh().eval()
    again.apply(rebuilt)
    rebuilt.load_state_dict(slim.model.state_dict())
    dtype = next(model.parameters()).dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    scale = max(1.0, float(wanted.abs().max()))
    for name, network in (("slim", slim.model), ("rebuilt", rebuilt)):
        off = float((network(x) - wanted).abs().max()) / scale
        assert off <= tolerance, f"the {name} network is {off:.3g} off"


def _check_end(sparsifier: gossamer.Sparsifier) -> None:
    """What a method promises of a whole run's end, beside what it promises of the start."""
    method, sites = sparsifier.method, sparsifier.sites
    kept = sum(site.nonzeros for site in sites)
    total = sum(site.original_numel for site in sites)
    if isinstance(method, (gossamer.Static, gossamer.SET, gossamer.RigL, gossamer.SNFS)):
        assert kept == round(method.density * total)
    if isinstance(method, (gossamer.GMP, gossamer.GraNet, gossamer.MEST, gossamer.TopKAST)):
        assert kept == round(method.density * total)
    if isinstance(method, gossamer.SRigL):
        assert kept <= round(method.density * total)
    if isinstance(method, gossamer.Chase):
        room = sum(int(site.masked.live.sum()) for site in sites)
        assert kept == min(round(method.density * total), room)
    for site in sites:
        if isinstance(method, gossamer.SRSTE) and method.dense_until < 1:
            whole = site.support[:, : site.weight.shape[1] // method.m * method.m]
            assert (whole.unflatten(1, (-1, method.m)).sum(2) == method.n).all(), site.name


HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def _quiet(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of targets missed, and of lam with Adam
        event("kept" if keeps_the_contract(case) else "refused")


@settings(max_examples=5, derandomize=True, deadline=None, suppress_health_check=HEALTH)
@given(cases())
def test_the_contract_on_random_networks(case: Case) -> None:
    _quiet(case)


def test_a_broken_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The properties can fail: one weight too many is enough."""

    def attach(
        self: Method, weight: nn.Parameter, count: int, generator: torch.Generator
    ) -> gossamer.Masked:
        return gossamer.Masked(weight, random_mask(weight.shape, count + 1, generator))

    network = Net((("convolution", 8, 3, "one", True, "batch", "relu"),), 3, (4, 4))
    case = Case(network, "static", {"density": 0.5})
    assert keeps_the_contract(case)
    monkeypatch.setattr(gossamer.Static, "attach", attach)
    with pytest.raises(AssertionError, match="weights, not"):
        keeps_the_contract(case)


@pytest.mark.slow
@settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=HEALTH)
@given(cases())
def test_the_contract_on_500_random_networks(case: Case) -> None:
    _quiet(case)
