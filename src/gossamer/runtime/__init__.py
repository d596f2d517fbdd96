"""The sparse CPU runtime: plain models with zeros in them, run by kernels that use the zeros."""

from gossamer.runtime.compile import Choice, Compiled, compile_sparse
from gossamer.runtime.file import load, save

__all__ = ["Choice", "Compiled", "compile_sparse", "load", "save"]
