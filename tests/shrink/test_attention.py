"""Attention that has lost heads computes what PyTorch's own computes with those heads at zero."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.channels import find_groups
from gossamer.shrink.attention import SlimMultiheadAttention
from gossamer.shrink.slice import apply_cuts, cuts_for

HEADS, WIDTH = 4, 16
GONE = [1, 2]


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.head(self.attention(query, key, value, need_weights=False)[0])


def inputs(**settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    widths = (WIDTH, settings.get("kdim", WIDTH), settings.get("vdim", WIDTH))
    return tuple(
        torch.randn(2, length, width, generator=generator, dtype=torch.float64)
        for length, width in zip((5, 7, 7), widths, strict=True)
    )


def pair(**settings: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """With dead heads, and without them."""
    torch.manual_seed(0)
    masked = Model(batch_first=True, **settings).double()
    for parameter in masked.parameters():
        parameter.data.normal_()
    groups = find_groups(masked, inputs(**settings))
    group = next(
        group for group in groups if group.name.startswith("attention.") and group.channels == HEADS
    )
    assert not group.locked
    with torch.no_grad():
        masked.attention.out_proj.weight[:, group.consumers[0].index[GONE].flatten()] = 0
    slim = copy.deepcopy(masked)
    undo = apply_cuts(slim, cuts_for(slim, [(group, GONE)]))
    assert type(slim.attention) is SlimMultiheadAttention
    assert slim.attention.num_heads == 2
    assert slim.attention.out_proj.weight.shape == (WIDTH, WIDTH // 2)
    undo()
    assert type(slim.attention) is nn.MultiheadAttention
    assert slim.attention.num_heads == HEADS
    apply_cuts(slim, cuts_for(slim, [(group, GONE)]))
    return masked.attention, slim.attention


MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "hidden pairs": {"attn_mask": torch.arange(35).view(5, 7) % 3 == 0},
    "added": {"attn_mask": torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)},
    "padding": {"key_padding_mask": torch.arange(14).view(2, 7) > 10},
    "both": {
        "attn_mask": torch.arange(35).view(5, 7) % 3 == 0,
        "key_padding_mask": torch.arange(14).view(2, 7) > 10,
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_outputs_are_those_of_dead_heads(settings: dict[str, Any], mask: str) -> None:
    masked, slim = pair(**settings)
    batch = inputs(**settings)
    wanted = masked(*batch, need_weights=False, **MASKS[mask])[0]
    for need_weights in (False, True):
        out, weights = slim(*batch, need_weights=need_weights, **MASKS[mask])
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
        assert (weights is None) == (not need_weights)


def test_weights_are_of_the_heads_that_are_left() -> None:
    masked, slim = pair()
    _, wanted = masked(*inputs(), average_attn_weights=False)
    _, weights = slim(*inputs(), average_attn_weights=False)
    left = [head for head in range(HEADS) if head not in GONE]
    torch.testing.assert_close(weights, wanted[:, left], rtol=0, atol=1e-12)
    torch.testing.assert_close(slim(*inputs())[1], wanted[:, left].mean(1), rtol=0, atol=1e-12)


def test_inputs_in_every_layout() -> None:
    masked, slim = pair()
    batch = inputs()
    one = tuple(tensor[0] for tensor in batch)
    torch.testing.assert_close(slim(*one)[0], masked(*one)[0], rtol=0, atol=1e-12)
    assert slim(*one)[1].shape == (5, 7)
    masked.batch_first = slim.batch_first = False
    turned = tuple(tensor.transpose(0, 1) for tensor in batch)
    torch.testing.assert_close(slim(*turned)[0], masked(*turned)[0], rtol=0, atol=1e-12)


def test_a_mask_per_head_of_the_full_network_is_refused() -> None:
    _, slim = pair()
    with pytest.raises(ValueError, match="8 slices for 2 samples and 2 heads"):
        slim(*inputs(), attn_mask=torch.zeros(2 * HEADS, 5, 7).bool())
    per_head = torch.zeros(4, 5, 7).bool()
    torch.testing.assert_close(slim(*inputs(), attn_mask=per_head)[0], slim(*inputs())[0])


def test_dropout_drops_in_training_only() -> None:
    _, slim = pair()
    slim.dropout = 0.5
    for need_weights in (False, True):
        outs = [slim.train()(*inputs(), need_weights=need_weights)[0] for _ in range(2)]
        assert not torch.equal(*outs)
        outs = [slim.eval()(*inputs(), need_weights=need_weights)[0] for _ in range(2)]
        assert torch.equal(*outs)


def test_a_saved_model_is_loaded_into_pytorchs_own_class(tmp_path) -> None:
    torch.manual_seed(0)
    model = Model(batch_first=True).double()
    with torch.no_grad():
        model.attention.out_proj.weight[:, 4:12] = 0
    slim = gossamer.shrink(model, inputs())
    assert slim.model.attention.num_heads == 2
    gossamer.save(tmp_path / "slim.safetensors", slim.model, slim.plan)
    loaded = gossamer.load(tmp_path / "slim.safetensors", Model(batch_first=True).double())
    assert torch.equal(loaded(*inputs()), slim.model(*inputs()))


class Named(nn.Module):
    """The number of heads is spelt out, and so is a number that only looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, 3)
        self.num_heads = HEADS
        self.width = WIDTH
        self.positions = HEADS  # of the input

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.positions]
        q, k, v = self.qkv(x).split(self.width, -1)
        q, k, v = (t.view(len(x), -1, self.num_heads, 4).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.reshape(len(x), self.positions, -1))


def test_numbers_that_spell_widths_follow(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Named().double(), torch.randn(2, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        model.out.weight[:, 4:8] = 0
    slim = gossamer.shrink(model, x)
    assert (slim.model.num_heads, slim.model.width, slim.model.positions) == (3, 12, 4)
    torch.testing.assert_close(slim.model(x), model(x), rtol=0, atol=1e-12)
    gossamer.save(tmp_path / "slim.safetensors", slim.model, slim.plan)
    loaded = gossamer.load(tmp_path / "slim.safetensors", Named().double())
    assert (loaded.num_heads, loaded.width) == (3, 12)
    assert torch.equal(loaded(x), slim.model(x))
    again = gossamer.shrink(loaded, x, slim.plan)
    assert again.removed == 0
    assert again.plan == slim.plan
