"""Messages about what is missing name commands that work."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dami_kernels import installation

ROOT = Path(__file__).resolve().parents[2]
WANTED = [
    "torch>=2",
    'fastapi>=1; extra == "serve"',
    'prometheus-client>=2; extra == "serve"',
    'lm-eval[hf]>=3; extra == "eval"',
    'math-verify>=4; extra == "eval"',
    'math-verify>=4; extra == "test"',
]


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "requires", lambda name: WANTED)


@pytest.mark.usefixtures("_known")
def test_an_extra_is_named_by_its_packages() -> None:
    text = installation.needs("dami serve", "fastapi", "serve")
    assert text == "dami serve needs fastapi: pip install 'fastapi>=1' 'prometheus-client>=2'"
    text = installation.needs("this", "lm_eval", "eval")
    assert text == "this needs lm_eval: pip install 'lm-eval[hf]>=3' 'math-verify>=4'"


@pytest.mark.usefixtures("_known")
def test_a_module_is_named_by_its_package() -> None:
    assert installation.needs("this", "math_verify") == "this needs math_verify: pip install 'math-verify>=4'"
    assert installation.needs("this", "prometheus_client").endswith("pip install 'prometheus-client>=2'")
    assert installation.needs("this", "other") == "this needs other: pip install other"


def test_a_checkout_that_is_not_installed_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "requires", requires)
    assert installation.needs("dami serve", "uvicorn", "serve") == "dami serve needs uvicorn: pip install uvicorn"


@pytest.mark.parametrize("extra", ["serve", "eval", "train", "vllm", "triton", "load"])
def test_every_extra_of_this_package_is_found(extra: str) -> None:
    """What pip is told is what the metadata of the installed package say, as pip itself reads them."""
    told = installation.needs("x", "y", extra).removeprefix("x needs y: pip install ")
    of_extra = metadata.metadata("dami-kernels").get_all("Requires-Dist") or []
    expected = [line.partition(";")[0].strip() for line in of_extra if re.search(rf"extra == .{extra}.$", line)]
    assert expected
    assert list(map(Requirement, shlex.split(told))) == list(map(Requirement, expected))


def test_nothing_tells_to_install_this_package_from_an_index() -> None:
    """No index has it: `pip install dami-kernels`, with or without an extra, is nowhere advised."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    code = [path for folder in ("python", "dami_kernels", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.*")]
    texts = {path: path.read_text() for path in [*pages, *code] if path.suffix in (".py", ".md", ".html")}
    assert len(texts) > 50
    advised = re.compile(r"pip install[^\n`]*['\"\s]dami-kernels")
    assert not [str(path) for path, text in texts.items() if advised.search(text)]
