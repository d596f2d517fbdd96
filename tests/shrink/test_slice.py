"""Slicing in place and taking it back; the plan as data."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.channels import Cut, Setting, find_groups
from gossamer.shrink.plan import Plan
from gossamer.shrink.slice import Refusal, apply_cuts, cuts_for, size_of
from nets import NETS, READERS, batches, evaluate, images, net, optimizer_for, train

CHASE = gossamer.Chase(density=0.3, channel_sparsity=0.3, update_interval=4, min_channels=2)


def _cut(tensor: str, dim: int, keep: list[int], width: int) -> Cut:
    return Cut(tensor, dim, torch.tensor(keep), width)


def _photograph(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Everything a cut may touch, as copies, and the identity of the parameters."""
    taken = {
        "tensors": {key: value.detach().clone() for key, value in model.state_dict().items()},
        "ids": [id(parameter) for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": [
            {k: v for k, v in vars(module).items() if isinstance(v, (int, bool, str, tuple))}
            for module in model.modules()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }
    if optimizer is not None:
        taken["state"] = [
            {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[p].items()}
            for p in model.parameters()
        ]
    return taken


def _equal(one, other) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


# One layer at a time


LAYERS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, int], dict[str, int]]] = {
    # layer, tensors with the dimension that is cut, attributes
    "linear out": (
        lambda: nn.Linear(5, 6),
        {"weight": 0, "bias": 0},
        {"out_features": 3, "in_features": 5},
    ),
    "linear in": (
        lambda: nn.Linear(6, 5),
        {"weight": 1},
        {"out_features": 5, "in_features": 3},
    ),
    "linear without bias": (
        lambda: nn.Linear(5, 6, bias=False),
        {"weight": 0},
        {"out_features": 3},
    ),
    "conv1d out": (
        lambda: nn.Conv1d(4, 6, 3),
        {"weight": 0, "bias": 0},
        {"out_channels": 3, "in_channels": 4, "groups": 1},
    ),
    "conv2d in": (
        lambda: nn.Conv2d(6, 4, 3),
        {"weight": 1},
        {"out_channels": 4, "in_channels": 3, "groups": 1},
    ),
    "conv3d out": (
        lambda: nn.Conv3d(2, 6, 1, bias=False),
        {"weight": 0},
        {"out_channels": 3},
    ),
    "depthwise": (
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        {"weight": 0, "bias": 0},
        {"out_channels": 3, "in_channels": 3, "groups": 3},
    ),
    "batch norm": (
        lambda: nn.BatchNorm2d(6),
        {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0},
        {"num_features": 3},
    ),
    "batch norm without affine": (
        lambda: nn.BatchNorm1d(6, affine=False),
        {"running_mean": 0, "running_var": 0},
        {"num_features": 3},
    ),
    "batch norm without statistics": (
        lambda: nn.BatchNorm3d(6, track_running_stats=False),
        {"weight": 0, "bias": 0},
        {"num_features": 3},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer(name: str) -> None:
    make, dims, attributes = LAYERS[name]
    model = nn.Sequential(make())
    layer = model[0]
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], 0.1, 0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
        optimizer.state[parameter]["step"] = torch.tensor(3.0)
    before = _photograph(model, optimizer)
    full = copy.deepcopy(before)
    keep = torch.tensor([0, 2, 5])
    cuts = [Cut(f"0.{key}", dim, keep, 6) for key, dim in dims.items()]
    assert all(size_of(model, cut.tensor, cut.dim) == 6 for cut in cuts)

    undo = apply_cuts(model, cuts, optimizer)
    assert all(size_of(model, cut.tensor, cut.dim) == 3 for cut in cuts)
    for key, value in layer.state_dict().items():
        old = full["tensors"][f"0.{key}"]
        assert torch.equal(value, old.index_select(dims[key], keep) if key in dims else old), key
    assert {key: getattr(layer, key) for key in attributes} == attributes
    for (key, parameter), grad, state in zip(
        layer.named_parameters(), full["grads"], full["state"], strict=True
    ):
        if key in dims:
            grad = grad.index_select(dims[key], keep)
            buffer = state["momentum_buffer"].index_select(dims[key], keep)
        else:
            buffer = state["momentum_buffer"]
        assert torch.equal(parameter.grad, grad)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)
        assert float(optimizer.state[parameter]["step"]) == 3.0
    assert [id(p) for p in model.parameters()] == full["ids"]

    undo()
    assert _equal(_photograph(model, optimizer), before)


@pytest.mark.parametrize(
    ("layer", "tensor"),
    [
        (nn.Conv2d(6, 6, 3, groups=3), "weight"),  # a group and a half
        (nn.MultiheadAttention(6, 2, add_bias_kv=True), "in_proj_weight"),
        (nn.MultiheadAttention(6, 2, add_zero_attn=True), "in_proj_weight"),
    ],
    ids=str,
)
def test_layers_that_exist_in_no_such_width_are_refused(layer: nn.Module, tensor: str) -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 6), "odd": layer})
    before = _photograph(model)
    size = getattr(layer, tensor).shape[0]
    keep = list(range(size // 2))
    cuts = [_cut("head.weight", 0, [0, 1], 6), _cut(f"odd.{tensor}", 0, keep, size)]
    with pytest.raises(Refusal):
        apply_cuts(model, cuts)
    assert _equal(_photograph(model), before)  # the first cut is taken back
    assert type(layer) in (nn.Conv2d, nn.MultiheadAttention)


# Whole networks, while they train


@pytest.mark.one_in(3)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", NETS)
def test_a_cut_taken_back_leaves_no_trace(name: str, optimizer: str) -> None:
    """Training goes on bit for bit as if the cut had never been made."""
    data = batches(16)
    runs = []
    for disturb in (False, True):
        model = net(name)
        sparsifier = gossamer.Sparsifier(
            model, CHASE, total_steps=200, example=images(2), cut="end"
        )
        opt = optimizer_for(optimizer, model)
        losses = train(model, sparsifier, opt, data[:6])
        loss = nn.functional.cross_entropy(model(data[6][0]), data[6][1])
        loss.backward()  # gradients are there, and the graph of `loss` is alive
        if disturb:
            before = _photograph(model, opt)
            removals = [
                (pool.group, torch.arange(0, pool.group.channels, 2)) for pool in sparsifier.pools
            ]
            undo = apply_cuts(model, cuts_for(model, removals), opt)
            evaluate(model, images(2))
            undo()
            assert _equal(_photograph(model, opt), before)
        opt.step()
        sparsifier.step(opt)
        opt.zero_grad()
        losses += train(model, sparsifier, opt, data[7:])
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert _equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("name", NETS)
def test_masks_and_hooks_follow_the_weight(name: str) -> None:
    model = net(name)
    sparsifier = gossamer.Sparsifier(model, CHASE, total_steps=200, example=images(2), cut="end")
    opt = optimizer_for("sgd", model)
    train(model, sparsifier, opt, batches(3))
    calls = []
    site = sparsifier.pools[0].producer
    site.weight.register_hook(lambda gradient: calls.append(gradient.shape))
    removals = [(pool.group, [0]) for pool in sparsifier.pools]
    apply_cuts(model, cuts_for(model, removals), opt)
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    assert calls == [site.weight.shape]
    for other in sparsifier.sites:
        weight = other.weight
        assert weight.shape == other.masked.mask.shape
        assert other.masked.live_out.flatten().shape == weight.shape[:1]
        assert other.masked.live_in.flatten().shape == weight.shape[1:2]
        assert not weight.grad[other.masked.mask == 0].any()  # the mask's hook still runs
        assert opt.state[weight]["momentum_buffer"].shape == weight.shape


def test_channels_last_survives_a_cut_and_its_undoing() -> None:
    model = net("vgg").to(memory_format=torch.channels_last)
    conv = model.features[3]
    groups = {group.name: group for group in find_groups(model, images(2))}
    undo = apply_cuts(model, cuts_for(model, [(groups["features.0"], [1, 2])]))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    undo()
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.shape == (16, 12, 3, 3)


def test_frozen_parameters_stay_frozen() -> None:
    model = net("vgg")
    model.features[1].weight.requires_grad_(False)
    groups = {group.name: group for group in find_groups(model, images(2))}
    apply_cuts(model, cuts_for(model, [(groups["features.0"], [0, 5])]))
    assert not model.features[1].weight.requires_grad
    assert model.features[0].weight.requires_grad
    assert model.features[1].weight.grad is None


def test_cuts_for_merges_what_falls_on_one_layer() -> None:
    model = net("vgg")
    groups = {group.name: group for group in find_groups(model, images(2))}
    cuts = cuts_for(model, [(groups["features.0"], [0]), (groups["features.3"], torch.tensor([3]))])
    by_place = {(cut.tensor, cut.dim): cut for cut in cuts}
    assert len(by_place) == len(cuts) == 14
    assert by_place["features.3.weight", 1].keep.tolist() == list(range(1, 12))
    assert by_place["features.3.weight", 0].keep.tolist() == [c for c in range(16) if c != 3]
    assert by_place["features.3.weight", 0].width == 16
    apply_cuts(model, cuts)
    assert model.features[3].weight.shape == (15, 11, 3, 3)
    assert cuts_for(model, [(groups["features.7"], [])]) == []


def test_a_layer_never_loses_all_its_channels() -> None:
    model = net("vgg")
    groups = {group.name: group for group in find_groups(model, images(2))}
    with pytest.raises(ValueError, match=r"features\.0\.weight would lose all of its 12"):
        cuts_for(model, [(groups["features.0"], list(range(12)))])


def test_optimizer_state_of_another_shape_is_refused_whole() -> None:
    model = net("vgg")
    optimizer = optimizer_for("sgd", model)
    loss = model(images(2)).sum()
    loss.backward()
    optimizer.step()
    optimizer.state[model.features[7].weight]["row_mean"] = torch.zeros(20, dtype=torch.float64)
    before = _photograph(model, optimizer)
    groups = {group.name: group for group in find_groups(model, images(2))}
    cuts = cuts_for(model, [(groups["features.0"], [1]), (groups["features.3"], [1])])
    with pytest.raises(ValueError, match=r"features\.7.*'row_mean'.*\(20,\).*cut=\"end\""):
        apply_cuts(model, cuts, optimizer)
    assert _equal(_photograph(model, optimizer), before)


# The plan


def _random_plan(model: nn.Module, name: str, rounds: int) -> Plan:
    """Cuts made in rounds on `model`, and the plan of them."""
    plan = Plan()
    groups = {group.name: group for group in find_groups(model, images(2))}
    generator = torch.Generator().manual_seed(1)
    for _ in range(rounds):
        removals = []
        for producer in READERS[name]:
            group = groups[producer]
            gone = torch.randperm(group.channels, generator=generator)[: group.channels // 4]
            removals.append((group, gone.sort().values))
        cuts = cuts_for(model, removals)
        apply_cuts(model, cuts)
        plan.record(cuts)
        groups = {producer: groups[producer].after(cuts) for producer in READERS[name]}
    return plan


@pytest.mark.parametrize("name", NETS)
def test_a_plan_of_several_rounds_rebuilds_the_network(name: str) -> None:
    model, fresh = net(name), net(name)
    x = images(3)
    plan = _random_plan(model, name, 3)
    assert len(plan) > 0
    made = plan.changes
    plan.apply(fresh)
    assert {(cut.tensor, cut.dim) for cut in made} == {(c.tensor, c.dim) for c in plan.changes}
    assert _equal(dict(fresh.state_dict()), dict(model.state_dict()))
    assert torch.equal(evaluate(fresh, x), evaluate(model, x))
    again = net(name)
    Plan.from_json(plan.to_json()).apply(again)
    assert torch.equal(evaluate(again, x), evaluate(model, x))


def test_kept_positions_are_numbered_as_in_the_full_network() -> None:
    plan = Plan()
    plan.record([_cut("a", 0, [0, 2, 3, 5], 6)])
    plan.record([_cut("a", 0, [1, 3], 4), _cut("b", 1, [0], 2)])
    assert plan.kept("a", 0).tolist() == [2, 5]
    assert plan.kept("b", 1).tolist() == [0]
    assert plan.kept("a", 1) is None
    assert len(plan) == 2
    assert {(c.tensor, c.dim, c.width) for c in plan.changes} == {("a", 0, 6), ("b", 1, 2)}


def test_plans_are_equal_when_they_keep_the_same_positions() -> None:
    one, other, different = Plan(), Plan(), Plan()
    one.record([_cut("a", 0, [0, 2], 3), _cut("b", 1, [1], 2)])
    other.record([_cut("b", 1, [1], 2)])
    other.record([_cut("a", 0, [0, 2], 3)])
    different.record([_cut("a", 0, [0, 1], 3), _cut("b", 1, [1], 2)])
    assert one == other  # in whatever order the cuts came
    assert one != different
    assert one == Plan.from_json(one.to_json())
    assert Plan() == Plan()
    assert one != "a plan"


def test_a_plan_is_plain_data() -> None:
    plan = Plan()
    plan.record([_cut("a.b", 0, [0, 2], 3), _cut("a.c", 0, [0, 2], 3)])
    plan.record([Setting("a", "heads", 4, 3)])
    plan.record([Setting("a", "heads", 3, 1)])
    data = plan.to_dict()
    assert json.loads(plan.to_json()) == data
    assert data["cuts"] == [{"of": 3, "kept": [0, 2], "places": [["a.b", 0], ["a.c", 0]]}]
    assert data["settings"] == [{"module": "a", "attribute": "heads", "of": 4, "now": 1}]
    assert Plan.from_dict(data) == plan


def _damaged(**changes) -> dict:
    row = {"of": 12, "kept": [0, 1], "places": [["features.0.weight", 0]]} | changes
    row = {key: value for key, value in row.items() if value is not ...}
    return {"format": "gossamer-plan", "version": 2, "cuts": [row], "settings": []}


def _set(**changes) -> dict:
    row = {"module": "attention", "attribute": "heads", "of": 4, "now": 2} | changes
    return {"format": "gossamer-plan", "version": 2, "cuts": [], "settings": [row]}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        "plan",
        {"format": "gossamer-plan", "version": 1, "cuts": [], "settings": []},
        {"format": "other", "version": 2, "cuts": [], "settings": []},
        {"format": "gossamer-plan", "version": 2},
        {"format": "gossamer-plan", "version": 2, "cuts": [3], "settings": []},
        _damaged(places=["features.0.weight", 0]),
        _damaged(places=[["features.0.weight", -1]]),
        _damaged(places=[["features.0.weight", "0"]]),
        _damaged(places=[[3, 0]]),
        _set(of="4"),
        _set(now=0),
        _set(now=2.0),
        _set(now=None),
        _damaged(of="12"),
        _damaged(of=1),
        _damaged(of=...),
        _damaged(kept=[]),
        _damaged(kept=[1, 0]),
        _damaged(kept=[1, 1]),
        _damaged(kept=[-1, 0]),
        _damaged(kept=[0, 12]),
        _damaged(kept=["0", "1"]),
        _damaged(kept=[0.5, 1.5]),
        _damaged(kept=3),
        _damaged(kept=...),
        _damaged(places=...),
    ],
    ids=str,
)
def test_what_is_no_plan(data) -> None:
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_dict(data)
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00"])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (_damaged(places=[["features.99.weight", 0]]), r"features\.99\.weight.*Vgg"),
        (_damaged(of=13), r"features\.0\.weight is 12 wide.*13"),
        (_damaged(places=[["features.2.weight", 0]]), r"features\.2\.weight"),
        (_damaged(places=[["features.1.weight", 1]]), r"features\.1\.weight"),
        (_set(), r"attention\.heads"),
        (_set(module="features", attribute="training", of=1), r"features\.training is True"),
        (_set(module="features.0", attribute="out_channels"), r"out_channels is 12 wide"),
    ],
    ids=str,
)
def test_a_plan_of_another_model(row: dict, words: str) -> None:
    model = net("vgg")
    before = _photograph(model)
    row["cuts"].insert(0, {"of": 16, "kept": [0], "places": [["features.3.weight", 0]]})
    with pytest.raises(ValueError, match=words):
        Plan.from_dict(row).apply(model)
    assert _equal(_photograph(model), before)


def test_a_plan_is_applied_once() -> None:
    model = net("vgg")
    plan = _random_plan(net("vgg"), "vgg", 1)
    plan.apply(model)
    with pytest.raises(ValueError, match=r"features\.\d+\.\w+ is \d+ wide"):
        plan.apply(model)
