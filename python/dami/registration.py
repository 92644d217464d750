"""Registers packed pairs with transformers without importing it, so that `import dami` stays instant.

If registration fails, this file only warns, and transformers works without dami. `dami.load_pair` raises the error
itself.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Registers `dami.loading.quantizer` with transformers, now or as soon as transformers' registry is imported."""
    if REGISTRY in sys.modules:
        _register_quantizer()
    else:
        sys.meta_path.insert(0, _AfterRegistry())


def _register_quantizer() -> None:
    try:
        import_module("dami.loading.quantizer")
    except Exception as error:
        warnings.warn(
            "dami could not make packed pairs known to transformers, which goes on without them: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class _AfterRegistry(MetaPathFinder):
    """Finds transformers' registry with the ordinary finders, and registers with it once it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register_quantizer()

            loader.exec_module = run_and_register
        return spec
