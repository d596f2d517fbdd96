"""Provenance, operation by operation: what can only be cut together, and what must stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.channels import ChannelGroup, find_groups

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """first (6 to 12) -> a function -> second, which reads `reads` features."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor], reads: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(reads, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x), self))


def group_of(model: nn.Module, name: str = "first", example: Tensor = X) -> ChannelGroup:
    return {group.name: group for group in find_groups(model, example)}[name]


def together(group: ChannelGroup) -> list[list[int]]:
    """Rows of the first producer that go together."""
    return group.producers[0].index.tolist()


SINGLE = [[row] for row in range(12)]


@pytest.mark.parametrize(
    ("function", "reads", "rows"),
    [
        (lambda x, _: F.gelu(x) + x.sigmoid(), 12, SINGLE),
        (lambda x, _: x.flip(1), 12, SINGLE),
        (lambda x, _: x[:, torch.arange(11, -1, -1)], 12, SINGLE),
        (lambda x, _: torch.cat([x, x * 2], 1), 24, SINGLE),
        (lambda x, _: torch.stack([x, x], 1).flatten(1), 24, SINGLE),
        (lambda x, _: x.repeat_interleave(2, 1), 24, SINGLE),
        (lambda x, _: torch.where(x > 0, x, x.exp()), 12, SINGLE),
        (lambda x, _: F.glu(x, 1), 6, [[row, row + 6] for row in range(6)]),
        (lambda x, _: x[:, :4] * x[:, 4:8] * x[:, 8:], 4, [[r, r + 4, r + 8] for r in range(4)]),
        (lambda x, _: x.unflatten(1, (3, 4)).sum(2), 3, [[*range(r, r + 4)] for r in (0, 4, 8)]),
        (lambda x, _: x.unflatten(1, (3, 4)).amax(1), 4, [[r, r + 4, r + 8] for r in range(4)]),
        (lambda x, _: x.unflatten(1, (3, 4)).mT.flatten(1), 12, SINGLE),
        (lambda x, _: F.pixel_shuffle(x.view(2, 12, 1, 1), 2).flatten(1), 12, SINGLE),
        (lambda x, _: torch.einsum("bhd->bh", x.unflatten(1, (3, 4))), 3, None),
    ],
)
def test_rows_that_go_together(
    function: Callable[[Tensor, nn.Module], Tensor], reads: int, rows: list[list[int]] | None
) -> None:
    group = group_of(Between(function, reads))
    assert not group.locked
    assert together(group) == (rows or [[*range(r, r + 4)] for r in (0, 4, 8)])
    per_channel = reads // len(group.producers[0].index)
    assert group.consumers[0].index.shape == (len(together(group)), per_channel)


def test_a_buffer_filled_in_pieces_is_followed() -> None:
    def pieces(x: Tensor, _: nn.Module) -> Tensor:
        whole = x.new_empty(2, 12)
        whole[:, 6:] = x[:, :6]
        whole[:, :6] = x[:, 6:]
        return whole

    group = group_of(Between(pieces))
    assert together(group) == SINGLE
    assert group.consumers[0].index.flatten().tolist() == [*range(6, 12), *range(6)]


def test_what_does_not_reach_the_output_ties_nothing() -> None:
    def unused(x: Tensor, _: nn.Module) -> Tensor:
        x.mean(1)
        return x

    assert together(group_of(Between(unused))) == SINGLE


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, _: x + x.mean(1, keepdim=True), "mean in the model's forward mixes all"),
        (lambda x, _: F.layer_norm(x, (12,)), "layer_norm"),
        (lambda x, _: x.softmax(1), "softmax"),
        (lambda x, _: F.group_norm(x, 3), "group_norm"),
        (lambda x, _: torch.fft.fft(x).real, "fft_r2c in the model's forward is not known"),
        (lambda x, _: x * (2 if x.sum() > 0 else 3), "looks at a value"),
    ],
)
def test_reasons_to_stay(function: Callable[[Tensor, nn.Module], Tensor], words: str) -> None:
    assert words in group_of(Between(function)).locked


def test_values_of_the_input_do_not_become_narrower() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 8)
            self.down = nn.Linear(8, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.down(self.up(x).relu()))

    groups = {group.name: group for group in find_groups(Skip(), X)}
    assert "input" in groups["down"].locked
    assert not groups["up"].locked


class Heads(nn.Module):
    """Attention with a scale per head, and a table of positions that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("positions", torch.randn(5, 4))
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu()
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = q * self.positions, k * self.positions
        scores = (q @ k.mT * self.scale).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


def test_heads_go_with_their_scale_and_leave_shared_positions() -> None:
    group = group_of(Heads(), "q", torch.randn(2, 5, 6))
    assert not group.locked
    assert together(group) == [[*range(r, r + 4)] for r in (0, 4, 8)]
    assert [part.tensor for part in group.producers] == ["q.weight", "k.weight", "v.weight"]
    carried = {(part.tensor, part.dim) for part in group.carriers}
    assert carried == {("scale", 0), ("q.bias", 0), ("k.bias", 0), ("v.bias", 0)}


def test_units_of_all_layers_and_directions_of_an_lstm_are_one_group() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0][:, -1])

    group = group_of(Recurrent(), "lstm.weight_ih_l0", torch.randn(2, 3, 6))
    assert group.channels == 4
    assert not group.locked
    assert together(group)[1] == [1, 5, 9, 13]  # one row per gate
    readers = {(part.tensor, part.dim): part.index.tolist()[1] for part in group.consumers}
    assert readers["fc.weight", 1] == [1, 5]  # forward and backward
    assert readers["lstm.weight_ih_l1", 1] == [1, 5]
    assert readers["lstm.weight_hh_l1_reverse", 1] == [1]


def test_a_weight_used_twice_has_one_atom_per_row() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 8, bias=False)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.up(x).relu(), self.up.weight.t()))

    groups = {group.name: group for group in find_groups(Tied(), X)}
    hidden = next(group for group in groups.values() if group.channels == 8)
    assert {(part.tensor, part.dim) for part in hidden.slices} == {("up.weight", 0)}


def test_the_run_leaves_switches_of_pytorch_as_they_were() -> None:
    model, example = nn.Sequential(nn.RNN(6, 4), nn.Identity()), torch.randn(3, 2, 6)
    states = []
    for trace in (False, True):
        if trace:
            find_groups(model, example)
        states.append(
            (
                torch.backends.mha.get_fastpath_enabled(),
                torch._C._get_mkldnn_enabled(),
                torch.is_grad_enabled(),
                torch.get_rng_state().tolist(),
            )
        )
    assert states[0] == states[1]
