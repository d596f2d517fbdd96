"""Networks that are narrow from the start: `widths_of`, `widths_match`, and the run they make."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import gossamer
from gossamer.channels import find_groups
from gossamer.measure.macs import account
from gossamer.shrink.file import read_plan
from gossamer.shrink.plan import Plan
from gossamer.train.config import TrainConfig
from gossamer.train.data import load_data
from gossamer.train.models import BasicBlock, build_model
from gossamer.train.narrowing import Widths, even_widths, is_narrower, read_widths
from gossamer.train.run import restore, train
from gossamer.train.source import Architecture, open_model

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

EXAMPLE = torch.zeros(2, 1, 8, 8)
DENSE = gossamer.Static(density=1.0)
LAYERS = (nn.Conv2d, nn.Linear)


def build(width=0.5):
    return build_model("vgg-small", num_classes=10, in_shape=(1, 8, 8), width=width)


def slim(path, removals, model=None):
    """A model file of a network without the first so many channels of each layer that is named."""
    about = Architecture(name="vgg-small", num_classes=10, in_shape=(1, 8, 8), width=0.5).metadata()
    model, about = (build(), about) if model is None else (copy.deepcopy(model), {})
    groups = {group.name: group for group in find_groups(model, EXAMPLE)}
    with torch.no_grad():
        for layer, count in removals.items():
            for part in groups[layer].consumers:
                weight = model.get_parameter(part.tensor).movedim(part.dim, 0)
                weight[part.index[:count].flatten()] = 0
    cut = gossamer.shrink(model, EXAMPLE)
    gossamer.save(path, cut.model, cut.plan, about)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Widths 16 16 32 32 64 64, but 4 fewer in the first layer, 20 and 50 fewer in two others."""
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    return slim(path, {"features.0": 4, "features.10": 20, "features.17": 50})


def widths(model):
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


# ------------------------------------------------------------------ widths and weights


def test_it_has_the_widths_and_weights_drawn_for_them(file):
    torch.manual_seed(0)
    full = build()
    found = read_widths(file, full, EXAMPLE, network=("vgg-small", 0.5))
    assert found.plan == read_plan(file)
    torch.manual_seed(0)
    narrow = found.narrow(build(), EXAMPLE, built_in=True)
    assert widths(narrow) == [12, 16, 32, 12, 64, 14]
    assert widths(full) == [16, 16, 32, 32, 64, 64]
    # He's law by the outputs that there are now; the classifier's bound by its inputs.
    for index, outputs in ((10, 12), (14, 64), (17, 14)):
        weight = narrow.features[index].weight.detach()
        assert float(weight.std()) == pytest.approx((2 / (9 * outputs)) ** 0.5, rel=0.1)
    limit = 14**-0.5
    assert 0.9 * limit < float(narrow.classifier.weight.detach().abs().max()) <= limit
    # None of them is what a sparse run of the same seed started from.
    kept = found.plan.kept("features.10.weight", 0)
    assert not torch.isin(narrow.features[10].weight, full.features[10].weight[kept]).any()


def test_a_factorys_weights_keep_the_size_of_the_outputs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = Plan.from_dict(
        {
            "format": "gossamer-plan",
            "version": 2,
            "cuts": [
                {
                    "of": 8,
                    "kept": [0, 5],
                    "places": [["0.weight", 0], ["0.bias", 0], ["2.weight", 1]],
                }
            ],
            "settings": [],
        }
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = Widths("there", "", plan).narrow(model, torch.zeros(2, 4), built_in=False)
    assert torch.equal(found[0].weight, before["0.weight"][[0, 5]])
    assert torch.allclose(found[2].weight, 2.0 * before["2.weight"][:, [0, 5]])  # sqrt(8 / 2)
    for name in ("2.bias", "4.weight", "4.bias"):
        assert torch.equal(found.get_parameter(name), before[name])


# ------------------------------------------------------------------ uniform widths


def test_even_widths_by_hand():
    ladders = [(8, 6, 4, 2), (4, 3, 2, 1)]

    def price(widths):
        return widths[0] * widths[1]

    # 8 4, 6 4, 6 3, 4 3, 4 2, ...: the largest share first, the first group where they are equal.
    targets = (40, 32, 29, 20, 13, 11, 2)
    found = [even_widths((8, 4), ladders, price, target, "MACs") for target in targets]
    assert found == [[8, 4], [8, 4], [8, 4], [6, 3], [4, 3], [4, 3], [2, 1]]
    with pytest.raises(ValueError, match="cannot come down to 1 MACs: as narrow as it can be it"):
        even_widths((8, 4), ladders, price, 1, "MACs")


def test_uniform_widths_have_the_macs(file):
    full = build()
    settings = {"network": ("vgg-small", 0.5), "match": "macs"}
    even = read_widths(file, full, EXAMPLE, **settings).narrow(build(), EXAMPLE, built_in=True)
    goal = account(open_model(file).model, EXAMPLE).macs_executed
    assert account(even, EXAMPLE).macs_executed == pytest.approx(goal, rel=0.02)
    shares = [now / before for now, before in zip(widths(even), widths(full), strict=True)]
    assert 0.5 < min(shares) <= max(shares) <= min(shares) + 1 / 8 < 1
    kept = read_widths(file, full, EXAMPLE, **settings, keep_channels=("features.7",))
    assert widths(kept.narrow(build(), EXAMPLE, built_in=True))[2] == 32


@pytest.mark.parametrize("cut", [False, True])
def test_uniform_widths_have_the_non_zeros(cut, tmp_path):
    """Skip paths are narrowed too, and nothing has to have been cut."""
    torch.manual_seed(0)
    full = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        *(BasicBlock(32, 32, 1) for _ in range(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    path = slim(tmp_path / "slim.safetensors", {"1.conv1": 8} if cut else {}, full)
    found = gossamer.load(path, copy.deepcopy(full))
    with torch.no_grad():
        for block in found[1:3]:
            block.conv1.weight[:, ::2] = block.conv2.weight[::2] = 0
    gossamer.save(path, found, read_plan(path))
    goal = account(found, EXAMPLE).nonzeros
    even = read_widths(path, full, EXAMPLE, network=("my:net", 1.0), match="nonzeros")
    small = even.narrow(copy.deepcopy(full), EXAMPLE, built_in=False)
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(goal, rel=0.03)
    left = [small[0].out_channels, *(small[index].conv1.out_channels for index in (1, 2))]
    assert max(left) - 4 <= min(left) <= max(left) < 32
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("skip", [False, True])
def test_skip_paths_are_narrowed_where_they_were(skip, tmp_path):
    full = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        *(BasicBlock(32, 32, 1) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    before = full[1].conv1.weight.detach().clone()
    removals = {f"{block}.conv1": 9 for block in (1, 2)} | ({"0": 3} if skip else {})
    path = slim(tmp_path / "slim.safetensors", removals, full)
    even = read_widths(path, full, EXAMPLE, network=("my:net", 1.0), match="macs").plan
    lost = {group.name for group in find_groups(full, EXAMPLE) if is_narrower(group, even)}
    assert lost == {"1.conv1", "2.conv1", "3.conv1"} | ({"0"} if skip else set())
    assert torch.equal(full[1].conv1.weight, before)  # it is only looked at


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (("vgg-small", 1.0), "has the widths of a vgg-small of width 0.5, and this is to be a "),
        (("resnet20", 0.5), "a resnet20 of width 0.5: give --model vgg-small --width 0.5"),
    ],
)
def test_another_network(network, message, file):
    with pytest.raises(ValueError, match=message):
        read_widths(file, build(), EXAMPLE, network=network)


def test_what_has_no_widths(tmp_path, file):
    network = ("vgg-small", 0.5)
    with pytest.raises(ValueError, match=r"nothing was cut from .*whole\.safetensors: its network"):
        read_widths(slim(tmp_path / "whole.safetensors", {}), build(), EXAMPLE, network=network)
    with pytest.raises(FileNotFoundError, match="there is no file or run folder none"):
        read_widths("none", build(), EXAMPLE, network=network)
    with pytest.raises(ValueError, match="widths_match=macs: say with widths_of of which network"):
        TrainConfig(widths_match="macs")
    dense = build()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(0.1)
    gossamer.save(tmp_path / "dense.safetensors", dense)
    with pytest.raises(ValueError, match=r"no weight of .*dense\.safetensors is zero: a dense"):
        read_widths(
            str(tmp_path / "dense.safetensors"),
            build(),
            EXAMPLE,
            network=network,
            match="nonzeros",
        )
    bare = tmp_path / "bare.safetensors"  # does not say what it is
    gossamer.save(bare, open_model(file).model, read_plan(file))
    with pytest.raises(ValueError, match=r"bare\.safetensors was made from another network: featu"):
        read_widths(str(bare), build(width=0.25), EXAMPLE, network=("vgg-small", 0.25))


# ------------------------------------------------------------------ runs


def tiny(folder, file, **settings):
    defaults = {"model": "vgg-small", "width": 0.5, "epochs": 2, "batch_size": 128, "lr": 0.05}
    defaults |= {"method": "static", "widths_of": file}
    return TrainConfig(**{**defaults, "out": str(folder), **settings})


class Stop:
    """Breaks training off in the second epoch."""

    def __getattr__(self, _):
        return lambda *_: None

    def stepped(self, epoch, step, figures):
        if (epoch, step) == (1, 3):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    """A dense network of those widths, trained from scratch: its configuration and its summary.

    It was broken off, and what its widths came from was gone when it went on.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("narrow")
    shutil.copy(file, folder / "copy.safetensors")
    config = tiny(folder / "run", str(folder / "copy.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        train(config, DENSE, watcher=Stop())
    (folder / "copy.safetensors").unlink()
    return config, train(config, DENSE, resume=True)


def test_a_run_is_of_the_narrow_network(trained, file):
    config, summary = trained
    folder = config.folder
    slim = open_model(file)
    found, size = summary["slim"], account(slim.model, EXAMPLE)
    assert found["macs_executed"] == found["macs_sparse"] == size.macs_executed
    steps = 2 * (load_data("digits", val_fraction=0.1, seed=0).train.labels.numel() // 128)
    assert found["macs_training"] == 3 * steps * 128 * size.macs_executed
    weights = [module.weight.numel() for module in slim.model.modules() if type(module) in LAYERS]
    full = [module.weight.numel() for module in build().modules() if type(module) in LAYERS]
    assert summary["sparse"]["density"] == pytest.approx(sum(weights) / sum(full))
    assert found["channel_sparsity"] == pytest.approx(74 / (16 + 16 + 32 + 32 + 64 + 64))
    assert summary["reference"]["macs_executed"] == account(build(), EXAMPLE).macs_executed
    assert found["max_abs_difference"] < 1e-4 < found["output_scale"]
    assert "had the widths of" in (folder / "report.md").read_text()
    # The file holds all that was cut, and the run can be looked at.
    again = gossamer.load(folder / "model.safetensors", build())
    assert widths(again) == widths(slim.model)
    assert widths(restore(folder).sparsifier.model) == widths(slim.model)


def test_a_run_stays_with_its_widths(trained, file):
    config, _ = trained
    folder = config.folder
    assert json.loads((folder / "widths.json").read_text())["source"] == config.widths_of
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"says widths_of: .*, and now it is None"):
        train(replace(config, widths_of=None), DENSE, resume=True)
    other = slim(folder.parent / "other.safetensors", {"features.0": 4})
    with pytest.raises(ValueError, match=r"and .*other\.safetensors holds another network now"):
        train(replace(config, widths_of=other), DENSE, resume=True)


def test_a_narrow_network_can_be_trained_sparse_and_has_a_full_twin(file, tmp_path):
    method = gossamer.Chase(density=0.3, channel_sparsity=0.3, min_channels=2)
    settings = {"epochs": 1, "batch_size": 64, "baseline": True, "widths_match": "macs"}
    config = tiny(tmp_path / "run", file, method="chase", **settings)
    summary = train(config, method)
    even = Widths.from_dict(json.loads((tmp_path / "run" / "widths.json").read_text()), "it").plan
    plan = read_plan(tmp_path / "run" / "model.safetensors")
    kept = [each.kept("features.17.weight", 0) for each in (even, plan)]
    assert torch.isin(kept[1], kept[0]).all()
    assert len(kept[1]) < len(kept[0]) < 64
    assert summary["dense"]["macs_executed"] == summary["reference"]["macs_executed"]
    assert summary["slim"]["max_abs_difference"] < 1e-4
    gossamer.load(tmp_path / "run" / "model.safetensors", build())
