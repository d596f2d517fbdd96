"""Every kind of network: cut at random and by trained zeros, trained on, exported.

The masked network, in which nothing reads the dead channels, is the measure of all: whatever is cut
computes what it computes, on inputs that no tracing has seen, in eval and in train mode, step after
step.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES, AWKWARD
from torch import Tensor, nn

import gossamer
from gossamer.channels import ChannelGroup, find_groups
from gossamer.example import Example, run
from gossamer.export import to_onnx, to_program

ALL = {**ARCHITECTURES, **AWKWARD}
NAMES = list(ARCHITECTURES)
EXPORTED = ("mlp", "resnet basic", "vit, fused qkv")  # in every run; the others are slow
TRAINED = (
    *("mlp", "resnet basic", "resnet bottleneck", "densenet", "mobilenet v2", "inception"),
    *("vit, fused qkv", "vit, separate qkv", "gated mlp", "llama", "lstm", "siamese", "albert"),
)
SPARSE = [name for name, architecture in ARCHITECTURES.items() if architecture.sparse]
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def _quick(names: Sequence[str], quick: Sequence[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def network(name: str) -> nn.Module:
    """In float64, with every norm and bias away from its start value, so that a wrong cut shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ALL[name].build().double()
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.dim() == 1 or not tensor.any()):
                low = 0.5 if key.endswith(("var", "weight", "scale")) else -0.5
                tensor.uniform_(low, low + 1)
    return model


def example(
    name: str, seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64
) -> Example:
    drawn = ALL[name].sample(torch.Generator().manual_seed(seed), batch)
    return _cast(drawn, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return tuple(_cast(item, dtype) for item in value)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def compute(model: nn.Module, x: Example, training: bool = False) -> list[Tensor]:
    """Outputs of a copy: train mode moves the statistics of norms."""
    model = copy.deepcopy(model).train(training)
    with torch.no_grad():
        return list(tensors(run(model, x)))


def assert_same(first: list[Tensor], second: list[Tensor], tolerance: float) -> None:
    assert [one.shape for one in first] == [other.shape for other in second]
    for one, other in zip(first, second, strict=True):
        scale = float(one.abs().max())
        assert 0 < scale < float("inf")
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, scale))


class Pair(NamedTuple):
    """A network in which nothing reads some channels, what `shrink` made of it, and which."""

    masked: nn.Module
    shrunk: gossamer.Shrunk
    groups: dict[str, ChannelGroup]
    dead: dict[str, Tensor]


def silence(
    model: nn.Module, groups: Mapping[str, ChannelGroup], dead: Mapping[str, Tensor]
) -> None:
    """No layer reads the dead channels."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, channels in dead.items():
            for part in groups[name].consumers:
                weight = named[part.tensor].movedim(part.dim, 0)
                weight[part.index[channels].flatten()] = 0


@cache
def cut_at_random(name: str) -> Pair:
    """Half of the channels of every group that is not locked are dead, and cut."""
    model, x = network(name), example(name)
    groups = {group.name: group for group in find_groups(model, x)}
    generator = torch.Generator().manual_seed(1)
    dead = {
        key: torch.randperm(group.channels, generator=generator)[: group.channels // 2]
        .sort()
        .values
        for key, group in groups.items()
        if not group.locked
    }
    silence(model, groups, dead)
    return Pair(model, gossamer.shrink(model, x), groups, dead)


def rows(pair: Pair) -> dict[str, Any]:
    return {row.layer: row for row in pair.shrunk.report}


# ---------------------------------------------------------------------- cut at random


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ALL)
def test_what_must_be_cut_is(name: str) -> None:
    pair = cut_at_random(name)
    report = rows(pair)
    missing = [key for key in ALL[name].cut if key not in report]
    assert not missing, sorted(report)
    for key in ALL[name].cut:
        row, group = report[key], pair.groups[key]
        left = group.channels - len(pair.dead.get(key, ()))
        assert row.after == row.before * left // group.channels < row.before, row
    for layer, word in ALL[name].kept.items():
        assert report[layer].after == report[layer].before
        assert report[layer].note.startswith("kept: ")
        assert word in report[layer].note


@pytest.mark.one_in(2)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
def test_outputs_stay(name: str, training: bool) -> None:
    """On other inputs, in another batch size, in float64 and in float32."""
    masked, shrunk, *_ = cut_at_random(name)
    assert shrunk.removed > 0 or not ALL[name].cut
    for seed in range(5, 11 if name in AWKWARD else 6):
        x = example(name, seed=seed, batch=3)
        assert_same(compute(masked, x, training), compute(shrunk.model, x, training), 1e-10)
    if not training:
        masked32, slim32 = (copy.deepcopy(model).float() for model in (masked, shrunk.model))
        x = example(name, seed=5, batch=3, dtype=torch.float32)
        assert_same(compute(masked32, x), compute(slim32, x), 1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ALL)
def test_training_goes_on_as_if_nothing_had_been_cut(name: str) -> None:
    """Two steps of momentum: every parameter, statistic and momentum that is left."""
    masked, shrunk, *_ = cut_at_random(name)
    models = [copy.deepcopy(masked).train(), copy.deepcopy(shrunk.model).train()]
    supports = [[p != 0 for p in model.parameters()] for model in models]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in models]
    for step in range(2):
        x = example(name, seed=7 + step, batch=3)
        losses = [step_of(model, opt, x) for model, opt in zip(models, optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        with torch.no_grad():  # zeros stay, as a method keeps them: also those that were not cut
            for model, support in zip(models, supports, strict=True):
                for parameter, on in zip(model.parameters(), support, strict=True):
                    parameter.mul_(on)
    whole, slim = (state_of(*both) for both in zip(models, optimizers, strict=True))
    assert set(slim) <= set(whole)
    compared = 0
    for key, value in slim.items():
        kept = whole[key]
        for dim in range(value.dim()):
            positions = shrunk.plan.kept(key.removesuffix(" momentum"), dim)
            kept = kept if positions is None else kept.index_select(dim, positions)
        torch.testing.assert_close(value, kept, rtol=0, atol=1e-10, msg=key)
        compared += key.endswith("momentum")
    assert compared > 3


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Example) -> float:
    loss = torch.zeros(())
    for out in tensors(run(model, x)):
        weights = torch.linspace(-1, 1, out.numel()).to(out).reshape(out.shape)
        loss = loss + (out * weights).sum() + out.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # tied ones once
    for key, parameter in model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            state[f"{key} momentum"] = momentum
    return state


# ---------------------------------------------------------------------- cut by trained zeros


def trained(name: str, method: gossamer.Method, cut: str, steps: int) -> gossamer.Sparsifier:
    model = network(name)
    sparsifier = gossamer.Sparsifier(
        model,
        method,
        total_steps=steps,
        example=example(name),
        exclude=ALL[name].exclude,
        cut=cut,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for step in range(steps):
        step_of_sparse(model, sparsifier, optimizer, example(name, seed=20 + step, batch=3))
    sparsifier.finalize()
    return sparsifier


def step_of_sparse(model, sparsifier, optimizer, x: Example) -> None:
    step_of(model, optimizer, x)
    sparsifier.step(optimizer)


def maskable(name: str) -> set[str]:
    """Of what must be cut: the groups between layers whose weights can be sparse."""
    pair = cut_at_random(name)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    groups = {key: pair.groups[key] for key in ALL[name].cut}
    return {
        key
        for key, group in groups.items()
        if all(
            isinstance(pair.masked.get_submodule(part.layer), kinds)
            and part.layer not in ALL[name].exclude
            for part in (*group.producers, *group.consumers)
        )
    }


CHASE = gossamer.Chase(
    density=0.4,
    channel_sparsity=0.4,
    update_interval=2,
    channel_interval=4,
    min_channels=1,
    min_channel_factor=0.5,
    prune_residual=True,
)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", _quick(SPARSE, TRAINED))
def test_channels_that_chase_removed_are_cut(name: str) -> None:
    sparsifier = trained(name, CHASE, "end", 10)
    shrunk = gossamer.shrink(sparsifier.model, example(name))
    left = {row.layer: row.after for row in shrunk.report}
    assert {pool.name for pool in sparsifier.pools} >= maskable(name)
    for pool in sparsifier.pools:
        assert left[pool.name] <= pool.group.width * int(pool.live.sum()) // pool.group.channels
    assert shrunk.removed > 0
    x = example(name, seed=5, batch=3)
    assert_same(compute(sparsifier.model, x), compute(shrunk.model, x), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_cut_while_training_is_cut_at_the_end(name: str) -> None:
    masked, slim = (trained(name, CHASE, cut, 10) for cut in ("end", "during"))
    assert len(slim.plan) > 0
    x = example(name, seed=5, batch=3)
    for training in (False, True):
        one, other = (compute(run_.model, x, training) for run_ in (masked, slim))
        assert_same(one, other, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_zeros_of_rigl(name: str) -> None:
    """Nobody asked for empty channels: those that came about go, or are folded, or stay."""
    method = gossamer.RigL(density=0.08, update_interval=2)
    sparsifier = trained(name, method, "end", 10)
    shrunk = gossamer.shrink(sparsifier.model, example(name))
    x = example(name, seed=5, batch=3)
    assert_same(compute(sparsifier.model, x), compute(shrunk.model, x), 1e-10)


# ---------------------------------------------------------------------- export


@pytest.mark.parametrize("name", _quick(NAMES, EXPORTED))
def test_program(name: str, tmp_path: Path) -> None:
    """torch.export of the slim network computes what the masked one does."""
    pair = cut_at_random(name)
    masked, slim = (copy.deepcopy(m).float().eval() for m in (pair.masked, pair.shrunk.model))
    path = tmp_path / "slim.pt2"
    x = example(name, dtype=torch.float32, batch=3)
    dynamic = ALL[name].dynamic
    to_program(path, slim, x, dynamic_batch=dynamic)
    program = torch.export.load(path).module()
    x = example(name, seed=5, batch=4 if dynamic else 3, dtype=torch.float32)
    with torch.no_grad():
        outputs = list(tensors(program(*tensors(x))))
    assert_same(compute(masked, x), outputs, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx(name: str, tmp_path: Path) -> None:
    """ONNX Runtime computes what the masked network does."""
    import onnxruntime

    pair = cut_at_random(name)
    masked, slim = (copy.deepcopy(m).float().eval() for m in (pair.masked, pair.shrunk.model))
    path = tmp_path / "slim.onnx"
    dynamic = ALL[name].dynamic
    exported = to_onnx(
        path, slim, example(name, dtype=torch.float32, batch=3), dynamic_batch=dynamic
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = example(name, seed=5, batch=4 if dynamic else 3, dtype=torch.float32)
    given = zip(exported.inputs, tensors(x), strict=True)
    outputs = session.run(None, {key: value.numpy() for key, value in given})
    assert_same(compute(masked, x), [torch.from_numpy(out) for out in outputs], 1e-4)
