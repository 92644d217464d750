"""The old name of `dami.serving.app`."""

from dami.serving.app import create_app
from dami.serving.listening import run
from dami.serving.service import ServiceSettings as Settings

__all__ = ["Settings", "create_app", "run"]
