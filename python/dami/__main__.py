"""`python -m dami` is `dami`."""

from dami.cli import app

app()
