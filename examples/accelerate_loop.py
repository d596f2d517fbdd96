"""Accelerate: a small MLP on digits with 2:4 weights; `accelerate launch` runs it on many GPUs.

    python examples/accelerate_loop.py                        # saves the whole state every epoch
    python examples/accelerate_loop.py --ckpt_path state-1    # goes on from there

Needs accelerate and scikit-learn.
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gossamer
from gossamer.integrations.checkpoint import carry

EPOCHS, BATCH, ACCUMULATE = 4, 32, 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", help="folder of save_state to go on from")
    settings = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = (
        torch.tensor(digits.data, dtype=torch.float32) / 16,
        torch.tensor(digits.target),
    )
    data = TensorDataset(images[:1408], labels[:1408])

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    loader = DataLoader(data, BATCH // accelerator.num_processes)
    per_epoch = len(loader) // (ACCUMULATE * accelerator.num_processes)
    sparsifier = gossamer.Sparsifier(
        net, gossamer.SRSTE(n=2, m=4, lam=0.01), total_steps=EPOCHS * per_epoch
    )  # before the optimizer and prepare
    carry(sparsifier)  # save_state and load_state keep its state with the model's
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, sgd, loader)
    if settings.ckpt_path:
        accelerator.load_state(settings.ckpt_path)

    for epoch in range(sparsifier.step_count // per_epoch, EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y) + sparsifier.penalty()
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients:  # an optimizer step was made
                    sparsifier.step(sgd)
                optimizer.zero_grad()
        accelerator.save_state(f"state-{epoch}")
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

    sparsifier.finalize()
    accuracy = (net.cpu()(images[1408:]).argmax(1) == labels[1408:]).float().mean()
    accelerator.print(f"accuracy {accuracy:.1%}")
    if accelerator.is_main_process:
        gossamer.save("slim.safetensors", net)


if __name__ == "__main__":
    main()
