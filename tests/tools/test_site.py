"""The site of the documentation: every public name is documented and in the API reference, every link holds."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.reference import ROOT, public_names

SECTION = re.compile(r"^(\w+):$", re.MULTILINE)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Public names with what they stand for: functions, classes, and the public methods of these."""
    for module, names in public_names().items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            yield f"{module}.{name}", value
            if inspect.isclass(value):
                for member, what in vars(value).items():
                    if not member.startswith("_") and (callable(what) or isinstance(what, property | classmethod)):
                        yield f"{module}.{name}.{member}", what


def arguments(doc: str) -> list[str]:
    """The names that the section "Args" describes; one entry may describe several."""
    sections = SECTION.split(doc)
    if "Args" not in sections:
        return []
    entries = re.findall(r"^    ([\w*][\w*, ]*):", sections[sections.index("Args") + 1], re.MULTILINE)
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


def test_packages_and_pages_name_what_is_public() -> None:
    names = public_names()
    assert {"load_pair", "patch_model", "intensity"} <= {*names["dami"]}
    assert "lerp_linear" in names["dami_kernels"]
    assert "ask" in names["dami.chat"]  # which pages import


@pytest.mark.parametrize(("name", "value"), [pytest.param(*each, id=each[0]) for each in public_objects()])
def test_every_public_name_has_a_docstring(name: str, value: Any) -> None:
    doc = inspect.getdoc(value)
    assert doc, f"{name} has no docstring"
    if inspect.isfunction(value):
        described = arguments(doc)
        taken = inspect.signature(value).parameters
        assert set(described) <= {*taken}, f"{name} describes arguments that it does not take"
        if described:
            missing = [each for each in taken if each not in described and each not in ("self", "cls")]
            assert not missing, f"{name} does not describe {missing}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a link that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory[inventory.index(b"\nx", 80) + 1 :]).decode()
    known = {line.split(" ")[0] for line in listed.splitlines()}
    assert not [name for name, _ in public_objects() if name not in known]


def test_pages_of_the_repository_are_on_the_site(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="formats/"' in front  # docs/formats.md in the README
    assert 'src="images/pair-curve.svg"' in front
    assert 'href="shipped-pair/"' in front  # a page elsewhere in the repository
    assert (site / "quickstart" / "index.html").exists()
    assert (site / "files" / "benchmarks" / "results" / "linear.csv").exists()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in ("index.html", "api/dami/index.html", "quickstart/index.html"):
        html = (site / page).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?://[^"]*"', html), page
