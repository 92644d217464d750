"""These tests need vLLM, which has an environment of its own: `make test-serving`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.dami.serving.vllm import pairs

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.update(pairs.ENVIRONMENT)


@pytest.fixture(scope="session", autouse=True)
def looks_here() -> None:
    from tests.dami.serving.vllm.engines import look_here

    look_here()


@pytest.fixture(scope="session")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both ends of a family's random pair, written once."""
    written: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in written:
            write = pairs.write_adapted if family == "adapted" else lambda path: pairs.write_ends(family, path)
            written[family] = write(tmp_path_factory.mktemp(family))
        return written[family]

    return of


@pytest.fixture(scope="session")
def packed(ends: Any) -> Any:
    """A family's pair packed in a format, once."""
    made: dict[tuple[str, str], Path] = {}

    def of(family: str, format: str) -> Path:
        if (family, format) not in made:
            made[family, format] = pairs.pack(ends(family), format)
        return made[family, format]

    return of
