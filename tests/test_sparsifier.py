"""The Sparsifier in the loops people write: accumulation, clipping, AMP, compile, EMA, copies."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gossamer
from nets import (
    NETS,
    READERS,
    ConvFlattenLinear,
    batches,
    evaluate,
    images,
    net,
    optimizer_for,
    train,
)

STEPS = 40
PLAIN = {"density": 0.2, "channel_sparsity": 0.0, "update_interval": 4}
CHANNELS = {"density": 0.2, "channel_sparsity": 0.5, "update_interval": 4, "min_channels": 2}


def _sparsifier(model: nn.Module, settings: dict, **options) -> gossamer.Sparsifier:
    dtype = next(model.parameters()).dtype
    options = {"total_steps": STEPS, "example": images(2, dtype=dtype)} | options
    return gossamer.Sparsifier(model, gossamer.Chase(**settings), **options)


def _masks(sparsifier: gossamer.Sparsifier) -> list[Tensor]:
    return [site.masked.mask.clone() for site in sparsifier.sites]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _zeros_hold(sparsifier: gossamer.Sparsifier, optimizer: torch.optim.Optimizer) -> None:
    for site in sparsifier.sites:
        off = ~site.support
        assert not site.weight.detach()[off].any(), site.name
        assert not site.effective.detach()[off].any(), site.name
        for key, value in optimizer.state[site.weight].items():
            if torch.is_tensor(value) and value.shape == site.weight.shape:
                assert not value[off].any(), (site.name, key)


# What making a Sparsifier does and does not touch


@pytest.mark.parametrize("name", NETS)
def test_construction_touches_only_the_pruned_weights(name: str) -> None:
    model, untouched = net(name), net(name)
    model.train()
    model.get_submodule(next(iter(READERS[name]))).eval()  # a module somebody has frozen
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    sparsifier = _sparsifier(model, CHANNELS)
    assert torch.equal(torch.get_rng_state(), state)
    names = [n for n, _ in untouched.named_modules()]
    assert [model.get_submodule(n).training for n in names] == modes
    for key, value in untouched.state_dict().items():
        layer, _, kind = key.rpartition(".")
        site = next((s for s in sparsifier.sites if s.name == layer), None)
        if kind == "weight" and site is not None:
            assert torch.equal(site.weight, value * site.masked.mask)
        else:
            assert torch.equal(model.state_dict()[key], value), key
    assert all(p.grad is None for p in model.parameters())
    assert sparsifier.step_count == 0
    assert sparsifier.revision == 0
    assert float(sparsifier.penalty()) == 0


def test_dropout_does_not_let_construction_draw_numbers() -> None:
    """Checks run the model, also in train mode; the user's random numbers are not theirs."""

    class Dropping(ConvFlattenLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.2, self.training))

    model = Dropping().double()
    state = torch.get_rng_state()
    sparsifier = _sparsifier(model, CHANNELS)
    assert torch.equal(torch.get_rng_state(), state)
    sparsifier.finalize()
    gossamer.shrink(model, images(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_leaves_the_global_generator_alone() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, CHANNELS | {"grow": "random"})
    optimizer = optimizer_for("sgd", model)
    data = batches(STEPS)
    state = torch.get_rng_state()
    train(model, sparsifier, optimizer, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("settings", [PLAIN, CHANNELS], ids=["plain", "channels"])
def test_same_seed_same_masks(settings: dict) -> None:
    runs = []
    for seed, global_seed in ((3, 0), (3, 99), (4, 0)):
        torch.manual_seed(global_seed)
        model = net("vgg")
        sparsifier = _sparsifier(model, settings, seed=seed, cut="end")
        start = _masks(sparsifier)
        losses = train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS))
        runs.append((start, losses, _masks(sparsifier)))
    first, again, other = runs
    assert _same(first[0], again[0])
    assert first[1] == again[1]
    assert _same(first[2], again[2])
    assert not _same(first[0], other[0])
    assert not _same(first[2], other[2])


def test_include_and_exclude() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(
        model, PLAIN, include=["features.*"], exclude=["features.0", "features.1*"]
    )
    assert [site.name for site in sparsifier.sites] == ["features.3", "features.7"]
    total = sum(site.original_numel for site in sparsifier.sites)
    assert sum(site.nonzeros for site in sparsifier.sites) == round(0.2 * total)
    assert type(model.classifier) is nn.Linear


def test_weights_that_no_method_makes_sparse_are_listed() -> None:
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
            "memory": nn.LSTM(8, 4),
            "up": nn.ConvTranspose2d(8, 4, 2),
            "table": nn.Embedding(5, 8),
        }
    )
    static = gossamer.Sparsifier(copy.deepcopy(model), gossamer.Static(density=0.5), total_steps=1)
    layers = ["cross.out_proj", "encoder.linear1", "encoder.linear2", "encoder.self_attn.out_proj"]
    assert sorted(site.name for site in static.sites) == layers
    attention = [f"cross.{name}_proj_weight" for name in "qkv"]
    attention += ["encoder.self_attn.in_proj_weight"]
    recurrent = ["memory.weight_ih_l0", "memory.weight_hh_l0"]
    assert set(static.left_dense) == {*attention, *recurrent, "up.weight"}
    assert "make query, key and value linear layers" in static.left_dense[attention[0]]
    dst = gossamer.Sparsifier(model, gossamer.DST(), total_steps=1)
    assert set(dst.left_dense) == {*attention, "up.weight"}


def test_revision_grows_when_supports_or_widths_change() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, CHANNELS)
    seen = {0: sparsifier.revision}
    changed = {}
    before = _masks(sparsifier)

    def after(step: int) -> None:
        nonlocal before
        seen[step] = sparsifier.revision
        now = _masks(sparsifier)
        changed[step] = [m.shape for m in now] != [m.shape for m in before] or not _same(
            now, before
        )
        before = now

    train(model, sparsifier, optimizer_for("sgd", model), batches(STEPS), after_step=after)
    assert sum(changed.values()) > 10
    for step, moved in changed.items():
        grown = seen[step] - seen[step - 1]
        assert grown in (0, 1)
        if moved:
            assert grown == 1


# Loops


def _micro_batched(
    chunks: int, settings: dict, optimizer: str = "sgd", set_to_none: bool = True
) -> tuple[nn.Module, gossamer.Sparsifier, list[float]]:
    model = net("conv_flatten_linear")  # no batch norm: a big batch is the sum of its parts
    sparsifier = _sparsifier(model, settings)
    opt = optimizer_for(optimizer, model)
    losses = []
    for x, y in batches(STEPS, 12):
        total = 0.0
        for part, label in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            loss = F.cross_entropy(model(part), label) / chunks
            loss.backward()
            total += float(loss.detach())
        opt.step()
        sparsifier.step(opt)
        opt.zero_grad(set_to_none=set_to_none)
        losses.append(total)
    return model, sparsifier, losses


@pytest.mark.parametrize("settings", [PLAIN, CHANNELS], ids=["plain", "channels"])
@pytest.mark.parametrize("chunks", [2, 3, 12])
def test_accumulation_equals_one_big_batch(chunks: int, settings: dict) -> None:
    whole, one, losses = _micro_batched(1, settings)
    parts, many, accumulated = _micro_batched(chunks, settings)
    assert accumulated == pytest.approx(losses, abs=1e-12)
    assert _same(_masks(one), _masks(many))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_set_to_zero_instead_of_none(chunks: int) -> None:
    _, one, losses = _micro_batched(chunks, CHANNELS)
    _, other, again = _micro_batched(chunks, CHANNELS, set_to_none=False)
    assert losses == again
    assert _same(_masks(one), _masks(other))


def test_clipping_sees_the_norm_of_the_masked_gradient_in_every_step() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, PLAIN)
    optimizer = optimizer_for("sgd", model)
    raw: dict[str, Tensor] = {}
    for site in sparsifier.sites:
        site.weight.register_hook(lambda g, name=site.name: raw.__setitem__(name, g.clone()))
    ratios = []
    model.train()
    for x, y in batches(STEPS):
        F.cross_entropy(model(x), y).backward()
        squares, dense = 0.0, 0.0
        latent = {id(site.weight): site for site in sparsifier.sites}
        for parameter in model.parameters():
            if id(parameter) in latent:
                site = latent[id(parameter)]
                squares += float((raw[site.name] * site.masked.mask).square().sum())
                dense += float(raw[site.name].square().sum())
            else:
                squares += float(parameter.grad.square().sum())
                dense += float(parameter.grad.square().sum())
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-12)
        ratios.append(dense / squares)
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    assert min(ratios) > 1.2  # else this would have shown nothing


class Orthogonal(torch.optim.Optimizer):
    """Muon's idea: the update is the orthogonal factor of the momentum matrix, dense throughout."""

    def __init__(self, parameters, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(parameter)
                buffer = state["buffer"].mul_(group["momentum"]).add_(parameter.grad)
                update = buffer
                if parameter.dim() > 1:
                    u, _, vh = torch.linalg.svd(buffer.flatten(1), full_matrices=False)
                    update = (u @ vh).view_as(parameter)
                parameter.sub_(update, alpha=group["lr"])


@pytest.mark.parametrize("cut", ["end", "during"])
@pytest.mark.parametrize("settings", [PLAIN, CHANNELS], ids=["plain", "channels"])
def test_an_optimizer_that_is_not_elementwise(settings: dict, cut: str) -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, settings, cut=cut)
    optimizer = Orthogonal(model.parameters())
    wrote_off_support = []

    def before(step: int) -> None:
        wrote_off_support.append(
            any(bool(site.weight.detach()[~site.support].any()) for site in sparsifier.sites)
        )

    losses = train(
        model,
        sparsifier,
        optimizer,
        batches(STEPS),
        before_step=before,
        after_step=lambda _: _zeros_hold(sparsifier, optimizer),
    )
    assert all(wrote_off_support)
    assert all(math.isfinite(loss) for loss in losses)
    sparsifier.finalize()
    total = sum(site.original_numel for site in sparsifier.sites)
    nonzeros = sum(int((model.get_submodule(s.name).weight != 0).sum()) for s in sparsifier.sites)
    assert nonzeros <= round(0.2 * total)


def test_a_subclass_of_an_elementwise_optimizer_is_not_trusted() -> None:
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None) -> None:
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)

    model = net("mlp")
    sparsifier = _sparsifier(model, PLAIN)
    optimizer = Noisy(model.parameters(), lr=0.01, momentum=0.9)
    train(
        model,
        sparsifier,
        optimizer,
        batches(20),
        after_step=lambda _: _zeros_hold(sparsifier, optimizer),
    )


@pytest.mark.parametrize("way", ["in place", "replaced", "foreach", "optimizer hook"])
def test_gradients_changed_after_backward_do_not_leave_the_support(way: str) -> None:
    """Gradient noise, or centralisation: what a user adds to `.grad` must not undo the mask."""
    model = net("mlp")
    sparsifier = _sparsifier(model, PLAIN)
    optimizer = optimizer_for("sgd", model)

    def add_noise(*_) -> None:
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 1e-3
            if way == "replaced":
                parameter.grad = parameter.grad + noise
            elif way == "foreach":
                torch._foreach_add_([parameter.grad], [noise])
            else:
                parameter.grad.add_(noise)

    if way == "optimizer hook":
        optimizer.register_step_pre_hook(add_noise)
    for x, y in batches(12):
        F.cross_entropy(model(x), y).backward()
        if way != "optimizer hook":
            add_noise()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
        _zeros_hold(sparsifier, optimizer)
    x = images(4)
    before = evaluate(model, x)
    sparsifier.finalize()
    assert torch.equal(evaluate(model, x), before)


def test_averaged_weights_swapped_into_the_model_compute_sparsely() -> None:
    """EMA helpers copy the average into the model's own parameters to evaluate it."""
    model = net("mlp")
    sparsifier = _sparsifier(model, PLAIN)
    average = [p.detach().clone() for p in model.parameters()]

    def update(_: int) -> None:
        for mean, parameter in zip(average, model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.1)

    train(model, sparsifier, optimizer_for("sgd", model), batches(20), after_step=update)
    with torch.no_grad():
        for mean, parameter in zip(average, model.parameters(), strict=True):
            parameter.copy_(mean)
    x = images(4)
    swapped = evaluate(model, x)
    sparsifier.finalize()
    torch.testing.assert_close(swapped, evaluate(model, x), rtol=0, atol=1e-12)


# Mixed precision


def _spoil(sparsifier: gossamer.Sparsifier, when: set[int], value: float) -> None:
    """A gradient that is not finite, off the support, in the given steps."""
    site = next(s for s in sparsifier.sites if not s.support.all())

    def plant(gradient: Tensor) -> Tensor:
        if sparsifier.step_count + 1 in when:
            gradient = gradient.clone()
            at = (site.masked.mask == 0).nonzero()[0]
            gradient[tuple(at)] = value
        return gradient

    site.weight.register_hook(plant)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("settings", [PLAIN, CHANNELS], ids=["plain", "channels"])
def test_a_skipped_step_postpones_the_update(settings: dict, value: float) -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, settings, cut="end")
    optimizer = optimizer_for("adam", model)
    _spoil(sparsifier, {8, 12, 13, 17}, value)  # updates are due at 4, 8, 12, ...
    changed = []
    model.train()
    for x, y in batches(STEPS):
        before = _masks(sparsifier)
        F.cross_entropy(model(x), y).backward()
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        if finite:
            optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
        now = _masks(sparsifier)
        grown = any(bool((new > old).any()) for new, old in zip(now, before, strict=True))
        if grown:
            changed.append(sparsifier.step_count)
        _zeros_hold(sparsifier, optimizer)
    # 8 -> 9; 12 and 13 -> 14; 17 is no update step and postpones nothing.
    assert [step for step in changed if step <= 20] == [4, 9, 14, 16, 20]


def test_a_postponed_update_survives_a_checkpoint() -> None:
    data = batches(STEPS)

    def fresh():
        model = net("vgg")
        sparsifier = _sparsifier(model, CHANNELS)
        _spoil(sparsifier, {8}, math.inf)
        return model, sparsifier, optimizer_for("sgd", model)

    def run(model, sparsifier, optimizer, some) -> list[float]:
        losses = []
        model.train()
        for x, y in some:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if all(bool(p.grad.isfinite().all()) for p in model.parameters()):
                optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    whole = fresh()
    expected = run(*whole, data)
    first = fresh()
    losses = run(*first, data[:8])
    second = fresh()
    second[1].load_state_dict(first[1].state_dict())
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    losses += run(*second, data[8:])
    assert losses == expected
    assert _same(_masks(whole[1]), _masks(second[1]))


def test_grad_scaler_changes_nothing_but_the_skipped_step() -> None:
    def run(scale: bool) -> tuple[list[float], list[Tensor]]:
        model = net("vgg")
        sparsifier = _sparsifier(model, CHANNELS)
        optimizer = optimizer_for("sgd", model)
        # A power of two scales float64 gradients exactly.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scale)
        losses = []
        model.train()
        for x, y in batches(STEPS):
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses, _masks(sparsifier)

    losses, masks = run(True)
    expected, unscaled = run(False)
    assert losses == expected
    assert _same(masks, unscaled)


def test_grad_scaler_overflow_keeps_masks_and_zeros() -> None:
    model = net("vgg", dtype=torch.float32)
    sparsifier = _sparsifier(model, CHANNELS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-6)
    scales = []
    for x, y in batches(20, dtype=torch.float32):
        scaler.scale(1000 * F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        _zeros_hold(sparsifier, optimizer)
    assert scales[0] < 1e33  # the first step overflowed
    assert scales[-1] == scales[3]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_autocast() -> None:
    model = net("vgg", dtype=torch.float32)
    sparsifier = _sparsifier(model, CHANNELS)
    optimizer = optimizer_for("sgd", model)
    for x, y in batches(STEPS, dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)  # also inside the autocast region
            optimizer.zero_grad()
        _zeros_hold(sparsifier, optimizer)
    assert len(sparsifier.plan) > 0
    assert sparsifier.locked.keys() == {"classifier"}


def test_a_bfloat16_model() -> None:
    model = net("conv_flatten_linear", dtype=torch.bfloat16)
    sparsifier = _sparsifier(model, CHANNELS)
    optimizer = optimizer_for("sgd", model)
    train(
        model,
        sparsifier,
        optimizer,
        batches(STEPS, dtype=torch.bfloat16),
        after_step=lambda _: _zeros_hold(sparsifier, optimizer),
    )
    total = sum(site.original_numel for site in sparsifier.sites)
    assert sum(site.nonzeros for site in sparsifier.sites) == round(0.2 * total)
    assert len(sparsifier.plan) > 0


# torch.compile


@pytest.mark.parametrize("settings", [PLAIN, CHANNELS], ids=["plain", "channels"])
def test_compiled_equals_eager_and_masks_do_not_recompile(settings: dict) -> None:
    def run(compiled: bool) -> tuple[list[float], list[Tensor], int]:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model = net("vgg")
        sparsifier = _sparsifier(model, settings, cut="end")
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        optimizer = optimizer_for("sgd", model)
        losses = []
        model.train()
        for x, y in batches(STEPS):
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses, _masks(sparsifier), counter.frame_count

    losses, masks, frames = run(True)
    expected, eager, _ = run(False)
    torch._dynamo.reset()
    assert losses == pytest.approx(expected, abs=1e-12)
    assert _same(masks, eager)
    assert frames == 1


def test_compiled_with_cuts() -> None:
    """A cut changes shapes, so it compiles anew; the run stays the same."""

    def run(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        model = net("conv_flatten_linear")
        settings = CHANNELS | {"channel_interval": 16}
        sparsifier = _sparsifier(model, settings)
        forward = (
            torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
            if compiled
            else model
        )
        optimizer = optimizer_for("sgd", model)
        losses = []
        for x, y in batches(STEPS):
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert len(sparsifier.plan) > 0
        return losses

    losses, expected = run(True), run(False)
    torch._dynamo.reset()
    assert losses == pytest.approx(expected, abs=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch._inductor
def test_compiled_with_inductor() -> None:
    torch._dynamo.reset()
    losses = []
    for compiled in (True, False):
        model = net("vgg")
        sparsifier = _sparsifier(model, PLAIN)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = optimizer_for("sgd", model)
        model.train()
        for x, y in batches(STEPS):
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    torch._dynamo.reset()
    assert losses[:STEPS] == pytest.approx(losses[STEPS:], abs=1e-9)


# Copies


def test_a_deep_copy_computes_the_same_and_leaves_the_original_alone() -> None:
    data = batches(STEPS)
    undisturbed = net("vgg")
    sparsifier = _sparsifier(undisturbed, CHANNELS)
    expected = train(undisturbed, sparsifier, optimizer_for("sgd", undisturbed), data)

    model = net("vgg")
    sparsifier = _sparsifier(model, CHANNELS)
    optimizer = optimizer_for("sgd", model)
    losses = train(model, sparsifier, optimizer, data[:10])
    x = images(4)
    twin = copy.deepcopy(model)
    assert torch.equal(evaluate(twin, x), evaluate(model, x))
    masks = {s.name: s.support.clone() for s in sparsifier.sites}
    baked = copy.deepcopy(twin)
    gossamer.finalize(baked)  # breaks the original with PyTorch's own remove_parametrizations
    assert torch.equal(evaluate(baked, x), evaluate(model, x))
    # A copy that trains on by itself stays sparse: it multiplies by its mask.
    loose = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for batch, label in data[:5]:
        loose.zero_grad()
        F.cross_entropy(twin(batch), label).backward()
        loose.step()
    gossamer.finalize(twin)
    for name, mask in masks.items():
        assert not twin.get_submodule(name).weight.detach()[~mask].any()
        assert not baked.get_submodule(name).weight.detach()[~mask].any()
    losses += train(model, sparsifier, optimizer, data[10:])
    assert losses == expected


def test_an_averaged_model_is_sparse_with_the_current_mask() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, PLAIN)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    data = batches(STEPS)
    optimizer = optimizer_for("sgd", model)
    train(
        model,
        sparsifier,
        optimizer,
        data[:30],
        after_step=lambda _: average.update_parameters(model),
    )
    plain = net("vgg")
    state = average.module.state_dict()
    strayed = 0
    with torch.no_grad():
        for key, value in plain.state_dict().items():
            layer = key.rpartition(".")[0]
            site = next((s for s in sparsifier.sites if s.name == layer), None)
            if site is not None and key.endswith("weight"):
                latent = state[f"{layer}.parametrizations.weight.original"]
                strayed += int((latent[~site.support] != 0).sum())
                value.copy_(latent * site.masked.mask)
            else:
                value.copy_(state[key])
    assert strayed > 0  # the mean holds weights of masks that have moved on
    x = images(4)
    assert torch.equal(evaluate(average.module, x), evaluate(plain, x))
    masks = {site.name: site.support.clone() for site in sparsifier.sites}

    gossamer.finalize(average.module)
    assert torch.equal(evaluate(average.module, x), evaluate(plain, x))
    for name, mask in masks.items():
        layer = average.module.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert not layer.weight.detach()[~mask].any()
    # The trained model knows nothing of it.
    train(model, sparsifier, optimizer, data[30:])
    _zeros_hold(sparsifier, optimizer)


def test_an_averaged_model_with_averaged_buffers() -> None:
    """The mean of masks counts from one half up."""
    model = net("mlp")
    sparsifier = _sparsifier(model, PLAIN)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    train(
        model,
        sparsifier,
        optimizer_for("sgd", model),
        batches(STEPS),
        after_step=lambda _: average.update_parameters(model),
    )
    means = {
        site.name: average.module.get_submodule(site.name).parametrizations.weight[0].mask.clone()
        for site in sparsifier.sites
    }
    assert any(bool(((mean > 0) & (mean < 1)).any()) for mean in means.values())
    gossamer.finalize(average.module)
    for name, mean in means.items():
        weight = average.module.get_submodule(name).weight.detach()
        assert not weight[mean <= 0.5].any()
        assert (weight[mean > 0.5] != 0).any()


# Checkpoints


def test_loading_dense_weights_keeps_the_zeros() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, PLAIN)
    state = model.state_dict()
    dense = {
        key: torch.randn_like(value) if key.endswith("original") else value
        for key, value in state.items()
    }
    model.load_state_dict(dense)
    for site in sparsifier.sites:
        latent = dense[f"{site.name}.parametrizations.weight.original"]
        assert torch.equal(site.weight, latent * site.masked.mask)
        assert torch.equal(site.effective, latent * site.masked.mask)


def test_loading_with_assign_is_refused() -> None:
    """`load_state_dict(assign=True)` swaps the Parameter objects that carry the masks' hooks."""
    model = net("vgg")
    sparsifier = _sparsifier(model, PLAIN)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"features\.0"):
        train(model, sparsifier, optimizer_for("sgd", model), batches(1))


def test_state_is_plain_data() -> None:
    model = net("vgg")
    sparsifier = _sparsifier(model, CHANNELS)
    train(model, sparsifier, optimizer_for("sgd", model), batches(12))
    state = sparsifier.state_dict()
    before = copy.deepcopy(state)

    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (str, int, float, bool))

    assert plain(state)
    train(model, sparsifier, optimizer_for("sgd", model), batches(6))
    assert state == before  # a photograph, not a window


# Memory formats and layer kinds


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(when: str) -> None:
    losses, masks = [], []
    for last in (False, True):
        model = net("vgg")
        if last and when == "before":
            model = model.to(memory_format=torch.channels_last)
        sparsifier = _sparsifier(model, CHANNELS)
        if last and when == "after":
            model = model.to(memory_format=torch.channels_last)
        for site in sparsifier.sites:
            if last and site.weight.dim() == 4:
                assert site.weight.is_contiguous(memory_format=torch.channels_last)
                assert site.masked.mask.is_contiguous(memory_format=torch.channels_last)
        data = batches(STEPS)
        if last:
            data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
        losses.append(train(model, sparsifier, optimizer_for("sgd", model), data))
        masks.append(_masks(sparsifier))
        if last:
            for site in sparsifier.sites:
                if site.weight.dim() == 4:
                    assert site.weight.is_contiguous(memory_format=torch.channels_last)
                    assert site.masked.mask.is_contiguous(memory_format=torch.channels_last)
    assert losses[0] == pytest.approx(losses[1], abs=1e-11)
    assert _same(*masks)


def test_conv3d() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(1, 12, 3, padding=1),
        nn.BatchNorm3d(12),
        nn.ReLU(),
        nn.Conv3d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).double()
    x = torch.randn(6, 1, 4, 4, 4, dtype=torch.float64)
    sparsifier = _sparsifier(model, CHANNELS, example=x)
    assert [pool.name for pool in sparsifier.pools] == ["0", "3"]
    data = [(x, torch.arange(6) % 4)] * STEPS
    train(model, sparsifier, optimizer_for("sgd", model), data)
    assert sparsifier.live_channels == round(0.5 * 28)
    assert sum(len(model[i].weight) for i in (0, 3)) == 14


def test_a_layer_that_no_loss_reaches() -> None:
    class Spare(ConvFlattenLinear):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(10, 10)

    for settings in (PLAIN, CHANNELS):
        torch.manual_seed(0)
        model = Spare().double()
        sparsifier = _sparsifier(model, settings)
        optimizer = optimizer_for("sgd", model)
        train(
            model,
            sparsifier,
            optimizer,
            batches(STEPS),
            after_step=lambda _, s=sparsifier, o=optimizer: _zeros_hold(s, o),
        )
        assert model.spare.bias.grad is None


# The plain loop, with a loss that outlives the step


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NETS)
def test_the_loop_of_the_readme_with_old_graphs_alive(name: str) -> None:
    """A cut while the last loss, and all before it, still hold their graphs."""
    results = []
    for keep in (False, True):
        model = net(name)
        sparsifier = _sparsifier(model, CHANNELS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        alive, losses = [], []
        for x, y in batches(STEPS):
            out = model(x)
            loss = F.cross_entropy(out, y) + sparsifier.penalty()
            loss.backward(retain_graph=keep)
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
            losses.append(loss.item())
            if keep:
                alive += [out, loss]
            _zeros_hold(sparsifier, optimizer)
        assert len(sparsifier.plan) > 0
        results.append((losses, _masks(sparsifier)))
        sparsifier.finalize()
        slim = gossamer.shrink(model, example=images(2), plan=sparsifier.plan)
        assert slim.max_abs_difference < 1e-12
    assert results[0][0] == results[1][0]
    assert _same(results[0][1], results[1][1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        lambda p: torch.optim.NAdam(p, lr=1e-3),
        lambda p: torch.optim.RAdam(p, lr=1e-3),
        lambda p: torch.optim.Adamax(p, lr=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.ASGD(p, lr=1e-2),
        lambda p: torch.optim.Rprop(p, lr=1e-3),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
    ],
    ids=[
        "sgd-foreach",
        "adamw-foreach",
        "adamw-fused",
        "nadam",
        "radam",
        "adamax",
        "adagrad",
        "adagrad-start",
        "adadelta",
        "asgd",
        "rprop",
        "adafactor",
    ],
)
@pytest.mark.parametrize("settings", [PLAIN, CHANNELS], ids=["plain", "channels"])
def test_the_optimizers_of_torch_keep_zeros(make, settings: dict) -> None:
    """Weights are zero off the support after every step; state too, once a support has changed."""
    model = net("conv_flatten_linear")
    sparsifier = _sparsifier(model, settings, cut="end")
    optimizer = make(model.parameters())

    def after(step: int) -> None:
        for site in sparsifier.sites:
            assert not site.weight.detach()[~site.support].any()
        if step % 4 == 0:
            _zeros_hold(sparsifier, optimizer)

    start = _masks(sparsifier)
    losses = train(model, sparsifier, optimizer, batches(STEPS), after_step=after)
    assert all(math.isfinite(loss) for loss in losses)
    assert not _same(start, _masks(sparsifier))


def test_an_optimizer_whose_state_cannot_be_cut() -> None:
    """Adafactor factors its state: refused with the way out, and the model still whole."""
    model = net("conv_flatten_linear")
    sparsifier = _sparsifier(model, CHANNELS)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r'optimizer state .* cut="end"'):
        train(model, sparsifier, optimizer, batches(STEPS))
    for site in sparsifier.sites:
        assert site.weight.shape == site.original_shape
    evaluate(model, images(2))


def test_a_state_from_before_a_setting_existed_means_its_default() -> None:
    def fresh(**settings: object) -> gossamer.Sparsifier:
        method = gossamer.RigL(density=0.3, **settings)
        return gossamer.Sparsifier(net("mlp"), method, total_steps=9)

    state = fresh().state_dict()
    del state["method"]["scope"]
    fresh().load_state_dict(state)
    with pytest.raises(ValueError, match="method: scope is 'layer' in it and 'global' here"):
        fresh(scope="global").load_state_dict(state)
