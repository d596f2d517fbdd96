"""Static: exact budgets, uniform masks, and nothing that moves."""

import numpy as np
import pytest
import torch

import gossamer
from nets import NETS, OPTIMIZERS, batches, net, optimizer_for, train
from reference import static as twin


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_budgets_are_the_twins(name: str, density: float, distribution: str) -> None:
    model = net(name)
    method = gossamer.Static(density=density, distribution=distribution)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=10)
    shapes = [site.original_shape for site in sparsifier.sites]
    counts = [site.nonzeros for site in sparsifier.sites]
    assert twin.counts_fit(distribution, shapes, density, counts), counts
    assert method.budget(shapes) == counts
    total = sum(shape.numel() for shape in shapes)
    assert sparsifier.density == round(density * total) / total


def test_masks_are_random_and_follow_the_seed() -> None:
    def masks(seed: int) -> list[torch.Tensor]:
        model = net("mlp", dtype=torch.float32)
        method = gossamer.Static(density=0.3)
        sparsifier = gossamer.Sparsifier(model, method, total_steps=10, seed=seed)
        return [site.support for site in sparsifier.sites]

    first, again, other = masks(0), masks(0), masks(1)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or a.all()
    # Layers of one shape do not share a mask either.
    twins = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 30))
    sites = gossamer.Sparsifier(twins, gossamer.Static(density=0.3), total_steps=10).sites
    assert not torch.equal(sites[0].support, sites[1].support)


def test_every_position_is_equally_likely() -> None:
    hits = np.zeros((10, 20))
    for seed in range(200):
        model = torch.nn.Sequential(torch.nn.Linear(20, 10))
        method = gossamer.Static(density=0.25)
        site = gossamer.Sparsifier(model, method, total_steps=10, seed=seed).sites[0]
        assert site.nonzeros == 50
        hits += site.support.numpy()
    # Binomial(200, 1/4): mean 50, standard deviation 6.1.
    assert abs(hits - 50).max() < 5 * 6.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_moves(optimizer: str) -> None:
    model = net("mobilenet")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.2), total_steps=40)
    before = [site.support.clone() for site in sparsifier.sites]
    kept = [site.weight.detach()[site.support].clone() for site in sparsifier.sites]
    opt = optimizer_for(optimizer, model)

    def after(step: int) -> None:
        for site, support in zip(sparsifier.sites, before, strict=True):
            assert torch.equal(site.support, support)
            assert not site.weight.detach()[~support].any()
            for value in opt.state[site.weight].values():
                assert value.dim() == 0 or not value[~support].any()
            assert site.masked.dense_gradient is None

    train(model, sparsifier, opt, batches(40), after_step=after)
    assert sparsifier.revision == 0
    assert sparsifier.pools == []
    assert sparsifier.channel_sparsity == 0
    moved = [
        not torch.equal(site.weight.detach()[site.support], old)
        for site, old in zip(sparsifier.sites, kept, strict=True)
    ]
    assert all(moved)


def test_start_weights_are_those_of_the_dense_network_where_kept() -> None:
    dense, model = net("vgg"), net("vgg")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.2), total_steps=10)
    for site in sparsifier.sites:
        weight = dense.get_submodule(site.name).weight
        assert torch.equal(site.weight, weight * site.masked.mask)


def test_density_one_changes_nothing() -> None:
    dense, model = net("basic"), net("basic")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=1.0), total_steps=20)
    data = batches(20)
    losses = train(model, sparsifier, optimizer_for("sgd", model), data)
    optimizer = optimizer_for("sgd", dense)
    dense.train()
    expected = []
    for x, y in data:
        loss = torch.nn.functional.cross_entropy(dense(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected
