"""Which names are public: those that a package lists or the documentation imports, and the class of patched models."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dami", "dami_kernels")
MODEL = ("dami.patching.model", "LerpModel")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "smollm2" / "README.md")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def public_names() -> dict[str, list[str]]:
    """Names by module: of the packages as they list them, then of other modules in the order of the alphabet."""
    imported: dict[str, set[str]] = {MODEL[0]: {MODEL[1]}}
    for page in PAGES:
        for block in PYTHON.findall(page.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
                    imported.setdefault(node.module, set()).update(alias.name for alias in node.names)
    names = {package: list(importlib.import_module(package).__all__) for package in PACKAGES}
    names |= {module: sorted(imported[module]) for module in sorted(imported.keys() - names.keys())}
    return names
