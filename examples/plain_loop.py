"""A loop of your own: a small CNN on digits, Chase takes half of its channels while it trains.

    python examples/plain_loop.py                            # saves every epoch
    python examples/plain_loop.py --ckpt_path checkpoint-2.pt  # goes on from there

Needs scikit-learn, for its digits: 1797 images of 8 by 8 pixels.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gossamer

EPOCHS, BATCH = 6, 64


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", help="checkpoint to go on from")
    settings = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = list(zip(images[:1408].split(BATCH), labels[:1408].split(BATCH), strict=True))

    model = network()
    sparsifier = gossamer.Sparsifier(
        model,
        gossamer.Chase(density=0.2, channel_sparsity=0.5, update_interval=10),
        total_steps=EPOCHS * len(train),
        example=images[:4],
    )  # before the optimizer
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    if settings.ckpt_path:
        state = torch.load(settings.ckpt_path, weights_only=True)
        sparsifier.load_state_dict(state["sparsifier"])  # first: it cuts the model to its widths
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(sparsifier.step_count // len(train), EPOCHS):
        model.train()
        for x, y in train:
            loss = F.cross_entropy(model(x), y) + sparsifier.penalty()  # 0 for Chase
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            optimizer.zero_grad()
        parts = {"sparsifier": sparsifier, "model": model, "optimizer": optimizer}
        torch.save(
            {key: part.state_dict() for key, part in parts.items()}, f"checkpoint-{epoch}.pt"
        )
        accuracy = (model.eval()(images[1408:]).argmax(1) == labels[1408:]).float().mean()
        print(f"epoch {epoch}: {accuracy:.1%}, {sparsifier.live_channels} channels")

    slim = gossamer.shrink(sparsifier.finalize(), images[:4], plan=sparsifier.plan)
    gossamer.save("slim.safetensors", slim.model, slim.plan)
    again = gossamer.load("slim.safetensors", network()).eval()
    print(slim.table(), torch.equal(again(images), slim.model.eval()(images)), sep="\n")


if __name__ == "__main__":
    main()
