"""Names of models that carry λ, for clients that can choose a model but send no other fields.

A pair served as NAME is also NAME:auto, NAME:PRESET for each of its presets, and NAME:0.7 for any number.
"""

from __future__ import annotations

from collections.abc import Iterable

from dami.callers import AUTO, from_text

LISTED = (0.0, 0.3, 0.5, 0.7, 1.0)  # numbers that the list of models shows; every other one works, too


def names_of(name: str, presets: Iterable[str], auto: bool, intensity_range: tuple[float, float]) -> list[str]:
    """Returns the names under which a pair is listed, itself first.

    Args:
        name: the served model's name.
        presets: the names of the pair's presets.
        auto: whether it has an estimator.
        intensity_range: the lowest and the highest λ that requests may ask for.
    """
    low, high = intensity_range
    numbers = [f"{lam:g}" for lam in LISTED if low <= lam <= high]
    return [name, *(f"{name}:{suffix}" for suffix in [*([AUTO] if auto else []), *presets, *numbers])]


def intensity_in(model: str, name: str) -> float | str | None:
    """Returns the λ that a model's name carries: a number, or the name of a preset or "auto"; None if it carries none.

    Args:
        model: the name in a request.
        name: the served model's name.

    Raises:
        ValueError: if it is not the served model's name, or has something else after it.
    """
    if model == name:
        return None
    served, colon, suffix = model.partition(f"{name}:")
    if served or not colon:
        raise ValueError(f"model must be {name!r}, got {model!r}")
    try:
        return from_text(suffix)
    except ValueError:
        wanted = f"model must be {name!r}, or {name!r} with a colon and a number, a preset or auto"
        raise ValueError(f"{wanted}, got {model!r}") from None
