"""A pytest plugin for transformers' own tests: every causal language model that they build becomes a patched pair.

`test_upstream.py` runs it in a checkout of transformers, whose package `tests` is then the only one of that name. The
environment variable DAMI_UPSTREAM is λ of every model, "mixed" for another in each row, or "plain" to patch none.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from typing import Any

import dami
import pytest
import torch
from dami.patching.model import _sequences, patched_model_class
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

LAM = os.environ["DAMI_UPSTREAM"]
ROWS = (0.0, 0.5, 1.0)  # λ of the rows of a mixed batch, in turn
NAMES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_MAPPING_NAMES.values()}  # causal models, and bodies alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    packages = {f"transformers.models.{item.path.parent.name}" for item in items}
    for cls in _subclasses(PreTrainedModel) if LAM != "plain" else ():
        if cls.__module__.rpartition(".")[0] in packages:
            _build_pairs(cls)


def _subclasses(cls: type) -> set[type]:
    return {each for sub in cls.__subclasses__() for each in (sub, *_subclasses(sub))}


building = 0  # models, one a part of the other


def _build_pairs(cls: Any) -> None:
    """Has a class of models build patched pairs, and turn those that it loads from files that a pair has saved."""
    build, load = cls.__init__, cls.from_pretrained.__func__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        global building
        building += 1
        try:
            build(self, *args, **kwargs)
        finally:
            building -= 1
        if building or type(self).__name__ not in NAMES or self.device.type == "meta":  # on meta it is yet to be loaded
            return
        thinking = copy.deepcopy(self)
        with torch.random.fork_rng(), torch.no_grad():
            for parameter in thinking.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        _turn(dami.patch_model(self, thinking))

    @functools.wraps(load)
    def from_pretrained(chosen: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(chosen, *args, **kwargs)  # with output_loading_info=True, a tuple
        _turn(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    cls.__init__, cls.from_pretrained = __init__, classmethod(from_pretrained)
    if LAM == "mixed":
        patched: Any = patched_model_class(cls)
        for name in ("forward", "generate"):
            if hasattr(patched, name):
                setattr(patched, name, _mixed(getattr(patched, name)))


def _turn(model: PreTrainedModel) -> None:
    if hasattr(model, "dami_patch") and LAM != "mixed":
        model.dami_patch.dial.lam = torch.tensor(float(LAM), device=model.device)


def _mixed(method: Any) -> Any:
    """`forward` or `generate` with a λ for each row, unless it is given one or runs inside `generate`."""

    @functools.wraps(method)
    def at_several(self: Any, *args: Any, intensity: Any = None, **kwargs: Any) -> Any:
        rows = _sequences(self, args, kwargs)
        if intensity is None and self.dami_patch.program is None and rows is not None:
            intensity = [ROWS[row % len(ROWS)] for row in range(rows)]
        return method(self, *args, intensity=intensity, **kwargs)

    at_several.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return at_several
