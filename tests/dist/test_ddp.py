"""Two processes with half the batch each train like one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gossamer

pytestmark = pytest.mark.dist

STEPS = 30


def train(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16, 10),
    ).double()  # fmt: skip
    method = gossamer.Chase(
        density=0.3, channel_sparsity=0.25, update_interval=2, channel_multiple=1
    )
    example = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS, example=example, cut="end")
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (16,), generator=generator)
        share = slice(rank * 16 // world, (rank + 1) * 16 // world)
        F.cross_entropy(parallel(x[share]), y[share]).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    assert sparsifier.channel_sparsity == pytest.approx(0.25)
    return {name: value.clone() for name, value in model.state_dict().items()}


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    torch.save(train(rank, world), f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match='cut="end"'):
        gossamer.Sparsifier(
            nn.Linear(4, 4),
            gossamer.Chase(),
            total_steps=STEPS,
            example=torch.zeros(1, 4),
        )
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    single = train(0, 1)
    for name, value in single.items():
        assert torch.equal(states[0][name], states[1][name]), name
        if name.endswith("mask"):
            assert torch.equal(states[0][name], value), name
        else:
            torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-9)
