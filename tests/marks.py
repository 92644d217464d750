"""Marks of single parameters of a test."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: str) -> list[Any]:
    """Parameters that are tested with -m slow only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
