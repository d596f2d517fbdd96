"""Plain models with zeros in them, for the engines that run them."""

from gossamer.export.onnx import to_onnx
from gossamer.export.program import to_program
from gossamer.export.semi_structured import SemiStructured, to_semi_structured
from gossamer.export.tensors import to_safetensors
from gossamer.export.verify import Exported
from gossamer.export.zeros import zeros_note

__all__ = [
    "Exported",
    "SemiStructured",
    "to_onnx",
    "to_program",
    "to_safetensors",
    "to_semi_structured",
    "zeros_note",
]
