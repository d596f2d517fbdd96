"""Gossamer: train a network sparse from scratch and get a smaller, faster model."""

from gossamer.bake import finalize
from gossamer.method import Cost, Method, Progress, SupportChange
from gossamer.methods.chase import Chase
from gossamer.methods.dst import DST
from gossamer.methods.srste import SRSTE
from gossamer.methods.static import Static
from gossamer.shrink.file import load, save
from gossamer.shrink.plan import Plan
from gossamer.shrink.shrink import Shrunk, shrink
from gossamer.site import Site
from gossamer.sparse_weight import Masked, SparseWeight
from gossamer.sparsifier import Sparsifier

__all__ = [
    "Chase",
    "Cost",
    "DST",
    "Masked",
    "Method",
    "Plan",
    "Progress",
    "SRSTE",
    "Shrunk",
    "Site",
    "SparseWeight",
    "Sparsifier",
    "Static",
    "SupportChange",
    "finalize",
    "load",
    "save",
    "shrink",
]

__version__ = "0.1.0"
