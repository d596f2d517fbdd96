"""STR, slow and plain, from the equations; shares no code with the package.

A. Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020,
arXiv 2002.03231. One weight after the other, plain Python floats.

    w~ = sign(w) max(|w| - t, 0),   t = 1 / (1 + exp(-s))
    dL/dw = G if |w| >= t else 0
    dL/ds = sum over |w| >= t of -sign(w) G,  times dt/ds = t (1 - t)
    SGD:  g = dL/dx + decay x;   m = momentum m + g;   x = x - lr m        for x = w and x = s
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


def threshold(s: float) -> float:
    return 1 / (1 + math.exp(-s)) if s > -700 else 0.0


def effective(weight: np.ndarray, s: float) -> np.ndarray:
    t = threshold(s)
    return np.vectorize(lambda w: math.copysign(max(abs(w) - t, 0.0), w))(weight)


def gradients(weight: np.ndarray, s: float, grad: np.ndarray) -> tuple[np.ndarray, float]:
    """dL/dW and dL/ds for `grad` = dL/dW~; one s for the whole weight."""
    t = threshold(s)
    to_weight = np.zeros_like(weight)
    to_threshold = 0.0
    for index, w in np.ndenumerate(weight):
        if abs(w) >= t:
            to_weight[index] = grad[index]
            to_threshold -= math.copysign(1.0, w) * grad[index]
    return to_weight, to_threshold * t * (1 - t)


def train(
    weight: np.ndarray,
    s: float,
    loss_grad: Callable[[np.ndarray], np.ndarray],
    lrs: Sequence[float],
    *,
    momentum: float,
    decay: float,
) -> tuple[np.ndarray, float]:
    """W and s after SGD on a loss whose gradient with respect to W~ is `loss_grad(W~)`."""
    weight = weight.copy()
    m_weight, m_s = np.zeros_like(weight), 0.0
    for lr in lrs:
        g_weight, g_s = gradients(weight, s, loss_grad(effective(weight, s)))
        m_weight = momentum * m_weight + g_weight + decay * weight
        m_s = momentum * m_s + g_s + decay * s
        weight, s = weight - lr * m_weight, s - lr * m_s
    return weight, s


def decayed(s: float, lrs: Sequence[float], *, momentum: float, decay: float) -> float:
    """s after SGD's decay alone, step by step."""
    m = 0.0
    for lr in lrs:
        m = momentum * m + decay * s
        s -= lr * m
    return s
