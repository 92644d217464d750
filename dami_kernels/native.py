"""Thin calls into the compiled CPU kernels (csrc/cpu)."""

from __future__ import annotations

WHY_NOT: str | None = "the compiled part is missing: pip install dami-kernels, or pip install -e . in a checkout"
