"""The methods by name. Adding one takes its file, one row here, its card and its reference twin."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gossamer.method import Method
from gossamer.methods.autosparse import AutoSparse
from gossamer.methods.chase import Chase
from gossamer.methods.dst import DST
from gossamer.methods.gmp import GMP
from gossamer.methods.granet import GraNet
from gossamer.methods.mest import MEST
from gossamer.methods.rigl import RigL
from gossamer.methods.set import SET
from gossamer.methods.snfs import SNFS
from gossamer.methods.srigl import SRigL
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
            "set",
            SET,
            "drops the weights nearest to zero and grows at random; never needs a dense gradient",
            "Mocanu et al., Scalable training of artificial neural networks with adaptive sparse "
            "connectivity inspired by network science, Nature Communications 2018, "
            "arXiv 1707.04780",
        ),
        MethodInfo(
            "rigl",
            RigL,
            "drops by magnitude, grows by gradient; one dense weight gradient per update",
            "Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, "
            "arXiv 1911.11134",
        ),
        MethodInfo(
            "snfs",
            SNFS,
            "drops by magnitude, grows by momentum; layers of large momentum gain weights",
            "Dettmers and Zettlemoyer, Sparse Networks from Scratch: Faster Training without "
            "Losing Performance, 2019, arXiv 1907.04840",
        ),
        MethodInfo(
            "gmp",
            GMP,
            "gradual magnitude pruning: dense at the start, the smallest weights go bit by bit",
            "Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for model "
            "compression, 2017, arXiv 1710.01878",
        ),
        MethodInfo(
            "granet",
            GraNet,
            "gradual pruning that regrows a falling share of the weights; from dense or sparse",
            "Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, "
            "NeurIPS 2021, arXiv 2106.10404",
        ),
        MethodInfo(
            "mest",
            MEST,
            "prunes by magnitude and grows at random, between bounds that draw together",
            "Yuan et al., MEST: Accurate and Fast Memory-Economic Sparse Training Framework on "
            "the Edge, NeurIPS 2021, arXiv 2110.14032",
        ),
        MethodInfo(
            "srigl",
            SRigL,
            "as many weights in every neuron of a layer, grown by gradient; idle neurons go",
            "Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024, "
            "arXiv 2305.02299",
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
