"""DST, slow and plain, from the equations; shares no code with the package.

J. Liu et al., "Dynamic Sparse Training", ICLR 2020, arXiv 2005.06870. A weight is a numpy array
(out, z): one row per neuron, filter, or unit of a gate; t has one threshold per row, one in all, or
one per weight.

    Q = |W| - t,   M = S(Q),   S(q) = 1 if q > 0 else 0,   W_eff = W M
    H(q) = 2 - 4 |q|  for |q| <= 0.4;   0.4  for 0.4 < |q| <= 1;   0  for |q| > 1
    dL/dW = G (M + |W| H(Q))             G = dL/dW_eff
    dL/dt = -sum G W H(Q) - alpha exp(-t)
    a layer with fewer than 1 % ones in M starts again at t = 0
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


def step(q: float) -> float:
    return 1.0 if q > 0 else 0.0


def tail(q: float) -> float:
    if abs(q) <= 0.4:
        return 2 - 4 * abs(q)
    return 0.4 if abs(q) <= 1 else 0.0


def thresholds(weight: np.ndarray, granularity: str) -> np.ndarray:
    rows, columns = weight.shape
    shape = {"row": (rows, 1), "layer": (1, 1), "weight": (rows, columns)}[granularity]
    return np.zeros(shape)


def _distances(weight: np.ndarray, t: np.ndarray) -> np.ndarray:
    spread = np.broadcast_to(t, weight.shape)
    return np.array(
        [
            [abs(weight[i, j]) - spread[i, j] for j in range(weight.shape[1])]
            for i in range(len(weight))
        ]
    )


def mask(weight: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.vectorize(step)(_distances(weight, t))


def gradients(weight: np.ndarray, t: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Task gradients with respect to weight and threshold, for G of the effective weight."""
    h = np.vectorize(tail)(_distances(weight, t))
    along_t = -(g * weight * h)
    for axis in (0, 1):
        if t.shape[axis] == 1:
            along_t = along_t.sum(axis, keepdims=True)
    return g * (mask(weight, t) + abs(weight) * h), along_t


def penalty(ts: Sequence[np.ndarray]) -> float:
    return sum(math.exp(-value) for t in ts for value in t.flat)


def collapsed(weight: np.ndarray, t: np.ndarray, below: float) -> bool:
    return bool(mask(weight, t).mean() < below)


# Training by hand


@dataclass
class Sgd:
    """v <- momentum v + (gradient + decay parameter), parameter <- parameter - lr v."""

    lr: float
    momentum: float
    decay: float
    velocity: dict[str, np.ndarray] = field(default_factory=dict)

    def step(self, name: str, parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        old = self.velocity.get(name, np.zeros_like(parameter))
        self.velocity[name] = self.momentum * old + gradient + self.decay * parameter
        return parameter - self.lr * self.velocity[name]


@dataclass
class Perceptron:
    """relu(x W1^T) W2^T, mean squared error summed over outputs, trained by DST."""

    weights: list[np.ndarray]
    ts: list[np.ndarray]
    alpha: float
    optimizer: Sgd
    reset_below: float
    resets: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0

    def train_step(self, x: np.ndarray, target: np.ndarray) -> float:
        effective = [w * mask(w, t) for w, t in zip(self.weights, self.ts, strict=True)]
        hidden = x @ effective[0].T
        active = np.maximum(hidden, 0)
        error = active @ effective[1].T - target
        loss = float((error**2).sum() / len(x)) + self.alpha * penalty(self.ts)
        out = 2 * error / len(x)
        back = (out @ effective[1]) * (hidden > 0)
        for layer, g in enumerate([back.T @ x, out.T @ active]):
            w, t = self.weights[layer], self.ts[layer]
            along_w, along_t = gradients(w, t, g)
            along_t = along_t - self.alpha * np.exp(-t)
            self.weights[layer] = self.optimizer.step(f"w{layer}", w, along_w)
            self.ts[layer] = self.optimizer.step(f"t{layer}", t, along_t)
        self.steps += 1
        for layer, (w, t) in enumerate(zip(self.weights, self.ts, strict=True)):
            if collapsed(w, t, self.reset_below):
                self.ts[layer] = np.zeros_like(t)
                self.optimizer.velocity[f"t{layer}"] = np.zeros_like(t)
                self.resets.append((self.steps, layer))
        return loss


def free_threshold(
    steps: int, *, lr: float, momentum: float, alpha: float, decay: float
) -> Callable[[int], float]:
    """The path of a threshold that feels no task: its value after so many steps of SGD."""
    t, velocity, path = 0.0, 0.0, [0.0]
    for _ in range(steps):
        velocity = momentum * velocity - alpha * math.exp(-t) + decay * t
        t -= lr * velocity
        path.append(t)
    return path.__getitem__
