"""The command line, `dami`: each module adds its commands to `base.app`."""

from dami.cli import base, answer, check, pairs, measure, tune, calibrate, serve, machine  # noqa: I001  # in the order of the help
from dami.cli.base import app

__all__ = ["answer", "app", "base", "calibrate", "check", "machine", "measure", "pairs", "serve", "tune"]
