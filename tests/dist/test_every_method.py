"""Several processes with a share of the batch each train as one process with all of it.

Every method, with the whole model in each process (DistributedDataParallel) and with the model
sharded (FSDP2); widths do not divide by the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gossamer
from gossamer.registry import METHODS as REGISTRY
from gossamer.sparsifier import Sparsifier

pytestmark = pytest.mark.dist

STEPS, BATCH = 18, 16
_NARROW = {"channel_sparsity": 0.25, "channel_multiple": 1, "update_interval": 2}
# The loss passes these on the way down, so that some periods raise alpha and some lower it.
_LOSSES = (2.3, 2.3, 2.3, 2.3)
METHODS = {
    "static": gossamer.Static(density=0.3),
    "set": gossamer.SET(density=0.3, update_interval=3),
    "set-global": gossamer.SET(density=0.3, update_interval=3, scope="global"),
    "rigl": gossamer.RigL(density=0.3, update_interval=3),
    "rigl-global": gossamer.RigL(density=0.3, update_interval=3, scope="global"),
    "snfs": gossamer.SNFS(density=0.3, update_interval=3),
    "gmp": gossamer.GMP(density=0.3, update_interval=3),
    "granet": gossamer.GraNet(density=0.3, update_interval=3),
    "mest": gossamer.MEST(density=0.3, update_interval=3, gradient_weight=0.1),
    "srigl": gossamer.SRigL(density=0.4, gamma_sal=0.8, update_interval=3),
    "chase": gossamer.Chase(density=0.3, **_NARROW),
    "chase-layer": gossamer.Chase(density=0.3, scope="layer", grow="random", **_NARROW),
    "srste": gossamer.SRSTE(lam=0.5),
    "srste-decoupled": gossamer.SRSTE(lam=0.5, mode="decoupled", refresh_interval=2),
    "dst": gossamer.DST(alpha=1e-2),
    "dst-target": gossamer.DST(target_density=0.3),
    "str": gossamer.STR(s_init=-3.0),
    "str-target": gossamer.STR(s_init=-3.0, target_density=0.3),
    "autosparse": gossamer.AutoSparse(s_init=-3.0, dense_losses=_LOSSES, tune_end=0.5),
    "autosparse-backward": gossamer.AutoSparse(s_init=-3.0, backward_sparsity=0.5),
    "topkast": gossamer.TopKAST(density=0.3, refresh_interval=4),
}
QUICK = ["rigl-global", "chase", "srste", "dst-target", "topkast"]
Wrap = Callable[[nn.Module, Sparsifier], nn.Module]


def alone(model: nn.Module, sparsifier: Sparsifier) -> nn.Module:
    return model


def ddp(model: nn.Module, sparsifier: Sparsifier) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, sparsifier: Sparsifier) -> nn.Module:
    return _shard(model, sparsifier, (dist.get_world_size(),))


def hsdp(model: nn.Module, sparsifier: Sparsifier) -> nn.Module:
    return _shard(model, sparsifier, (2, dist.get_world_size() // 2))


def _shard(model: nn.Module, sparsifier: Sparsifier, shape: tuple[int, ...]) -> nn.Module:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    sparsifier.rebind()
    return model


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 13, 3), nn.ReLU(), nn.Conv2d(13, 18, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(18 * 4, 10),
    ).double()  # fmt: skip


def train(wrap: Wrap, rank: int, world: int, method: gossamer.Method) -> dict[str, Tensor]:
    model = network()
    example = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    sparsifier = Sparsifier(model, method, total_steps=STEPS, example=example, cut="end")
    parallel = wrap(model, sparsifier)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = x.flatten(1)[:, :10].argmax(1)
        share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = F.cross_entropy(parallel(x[share]), y[share])
        sparsifier.observe(loss)
        (loss + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    supports = {f"support of {name}": mask for name, mask in sparsifier.supports().items()}
    parallel.eval()
    shown = parallel(x).detach()
    plain = sparsifier.finalize(into=network())
    torch.testing.assert_close(plain(x), shown, rtol=1e-9, atol=1e-9)
    return {**supports, **plain.state_dict()}


def worker(rank: int, world: int, folder: str, wraps: list[Wrap], names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    found = {
        f"{name} {wrap.__name__}": train(wrap, rank, world, METHODS[name])
        for name in names
        for wrap in wraps
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def check(folder: Path, world: int, wraps: list[Wrap], names: list[str]) -> None:
    mp.spawn(worker, args=(world, str(folder), wraps, names), nprocs=world)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name in names:
        single = train(alone, 0, 1, METHODS[name])
        for wrap in wraps:
            run = f"{name} {wrap.__name__}"
            for key, value in single.items():
                got = [states[run][key] for states in found]
                for other in got[1:]:
                    assert torch.equal(got[0], other), (run, key)
                if value.dtype == torch.bool:
                    assert torch.equal(got[0], value), (run, key)
                else:
                    torch.testing.assert_close(got[0], value, rtol=1e-6, atol=1e-6)


def test_no_method_is_missing() -> None:
    tested = {type(method).__name__ for method in METHODS.values()}
    assert tested == {info.cls.__name__ for info in REGISTRY.values()}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    check(tmp_path, 2, [ddp, fsdp], QUICK)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_other_methods(tmp_path: Path) -> None:
    check(tmp_path, 2, [ddp, fsdp], [name for name in METHODS if name not in QUICK])


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path) -> None:
    check(tmp_path, 4, [ddp, fsdp, hsdp], list(METHODS))
