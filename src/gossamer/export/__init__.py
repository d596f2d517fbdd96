"""Plain models with zeros in them, for the engines that run them."""

from gossamer.export.semi_structured import SemiStructured, to_semi_structured

__all__ = ["SemiStructured", "to_semi_structured"]
