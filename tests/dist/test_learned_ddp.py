"""Two processes train penalties, thresholds and factors as one does."""

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
from gossamer.sparse_weight import SoftThreshold

pytestmark = pytest.mark.dist

STEPS = 20
METHODS = {
    "srste": gossamer.SRSTE(lam=0.5),
    "srste-decoupled": gossamer.SRSTE(lam=0.5, mode="decoupled"),
    "dst": gossamer.DST(alpha=1e-2),
    "dst-target": gossamer.DST(target_density=0.3),
    "str-target": gossamer.STR(s_init=-3.0, target_density=0.3),
    # The loss passes these on the way down, so that some periods raise alpha and some lower it.
    "autosparse-tuned": gossamer.AutoSparse(
        s_init=-3.0, dense_losses=(1.2, 1.2, 1.2, 1.2), tune_end=0.5
    ),
    "topkast": gossamer.TopKAST(density=0.3, refresh_interval=4),
}


def train(rank: int, world: int, method: gossamer.Method) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    sparsifier = gossamer.Sparsifier(model, method, total_steps=STEPS)
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
        y = x[:, :4].argmax(1)
        share = slice(rank * 16 // world, (rank + 1) * 16 // world)
        loss = F.cross_entropy(parallel(x[share]), y[share])
        sparsifier.observe(loss)
        (loss + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    found = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = sparsifier.sites[0].sparse
    if isinstance(sparse, SoftThreshold) and isinstance(method, gossamer.AutoSparse):
        assert sparse.get_buffer("alpha_start") not in (0.5, 0.5 * 1.05**4, 0.5 * 0.995**4)
    return found


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    for name, method in METHODS.items():
        torch.save(train(rank, world, method), f"{folder}/{name}-{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    for method, setting in METHODS.items():
        states = [torch.load(tmp_path / f"{method}-{rank}.pt") for rank in range(2)]
        for name, value in train(0, 1, setting).items():
            assert torch.equal(states[0][name], states[1][name]), (method, name)
            torch.testing.assert_close(states[0][name], value, rtol=1e-6, atol=1e-6)
