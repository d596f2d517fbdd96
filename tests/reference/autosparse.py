"""AutoSparse, slow and plain, from the equations; shares no code with the package.

A. Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks", 2023,
arXiv 2304.06941. One weight after the other, plain Python floats; thresholds are `(out,)`, equal
ones where a layer shares one.

    w~ = sign(w) max(v, 0),   v = |w| - t,   t = 1 / (1 + exp(-s))
    dL/dw = G h'(v),   dL/ds = -t (1 - t) sum sign(w) G h'(v),   h'(v) = 1 if v >= 0 else alpha
    alpha_i = alpha_0 max(cos, sig):  cos = (1 + cos(pi i / T)) / 2,
                                      sig = 1 - 1 / (1 + exp(-(L0 + (L1 - L0) i / T))), -6 to 6
    backward sparsity B: h' = 0 where v is among the lowest B of the layer
    SGD:  g = dL/dx + decay x;   m = momentum m + g;   x = x - lr m        for x = w and x = s
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


def effective(weight: np.ndarray, s: np.ndarray) -> np.ndarray:
    out = np.zeros_like(weight)
    for index, w in np.ndenumerate(weight):
        v = abs(w) - 1 / (1 + math.exp(-s[index[0]]))
        out[index] = math.copysign(1.0, w) * v if v > 0 else 0.0
    return out


def gradients(
    weight: np.ndarray,
    s: np.ndarray,
    grad: np.ndarray,
    alpha: float,
    backward_sparsity: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """dL/dW and dL/ds (per row) for `grad` = dL/dW~."""
    t = [1 / (1 + math.exp(-value)) for value in s]
    distance = {index: abs(w) - t[index[0]] for index, w in np.ndenumerate(weight)}
    ranked = sorted(distance.values(), reverse=True)
    cut = ranked[round((1 - backward_sparsity) * len(ranked)) - 1]
    to_weight, to_s = np.zeros_like(weight), np.zeros_like(s)
    for index, w in np.ndenumerate(weight):
        v = distance[index]
        slope = 0.0 if v < cut else 1.0 if v >= 0 else alpha
        to_weight[index] = slope * grad[index]
        to_s[index[0]] -= np.sign(w) * slope * grad[index]
    return to_weight, to_s * [x * (1 - x) for x in t]


def train(
    weight: np.ndarray,
    s: np.ndarray,
    loss_grad: Callable[[np.ndarray], np.ndarray],
    alphas: Sequence[float],
    lrs: Sequence[float],
    *,
    shared: bool,
    backward_sparsity: float,
    momentum: float,
    decay: float,
) -> tuple[np.ndarray, np.ndarray]:
    """W and s after SGD on a loss whose gradient with respect to W~ is `loss_grad(W~)`.

    `shared`: one threshold for the layer. Once alpha is 0, every weight above it gets its gradient.
    """
    weight, s = weight.copy(), s.copy()
    m_weight, m_s = np.zeros_like(weight), np.zeros_like(s)
    for alpha, lr in zip(alphas, lrs, strict=True):
        left_out = backward_sparsity if alpha > 0 else 0.0
        g_weight, g_s = gradients(weight, s, loss_grad(effective(weight, s)), alpha, left_out)
        if shared:
            g_s = np.full_like(g_s, g_s.sum())
        m_weight = momentum * m_weight + g_weight + decay * weight
        m_s = momentum * m_s + g_s + decay * s
        weight, s = weight - lr * m_weight, s - lr * m_s
    return weight, s


def sigmoid_cosine(i: float, total: float) -> float:
    cos = (1 + math.cos(math.pi * i / total)) / 2
    sig = 1 - 1 / (1 + math.exp(-(-6 + 12 * i / total)))
    return max(cos, sig)


def alpha_at(step: int, total: int, alpha_0: float, reset: float) -> float:
    return 0.0 if step / total >= reset else alpha_0 * sigmoid_cosine(step, total)


def tuned(alpha: float, losses: Sequence[float], dense_losses: Sequence[float]) -> float:
    for loss, dense in zip(losses, dense_losses, strict=True):
        alpha *= 1.05 if loss > dense * (1 + 0.01) else 0.995
    return alpha
