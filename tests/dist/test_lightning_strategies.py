"""Lightning's strategies for several processes train like one process: DDP, and FSDP2 shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gossamer
from ports import free_port

pytest.importorskip("lightning")

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS, BATCH = 8, 8


def train(strategy: str, rank: int, world: int) -> dict[str, Tensor]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from gossamer.integrations.lightning import SparsifyCallback

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 3)).double()

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network

        def configure_model(self) -> None:
            if strategy == "fsdp":
                mesh = self.device_mesh["data_parallel"]
                fully_shard(self.model[2], mesh=mesh)
                fully_shard(self.model, mesh=mesh)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, x[:, :3].argmax(1))
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    method = gossamer.RigL(density=0.3, update_interval=2)
    sparsifier = gossamer.Sparsifier(network, method, total_steps=STEPS)
    strategies = {
        "auto": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
    }
    Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategies[strategy](),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[SparsifyCallback(sparsifier)],
    ).fit(Net(), DataLoader(data, batch_size=BATCH // world, sampler=sampler))
    assert sparsifier.step_count == STEPS
    return sparsifier.supports()


def worker(rank: int, world: int, port: int, strategy: str, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    # As torchrun sets them, so that Lightning starts no processes of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    torch.save(train(strategy, rank, world), f"{folder}/{strategy}-{rank}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    for strategy, world in (("auto", 1), ("ddp", 2), ("fsdp", 2)):
        mp.spawn(worker, args=(world, free_port(), strategy, str(tmp_path)), nprocs=world)
    single = torch.load(tmp_path / "auto-0.pt", weights_only=True)
    for run in ("ddp-0", "ddp-1", "fsdp-0", "fsdp-1"):
        supports = torch.load(tmp_path / f"{run}.pt", weights_only=True)
        for name, support in single.items():
            assert torch.equal(supports[name], support), (run, name)
