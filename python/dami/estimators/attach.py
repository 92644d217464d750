"""Defines `attach`, which sets a patched model's estimator."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TypeVar

from torch import nn

from dami.dial.patch import Estimator, patch_of
from dami.dial.values import one_lam
from dami.estimators.files import StoredIntensity

M = TypeVar("M", bound=nn.Module)


def attach(
    model: M, estimator: Estimator | str | PathLike[str] | None, presets: Mapping[str, float] | None = None
) -> M:
    """Sets or removes the estimator that `generate(intensity="auto")` uses, and returns the model.

    Args:
        model: a patched model.
        estimator: any object with `estimate(model, batch) -> λ of each prompt`; or a directory written by `dami
            train-estimator`, whose presets are then used too; or None for no estimator.
        presets: λ by name, for `generate(intensity="low")`. None keeps the current ones, or takes the directory's.

    Raises:
        TypeError: the model is not patched, the estimator has no method `estimate`, or a preset is not a number.
        ValueError: a preset is called "auto" or is not finite, or the directory holds no estimator.
        OSError: the directory does not exist.
    """
    patch = patch_of(model)
    if isinstance(estimator, (str, PathLike)):
        stored = StoredIntensity.load(estimator)
        patch.frontier, patch.prompt_tail = stored.frontier, stored.prompt_tail
        return attach(model, stored.estimator, stored.presets if presets is None else presets)
    if estimator is not None and not callable(getattr(estimator, "estimate", None)):
        raise TypeError(f"estimator must have a method estimate(model, batch), got {type(estimator).__name__}")
    if presets is not None:
        if "auto" in presets:
            raise ValueError('presets must have names other than "auto", which is what the estimator chooses')
        for name, lam in presets.items():
            one_lam(lam, f"presets[{name!r}]")
        patch.presets = {name: float(lam) for name, lam in presets.items()}  # keeps 0.6, not the nearest float32
    patch.estimator = estimator
    return model
