"""The classes of patched modules."""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn

from dami.layers.base import LerpModule, M, Recipe, recipe_of


@functools.cache
def patched_class(kind: type[LerpModule], original: Any) -> type[LerpModule]:
    """The class of a patched module: a subclass of the original's whose innermost forward is the kind's."""
    if original is kind.replaces:
        return kind
    # a subclass keeps its own forward, which calls its parent's; a norm's forward is replaced as a whole
    bases = (kind, original) if kind.replaces is None else (original, kind)
    recipe = Recipe(patched_class, (kind, recipe_of(original)))
    return type(f"Lerp{original.__name__}", bases, {"__module__": original.__module__, "recipe": recipe})


def reclass(module: nn.Module, cls: type[M]) -> M:
    """Changes a module's class in place, and what accelerate's hooks have kept of the old one."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module._old_forward = cls.forward.__get__(module)
    return cast(M, module)
