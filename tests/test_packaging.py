"""What is in the source archive and in the wheel, which is built from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
pytest.importorskip("ninja")

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile")
TOP += ("mkdocs.yml", "pyproject.toml", "setup.py")
FOLDERS = (".ci", "benchmarks", "csrc", "dami_kernels", "deploy", "docs", "examples", "python", "tests", "tools")
TABLE = "dami_kernels/tuning/tables/A_GPU.json"  # as `make tune-gpu` writes them
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "*.egg-info")
CODE = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what: str, source: Path, to: Path) -> Path:
    """Calls a hook of the build backend; there is no compiler, so that it takes seconds."""
    environment = {"PATH": "", "CXX": "false", "HOME": os.environ.get("HOME", "/"), "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, "-c", CODE, f"build_{what}", str(to)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return to / done.stdout.splitlines()[-1]


def files(*folders: str) -> set[str]:
    """Of the checkout, without what was built."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    names = (path.relative_to(ROOT) for path in paths)
    return {str(name) for name in names if "__pycache__" not in name.parts and name.suffix not in (".so", ".o", ".pyc")
            and not any(part.endswith(".egg-info") for part in name.parts)}  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, directory / "checkout" / folder, ignore=BUILT)
    for name in (*TOP, "MANIFEST.in"):
        shutil.copy(ROOT / name, directory / "checkout")
    table = directory / "checkout" / TABLE
    table.parent.mkdir(exist_ok=True)
    table.write_text("[]\n")
    return build("sdist", directory / "checkout", directory)


@pytest.fixture(scope="module")
def wheel(archive: Path) -> zipfile.ZipFile:
    with tarfile.open(archive) as packed:
        packed.extractall(archive.parent, filter="data")
    return zipfile.ZipFile(build("wheel", archive.parent / archive.name.removesuffix(".tar.gz"), archive.parent))


def test_the_source_archive_has_all_that_a_checkout_has(archive: Path) -> None:
    with tarfile.open(archive) as packed:
        names = {member.name.partition("/")[2] for member in packed.getmembers() if member.isfile()}
    assert {*TOP} | files(*FOLDERS) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_has_the_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    wanted = {name.removeprefix("python/") for name in files("python", "dami_kernels")}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == wanted | {TABLE}
    assert "dami/data/pair/questions.jsonl" in found


def test_an_image_is_given_what_the_wheel_is_built_from(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Of the checkout, Docker sees only what .dockerignore lets through."""
    context = tmp_path / "context"
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            source = ROOT / line[1:]
            if source.is_dir():
                shutil.copytree(source, context / line[1:], ignore=BUILT)
            else:
                shutil.copy(source, context / line[1:])
    built = zipfile.ZipFile(build("wheel", context, tmp_path))
    assert {*built.namelist()} == {*wheel.namelist()} - {TABLE}


def test_every_pattern_of_package_data_matches_something() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, patterns in settings["package-data"].items():
        top, *rest = package.split(".")
        for pattern in set(patterns) - {"tables/*.json"}:  # none has been measured yet
            assert any(
                path.is_file() for path in (ROOT / settings["package-dir"][top]).joinpath(*rest).glob(pattern)
            ), pattern


def test_the_metadata_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for entry in metadata.get_all("Project-URL", []):
        assert f"({entry.partition(', ')[2]})" in readme  # no address that the README does not know
