"""Takes a name of another package away, or changes it, to see what is said of it."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dami_kernels.upstream import Place


def ways(place: Place) -> list[str]:
    """How a place can break: it is gone, takes or has other names, or no longer does what it did."""
    return ["gone", *["renamed"] * bool(place.names), *["idle"] * bool(place.proof)]


def break_place(monkeypatch: pytest.MonkeyPatch, place: Place, way: str) -> str:
    """Breaks a place for whoever imports it now, and returns what must be said of it."""
    module, _, path = place.path.partition(":")
    real = importlib.import_module(module)
    owner, *members = path.split(".")
    found: Any = getattr(real, owner)
    for member in members:
        found = getattr(found, member)
    new: Any = type("Other", (), {})
    if not isinstance(found, type):

        def new(other: Any = None, *rest: Any, **options: Any) -> None: ...

        if way == "idle":
            new.__signature__ = inspect.signature(found)
    for member in reversed(members):
        new = SimpleNamespace(**{member: new})

    class Changed(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name != owner:
                return getattr(real, name)
            if way == "gone":
                raise AttributeError(f"module {module!r} has no attribute {name!r}")
            return new

    monkeypatch.setitem(sys.modules, module, Changed(module))
    return {
        "gone": f"has no {place.path}: module '{module}' has no attribute '{owner}'",
        "renamed": f"has no {', '.join(place.names)} in {place.path}, but ",
        "idle": f"has a {place.path} that does not {place.does}",
    }[way]
