"""Prices: MACs and bytes at given widths are those of a network that is really cut to them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer.channels import find_groups
from gossamer.measure import account
from gossamer.prices import Bytes, Macs, Parameters, cut_to
from gossamer.shrink.plan import Plan
from gossamer.shrink.slice import apply_cuts, cuts_for
from nets import NETS, SKIP_NETS, images, net


class Attention(nn.Module):
    """Scores of attention are products that no weight takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.query, self.key = nn.Linear(24, 16), nn.Linear(24, 16)
        self.value = nn.Linear(24, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 4))

    def forward(self, x):
        x = self.embed(x.reshape(len(x), 24, 8))
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return self.mlp((scores.softmax(-1) @ self.value(x)).mean(1))


def _model(name: str) -> nn.Module:
    return Attention().double() if name == "attention" else net(name)


def _groups(model: nn.Module):
    return [group for group in find_groups(model, images(2)) if not group.locked]


def _some_widths(groups, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(1, g.channels + 1, (), generator=generator)) for g in groups]


@pytest.mark.parametrize("name", [*dict.fromkeys([*NETS, *SKIP_NETS]), "attention"])
def test_prices_are_those_of_the_cut_network(name: str, tmp_path: Path) -> None:
    model = _model(name)
    groups = _groups(model)
    assert groups
    macs, size = Macs(model, groups, images(2)), Bytes(model, groups)
    count = Parameters(model, groups)
    assert macs.dense == account(model, images(2)).macs_executed
    for seed in range(3):
        widths = _some_widths(groups, seed)
        slim = cut_to(model, groups, widths)
        assert macs(widths) == account(slim, images(2)).macs_executed
        assert count(widths) == sum(parameter.numel() for parameter in slim.parameters())

        # The file keeps other channels than `cut_to` does, and is no longer than was said.
        generator = torch.Generator().manual_seed(seed)
        gone = [
            torch.randperm(g.channels, generator=generator)[w:].sort().values
            for g, w in zip(groups, widths, strict=True)
        ]
        cut = copy.deepcopy(model)
        cuts = cuts_for(cut, list(zip(groups, gone, strict=True)))
        apply_cuts(cut, cuts)
        plan = Plan()
        plan.record(cuts)
        gossamer.save(tmp_path / "slim.safetensors", cut, plan)
        tensors = sum(t.numel() * t.element_size() for t in cut.state_dict().values())
        header = size(widths) - tensors
        real = (tmp_path / "slim.safetensors").stat().st_size - tensors
        assert real <= header <= 1.1 * real + 320
