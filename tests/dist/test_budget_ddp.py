"""Two processes with clocks that disagree decide alike: the first one measures for both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gossamer
from clocks import FakeClock
from nets import batches, images, net

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 20


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = net("mlp")
    clock = FakeClock(whole=1.3, noise=0.01 + 0.05 * rank, scale=1.0 + rank)
    table = gossamer.latency(model, images(4), stopwatch=clock)
    limit = [0.6 * table.dense]
    dist.broadcast_object_list(limit)
    settings = {"channel_multiple": 1, "min_channels": 2, "update_interval": 2}
    method = gossamer.Chase(density=0.3, max_latency_ms=limit[0], **settings)
    sparsifier = gossamer.Sparsifier(
        model, method, total_steps=STEPS, example=images(4), cut="end", latency=table
    )
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in batches(STEPS):
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    torch.save((model.state_dict(), sparsifier.state_dict()), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def test_the_first_process_measures_for_all(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    (one, first), (two, second) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert first["latency"] == second["latency"]
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    masks = [value for name, value in one.items() if name.endswith("live_out")]
    assert any(not mask.all() for mask in masks)
