"""What an update of a sharded model costs: bytes sent, seconds, and memory, by number of weights.

    python benchmarks/sharding.py                          2 processes, up to 64 million weights
    python benchmarks/sharding.py --world 4 --weights 4 16

Every process is one of `--world` on this machine, with one thread, and talks by gloo. The model is
a stack of square linear layers without biases, sharded by FSDP2, in float32 with SGD and momentum.
Bytes are what one process gives into collectives of `Sparsifier.step`; seconds are CPU seconds of
one process, the median of the updates; memory is bytes per weight of all tensors of one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

import gossamer
from gossamer.sharding import local

WIDTH = 1024
UPDATES = 3
METHODS = {
    "rigl, per layer": gossamer.RigL(density=0.1, update_interval=1),
    "rigl, global": gossamer.RigL(density=0.1, update_interval=1, scope="global"),
    "set, per layer": gossamer.SET(density=0.1, update_interval=1),
    "gmp, global": gossamer.GMP(density=0.1, update_interval=1, scope="global"),
    "srste 2:4": gossamer.SRSTE(),
    "dst, target": gossamer.DST(target_density=0.1),
}


def measure(method: gossamer.Method, layers: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    sparsifier = gossamer.Sparsifier(model, method, total_steps=100)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    sparsifier.rebind()
    optimizer = torch.optim.SGD(sparsifier.parameter_groups(), lr=0.01, momentum=0.9)
    sent: list[int] = []
    seconds = []

    def counted(call, position):  # type: ignore[no-untyped-def]
        def counting(*args, **kwargs):  # type: ignore[no-untyped-def]
            sent.append(args[position].nbytes)
            return call(*args, **kwargs)

        return counting

    for step in range(UPDATES + 1):
        (model(torch.randn(8, WIDTH)).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
        sent.clear()
        with (
            mock.patch.object(dist, "all_reduce", counted(dist.all_reduce, 0)),
            mock.patch.object(dist, "all_gather", counted(dist.all_gather, 1)),
        ):
            start = time.process_time()
            sparsifier.step(optimizer)
            if step:  # the first one warms up
                seconds.append(time.process_time() - start)
        held = [*model.parameters(), *model.buffers()]
        held += [parameter.grad for parameter in model.parameters()]
        held += [value for state in optimizer.state.values() for value in state.values()]
        optimizer.zero_grad()
    weights = layers * WIDTH * WIDTH
    return {
        "weights": weights,
        "bytes": sum(sent),
        "share": sum(sent) / (4 * weights),
        "seconds": statistics.median(seconds),
        "memory": sum(local(tensor.detach()).nbytes for tensor in held) / weights,
    }


def worker(rank: int, world: int, millions: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    if rank == 0:
        print(f"torch {torch.__version__}, {world} processes, gloo, one thread each")
        print(
            f"{'':>16} {'weights':>12} {'bytes sent':>11} {'of fp32':>8} {'CPU s':>7} "
            f"{'B/weight':>9}"
        )
    for name, method in METHODS.items():
        for million in millions:
            row = measure(method, million)
            if rank == 0:
                print(
                    f"{name:>16} {row['weights']:12,} {row['bytes']:11,} {row['share']:8.3%} "
                    f"{row['seconds']:7.3f} {row['memory']:9.2f}",
                    flush=True,
                )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--world", type=int, default=2, help="processes")
    parser.add_argument("--weights", type=int, nargs="+", default=[4, 16, 64], help="in millions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(args.world, args.weights, folder), nprocs=args.world)
