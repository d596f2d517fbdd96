"""The target of learned thresholds: the shifts by hand, and runs that end where they were told."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer import control
from gossamer.control import LAYER_FLOOR, looked_at, planned_density, threshold_shifts

METHODS = {
    "dst": gossamer.DST(target_density=0.2),
    "dst-layer": gossamer.DST(target_density=0.2, granularity="layer", clamp=True),
    "str": gossamer.STR(s_init=-3.0, target_density=0.2),
    "autosparse": gossamer.AutoSparse(s_init=-3.0, target_density=0.2, granularity="row"),
}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def run(
    method: gossamer.Method, steps: int = 80, weight_decay: float = 1e-3
) -> tuple[gossamer.Sparsifier, list[float]]:
    """A trained network's Sparsifier, and the density after every step."""
    torch.manual_seed(0)
    model = net()
    sparsifier = gossamer.Sparsifier(model, method, total_steps=steps)
    optimizer = torch.optim.SGD(
        sparsifier.parameter_groups(), lr=0.05, momentum=0.9, weight_decay=weight_decay
    )
    x = torch.randn(64, 16)
    y = x[:, :4].argmax(1)
    densities = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y) + sparsifier.penalty()
        loss.backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
        densities.append(sparsifier.density)
    return sparsifier, densities


def test_the_plan_is_cubic_and_holds() -> None:
    assert planned_density(0, 0.1, 0.75) == 1
    assert planned_density(0.375, 0.1, 0.75) == pytest.approx(0.1 + 0.9 / 8)
    assert planned_density(0.75, 0.1, 0.75) == planned_density(1, 0.1, 0.75) == 0.1


def test_one_shift_for_all_layers_leaves_the_count_asked_for() -> None:
    margins = [torch.tensor([-1.0, 0.2, 0.5, 3.0]), torch.tensor([0.1, 0.4, 0.6, 2.0])]
    # Four of eight stay: the line is drawn between 0.4 and 0.5.
    assert threshold_shifts(margins, 0.5) == pytest.approx([0.45, 0.45])
    # Six stay, where three lie above: thresholds go down.
    lowered = threshold_shifts([margins[0] - 1, margins[1] - 1], 0.75)
    assert lowered == pytest.approx([-0.85, -0.85])
    assert threshold_shifts(margins, 1.0) == [0, 0]


def test_a_layer_keeps_its_floor_and_the_others_pay_for_it() -> None:
    rich, poor = torch.linspace(10, 20, 90), torch.linspace(0, 1, 10)
    density = 0.2
    shifts = threshold_shifts([rich, poor], density)
    floor = math.ceil(LAYER_FLOOR * density * 10)
    assert floor == 1
    assert int((poor > shifts[1]).sum()) == floor
    assert int((rich > shifts[0]).sum()) == 20 - floor


def test_looks_take_turns_and_the_last_sees_all() -> None:
    weights = [torch.zeros(1000, 300), torch.zeros(1000, 500), torch.zeros(2, 1)]
    stride = 800_002 // control._SAMPLE
    assert stride == 3
    seen = [torch.zeros(weight.numel()) for weight in weights]
    for step in range(1, stride + 1):
        for count, index in zip(seen, looked_at(weights, step, 100), strict=True):
            assert index is not None
            assert index.numel() >= 1
            count[index] += 1
    assert all(bool((count == 1).all()) for count in seen[:2])
    assert bool((seen[2] >= 1).all())
    assert looked_at(weights, 100, 100) == [None] * 3
    assert looked_at(weights[2:], 1, 100) == [None]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_follows_the_plan_to_its_target(name: str) -> None:
    method = METHODS[name]
    sparsifier, densities = run(method)
    total = sum(site.weight.numel() for site in sparsifier.sites)
    assert densities[-1] == pytest.approx(0.2, abs=1 / total)
    reached = [planned_density(step / 80, 0.2, 0.75) for step in range(1, 81)]
    # A density below the plan is left alone only while all weights may stay.
    assert densities == pytest.approx(reached, abs=2 / total)
    for site in sparsifier.sites:
        assert site.nonzeros >= LAYER_FLOOR * 0.2 * site.weight.numel()
    model = sparsifier.finalize()
    nonzero = sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "weight" in n)
    assert nonzero == round(0.2 * total)


@pytest.mark.parametrize("name", ["dst", "str"])
def test_looking_at_samples_ends_as_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_SAMPLE", 200)
    sparsifier, densities = run(METHODS[name])
    total = sum(site.weight.numel() for site in sparsifier.sites)
    assert total // 200 > 1
    assert densities[-1] == pytest.approx(0.2, abs=1 / total)
    assert densities[70] == pytest.approx(0.2, rel=0.2)  # a look at 200 weights


def test_between_shifts_nothing_is_held() -> None:
    _, densities = run(gossamer.STR(s_init=-3.0, target_density=0.2, control_interval=7))
    plan = [planned_density(step / 80, 0.2, 0.75) for step in range(1, 81)]
    close = [abs(d - p) < 3e-3 for d, p in zip(densities, plan, strict=True)]
    assert all(close[step - 1] for step in range(7, 80, 7))
    assert close[-1]  # the last step shifts, due or not
    assert not all(close[:40])


def test_the_target_takes_the_place_of_the_penalty_and_of_resets() -> None:
    method = gossamer.DST(target_density=0.05, alpha=1.0, reset_below=0.5)
    sparsifier, densities = run(method)
    assert sparsifier.penalty().item() == 0
    assert densities[-1] == pytest.approx(0.05, abs=1e-3)


def test_recurrent_matrices_end_at_the_target_too() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 12, batch_first=True)
    sparsifier = gossamer.Sparsifier(lstm, gossamer.DST(target_density=0.25), total_steps=12)
    optimizer = torch.optim.Adam(sparsifier.parameter_groups(), lr=1e-2)
    for _ in range(12):
        out, _ = lstm(torch.randn(8, 5, 6))
        out.square().mean().backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    assert len(sparsifier.sites) == 2
    assert sparsifier.density == pytest.approx(0.25, abs=1e-3)


def test_weights_that_no_threshold_reaches_are_told_of() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.fill_(5.0)
    method = gossamer.STR(s_init=-3.0, target_density=0.1)
    sparsifier = gossamer.Sparsifier(layer, method, total_steps=2)
    optimizer = torch.optim.SGD(sparsifier.parameter_groups(), lr=1e-3)
    layer(torch.randn(4, 8)).sum().backward()
    sparsifier.step(optimizer)
    told = r"target_density=0\.1 was asked for.* ends at 1"
    with pytest.warns(UserWarning, match=told) as warnings:
        sparsifier.step(optimizer)
    assert warnings[0].filename == __file__


def test_a_resumed_run_ends_alike() -> None:
    method = METHODS["dst"]

    def steps(
        model: nn.Module, sparsifier: gossamer.Sparsifier, optimizer: torch.optim.SGD, count: int
    ) -> None:
        for _ in range(count):
            seed = sparsifier.step_count
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
            F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()

    def start() -> tuple[nn.Module, gossamer.Sparsifier, torch.optim.SGD]:
        torch.manual_seed(0)
        model = net()
        sparsifier = gossamer.Sparsifier(model, method, total_steps=40)
        return model, sparsifier, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    whole = start()
    steps(*whole, 17)
    states = [copy.deepcopy(part.state_dict()) for part in whole]
    steps(*whole, 23)
    again = start()
    again[1].load_state_dict(states[1])
    again[0].load_state_dict(states[0])
    again[2].load_state_dict(states[2])
    steps(*again, 23)
    for one, other in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cls", [gossamer.DST, gossamer.STR, gossamer.AutoSparse])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"target_density": 0.0}, r"target_density=0\.0 is out of range: give a value in \(0, 1\]"),
        ({"target_density": 90}, r"target_density=90 is out of range"),
        ({"target_reached": 0}, r"target_reached=0 is out of range"),
        ({"control_interval": 0}, r"control_interval=0 is out of range"),
    ],
)
def test_wrong_targets(cls: type, wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cls(**wrong)
    with pytest.raises(TypeError, match=r"control_interval=1\.5 is a float: give a whole number"):
        cls(control_interval=1.5)
