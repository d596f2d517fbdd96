"""Blocks: consecutive outputs that are kept or pruned together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer import DST, GMP, MEST, SET, Chase, GraNet, RigL, Static
from gossamer.channels import ChannelGroup, Slice
from gossamer.collapse import CollapseWarning
from gossamer.measure import check_block
from gossamer.method import Method, Progress
from gossamer.methods.dst import Thresholded
from gossamer.ops import pooled, random_mask, spread
from gossamer.site import Site
from gossamer.sparse_weight import Masked
from gossamer.sparsifier import Sparsifier
from gossamer.surrogates import long_tailed_step
from reference import dst as slow_dst
from reference import rigl as slow

BLOCK = 4


class Net(nn.Module):
    """Three convolutions and a classifier of 6 outputs."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 8)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((2, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 8)
        self.classifier = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.head(self.features(x).mean((2, 3))))
        return self.classifier(x)


def train(method: Method, steps: int = 12, **settings: Any) -> tuple[Net, Sparsifier]:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    y = torch.arange(8) % 6
    sparsifier = Sparsifier(model, method, total_steps=steps, example=x[:2], **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        (F.cross_entropy(model(x), y) + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    return model, sparsifier


def whole(support: Tensor, block: int = BLOCK) -> bool:
    """Whether a support is made of blocks."""
    return torch.equal(spread(support[::block], block), support)


METHODS = {
    "static": Static(density=0.3, block=BLOCK),
    "rigl": RigL(density=0.3, block=BLOCK, update_interval=2),
    "rigl-global": RigL(density=0.3, block=BLOCK, update_interval=2, scope="global"),
    "gmp": GMP(density=0.3, block=BLOCK, update_interval=2),
    "gmp-global": GMP(density=0.3, block=BLOCK, update_interval=2, scope="global"),
    "granet": GraNet(density=0.3, block=BLOCK, update_interval=2),
    "set": SET(density=0.3, block=BLOCK, update_interval=2, drop="magnitude"),
    "mest": MEST(density=0.3, block=BLOCK, update_interval=2, gradient_weight=0.1),
    "chase": Chase(density=0.3, block=BLOCK, update_interval=2, channel_sparsity=0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_supports_are_blocks_and_counts_are_exact(name: str) -> None:
    method = METHODS[name]
    start = Sparsifier(Net(), method, total_steps=12)
    before = [site.support.clone() for site in start.sites]
    _, sparsifier = train(method)
    assert sparsifier.left_dense == {"classifier": "has 6 outputs, no multiple of block=4"}
    shapes = [site.original_places for site in sparsifier.sites]
    assert shapes[1] == (4, 8, 3, 3)
    places = sum(shape.numel() for shape in shapes)
    for site in sparsifier.sites:
        assert whole(site.support), site.name
        assert not site.weight[~site.support].any()
    assert sum(site.nonzeros for site in sparsifier.sites) == BLOCK * round(0.3 * places)
    moved = [not torch.equal(s.support, b) for s, b in zip(sparsifier.sites, before, strict=True)]
    assert any(moved) is (name != "static")
    report = check_block(sparsifier.finalize(), BLOCK)
    assert report.fits
    assert report["features.3"].block_density == sparsifier.sites[1].density


def test_rigl_is_its_twin_over_sums_of_blocks() -> None:
    torch.manual_seed(1)
    method = RigL(density=0.3, block=BLOCK, drop_fraction=0.4, update_interval=3)
    layers = [nn.Linear(16, 8).double(), nn.Conv2d(3, 12, 3).double()]
    sites = []
    for layer in layers:
        mask = random_mask(layer.weight.shape, 15, torch.Generator().manual_seed(0), BLOCK)
        sparse = Masked(layer.weight, mask)
        layer.weight.data *= sparse.mask
        sparse.dense_gradient = torch.randn_like(layer.weight)
        sites.append(Site("x", layer, "weight", layer.weight, sparse, layer.weight.shape, BLOCK))

    def sums(tensor: Tensor) -> np.ndarray:
        array = tensor.detach().abs().numpy()
        blocks = [array[row : row + BLOCK].sum(0) for row in range(0, len(array), BLOCK)]
        return np.stack(blocks)

    progress = Progress(3, 30)
    expected = slow.update(
        [sums(site.weight) for site in sites],
        [site.support.numpy()[::BLOCK] for site in sites],
        [sums(site.masked.dense_gradient) for site in sites],
        slow.drop_fraction(3, 0.75 * 30, 0.4, 0.0),
    )
    changes = method.update(sites, progress, torch.Generator())
    for change, kept, grown in zip(changes, expected.kept, expected.grown, strict=True):
        np.testing.assert_array_equal(change.kept.numpy(), kept)
        np.testing.assert_array_equal(change.grown.numpy(), grown)
        assert grown.any()


# DST


def _by_hand(w: np.ndarray, t: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, ...]:
    """Effective weight and gradients of DST with blocks, from the equations, loop by loop."""
    effective, along_w, along_t = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    spread_t = np.broadcast_to(t, w.shape)
    for first in range(0, len(w), BLOCK):
        rows = range(first, first + BLOCK)
        for j in range(w.shape[1]):
            q = sum(abs(w[i, j]) - spread_t[i, j] for i in rows) / BLOCK
            pull = sum(g[i, j] * w[i, j] for i in rows) * slow_dst.tail(q) / BLOCK
            for i in rows:
                effective[i, j] = w[i, j] * slow_dst.step(q)
                along_w[i, j] = g[i, j] * slow_dst.step(q) + np.sign(w[i, j]) * pull
                along_t[i, j] = -pull
    for axis in (0, 1):
        if t.shape[axis] == 1:
            along_t = along_t.sum(axis, keepdims=True)
    return effective, along_w, along_t


@pytest.mark.parametrize("granularity", ["row", "layer", "weight"])
def test_dst_is_its_twin(granularity: str) -> None:
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(12, 7, dtype=torch.float64))
    sparse = Thresholded(weight, granularity, BLOCK)
    with torch.no_grad():
        sparse.threshold.copy_(0.8 + 0.3 * torch.randn_like(sparse.threshold))
    g = torch.randn(12, 7, dtype=torch.float64)
    effective = sparse(weight)
    effective.backward(g)
    wanted = _by_hand(*(x.detach().numpy() for x in (weight, sparse.threshold, g)))
    for got, value in zip((effective, weight.grad, sparse.threshold.grad), wanted, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), value, rtol=0, atol=1e-14)
    assert 0 < sparse.support(weight).double().mean() < 1
    assert torch.equal(sparse.support(weight), effective != 0)


def test_dst_with_blocks_of_one_row_is_dst() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    doubled = weight.detach().repeat_interleave(2, 0).requires_grad_()
    threshold = torch.rand(6, 1, dtype=torch.float64, requires_grad=True)
    twice = threshold.detach().repeat_interleave(2, 0).requires_grad_()
    long_tailed_step(weight, threshold).sum().backward()
    long_tailed_step(doubled, twice, 2).sum().backward()
    torch.testing.assert_close(doubled.grad[::2], weight.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(pooled(twice.grad, 2), 2 * threshold.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("granularity", ["row", "layer", "weight"])
def test_dst_meets_a_target_in_blocks(granularity: str) -> None:
    method = DST(target_density=0.3, granularity=granularity, block=BLOCK)
    _, sparsifier = train(method)
    assert all(whole(site.support) for site in sparsifier.sites)
    assert sparsifier.density == pytest.approx(0.3, abs=0.01)
    assert check_block(sparsifier.finalize(), BLOCK).fits


def test_dst_resets_a_layer_that_keeps_no_block() -> None:
    model = Net()
    sparsifier = Sparsifier(model, DST(block=BLOCK), total_steps=4)
    site = sparsifier.sites[1]
    with torch.no_grad():
        site.sparse.threshold.fill_(10)
    assert not site.support.any()
    with torch.no_grad():
        sparsifier.method.advance(sparsifier.sites, Progress(1, 4), None)
    assert not site.sparse.threshold.any()


# Chase


def test_chase_cuts_whole_blocks() -> None:
    method = Chase(
        density=0.4, block=BLOCK, channel_sparsity=0.4, min_channels=4, update_interval=1
    )
    model, sparsifier = train(method, steps=20)
    kept = sparsifier.plan.kept("features.3.weight", 0)
    assert sparsifier.channel_sparsity == pytest.approx(0.4, abs=0.13)
    assert kept is not None
    assert len(kept) in (4, 8, 12)
    for site in sparsifier.sites:
        outputs = sparsifier.plan.kept(site.tensor_name, 0)
        if outputs is not None:
            assert whole(torch.isin(torch.arange(len(outputs) * 8), outputs))
        assert whole(site.support)
    model.eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = model(x)
    plain = sparsifier.finalize()
    slim = gossamer.shrink(plain, x, sparsifier.plan, block=BLOCK)
    assert check_block(slim.model, BLOCK).fits
    torch.testing.assert_close(slim.model(x), expected, rtol=1e-10, atol=1e-12)
    file = slim.model.state_dict()
    assert file["features.3.weight"].shape[0] % BLOCK == 0


def test_shrink_leaves_blocks_whole_only_when_told() -> None:
    model = Net((8, 8, 8)).eval()
    with torch.no_grad():
        model.features[3].weight[:, 1] = 0  # nobody reads channel 1 ...
        model.features[6].weight[:, 4:] = 0  # ... nor the second block of the next layer
    x = torch.randn(2, 2, 4, 4)
    one = gossamer.shrink(model, x).model.features
    four = gossamer.shrink(model, x, block=BLOCK).model.features
    assert (one[0].out_channels, one[3].out_channels) == (7, 4)
    assert (four[0].out_channels, four[3].out_channels) == (8, 4)
    assert torch.equal(four[3].weight, model.features[3].weight[:4])
    with pytest.raises(ValueError, match="block=0: give 1"):
        gossamer.shrink(model, x, block=0)


def _group(*producers: list[list[int]]) -> ChannelGroup:
    made = tuple(
        Slice(f"layer{n}.weight", 0, "out", torch.tensor(index))
        for n, index in enumerate(producers)
    )
    return ChannelGroup("layer0", len(producers[0]), made, (), ())


def test_channels_that_go_together() -> None:
    plain = [[n] for n in range(8)]
    assert _group(plain).unit(1) == 1
    assert _group(plain).unit(4) == 4
    assert _group(plain).unit(16) is None
    heads = [list(range(4 * n, 4 * n + 4)) for n in range(4)]
    assert _group(heads).unit(4) == 1
    assert _group(heads).unit(8) == 2
    gated = [[n, 8 + n] for n in range(8)]  # both halves of one matrix
    assert _group(gated).unit(4) == 4
    assert _group(plain, [[8 + n] for n in range(8)]).unit(8) == 8
    assert _group([[2 + n] for n in range(8)]).unit(4) is None, "they begin within a block"


def test_a_group_that_straddles_blocks_is_locked() -> None:
    class Split(nn.Module):
        """The first 6 outputs are read by one layer, the other 6 by another."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Linear(4, 8), nn.Linear(8, 12)
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.wide(F.relu(self.stem(x))).relu().split(6, 1)
            return self.one(one) + self.two(two)

    method = Chase(
        density=0.5, block=BLOCK, channel_sparsity=0.3, min_channels=4, update_interval=1
    )
    sparsifier = Sparsifier(Split(), method, total_steps=9, example=torch.randn(2, 4))
    assert "they do not make up whole blocks of 4 outputs" in sparsifier.locked.values()
    assert [pool.name for pool in sparsifier.pools] == ["stem"]


# What is refused, and what stays dense


def test_refuses() -> None:
    with pytest.raises(ValueError, match="a block of 4 weights has none"):
        SET(block=4)
    with pytest.raises(ValueError, match="channel_multiple=8 is no multiple of block=16"):
        Chase(block=16, channel_multiple=8)
    with pytest.raises(ValueError, match=r"block=0 is out of range"):
        RigL(block=0)
    with pytest.raises(TypeError, match=r"block=2.0 is a float"):
        GMP(block=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classifier has 6 outputs, no multiple of block=4"):
        Sparsifier(Net(), RigL(block=4), total_steps=9, include=["classifier"])


def test_a_block_never_spans_two_groups() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    sparsifier = Sparsifier(model, Static(density=0.5, block=BLOCK), total_steps=4)
    reason = "has 2 outputs in each of 4 groups, no multiple of block=4"
    assert sparsifier.left_dense == {"0": reason}


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsifier = Sparsifier(Net(), Static(block=BLOCK), total_steps=4)
    sparsifier.rebind()  # nothing is sharded
    monkeypatch.setattr("gossamer.sparsifier.is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match="block=4 needs whole blocks of outputs in every process"):
        sparsifier.rebind()


def test_a_held_layer_is_held_in_blocks() -> None:
    model = Net()
    method = GMP(density=0.1, block=BLOCK, scope="global", update_interval=2)
    sparsifier = Sparsifier(model, method, total_steps=10, on_collapse="hold")
    site = sparsifier.sites[1]
    with torch.no_grad():
        site.weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def steps() -> None:
        for _ in range(8):
            model(torch.randn(2, 2, 4, 4)).sum().backward()
            optimizer.step()
            sparsifier.step(optimizer)

    with pytest.warns(CollapseWarning, match="held at 8 weights"):
        steps()
    assert all(whole(site.support) for site in sparsifier.sites)
    assert sparsifier.sites[1].nonzeros == 8


# check_block


def test_check_block() -> None:
    torch.manual_seed(0)
    places = torch.rand(2, 10) < 0.5
    layer, other = nn.Linear(10, 8), nn.Conv2d(10, 7, 1)
    with torch.no_grad():
        layer.weight *= spread(places, 4)
        other.weight[:4, 3] = 0
        other.weight[4:, 5] = 0  # the last block, of 3 outputs
    report = check_block(nn.Sequential(layer, other, nn.Linear(3, 3)), 4)
    assert report["0"].fits
    assert report["0"].density == places.double().mean()
    assert report["1"].fits
    assert report["1"].block_density == 63 / 70
    assert report["2"].why == "dense: it has no zeros"
    assert report.fits
    assert report.to_dict()["layers"][2]["fits"] is False
    assert "no: dense" in report.table()
    with torch.no_grad():
        other.weight[2, 7] = 0  # one value among kept ones
        layer.weight[torch.rand(8, 10) < 0.7] = 0
    report = check_block(nn.Sequential(layer, other), 4)
    assert report["1"].fits
    assert report["1"].density < report["1"].block_density
    assert "of its blocks that are not zero is filled" in report["0"].why
    assert not report.fits
    with torch.no_grad():
        layer.weight.fill_(1)[0] = 0
    assert check_block(layer, 4)[""].why == "no block is zero"
    with pytest.raises(ValueError, match="block=1 is no pattern"):
        check_block(layer, 1)


def test_groups_have_blocks_of_their_own() -> None:
    conv = nn.Conv2d(4, 12, 1, groups=2, bias=False)
    with torch.no_grad():
        conv.weight[4:6, 0] = 0  # the last, short block of the first group
        conv.weight[6:10, 1] = 0
    report = check_block(conv, 4)[""]
    assert report.fits
    assert report.block_density == 18 / 24
