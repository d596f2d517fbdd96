"""Errors say what was got, what was wanted and what to do, with the layer's name."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import gossamer
from nets import ConvFlattenLinear, batches, images, mlp, net, optimizer_for, train

STATIC = gossamer.Static(density=0.5)


def _chase(**changes) -> gossamer.Chase:
    return gossamer.Chase(
        **({"density": 0.2, "channel_sparsity": 0.5, "min_channels": 2} | changes)
    )


def _says(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    for word in words:
        assert re.search(word, text), f"{word!r} is not in: {text}"
    assert "\n" not in text.strip()


# Hyperparameters


@pytest.mark.parametrize("method", [gossamer.Chase, gossamer.Static])
@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.5, float("nan")])
def test_density_out_of_range(method, density: float) -> None:
    with pytest.raises(ValueError, match="density") as error:
        method(density=density)
    _says(error, method.__name__, re.escape(f"density={density!r}"), r"\(0, 1\]")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "memory_margin": [-0.1, 1.1],
        "explore_end": [0, 1.5],
        "drop_fraction": [-1, 2],
        "drop_fraction_end": [-1, 2],
        "t_end": [-0.5, 1.5],
        "min_channel_factor": [-0.1, 1.1],
        "min_channels": [0, -3],
        "channel_multiple": [0],
        "update_interval": [0, -1],
        "channel_interval": [0],
    }.items(),
)
def test_chase_out_of_range(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name) as error:
            gossamer.Chase(**{name: value})
        _says(error, "Chase", re.escape(f"{name}={value!r}"))


@pytest.mark.parametrize("value", [1, 1.0, 1.2, -0.1, float("nan")])
def test_channel_sparsity_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="channel_sparsity") as error:
        gossamer.Chase(channel_sparsity=value)
    _says(error, "Chase", re.escape(str(value)), r"\[0, 1\)")


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"distribution": "erkk"}, "'erk'"),
        ({"grow": "gradients"}, "'gradient'"),
        ({"scope": "globall"}, "'global'"),
        ({"channel_score": "ummm"}, "'umm'"),
    ],
)
def test_unknown_choices_name_the_nearest(changes: dict[str, str], nearest: str) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=name) as error:
        gossamer.Chase(**changes)
    _says(error, f"'{value}'", f"did you mean {nearest}")


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_start": 0.5, "channel_end": 0.4},
        {"channel_start": 0.5, "channel_end": 0.5},
        {"channel_end": 0.9, "explore_end": 0.8},
        {"channel_start": -0.1},
        {"channel_start": 0.8},
    ],
    ids=str,
)
def test_channel_window_out_of_order(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="channel_start") as error:
        gossamer.Chase(**changes)
    _says(error, "channel_end", "explore_end")


def test_unknown_hyperparameters_are_refused() -> None:
    with pytest.raises(TypeError, match="densty"):
        gossamer.Chase(densty=0.1)
    with pytest.raises(TypeError):
        gossamer.Chase(0.1)  # keyword only


@pytest.mark.parametrize(
    ("name", "value"),
    [("channel_interval", 20.5), ("channel_multiple", 1.5), ("min_channels", 2.5)],
)
def test_values_of_another_type(name: str, value: float) -> None:
    """Said at once and with the name, not as a TypeError in the middle of a run."""
    with pytest.raises(TypeError, match=f"{name}=.*whole number"):
        gossamer.Chase(**{name: value})


# Model and method


def test_density_below_the_reachable_minimum() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="density") as error:
        gossamer.Sparsifier(model, gossamer.Static(density=1e-5), total_steps=10)
    _says(error, "density=1e-05", "3 layers", "give at least")
    least = float(str(error.value).rsplit(" ", 1)[1])
    gossamer.Sparsifier(mlp(), gossamer.Static(density=least), total_steps=10)  # as it says


def test_channel_sparsity_that_floors_forbid() -> None:
    with pytest.raises(ValueError, match="channel_sparsity") as error:
        gossamer.Sparsifier(
            net("mlp"),
            _chase(channel_sparsity=0.9, min_channels=8),
            total_steps=100,
            example=images(2),
        )
    # 44 hidden units; 8 and 8 must stay, 10 % would be 4.
    _says(error, "channel_sparsity=0.9", "4 of 44", "16", "0.636", "min_channels=8")
    reachable = gossamer.Sparsifier(
        mlp().double(),
        _chase(channel_sparsity=0.636, min_channels=8),
        total_steps=100,
        example=images(2),
    )
    assert reachable.pools


def test_channel_sparsity_that_a_multiple_forbids() -> None:
    with pytest.raises(ValueError, match="channel_multiple=16"):
        gossamer.Sparsifier(
            mlp().double(),
            _chase(channel_sparsity=0.5, channel_multiple=16),
            total_steps=100,
            example=images(2),
        )


def test_no_layer_to_make_sparse() -> None:
    for model in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))):
        with pytest.raises(ValueError, match="no layer to make sparse"):
            gossamer.Sparsifier(model, STATIC, total_steps=10)
    with pytest.raises(ValueError, match="exclude"):
        gossamer.Sparsifier(mlp(), STATIC, total_steps=10, exclude=["*"])
    with pytest.raises(ValueError, match="include"):
        gossamer.Sparsifier(mlp(), STATIC, total_steps=10, include=[])


def test_tied_weights_name_both() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="tied") as error:
        gossamer.Sparsifier(model, STATIC, total_steps=10)
    _says(error, r"embed\.weight", r"head\.weight", "[Ee]xclude 'head'")
    both = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    both[1].weight = both[0].weight
    with pytest.raises(ValueError, match="tied") as error:
        gossamer.Sparsifier(both, STATIC, total_steps=10)
    _says(error, r"0\.weight", r"1\.weight")


def test_tied_weights_that_are_excluded_are_fine() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 5),
            "hidden": nn.Linear(5, 5),
            "head": nn.Linear(5, 7, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    sparsifier = gossamer.Sparsifier(model, STATIC, total_steps=10, exclude=["head"])
    assert [site.name for site in sparsifier.sites] == ["hidden"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_unknown_patterns_name_the_nearest(option: str) -> None:
    with pytest.raises(ValueError, match="pattern") as error:
        gossamer.Sparsifier(net("vgg"), STATIC, total_steps=10, **{option: ["clasifier"]})
    _says(error, "'clasifier'", "'classifier'")
    with pytest.raises(ValueError, match=r"'nothing\.\*'"):
        gossamer.Sparsifier(net("vgg"), STATIC, total_steps=10, **{option: ["nothing.*"]})


def test_a_frozen_layer() -> None:
    model = net("vgg")
    model.features[3].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"features\.3") as error:
        gossamer.Sparsifier(model, STATIC, total_steps=10)
    _says(error, "frozen", "requires_grad", "exclude")
    gossamer.Sparsifier(model, STATIC, total_steps=10, exclude=["features.3"])


def test_a_layer_that_is_parametrized_already() -> None:
    model = net("vgg")
    gossamer.Sparsifier(model, STATIC, total_steps=10)
    with pytest.raises(ValueError, match=r"features\.0") as error:
        gossamer.Sparsifier(model, STATIC, total_steps=10)
    _says(error, "parametrized already", "finalize", "exclude")
    other = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0 is parametrized already"):
        gossamer.Sparsifier(other, STATIC, total_steps=10)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"density": 1e-9}, {}),
        ({"channel_sparsity": 0.99}, {}),
        ({"update_interval": 500}, {}),
        ({}, {"example": None}),
        ({}, {"example": images(2).float()}),
        ({}, {"exclude": ["nothing"]}),
        ({}, {"cut": "never"}),
    ],
    ids=["density", "channels", "interval", "no example", "dtype", "pattern", "cut"],
)
def test_a_refused_model_is_not_changed(changes: dict, options: dict) -> None:
    model, untouched = net("vgg"), net("vgg")
    with pytest.raises(ValueError, match=r"\w"):
        gossamer.Sparsifier(
            model, _chase(**changes), **({"total_steps": 100, "example": images(2)} | options)
        )
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert list(model.state_dict()) == list(untouched.state_dict())
    for key, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


# Run


@pytest.mark.parametrize("steps", [0, -5])
def test_total_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"total_steps={steps}"):
        gossamer.Sparsifier(mlp(), STATIC, total_steps=steps)


def test_a_channel_interval_longer_than_its_window() -> None:
    """One removal at the end of the window is left: all channels at once, and nobody said so."""
    with pytest.raises(ValueError, match="channel_interval"):
        gossamer.Sparsifier(
            net("mlp"),
            _chase(update_interval=10, channel_interval=5000),
            total_steps=1000,
            example=images(2),
        )


# The example


def test_an_example_the_model_does_not_accept() -> None:
    model = net("conv_flatten_linear")
    small = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="'fc1'") as error:
        gossamer.Sparsifier(model, _chase(), total_steps=100, example=small)
    _says(error, "cannot be traced", "RuntimeError", "example")
    with pytest.raises(ValueError, match="'conv1'"):
        gossamer.Sparsifier(model, _chase(), total_steps=100, example=small.float())
    with pytest.raises(ValueError, match="forward"):
        gossamer.Sparsifier(model, _chase(), total_steps=100, example=(small, small))
    with pytest.raises(ValueError, match="forward"):
        gossamer.Sparsifier(model, _chase(), total_steps=100, example={"y": small})


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


def test_channels_that_leave_torch_stay() -> None:
    """What numpy does with them nobody can follow."""

    class Leaves(ConvFlattenLinear):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Sequential(nn.ReLU(), LeavesTorch())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.odd(self.conv1(x)[:, :3]))

    shrunk = gossamer.shrink(Leaves().double(), images(2))
    rows = {row.layer: row for row in shrunk.report}
    assert any(row.note.startswith("kept: ") for name, row in rows.items() if "conv1" in name)
    assert shrunk.removed == 0


def test_a_model_that_fails_on_the_example_names_the_module() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such kernel")

    class Untraceable(ConvFlattenLinear):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Sequential(nn.ReLU(), Fails())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.odd(x))

    for act in (
        lambda model: gossamer.Sparsifier(model, _chase(), total_steps=100, example=images(2)),
        lambda model: gossamer.shrink(model, images(2)),
    ):
        with pytest.raises(ValueError, match=r"'odd\.1'") as error:
            act(Untraceable().double())
        _says(error, "cannot be traced", "no such kernel")


# In the loop


def test_a_step_without_gradients() -> None:
    model = mlp()
    sparsifier = gossamer.Sparsifier(model, STATIC, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="gradient") as error:
        sparsifier.step(optimizer)
    _says(error, "backward", "zero_grad")
    assert sparsifier.step_count == 0
    model(images(2).float()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="gradient"):
        sparsifier.step(optimizer)


def test_an_optimizer_that_lacks_a_parameter() -> None:
    model = net("vgg")
    early = optimizer_for("sgd", model)
    sparsifier = gossamer.Sparsifier(model, STATIC, total_steps=10)
    some = torch.optim.SGD(model.features.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"classifier\.weight") as error:
        train(model, sparsifier, some, batches(1))
    _says(error, r"\(4, 20\)", r"model\.parameters\(\)", "after the Sparsifier")
    assert sparsifier.step_count == 0
    # The latent weights are the very objects of before, so an earlier optimizer serves as well.
    train(model, sparsifier, early, batches(2))
    other = net("vgg")
    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        train(model, sparsifier, optimizer_for("sgd", other), batches(1))


def test_weights_that_became_nan() -> None:
    """A diverged run ends in an error about the loss, not in one about masks."""
    model = net("mlp")
    sparsifier = gossamer.Sparsifier(
        model, _chase(channel_sparsity=0, update_interval=4), total_steps=20
    )
    optimizer = optimizer_for("sgd", model)

    def spoil(step: int) -> None:
        if step == 8:
            with torch.no_grad():
                site = sparsifier.sites[0]
                site.weight[tuple(site.support.nonzero()[0])] = float("nan")

    with pytest.raises(ValueError, match="NaN") as error:
        train(model, sparsifier, optimizer, batches(20), before_step=spoil)
    _says(error, "learning rate")


# Checkpoints


def _state(**changes) -> dict:
    model = net("vgg")
    method = changes.pop("method", _chase())
    options = {"total_steps": 60, "example": images(2)} | changes
    return gossamer.Sparsifier(model, method, **options).state_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": gossamer.Static(density=0.2)}, ["method", "Static", "Chase"]),
        ({"method": _chase(density=0.3)}, ["density", "0.3", "0.2"]),
        ({"method": _chase(channel_sparsity=0.25)}, ["channel_sparsity", "0.25", "0.5"]),
        ({"total_steps": 80}, ["total_steps", "80", "60"]),
        ({"seed": 5}, ["seed", "5", "0"]),
        ({"cut": "end"}, ["cut", "end", "during"]),
        ({"exclude": ["features.3"]}, ["shapes", r"features\.3"]),
        ({"include": ["features.*"]}, ["shapes", "classifier"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(list(value)),
)
def test_a_checkpoint_of_other_settings(changes: dict, words: list[str]) -> None:
    model = net("vgg")
    sparsifier = gossamer.Sparsifier(model, _chase(), total_steps=60, example=images(2))
    with pytest.raises(ValueError, match="checkpoint") as error:
        sparsifier.load_state_dict(_state(**changes))
    _says(error, *words)
    assert sparsifier.step_count == 0


def test_a_checkpoint_of_another_model() -> None:
    sparsifier = gossamer.Sparsifier(net("basic"), _chase(), total_steps=60, example=images(2))
    with pytest.raises(ValueError, match="shapes"):
        sparsifier.load_state_dict(_state())


def test_what_is_no_checkpoint() -> None:
    sparsifier = gossamer.Sparsifier(net("vgg"), _chase(), total_steps=60, example=images(2))
    for state in ({}, net("vgg").state_dict(), {"step": 3}):
        with pytest.raises(ValueError, match="not a Sparsifier's state") as error:
            sparsifier.load_state_dict(state)
        _says(error, r"state_dict\(\)")
    for key in _state().keys() - {"locked", "refused", "collapse"}:  # older states lack these
        state = _state()
        del state[key]
        with pytest.raises(ValueError, match=key):
            sparsifier.load_state_dict(state)
        assert sparsifier.step_count == 0


def test_a_model_state_of_other_widths() -> None:
    """The model's state loaded before the Sparsifier's: PyTorch's own error names the shapes."""
    model = net("vgg")
    sparsifier = gossamer.Sparsifier(
        model, _chase(update_interval=4), total_steps=60, example=images(2)
    )
    train(model, sparsifier, optimizer_for("sgd", model), batches(20))
    fresh = net("vgg")
    other = gossamer.Sparsifier(fresh, _chase(update_interval=4), total_steps=60, example=images(2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict())
    assert other.step_count == 0
    other.load_state_dict(sparsifier.state_dict())
    fresh.load_state_dict(model.state_dict())
