"""Two processes drop and grow as one does, dense gradients and momenta averaged over both."""

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
METHODS = {
    "set": gossamer.SET(density=0.3, update_interval=3),
    "rigl": gossamer.RigL(density=0.3, update_interval=3, scope="global"),
    "snfs": gossamer.SNFS(density=0.3, update_interval=3),
}


def train(rank: int, world: int, name: str) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    sparsifier = gossamer.Sparsifier(model, METHODS[name], total_steps=STEPS)
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
        y = x[:, :4].argmax(1)
        share = slice(rank * 16 // world, (rank + 1) * 16 // world)
        F.cross_entropy(parallel(x[share]), y[share]).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    assert sparsifier.revision == len(range(3, round(METHODS[name].t_end * STEPS), 3))
    return {key: value.clone() for key, value in model.state_dict().items()}


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    for name in METHODS:
        torch.save(train(rank, world, name), f"{folder}/{name}-{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    for name in METHODS:
        states = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        for key, value in train(0, 1, name).items():
            assert torch.equal(states[0][key], states[1][key]), key
            if key.endswith("mask"):
                assert torch.equal(states[0][key], value), key
            else:
                torch.testing.assert_close(states[0][key], value, rtol=1e-9, atol=1e-9)
