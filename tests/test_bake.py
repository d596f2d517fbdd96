"""finalize(): a plain model again, exact zeros, the same objects; copies and originals apart."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import gossamer
from gossamer.bake import sparse_layers
from nets import NETS, batches, evaluate, images, net, optimizer_for, train

CHASE = gossamer.Chase(density=0.2, channel_sparsity=0.5, update_interval=4, min_channels=2)


def _trained(name: str, steps: int = 24, cut: str = "during", dtype=torch.float64):
    model = net(name, dtype=dtype)
    example = images(2, dtype=dtype)
    sparsifier = gossamer.Sparsifier(model, CHASE, total_steps=24, example=example, cut=cut)
    optimizer = optimizer_for("sgd", model)
    train(model, sparsifier, optimizer, batches(steps, dtype=dtype))
    return model, sparsifier, optimizer


@pytest.mark.parametrize("cut", ["end", "during"])
@pytest.mark.parametrize("name", NETS)
def test_a_plain_model_again(name: str, cut: str) -> None:
    model, sparsifier, optimizer = _trained(name, cut=cut)
    untouched = net(name)
    x = images(4)
    before = evaluate(model, x)
    supports = {site.name: site.support.clone() for site in sparsifier.sites}
    latent = {site.name: id(site.weight) for site in sparsifier.sites}
    parameters = [id(p) for p in model.parameters()]

    assert sparsifier.finalize() is model
    assert torch.equal(evaluate(model, x), before)
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in untouched.named_parameters()]
    for layer, support in supports.items():
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, nn.Parameter)
        assert id(weight) == latent[layer]
        assert not weight.detach()[~support].any()
        assert not torch.signbit(weight.detach()[~support]).any()  # not even minus zero
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)

    # The optimizer still refers to the parameters, and nothing masks them any more.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
    data, labels = batches(1)[0]
    optimizer.zero_grad()
    F.cross_entropy(model(data), labels).backward()
    first = model.get_submodule(sparsifier.sites[0].name).weight
    assert all(p.grad is not None for p in model.parameters())
    some = [model.get_submodule(n).weight.grad[~s] for n, s in supports.items()]
    assert any(gradient.any() for gradient in some)
    old = first.detach().clone()
    optimizer.step()
    assert not torch.equal(first.detach(), old)


@pytest.mark.parametrize("name", NETS)
def test_state_dict_loads_into_the_users_class(name: str) -> None:
    model, sparsifier, _ = _trained(name, cut="end")
    sparsifier.finalize()
    fresh = net(name, seed=7)
    fresh.load_state_dict(model.state_dict())
    x = images(4)
    assert torch.equal(evaluate(fresh, x), evaluate(model, x))


def test_twice_is_once() -> None:
    model, sparsifier, _ = _trained("vgg")
    sparsifier.finalize()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert sparsifier.finalize() is model
    assert gossamer.finalize(model) is model
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_model_that_never_was_sparse() -> None:
    model = net("vgg")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert gossamer.finalize(model) is model
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_copy_can_be_finalized_and_the_original_goes_on() -> None:
    """PyTorch's remove_parametrizations breaks the class that both share."""
    whole, other, _ = _trained("vgg")
    model, sparsifier, optimizer = _trained("vgg", steps=10)
    x = images(4)
    twin = copy.deepcopy(model)
    twin_of_twin = copy.deepcopy(twin)
    expected = evaluate(model, x)
    for made in (twin, twin_of_twin):
        gossamer.finalize(made)
        assert torch.equal(evaluate(made, x), expected)
        assert type(made.features[0]) is nn.Conv2d
    assert torch.equal(evaluate(model, x), expected)
    train(model, sparsifier, optimizer, batches(24)[10:])
    sparsifier.finalize()
    other.finalize()
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_copy_of_a_finalized_model_is_plain() -> None:
    model, sparsifier, _ = _trained("vgg")
    sparsifier.finalize()
    twin = pickle.loads(pickle.dumps(model))  # no parametrized class is left to stumble over
    assert torch.equal(evaluate(twin, images(2)), evaluate(model, images(2)))
    assert torch.equal(evaluate(copy.deepcopy(model), images(2)), evaluate(model, images(2)))


def test_zeros_are_exact_whatever_was_written_to_the_latent_weight() -> None:
    model, sparsifier, _ = _trained("mlp", cut="end")
    twin = copy.deepcopy(model)
    for made in (model, twin):
        with torch.no_grad():
            for layer in sparse_layers(made):
                made.get_submodule(layer).parametrizations.weight.original.add_(1.0)
    supports = {site.name: site.support.clone() for site in sparsifier.sites}
    sparsifier.finalize()
    gossamer.finalize(twin)
    for made in (model, twin):
        for layer, support in supports.items():
            weight = made.get_submodule(layer).weight.detach()
            assert not weight[~support].any()
            assert (weight[support] != 0).any()


def test_hooks_of_users_stay() -> None:
    model = net("vgg")
    calls = []
    model.features[0].register_forward_hook(lambda *_: calls.append("features.0"))
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(), total_steps=10)
    evaluate(model, images(2))
    sparsifier.finalize()
    evaluate(model, images(2))
    assert calls == ["features.0"] * 2


def test_layers_of_the_users_own_class() -> None:
    class Scaled(nn.Linear):
        """A subclass with a parameter of its own, in front of weight and bias."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.scale = nn.Parameter(torch.ones(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight, self.bias) * self.scale

    model = nn.Sequential(Scaled(6, 5), nn.ReLU(), Scaled(5, 4))
    keys = list(model.state_dict())
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.5), total_steps=10)
    x = torch.randn(3, 6)
    before = evaluate(model, x)
    sparsifier.finalize()
    assert type(model[0]) is Scaled
    assert torch.equal(evaluate(model, x), before)
    # An optimizer's checkpoint counts parameters in order.
    assert list(model.state_dict()) == keys


def test_other_parametrizations_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    sparsifier = gossamer.Sparsifier(
        model, gossamer.Static(density=0.5), total_steps=10, exclude=["2"]
    )
    sparsifier.finalize()
    assert parametrize.is_parametrized(model[2], "weight")
    assert not parametrize.is_parametrized(model[0])


def test_half_precision() -> None:
    model, sparsifier, _ = _trained("mlp", dtype=torch.bfloat16)
    before = evaluate(model, images(2, dtype=torch.bfloat16))
    sparsifier.finalize()
    assert torch.equal(evaluate(model, images(2, dtype=torch.bfloat16)), before)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_sparse_layers_lists_them_by_name() -> None:
    model, sparsifier, _ = _trained("vgg")
    found = sparse_layers(model)
    assert list(found) == [site.name for site in sparsifier.sites]
    assert all(found[site.name] is site.sparse for site in sparsifier.sites)
    sparsifier.finalize()
    assert sparse_layers(model) == {}
