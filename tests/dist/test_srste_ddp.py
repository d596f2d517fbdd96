"""Two processes draw pruned weights to zero as one does: lam counts once."""

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

STEPS = 20


def train(rank: int, world: int, mode: str) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    method = gossamer.SRSTE(lam=0.5, mode=mode)
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
        y = x[:, :4].argmax(1)
        share = slice(rank * 16 // world, (rank + 1) * 16 // world)
        loss = F.cross_entropy(parallel(x[share]), y[share]) + sparsifier.penalty()
        loss.backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    for mode in ("gradient", "decoupled"):
        torch.save(train(rank, world, mode), f"{folder}/{mode}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    for mode in ("gradient", "decoupled"):
        states = [torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in range(2)]
        for name, value in train(0, 1, mode).items():
            assert torch.equal(states[0][name], states[1][name]), name
            torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-9)
