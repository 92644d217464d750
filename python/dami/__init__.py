"""Two checkpoints of one architecture, one batch, and a reasoning intensity per query.

model, tokenizer = dami.load_pair("…-Instruct", "…-Thinking")
model.generate(**batch, intensity=[0.0, 0.3, 1.0])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dami import registration
from dami.version import __version__ as __version__

if TYPE_CHECKING:
    from dami.dial.turning import intensity, set_intensity
    from dami.estimators.attach import attach
    from dami.estimators.registry import register_estimator
    from dami.huge_pages import use_huge_pages
    from dami.layers.describe import describe
    from dami.loading.load import load_pair
    from dami.loading.packing import pack
    from dami.patching.model import PairModel, twin
    from dami.patching.patch import patch_model, unpatch_model
    from dami.saving.config import PairConfig
    from dami.saving.directory import save_pair
    from dami.saving.merging import materialize
    from dami.sources import example_pair

_HOME = {
    "PairConfig": "saving.config",
    "PairModel": "patching.model",
    "attach": "estimators.attach",
    "describe": "layers.describe",
    "example_pair": "sources",
    "intensity": "dial.turning",
    "load_pair": "loading.load",
    "materialize": "saving.merging",
    "pack": "loading.packing",
    "patch_model": "patching.patch",
    "register_estimator": "estimators.registry",
    "save_pair": "saving.directory",
    "set_intensity": "dial.turning",
    "twin": "patching.model",
    "unpatch_model": "patching.patch",
    "use_huge_pages": "huge_pages",
}

__all__ = [
    "PairConfig",
    "PairModel",
    "attach",
    "describe",
    "example_pair",
    "intensity",
    "load_pair",
    "materialize",
    "pack",
    "patch_model",
    "register_estimator",
    "save_pair",
    "set_intensity",
    "twin",
    "unpatch_model",
    "use_huge_pages",
]

registration.register()


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used: `import dami` alone stays instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'dami' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dami.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
