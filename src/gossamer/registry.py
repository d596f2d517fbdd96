"""The methods by name. Adding one takes its file, one row here, its card and its reference twin."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gossamer.method import Method
from gossamer.methods.autosparse import AutoSparse
from gossamer.methods.chase import Chase
from gossamer.methods.dst import DST
from gossamer.methods.srste import SRSTE
from gossamer.methods.static import Static
from gossamer.methods.str import STR
from gossamer.methods.topkast import TopKAST

__all__ = ["METHODS", "MethodInfo", "method_info"]


@dataclass(frozen=True)
class MethodInfo:
    """One method: its name on the command line, its class, one line about it, its paper."""

    name: str
    cls: type[Method]
    summary: str
    paper: str


METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            "static",
            Static,
            "a random mask, drawn once, never changed: what every other method must beat",
            "Evci et al., Rigging the Lottery, ICML 2020, arXiv 1911.11134 (its baseline)",
        ),
        MethodInfo(
            "chase",
            Chase,
            "dynamic sparse training that turns into removed channels while it trains",
            "Yin et al., Dynamic Sparsity Is Channel-Level Sparsity Learner, NeurIPS 2023, "
            "arXiv 2305.19454",
        ),
        MethodInfo(
            "dst",
            DST,
            "trainable thresholds: starts dense, and training finds each layer's density",
            "Liu et al., Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With "
            "Trainable Masked Layers, ICLR 2020, arXiv 2005.06870",
        ),
        MethodInfo(
            "autosparse",
            AutoSparse,
            "learned soft thresholds; weights below them learn on, at an annealed share",
            "Kundu et al., AutoSparse: Towards Automated Sparse Training of Deep Neural Networks, "
            "2023, arXiv 2304.06941",
        ),
        MethodInfo(
            "str",
            STR,
            "learned soft thresholds, raised by weight decay; pruned weights do not learn",
            "Kusupati et al., Soft Threshold Weight Reparameterization for Learnable Sparsity, "
            "ICML 2020, arXiv 2002.03231",
        ),
        MethodInfo(
            "topkast",
            TopKAST,
            "the largest weights act, more of them learn; always sparse, optionally annealed",
            "Jayakumar et al., Top-KAST: Top-K Always Sparse Training, NeurIPS 2020, "
            "arXiv 2106.03517",
        ),
        MethodInfo(
            "srste",
            SRSTE,
            "N of every M consecutive weights, from scratch; 2:4 runs on sparse tensor cores",
            "Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From "
            "Scratch, ICLR 2021, arXiv 2102.04010",
        ),
    )
}


def method_info(name: str) -> MethodInfo:
    """The row of method `name`. Raises ValueError with the nearest name when there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no method is called {name!r}{hint}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
