"""Several processes: a loop of your own under torchrun, the model in each process or sharded.

    torchrun --nproc-per-node 2 examples/distributed_loop.py                # DDP
    torchrun --nproc-per-node 2 examples/distributed_loop.py --engine fsdp  # FSDP2
    ... --resume                                               # goes on from the last checkpoint

With DDP Chase cuts channels out while it trains; FSDP's shapes are fixed, so that there they are
masked, and cut at the end. Runs on CPUs (gloo) as on GPUs (NCCL). Needs scikit-learn's digits.
"""

import argparse
import json
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import gossamer

EPOCHS, BATCH = 6, 64


def network() -> nn.Module:
    torch.manual_seed(0)  # the same weights in every process
    return nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, 10),
    )


def shards(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: gossamer.Sparsifier
) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    # As text: of a dict, a loader would fill in only what the fresh one has.
    return {
        "model": weights,
        "optimizer": moments,
        "sparsifier": json.dumps(sparsifier.state_dict()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    settings = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(digits.target, device=device)
    batches = list(zip(images[:1408].split(BATCH), labels[:1408].split(BATCH), strict=True))

    model = network().to(device)
    sparsifier = gossamer.Sparsifier(
        model,
        gossamer.Chase(density=0.2, channel_sparsity=0.5, update_interval=10),
        total_steps=EPOCHS * len(batches),
        example=images[:4],
        cut="end" if settings.engine == "fsdp" else "during",
    )
    if settings.engine == "fsdp":
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
        sparsifier.rebind()  # the parameters are others now
        forward = model
    else:
        forward = sparsifier.data_parallel(device_ids=[device.index] if cuda else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    where = f"checkpoint-{settings.engine}"
    if settings.resume and settings.engine == "ddp":
        saved = torch.load(f"{where}.pt", map_location=device, weights_only=True)
        sparsifier.load_state_dict(saved["sparsifier"])  # first: it cuts the model to its widths
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    elif settings.resume:
        saved = shards(model, optimizer, sparsifier)
        dcp.load(saved, checkpoint_id=where)
        sparsifier.load_state_dict(json.loads(saved["sparsifier"]))
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )

    for epoch in range(sparsifier.step_count // len(batches), EPOCHS):
        model.train()
        for x, y in batches:
            mine = slice(rank, None, world)  # every process has its share of the batch
            loss = F.cross_entropy(forward(x[mine]), y[mine]) + sparsifier.penalty()
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
        if epoch == EPOCHS // 2 and settings.engine == "fsdp":
            dcp.save(shards(model, optimizer, sparsifier), checkpoint_id=where)
        elif epoch == EPOCHS // 2 and rank == 0:
            parts = {"sparsifier": sparsifier, "model": model, "optimizer": optimizer}
            torch.save({key: part.state_dict() for key, part in parts.items()}, f"{where}.pt")
        if rank == 0:
            print(f"epoch {epoch}: {sparsifier.live_channels} channels")

    into = network() if settings.engine == "fsdp" else None
    plain = sparsifier.finalize(into)
    if rank == 0:
        slim = gossamer.shrink(plain.cpu(), images[:4].cpu(), plan=sparsifier.plan)
        gossamer.save("slim.safetensors", slim.model, slim.plan)
        again = gossamer.load("slim.safetensors", network()).eval()
        correct = again(images[1408:].cpu()).argmax(1) == labels[1408:].cpu()
        print(slim.table(), f"accuracy {correct.float().mean():.1%}", sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
