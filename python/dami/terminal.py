"""The old name of `dami.cli.terminal`."""

from dami.cli.terminal import point_table

__all__ = ["point_table"]
