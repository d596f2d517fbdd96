"""What goes with several processes: cuts under DDP, checks, checkpoints of shards, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gossamer
from gossamer.ops import keep_largest, kth_largest
from gossamer.parallel import check_agreement, fingerprint

pytestmark = pytest.mark.dist

STEPS, BATCH, WORLD = 16, 8, 2
CHASE = gossamer.Chase(
    density=0.4, channel_sparsity=0.5, channel_multiple=1, min_channels=4, update_interval=2
)
RIGL = gossamer.RigL(density=0.3, update_interval=2)


def network(width: int = 15) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    ).double()


def sparsifier_of(model: nn.Module, method: gossamer.Method, cut: str = "end"):
    example = torch.zeros(2, 6, dtype=torch.float64)
    return gossamer.Sparsifier(model, method, total_steps=STEPS, example=example, cut=cut)


def batches(first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        yield x, x[:, :3].argmax(1)


def train(run, model, sparsifier, optimizer, rank: int, world: int, first=0, last=STEPS) -> None:
    for x, y in batches(first, last):
        share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        F.cross_entropy(run(x[share]), y[share]).backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sharded(method: gossamer.Method):
    model = network()
    sparsifier = sparsifier_of(model, method)
    fully_shard(model[2])
    fully_shard(model)
    sparsifier.rebind()
    return model, sparsifier, sgd(model)


# ------------------------------------------------------------------ the checks, in each process


def cutting_rewraps(rank: int, folder: Path) -> None:
    """Channels cut while training under DDP: as in one process, narrower, and still in step."""
    model = network()
    sparsifier = sparsifier_of(model, CHASE, cut="during")
    parallel = sparsifier.data_parallel()
    first = parallel.module
    train(parallel, model, sparsifier, sgd(model), rank, WORLD)
    assert parallel.module is not first
    assert model[0].weight.shape[0] < 15
    assert [p.shape for p in parallel.parameters()] == [p.shape for p in model.parameters()]
    with parallel.no_sync():
        parallel(torch.zeros(1, 6, dtype=torch.float64)).sum().backward()
    torch.save(model.state_dict(), folder / f"cut-{rank}.pt")


def cutting_needs_it(rank: int, folder: Path) -> None:
    """DistributedDataParallel itself cannot follow a cut; the first step says so."""
    model = network()
    sparsifier = sparsifier_of(model, CHASE, cut="during")
    parallel = DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"sparsifier\.data_parallel"):
        train(parallel, model, sparsifier, sgd(model), rank, WORLD)


def drift_is_found(rank: int, folder: Path) -> None:
    """Ranks whose supports differ stop at the next update, with the layer's name."""
    model = network()
    sparsifier = sparsifier_of(model, RIGL)
    check_agreement(sparsifier.sites, 0)
    if rank == 1:
        mask = sparsifier.sites[1].masked.mask
        mask.copy_(mask.flip(0))  # as many ones, elsewhere
    with pytest.raises(RuntimeError, match="disagree on the support of 2 after step 3"):
        check_agreement(sparsifier.sites, 3)


def shards_resume(rank: int, folder: Path) -> None:
    """Saved by torch.distributed.checkpoint and loaded into a fresh process group's shards."""
    half = STEPS // 2
    whole = sharded(RIGL)
    train(whole[0], *whole, rank, WORLD)
    model, sparsifier, optimizer = sharded(RIGL)
    train(model, model, sparsifier, optimizer, rank, WORLD, 0, half)
    weights, moments = get_state_dict(model, optimizer)
    told = json.dumps(sparsifier.state_dict())
    state = {"model": weights, "optimizer": moments, "sparsifier": told}
    dcp.save(state, checkpoint_id=folder / "shards")
    masks = [value for name, value in weights.items() if name.endswith("mask")]
    assert all(mask.to_local().shape[0] < mask.shape[0] for mask in masks)

    model, sparsifier, optimizer = sharded(RIGL)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "sparsifier": ""}
    dcp.load(state, checkpoint_id=folder / "shards")
    sparsifier.load_state_dict(json.loads(state["sparsifier"]))
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    train(model, model, sparsifier, optimizer, rank, WORLD, half, STEPS)
    for name, value in whole[0].state_dict().items():
        got = model.state_dict()[name]
        if hasattr(value, "full_tensor"):
            value, got = value.full_tensor(), got.full_tensor()
        assert torch.equal(value, got), name


def only_counts_travel(rank: int, folder: Path) -> None:
    """An update sends samples and counts, a few hundredths of the weights' bytes."""
    model = nn.Sequential(nn.Linear(1600, 1600, bias=False))
    sparsifier = gossamer.Sparsifier(model, RIGL, total_steps=STEPS)
    fully_shard(model)
    sparsifier.rebind()
    optimizer = sgd(model)
    for step in range(1, 3):
        model(torch.randn(4, 1600)).square().mean().backward()
        optimizer.step()
        with counted_bytes() as sent:
            sparsifier.step(optimizer)
        optimizer.zero_grad()
        if step % 2:
            assert sum(sent) < 100
    selections = 2  # weights to drop, gradients to grow
    assert 4 * (1 << 14) < sum(sent) < selections * 0.03 * 4 * 1600 * 1600


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    sent: list[int] = []

    def counting(call: Callable, position: int) -> Callable:
        def counted(*args, **kwargs):
            sent.append(args[position].nbytes)
            return call(*args, **kwargs)

        return counted

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", counting(dist.all_gather, 1)),
    ):
        yield sent


def selection_is_exact(rank: int, folder: Path) -> None:
    """On shards as on whole tensors: ties, plain tensors among sharded ones, large ones."""
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(5)
    for sizes in [((7, 3), (1, 5), (4, 2, 2)), ((301, 300), (5, 4))]:
        scores = [torch.randint(0, 9, size, generator=generator).float() for size in sizes]
        scores[0] += torch.rand(sizes[0], generator=generator) * (len(sizes) == 2)
        among = [torch.rand(size, generator=generator) > 0.3 for size in sizes]
        total = sum(int(mask.sum()) for mask in among)

        def shard(tensors: list[Tensor]) -> list[Tensor]:
            spread = [distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in tensors]
            return [*spread[:-1], tensors[-1]]  # the last one is in every process

        for k in (1, total // 3, total - 1, total):
            assert kth_largest(shard(scores), k, shard(among)) == kth_largest(scores, k, among)
            for got, wanted in zip(
                keep_largest(shard(scores), k, shard(among)),
                keep_largest(scores, k, among),
                strict=True,
            ):
                assert torch.equal(getattr(got, "full_tensor", lambda got=got: got)(), wanted)


def sharded_before(rank: int, folder: Path) -> None:
    """Weights that are DTensors already, as tensor parallelism makes them."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = network()
    for linear in (model[0], model[2], model[4]):
        for name, parameter in list(linear.named_parameters()):
            spread = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(linear, name, nn.Parameter(spread))
    from torch.distributed.tensor.experimental import implicit_replication

    sparsifier = sparsifier_of(model, RIGL)
    with implicit_replication():
        train(lambda x: model(x).full_tensor(), model, sparsifier, sgd(model), 0, 1)
    torch.save(sparsifier.supports(), folder / f"tensor-{rank}.pt")


def refusals(rank: int, folder: Path) -> None:
    """What cannot be done is said, with what to do instead."""
    model = network()
    sparsifier = sparsifier_of(model, RIGL)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"call sparsifier\.rebind\(\) right after fully_shard"):
        train(model, model, sparsifier, sgd(model), rank, WORLD)

    model = network()
    sparsifier = sparsifier_of(model, CHASE, cut="during")
    fully_shard(model)
    with pytest.raises(ValueError, match='train with cut="end"'):
        sparsifier.rebind()

    model, sparsifier, _ = sharded(RIGL)
    with pytest.raises(ValueError, match=r"finalize\(into=MyModel\(\)\)"):
        gossamer.finalize(model)
    with pytest.raises(ValueError, match=r"0.weight is \(15, 6\) .* \(16, 6\) in it"):
        sparsifier.finalize(into=network(16))


CHECKS = (
    selection_is_exact,
    cutting_rewraps,
    cutting_needs_it,
    drift_is_found,
    shards_resume,
    only_counts_travel,
    sharded_before,
    refusals,
)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    for check in CHECKS:
        check(rank, Path(folder))
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    model = network()
    train(model, model, sparsifier_of(model, CHASE, cut="during"), sgd(model), 0, 1)
    cut = [torch.load(tmp_path / f"cut-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, value in model.state_dict().items():
        assert torch.equal(cut[0][name], cut[1][name]), name
        torch.testing.assert_close(cut[0][name], value, rtol=1e-9, atol=1e-9)

    model = network()
    sparsifier = sparsifier_of(model, RIGL)
    train(model, model, sparsifier, sgd(model), 0, 1)
    for rank in range(WORLD):
        tensor = torch.load(tmp_path / f"tensor-{rank}.pt", weights_only=True)
        for name, support in sparsifier.supports().items():
            assert torch.equal(tensor[name], support), name


def test_fingerprints_tell_supports_apart() -> None:
    support = torch.zeros(40, dtype=torch.bool)
    seen = set()
    for i in range(40):
        for j in range(i):
            support[:] = False
            support[[i, j]] = True
            seen.add(int(fingerprint(support)))
    assert len(seen) == 40 * 39 // 2
