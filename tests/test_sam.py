"""Optimizers of two steps (SAM): gradients at w, then at w + e, then one step from w."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from nets import batches, evaluate, images, net

STEPS = 24


class SAM(torch.optim.Optimizer):
    """Foret et al. 2021, as the widespread implementation has it, inner optimizer and all."""

    def __init__(self, parameters, rho: float = 0.05, **settings) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **settings)

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def train(model, optimizer, penalty=lambda: 0.0, after=lambda: None, zero_grad=False) -> None:
    model.train()
    for x, y in batches(STEPS):
        (F.cross_entropy(model(x), y) + penalty()).backward()
        optimizer.first_step()
        (F.cross_entropy(model(x), y) + penalty()).backward()
        optimizer.second_step(zero_grad)
        after()
        optimizer.zero_grad()


def sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), lr=0.02, momentum=0.9)


def test_a_mask_trains_as_masked_gradients_do() -> None:
    model, plain = net("mlp"), net("mlp")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.3), total_steps=STEPS)
    for site in sparsifier.sites:
        weight, mask = plain.get_submodule(site.name).weight, site.masked.mask.clone()
        with torch.no_grad():
            weight.mul_(mask)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    optimizer = sam(model)
    train(model, optimizer, after=lambda: sparsifier.step(optimizer.base_optimizer))
    train(plain, sam(plain))
    sparsifier.finalize()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_channels_are_cut_on_the_way() -> None:
    model = net("vgg")
    settings = {"channel_sparsity": 0.5, "update_interval": 4, "min_channels": 2}
    sparsifier = gossamer.Sparsifier(
        model, gossamer.Chase(density=0.2, **settings), total_steps=STEPS, example=images(2)
    )
    optimizer = sam(model)
    inner = optimizer.base_optimizer

    def after() -> None:
        sparsifier.step(inner)
        for site in sparsifier.sites:
            off = ~site.support
            assert not site.weight.detach()[off].any()
            assert not inner.state[site.weight]["momentum_buffer"][off].any()

    train(model, optimizer, after=after)
    assert len(sparsifier.plan)
    x = images(4)
    before: Tensor = evaluate(model, x)
    sparsifier.finalize()
    assert torch.equal(evaluate(model, x), before)


@pytest.mark.parametrize(
    "method", [gossamer.SRSTE(), gossamer.DST(target_density=0.3)], ids=["SRSTE", "DST"]
)
def test_learned_supports(method: gossamer.Method) -> None:
    model = net("mlp")
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    optimizer = sam(model)
    start = sparsifier.supports()
    train(
        model,
        optimizer,
        penalty=sparsifier.penalty,
        after=lambda: sparsifier.step(optimizer.base_optimizer),
    )
    assert sparsifier.density == pytest.approx(0.5 if "SRSTE" in repr(method) else 0.3, abs=0.01)
    assert any(not torch.equal(mask, start[name]) for name, mask in sparsifier.supports().items())


def test_gradients_that_are_gone_are_missed() -> None:
    model = net("mlp")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.3), total_steps=STEPS)
    optimizer = sam(model)
    with pytest.raises(ValueError, match=r"found no gradient .* before optimizer.zero_grad\(\)"):
        train(
            model,
            optimizer,
            after=lambda: sparsifier.step(optimizer.base_optimizer),
            zero_grad=True,
        )


def test_the_outer_optimizer_is_refused() -> None:
    model = net("mlp")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.3), total_steps=STEPS)
    optimizer = sam(model)
    with pytest.raises(ValueError, match=r"SAM remembers .* call step\(optimizer.base_optimizer\)"):
        train(model, optimizer, after=lambda: sparsifier.step(optimizer))
