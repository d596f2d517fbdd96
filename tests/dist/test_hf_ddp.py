"""Two processes of Hugging Face's Trainer, with half the batch each, train like one with all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn import functional as F

import gossamer
from ports import free_port

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS, WORDS, BATCH = 8, 32, 8


def by_items(outputs, labels, num_items_in_batch):  # type: ignore[no-untyped-def]
    """The Trainer leaves the loss of a BERT classifier undivided by accumulated batches."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def train(folder: str, world: int) -> dict[str, torch.Tensor]:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from gossamer.integrations.transformers import SparsifyCallback

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config).double()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, WORDS, (2 * STEPS * BATCH, 8), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0] > row[1])} for row in tokens]
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH // world,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.1,
        max_grad_norm=0.5,
        optim="sgd",
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    assert args.world_size == world
    lam = gossamer.SRSTE(lam=1.0)
    narrow = gossamer.Chase(
        density=0.5, channel_sparsity=0.5, min_channels=4, channel_multiple=1, update_interval=2
    )
    example = {"input_ids": tokens[:2]}
    attention = gossamer.Sparsifier(model, lam, total_steps=STEPS, include=["*attention*"])
    mlps = gossamer.Sparsifier(
        model,
        narrow,
        total_steps=STEPS,
        example=example,
        include=["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"],
        cut="end",
    )
    callback = SparsifyCallback(attention, mlps)
    Trainer(
        model=model,
        args=args,
        train_dataset=data,
        callbacks=[callback],
        compute_loss_func=by_items,
    ).train()
    assert mlps.live_channels == 12
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if name != "gossamer_state"}


def worker(rank: int, world: int, port: int, folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(train(folder, world), f"{folder}/{rank}-of-{world}.pt")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    for world in (1, 2):
        mp.spawn(worker, args=(world, free_port(), str(tmp_path)), nprocs=world)
    single, *pair = [
        torch.load(tmp_path / name, weights_only=True)
        for name in ("0-of-1.pt", "0-of-2.pt", "1-of-2.pt")
    ]
    for name, value in single.items():
        assert torch.equal(pair[0][name], pair[1][name]), name
        if value.is_floating_point() and not name.endswith("mask"):
            torch.testing.assert_close(pair[0][name], value, rtol=1e-7, atol=1e-9)
        else:
            assert torch.equal(pair[0][name], value), name
