"""`python -m dami` is `dami`."""

from dami.cli.base import app

app()
