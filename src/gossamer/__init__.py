"""Gossamer: train a network sparse from scratch and get a smaller, faster model."""

from typing import TYPE_CHECKING, Any

from gossamer.bake import finalize
from gossamer.forecast import forecast
from gossamer.latency import LatencyTable, latency
from gossamer.method import Cost, Method, Progress, SupportChange
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
from gossamer.shrink.file import load, save
from gossamer.shrink.plan import Plan
from gossamer.shrink.shrink import Shrunk, shrink
from gossamer.site import Site
from gossamer.sparse_weight import Masked, SparseWeight
from gossamer.sparsifier import Sparsifier

if TYPE_CHECKING:
    from gossamer.runtime.compile import compile_sparse
else:

    def __getattr__(name: str) -> Any:
        """The runtime when it is first asked for: it registers operators with PyTorch."""
        if name != "compile_sparse":
            raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
        from gossamer.runtime.compile import compile_sparse

        return compile_sparse


__all__ = [
    "AutoSparse",
    "Chase",
    "Cost",
    "DST",
    "GMP",
    "GraNet",
    "LatencyTable",
    "MEST",
    "Masked",
    "Method",
    "Plan",
    "Progress",
    "RigL",
    "SET",
    "SNFS",
    "SRSTE",
    "SRigL",
    "STR",
    "Shrunk",
    "Site",
    "SparseWeight",
    "Sparsifier",
    "Static",
    "SupportChange",
    "TopKAST",
    "compile_sparse",
    "finalize",
    "forecast",
    "latency",
    "load",
    "save",
    "shrink",
]

__version__ = "0.1.0"
