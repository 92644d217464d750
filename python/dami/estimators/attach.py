"""`attach` gives a patched model its estimator."""

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
    """Gives a patched model the estimator that `generate(intensity="auto")` asks, or takes it off; returns the model.

    Args:
        model: a patched model.
        estimator: any object with `estimate(model, batch) -> λ of each prompt`; or a directory that `dami
            train-estimator` wrote, with its presets; or None.
        presets: λ by name, for `generate(intensity="low")`; None leaves those that are there.

    Raises:
        TypeError: the model is not patched, the estimator has no method `estimate`, or a preset is no number.
        ValueError: a preset is called "auto", or is not finite; or the directory holds no estimator.
        OSError: there is no such directory.
    """
    patch = patch_of(model)
    if isinstance(estimator, (str, PathLike)):
        stored = StoredIntensity.load(estimator)
        patch.frontier = stored.frontier
        return attach(model, stored.estimator, stored.presets if presets is None else presets)
    if estimator is not None and not callable(getattr(estimator, "estimate", None)):
        raise TypeError(f"estimator must have a method estimate(model, batch), got {type(estimator).__name__}")
    if presets is not None:
        if "auto" in presets:
            raise ValueError('presets must have names other than "auto", which is what the estimator chooses')
        for name, lam in presets.items():
            one_lam(lam, f"presets[{name!r}]")
        patch.presets = {name: float(lam) for name, lam in presets.items()}  # 0.6, and not the float32 next to it
    patch.estimator = estimator
    return model
