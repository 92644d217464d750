"""`import dami` is instant and needs nothing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import dami
import pytest


def test_importing_dami_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, dami; print(sorted({'torch', 'transformers', 'triton'} & sys.modules.keys()), dir(dami))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert all(name in done.stdout for name in dami.__all__)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in dami.__all__:
        assert getattr(dami, name).__doc__
    with pytest.raises(AttributeError, match="module 'dami' has no attribute 'merge'"):
        dami.merge  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [
        "row_parameter.rule",
        "decoding.KNOWN",
        "terminal.point_table",
        "serving.server.Settings",
        "serving.server.create_app",
        "serving.server.run",
        "estimators.Estimator",
        "estimators.training.train_estimator",
        "evaluation.study_report.write_report",
        "evaluation.frontier.wilson",
        "evaluation.tasks.same_math",
    ],
)
def test_old_names_are_there(name: str) -> None:
    module, _, name = f"dami.{name}".rpartition(".")
    assert getattr(importlib.import_module(module), name) is not None


def test_the_version_stands_in_one_place_and_is_cited() -> None:
    root = Path(__file__).resolve().parents[2]
    assert 'dynamic = ["version"]' in (root / "pyproject.toml").read_text()
    assert f"\nversion: {dami.__version__}\n" in (root / "CITATION.cff").read_text()
