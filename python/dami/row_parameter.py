"""The old name of `dami.layers.row_parameter`."""

from dami.layers.row_parameter import rule

__all__ = ["rule"]
