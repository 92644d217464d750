"""The old name of `dami.generation.pieces`."""

from dami.generation.pieces import KNOWN

__all__ = ["KNOWN"]
