"""Lightning: any LightningModule trains sparse with a callback; here an MLP on digits, with DST.

    python examples/lightning_trainer.py                                     # 4 epochs
    python examples/lightning_trainer.py --ckpt_path checkpoints/epoch=1.ckpt

Needs lightning and scikit-learn.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gossamer
from gossamer.integrations.lightning import SparsifyCallback

EPOCHS, BATCH = 4, 64


class Digits(LightningModule):
    """Yours; all it does about sparsity is to add the penalty."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        method = gossamer.DST(alpha=1e-3, target_density=0.2)
        self.sparsifier = gossamer.Sparsifier(self.model, method, total_steps=steps)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        return loss + self.sparsifier.penalty()

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", help="checkpoint to go on from")
    settings = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train = DataLoader(torch.utils.data.Subset(data, range(1408)), BATCH)
    test = DataLoader(torch.utils.data.Subset(data, range(1408, len(data))), BATCH)

    module = Digits(EPOCHS * len(train))
    save = ModelCheckpoint("checkpoints", "{epoch}", save_top_k=-1)
    callbacks = [SparsifyCallback(module.sparsifier), save]
    trainer = Trainer(
        max_epochs=EPOCHS, callbacks=callbacks, logger=False, accelerator="cpu", devices=1
    )
    trainer.fit(module, train, ckpt_path=settings.ckpt_path)
    trainer.test(module, test)
    slim = gossamer.shrink(module.sparsifier.finalize(), images[:4], plan=module.sparsifier.plan)
    gossamer.save("slim.safetensors", slim.model, slim.plan)
    print(slim.table())


if __name__ == "__main__":
    main()
