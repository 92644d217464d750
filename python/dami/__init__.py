"""Two checkpoints of one architecture, one batch, and a reasoning intensity per query.

model, tokenizer = dami.load_pair("…-Instruct", "…-Thinking")
model.generate(**batch, intensity=[0.0, 0.3, 1.0])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dami import registration

if TYPE_CHECKING:
    from dami.checkpoints import load_pair
    from dami.dial import intensity
    from dami.model import attach, twin
    from dami.packing import pack
    from dami.patching import describe, patch_model, unpatch_model
    from dami.sharing import materialize, save_pair
    from dami.sources import example_pair

__version__ = "0.1.0"

_HOME = {
    "attach": "model",
    "describe": "patching",
    "example_pair": "sources",
    "intensity": "dial",
    "load_pair": "checkpoints",
    "materialize": "sharing",
    "pack": "packing",
    "patch_model": "patching",
    "save_pair": "sharing",
    "twin": "model",
    "unpatch_model": "patching",
}

__all__ = [
    "attach",
    "describe",
    "example_pair",
    "intensity",
    "load_pair",
    "materialize",
    "pack",
    "patch_model",
    "save_pair",
    "twin",
    "unpatch_model",
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
