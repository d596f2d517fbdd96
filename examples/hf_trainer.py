"""Hugging Face's Trainer: a small BERT reads digits; 2:4 in its attention, fewer hidden units.

    python examples/hf_trainer.py                                      # 6 epochs, writes slim-bert/
    python examples/hf_trainer.py --ckpt_path bert-run/checkpoint-88   # goes on from there

In any other process: `gossamer.integrations.transformers.load_pretrained("slim-bert")`.
Needs transformers, accelerate and scikit-learn; downloads nothing.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gossamer
from gossamer.integrations.transformers import SparsifyCallback, planned_steps, save_pretrained


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", help="checkpoint folder to go on from")
    settings = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    pixels = F.avg_pool2d(torch.tensor(digits.images), 2).round().long().flatten(1)  # 16 "words"
    data = [{"input_ids": x, "labels": y} for x, y in zip(pixels, digits.target, strict=True)]

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    start = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=17, intermediate_size=128, num_labels=10, **size, **start)
    )
    args = TrainingArguments(
        output_dir="bert-run",
        per_device_train_batch_size=32,
        num_train_epochs=6,
        learning_rate=3e-3,
        warmup_steps=20,
        dataloader_pin_memory=False,
        save_strategy="epoch",
        report_to="none",
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=data[:1408], eval_dataset=data[1408:],
        compute_metrics=lambda made: {"accuracy": (made[0].argmax(1) == made[1]).mean()},
    )  # fmt: skip
    steps, example = planned_steps(trainer), {"input_ids": pixels[:4]}
    pattern = gossamer.SRSTE(n=2, m=4, lam=0.01)
    attention = gossamer.Sparsifier(model, pattern, total_steps=steps, include=["*attention*"])
    narrow = gossamer.Chase(density=0.3, channel_sparsity=0.5, update_interval=5)
    rest = ["*attention*", "*pooler*", "classifier"]
    mlps = gossamer.Sparsifier(model, narrow, total_steps=steps, example=example, exclude=rest)
    trainer.add_callback(SparsifyCallback(attention, mlps))
    trainer.train(resume_from_checkpoint=settings.ckpt_path)
    print(trainer.evaluate())

    attention.finalize()
    mlps.finalize()
    slim = gossamer.shrink(model.cpu(), example, plan=mlps.plan)
    save_pretrained("slim-bert", slim.model, slim.plan)
    print(slim.table())


if __name__ == "__main__":
    main()
