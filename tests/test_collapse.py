"""A layer that falls below its floor: said, held or stopped."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gossamer
from gossamer.collapse import CollapseError, CollapseWarning
from gossamer.sparse_weight import SparseWeight

STEPS = 40


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)
    )


def trained(method, steps=STEPS, model=None, lr=0.1, decay=0.0, sparsifier=None, **settings):
    """Train, with the middle layer's weights a thousandth of the others'."""
    if sparsifier is None:
        model = model or net()
        with torch.no_grad():
            model[2].weight *= 1e-3
            model[4].weight *= 2
        sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS, **settings)
    groups = sparsifier.parameter_groups(weight_decay=decay)
    optimizer = torch.optim.SGD(groups, lr=lr)
    generator = torch.Generator().manual_seed(sparsifier.step_count)
    for _ in range(steps):
        x = torch.randn(16, 16, generator=generator)
        loss = sparsifier.model(x).square().mean() * 1e-3 + sparsifier.penalty()
        loss.backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    return sparsifier


def kept(sparsifier):
    return {site.name: site.nonzeros for site in sparsifier.sites}


GMP = gossamer.GMP(density=0.1, scope="global", update_interval=2)
# Thresholds are drawn up by nothing but their decay or penalty: the loss is next to nothing.
LEARNED = {
    "str": (gossamer.STR(s_init=-5.0), {"decay": 1.0}),
    "str-row": (gossamer.STR(s_init=-5.0, granularity="row"), {"decay": 1.0}),
    "autosparse": (gossamer.AutoSparse(), {"decay": 1.0}),
    "dst": (gossamer.DST(alpha=1.0, reset_below=0.0), {}),
    "dst-layer": (gossamer.DST(alpha=1.0, reset_below=0.0, granularity="layer"), {}),
    "dst-weight": (gossamer.DST(alpha=0.1, reset_below=0.0, granularity="weight"), {}),
}


def test_a_global_ranking_that_empties_a_layer_is_said_once():
    with pytest.warns(CollapseWarning) as warned:
        sparsifier = trained(GMP)
    assert kept(sparsifier)["2"] == 0
    (text,) = {str(warning.message) for warning in warned}
    assert sparsifier.collapsed == [text]
    for part in (
        "2 has collapsed by step ",
        f"of {STEPS}: it keeps 0 of 1,600 weights, 0 (before: ",
        "floor: 2",
        "The schedule asks for a density of ",
        'GMP(scope="global", density=0.1) ranks the weights of all layers together',
        'scope="layer" gives each its share',
        'on_collapse="hold" keeps it at its floor',
    ):
        assert part in text
    assert warned[0].filename == __file__  # who called step


def test_a_mask_is_held_at_the_largest_of_its_weights():
    start = net()
    with pytest.warns(CollapseWarning, match="It is held at 4 weights"):
        sparsifier = trained(GMP, model=copy.deepcopy(start), on_collapse="hold", lr=0.0)
    assert kept(sparsifier)["2"] == 4
    largest = start[2].weight.abs().flatten().topk(4).indices
    support = next(site for site in sparsifier.sites if site.name == "2").support
    assert sorted(support.flatten().nonzero().flatten().tolist()) == sorted(largest.tolist())
    assert sum(kept(sparsifier).values()) == round(0.1 * 2400) + 4  # the budget is exceeded by it
    assert len(sparsifier.collapsed) == 1


def test_it_can_stop_the_run():
    with pytest.raises(CollapseError, match=r"2 has collapsed by step \d+ of 40"):
        trained(GMP, on_collapse="stop")


@pytest.mark.parametrize("name", LEARNED)
def test_learned_thresholds_are_held(name):
    method, settings = LEARNED[name]
    with pytest.warns(CollapseWarning) as warned:
        assert min(kept(trained(method, **settings)).values()) == 0
    cause = {"str": "Weight decay draws", "aut": "alpha is ", "dst": "penalty, DST(alpha="}
    assert cause[name[:3]] in str(warned[0].message)

    sparsifier, counts = trained(method, 0, on_collapse="hold"), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            trained(method, 1, sparsifier=sparsifier, **settings)
            counts.append(min(kept(sparsifier).values()))
    assert min(counts) >= 1
    assert all("It is held at" in str(warning.message) for warning in told)
    # The first layer's 640 weights have a floor of 1, and are held at 2; the others' likewise.
    assert kept(sparsifier) == {"0": 2, "2": 4, "4": 2}
    assert len(sparsifier.collapsed) == 3


def test_what_is_held_may_leave_by_itself():
    method = gossamer.STR(s_init=-5.0)
    with pytest.warns(CollapseWarning):
        sparsifier = trained(method, 20, on_collapse="hold", decay=1.0)
    assert set(sparsifier._guard._caps) == {"0", "2", "4"}
    with torch.no_grad():
        for site in sparsifier.sites:
            site.sparse.raw.fill_(-20.0)
    trained(method, 1, sparsifier=sparsifier)
    assert not sparsifier._guard._caps
    assert kept(sparsifier)["2"] == 1600


def test_nothing_is_said_of_a_healthy_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (gossamer.RigL(density=0.1), gossamer.GMP(density=0.1), gossamer.DST()):
            assert trained(method, on_collapse="stop").collapsed == []


def test_a_density_asked_for_is_no_collapse():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10))
        gmp = gossamer.GMP(density=8e-4, update_interval=2)
        sparsifier = gossamer.Sparsifier(model, gmp, total_steps=STEPS, on_collapse="stop")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(STEPS):
            model(torch.randn(4, 300)).square().mean().backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
    assert sparsifier.density == pytest.approx(8e-4, rel=0.01)


@pytest.mark.parametrize("name", ["str-row", "gmp"])
def test_a_resumed_run_holds_on(name):
    method, settings = LEARNED.get(name, (GMP, {}))
    with pytest.warns(CollapseWarning):
        whole = trained(method, 25, on_collapse="hold", **settings)
    state, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(whole.model.state_dict())
    trained(method, 10, sparsifier=whole, **settings)

    again = trained(method, 0, on_collapse="hold")
    again.load_state_dict(state)
    again.model.load_state_dict(weights)
    trained(method, 10, sparsifier=again, **settings)
    assert again.collapsed == whole.collapsed
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    del state["collapse"]  # as it was before there was any
    older = trained(method, 0, on_collapse="hold")
    older.load_state_dict(state)
    assert older.step_count == 25


class Strange(SparseWeight):
    def forward(self, weight):
        return weight

    def support(self, weight):
        return weight != 0


def test_what_cannot_be_held_is_refused(monkeypatch):
    monkeypatch.setattr(gossamer.Static, "attach", lambda self, weight, *_: Strange())
    assert trained(gossamer.Static(density=1.0), 1).collapsed == []
    with pytest.raises(ValueError, match="the Strange of 0 is neither: choose"):
        trained(gossamer.Static(density=1.0), on_collapse="hold")
    with pytest.raises(ValueError, match="on_collapse='halt': choose"):
        trained(GMP, on_collapse="halt")


def test_a_layer_of_zeros_cannot_be_held():
    method = gossamer.STR(s_init=-5.0)
    sparsifier = trained(method, 0, on_collapse="hold")
    with torch.no_grad():
        sparsifier.sites[1].weight.zero_()
    with pytest.raises(CollapseError, match=r"2 has collapsed .* It cannot be held"):
        trained(method, 1, sparsifier=sparsifier, decay=1.0)


def test_patterns_of_fixed_count_are_not_looked_at():
    for method in (gossamer.SRSTE(n=1, m=4), gossamer.TopKAST(density=0.1)):
        sparsifier = trained(method, 4, on_collapse="hold")
        assert sparsifier._guard._sites == []
