"""Registers classes of estimators by name, so that an estimator can be saved and loaded with a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import Tensor

from dami.dial.patch import Estimator

C = TypeVar("C", bound=type[Any])

ENTRY_POINTS = "dami.estimators"
_KINDS: dict[str, type[Any]] = {}


def register_estimator(kind: str) -> Callable[[C], C]:
    """Decorates a class of estimators, so that `dami.save_pair` and `dami.load_pair` can save and load its instances.

    The class is a dataclass whose fields are JSON-serialisable. Or it has a method `state()`, which returns its
    settings (JSON-serialisable) and its weights (tensors by name), and a class method `from_state(settings, weights)`,
    which creates an estimator from both. To load the pair, the class's module must be imported, or a package installed
    that declares it as an entry point of the group "dami.estimators".

    Args:
        kind: the name of the class in the files.

    Raises:
        TypeError: the class is not an estimator, or cannot be stored.
        ValueError: another class has that name.
    """

    def register(cls: C) -> C:
        if not callable(getattr(cls, "estimate", None)):
            raise TypeError(f"estimator must have a method estimate(model, batch), got {cls.__name__}")
        if not is_dataclass(cls) and not all(callable(getattr(cls, name, None)) for name in ("state", "from_state")):
            raise TypeError(f"estimator must be a dataclass, or have state() and from_state(), got {cls.__name__}")
        known = _KINDS.get(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # redefining a class is fine
            raise ValueError(f"kind must be a new name, got {kind!r}, which is {known.__qualname__}'s")
        _KINDS[kind] = cls
        return cls

    return register


def kinds() -> list[str]:
    """Returns the names of all registered kinds."""
    return sorted(_KINDS)


def state_of(estimator: Estimator) -> tuple[str, dict[str, Any], Mapping[str, Tensor]]:
    """Returns kind, settings and weights of an estimator; TypeError if its class is not registered."""
    kind = next((kind for kind, cls in _KINDS.items() if type(estimator) is cls), None)
    if kind is None:
        raise TypeError(
            f"estimator must be one of the kinds {kinds()} to be saved, got {type(estimator).__name__}: register it "
            "with dami.register_estimator, or take it off with dami.attach(model, None)"
        )
    stored: Any = estimator
    if hasattr(stored, "state"):
        return kind, *stored.state()
    return kind, {field.name: getattr(stored, field.name) for field in fields(stored)}, {}


def estimator_of(kind: str, settings: dict[str, Any], weights: Mapping[str, Tensor]) -> Estimator:
    """Creates an estimator from its kind, settings and weights; ValueError if the kind is not registered."""
    if kind not in _KINDS:
        for entry in entry_points(group=ENTRY_POINTS):
            entry.load()
    if kind not in _KINDS:
        raise ValueError(
            f"kind must be one of {kinds()}, got {kind!r}: import the module that registers it, with "
            "dami.register_estimator, before the pair is loaded"
        )
    cls = _KINDS[kind]
    return cls.from_state(settings, weights) if hasattr(cls, "from_state") else cls(**settings)
