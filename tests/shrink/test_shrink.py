"""shrink(): what is cut from a plain model with zeros in it, and that nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from nets import CLASSES, NETS, READERS, batches, evaluate, images, net, optimizer_for


def _columns(model: nn.Module, layer: str, channels: list[int], per_channel: int = 1) -> None:
    """Let `layer` read nothing of these input channels."""
    with torch.no_grad():
        for channel in channels:
            at = slice(channel * per_channel, (channel + 1) * per_channel)
            model.get_submodule(layer).weight[:, at] = 0


def _widths(shrunk: gossamer.Shrunk) -> dict[str, int]:
    return {row.layer: row.after for row in shrunk.report}


def _check(model: nn.Module, shrunk: gossamer.Shrunk) -> None:
    """The slim model computes the same, also on other data, and is made of plain layers."""
    assert shrunk.max_abs_difference < 1e-12
    for seed in (1, 2):
        x = images(5, seed=seed)
        expected = evaluate(model, x)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(evaluate(shrunk.model, x), expected, rtol=0, atol=1e-10 * scale)
    assert [type(m) for m in shrunk.model.modules()] == [type(m) for m in model.modules()]
    assert list(shrunk.model.state_dict()) == list(model.state_dict())
    for layer in shrunk.model.modules():  # attributes tell the truth
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[0] == layer.out_channels
            assert layer.weight.shape[1] * layer.groups == layer.in_channels
        elif isinstance(layer, nn.BatchNorm2d):
            assert len(layer.running_mean) == len(layer.weight) == layer.num_features


@pytest.mark.parametrize("name", NETS)
def test_unread_channels_go(name: str) -> None:
    model = net(name)
    dead = [0, 3, 4]
    for reader in READERS[name].values():
        _columns(model, reader.layer, dead, reader.per_channel)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shrunk = gossamer.shrink(model, images(3))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    _check(model, shrunk)
    for producer, reader in READERS[name].items():
        width = len(model.get_submodule(producer).weight)
        assert _widths(shrunk)[producer] == width - 3
        assert len(shrunk.model.get_submodule(producer).weight) == width - 3
        kept = [channel for channel in range(width) if channel not in dead]
        assert shrunk.plan.kept(f"{producer}.weight", 0).tolist() == kept
        if reader.depthwise:
            depthwise = shrunk.model.get_submodule(reader.depthwise)
            assert depthwise.groups == depthwise.in_channels == width - 3
    assert shrunk.removed == 3 * len(READERS[name])


def test_a_channel_that_is_read_stays_though_it_is_constant() -> None:
    """Zero weights before a norm still emit its shift; what reads it must go on reading it."""
    model = net("vgg")
    with torch.no_grad():
        model.features[0].weight[2] = 0
        model.features[0].bias[2] = 0
    shrunk = gossamer.shrink(model, images(3))
    assert _widths(shrunk)["features.0"] == 12
    _check(model, shrunk)


def test_one_reader_is_not_enough() -> None:
    """A channel of a residual stream goes only when every layer that reads it ignores it."""
    readers = ["layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"]
    for missing in [None, *readers]:
        model = net("basic")
        for layer in readers:
            if layer != missing:
                _columns(model, layer, [1, 5])
        shrunk = gossamer.shrink(model, images(3))
        assert _widths(shrunk)["layer1.0.conv2"] == (10 if missing is None else 12)
        _check(model, shrunk)
        if missing is None:
            for producer in ("layer1.0.conv2", "layer1.0.shortcut.0", "layer1.1.conv2"):
                assert len(shrunk.model.get_submodule(producer).weight) == 10
            for norm in ("layer1.0.bn2", "layer1.0.shortcut.1", "layer1.1.bn2"):
                assert shrunk.model.get_submodule(norm).num_features == 10


def test_chains_of_dead_channels_go_to_the_end() -> None:
    """Cutting one layer frees channels of the layer before, and so on back to the first."""
    model = net("vgg")
    with torch.no_grad():
        _columns(model, "classifier", list(range(10, 20)))  # features.10 keeps 0 to 9
        model.features[10].weight[:10, 8:] = 0  # which read only 0 to 7 of features.7
        model.features[7].weight[:8, 6:] = 0  # which read only 0 to 5 of features.3
        model.features[3].weight[:6, 4:] = 0  # which read only 0 to 3 of features.0
    shrunk = gossamer.shrink(model, images(3))
    assert _widths(shrunk) == {
        "features.0": 4,
        "features.3": 6,
        "features.7": 8,
        "features.10": 10,
        "classifier": CLASSES,
    }
    _check(model, shrunk)


def test_a_layer_that_reads_nothing_keeps_one_channel() -> None:
    model = net("vgg")
    with torch.no_grad():
        model.features[7].weight.zero_()
    shrunk = gossamer.shrink(model, images(3))
    assert _widths(shrunk)["features.3"] == 1
    assert _widths(shrunk)["features.0"] <= 12
    _check(model, shrunk)


@pytest.mark.parametrize("name", ["mobilenet", "conv_flatten_linear", "mlp"])
def test_all_channels_dead_but_one(name: str) -> None:
    """Also a depthwise convolution of one channel, which is an ordinary one to PyTorch."""
    model = net(name)
    for producer, reader in READERS[name].items():
        width = len(model.get_submodule(producer).weight)
        _columns(model, reader.layer, list(range(1, width)), reader.per_channel)
    shrunk = gossamer.shrink(model, images(3))
    assert all(_widths(shrunk)[producer] == 1 for producer in READERS[name])
    _check(model, shrunk)
    again = gossamer.shrink(shrunk.model, images(3), shrunk.plan)
    assert again.removed == 0
    fresh = net(name)
    shrunk.plan.apply(fresh)
    fresh.load_state_dict(shrunk.model.state_dict())
    _check(model, gossamer.Shrunk(fresh, shrunk.plan, shrunk.report, 0.0))


def test_widths_that_hardware_likes() -> None:
    """Dead channels stay where a width would be odd without them."""
    model = net("vgg")
    dead = {"features.0": 3, "features.3": 9, "features.7": 17, "features.10": 1}
    for producer, count in dead.items():
        _columns(model, READERS["vgg"][producer].layer, list(range(count)))
    shrunk = gossamer.shrink(model, images(3), multiple=4)
    assert {name: _widths(shrunk)[name] for name in dead} == {
        "features.0": 12,  # 9 are read, of 12
        "features.3": 8,  # 7 of 16
        "features.7": 4,  # 3 of 20
        "features.10": 20,  # 19 of 20
    }
    _check(model, shrunk)
    assert gossamer.shrink(shrunk.model, images(3), multiple=4).removed == 0
    with pytest.raises(ValueError, match="multiple=0"):
        gossamer.shrink(model, images(3), multiple=0)


@pytest.mark.parametrize("name", NETS)
def test_nothing_to_cut(name: str) -> None:
    model = net(name)
    shrunk = gossamer.shrink(model, images(3))
    assert shrunk.removed == 0
    assert len(shrunk.plan) == 0
    assert shrunk.max_abs_difference == 0
    assert shrunk.model is not model
    for (key, value), (other, same) in zip(
        model.state_dict().items(), shrunk.model.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(value, same)
    assert all(row.before == row.after for row in shrunk.report)


@pytest.mark.parametrize("name", NETS)
def test_shrinking_twice_is_shrinking_once(name: str) -> None:
    model = net(name)
    for reader in READERS[name].values():
        _columns(model, reader.layer, [1, 2], reader.per_channel)
    once = gossamer.shrink(model, images(3))
    twice = gossamer.shrink(once.model, images(3), once.plan)
    assert twice.removed == 0
    assert twice.plan.to_dict() == once.plan.to_dict()


def test_the_plan_goes_on_from_an_earlier_one() -> None:
    model, full = net("vgg"), net("vgg")
    _columns(model, "features.3", [0, 4])
    first = gossamer.shrink(model, images(3))
    _columns(first.model, "features.3", [1, 2])  # channels 2 and 3 of the full network
    second = gossamer.shrink(first.model, images(3), first.plan)
    assert second.plan.kept("features.0.weight", 0).tolist() == [1, 5, 6, 7, 8, 9, 10, 11]
    assert first.plan.kept("features.0.weight", 0).tolist() == [1, 2, 3, *range(5, 12)]  # untouched
    second.plan.apply(full)
    full.load_state_dict(second.model.state_dict())
    assert torch.equal(evaluate(full, images(3)), evaluate(second.model, images(3)))


@pytest.mark.parametrize("name", NETS)
def test_training_goes_on(name: str) -> None:
    """The slim model and the zeroed one train alike as long as the zeros are held."""
    model = net(name)
    for reader in READERS[name].values():
        _columns(model, reader.layer, [0, 2, 5], reader.per_channel)
    slim = gossamer.shrink(model, images(3)).model
    assert all(p.requires_grad and p.is_leaf for p in slim.parameters())
    optimizers = [optimizer_for("sgd", m) for m in (model, slim)]
    for x, y in batches(12):
        losses = []
        for network, optimizer in zip((model, slim), optimizers, strict=True):
            network.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            if network is model:
                for reader in READERS[name].values():
                    grad = network.get_submodule(reader.layer).weight.grad
                    for channel in (0, 2, 5):
                        at = channel * reader.per_channel
                        grad[:, at : at + reader.per_channel] = 0
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_modes_and_frozen_parameters_are_kept() -> None:
    model = net("vgg")
    _columns(model, "features.3", [0])
    model.train()
    model.features[1].eval()
    model.features[4].weight.requires_grad_(False)
    slim = gossamer.shrink(model, images(3)).model
    assert [m.training for m in slim.modules()] == [m.training for m in model.modules()]
    flags = [[p.requires_grad for p in m.parameters()] for m in (model, slim)]
    assert flags[0] == flags[1]


def test_float32_and_examples_of_every_kind() -> None:
    model = net("vgg", dtype=torch.float32)
    _columns(model, "features.3", [0, 7])
    x = images(3, dtype=torch.float32)
    for example in (x, x[:1], (x,), [x], {"x": x}):
        shrunk = gossamer.shrink(model, example)
        assert _widths(shrunk)["features.0"] == 10
        assert shrunk.max_abs_difference < 1e-5


def test_it_leaves_the_global_generator_and_the_gradient_mode_alone() -> None:
    model = net("vgg")
    _columns(model, "features.3", [0, 7])
    state = torch.get_rng_state()
    with torch.no_grad():  # tracing needs gradients of its own
        shrunk = gossamer.shrink(model, images(3))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert shrunk.removed == 2


class Caching(nn.Module):
    """Keeps a tensor from its first forward, as rotary embeddings and position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net("vgg")
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(1, 2, CLASSES, dtype=x.dtype)
        return self.body(x) * self.table


def test_a_model_that_caches_can_train_afterwards() -> None:
    """The check runs the model; what it leaves behind there must serve in training too."""
    model = Caching()
    _columns(model, "body.features.3", [0, 1])
    shrunk = gossamer.shrink(model, images(3))
    assert shrunk.removed == 2
    for network in (shrunk.model, model):
        network.train()
        F.cross_entropy(network(images(4)), torch.arange(4)).backward()
        assert all(p.grad is not None for p in network.parameters())


# The report


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(192, 10)
        self.norm = nn.LayerNorm(10)
        self.two = nn.Linear(10, 12)
        self.three = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(F.relu(self.norm(self.one(x.flatten(1)))))))


def test_report_and_table() -> None:
    torch.manual_seed(0)
    model = Normed().double()
    _columns(model, "two", [3])
    _columns(model, "three", [0, 1])
    shrunk = gossamer.shrink(model, images(3))
    rows = {row.layer: row for row in shrunk.report}
    assert list(rows) == ["one", "two", "three"]
    assert (rows["one"].before, rows["one"].after) == (10, 10)
    assert "norm (LayerNorm)" in rows["one"].note
    assert (rows["two"].before, rows["two"].after, rows["two"].note) == (12, 10, "")
    assert rows["three"].note
    assert shrunk.removed == 2
    table = shrunk.table().splitlines()
    assert len(table) == 4
    assert table[0].split() == ["layer", "before", "after", "note"]
    assert table[2].split() == ["two", "12", "10"]
    assert "LayerNorm" in table[1]


def test_a_cut_that_changes_outputs_is_taken_back_and_reported() -> None:
    class Rolled(nn.Module):
        """Channels change places by a number that does not know how many there are."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
            self.conv2 = nn.Conv2d(10, 6, 3, padding=1)
            self.fc = nn.Linear(6 * 64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv2(F.relu(self.conv1(x))))
            return self.fc(x.roll(2, 1).flatten(1))

    torch.manual_seed(0)
    model = Rolled().double()
    _columns(model, "conv2", [0, 1])
    _columns(model, "fc", [2], per_channel=64)
    shrunk = gossamer.shrink(model, images(3))
    rows = {row.layer: row for row in shrunk.report}
    assert (rows["conv1"].after, rows["conv1"].note) == (8, "")
    assert rows["conv2"].after == 6
    assert "changes the outputs" in rows["conv2"].note
    _check(model, shrunk)


def test_a_layer_that_the_example_does_not_reach() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net("mlp")
            self.spare = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Spare()
    _columns(model, "body.3", [0, 1])
    shrunk = gossamer.shrink(model, images(3))
    rows = {row.layer: row for row in shrunk.report}
    assert rows["body.1"].after == 22
    assert rows["spare"].note
    _check(model, shrunk)


def test_a_model_that_is_still_parametrized() -> None:
    model = net("vgg")
    gossamer.Sparsifier(model, gossamer.Static(), total_steps=10)
    with pytest.raises(ValueError, match=r"features\.0 is still parametrized.*finalize"):
        gossamer.shrink(model, images(2))


def test_a_copy_of_a_finalized_model() -> None:
    model = net("vgg")
    sparsifier = gossamer.Sparsifier(model, gossamer.Static(density=0.02), total_steps=10)
    twin = copy.deepcopy(model)
    gossamer.finalize(twin)
    shrunk = gossamer.shrink(twin, images(3))
    assert shrunk.removed > 0  # so few weights leave whole channels unread
    _check(twin, shrunk)
    sparsifier.finalize()
    assert gossamer.shrink(model, images(3)).plan.to_dict() == shrunk.plan.to_dict()
