"""The kernel for the Hugging Face hub: it is generated, and works where `dami_kernels` cannot be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dami_kernels import reference
from dami_kernels.weight import LerpWeight
from tests.tolerance import assert_as_accurate, factor_for
from tools import hub_kernels

# What every process below does first: imports a build as the package `kernels` does, under the name in its metadata.
LOAD = """
import importlib.util, json, sys, warnings
from pathlib import Path
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dami", "dami_kernels"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Blocked())

def load(variant):
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

build, files = Path(sys.argv[1]), Path(sys.argv[2])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "dami-kernels"
    hub_kernels.write(directory)
    return directory


def run(code: str, project: Path, files: Path, **environment: str) -> str:
    """Runs code after LOAD in an interpreter that finds neither this checkout nor its tests."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD + code, str(project / "build"), str(files)],
        env={**os.environ, **environment},
        cwd=files,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, base, target and λ, of odd sizes."""
    x, base, target = (torch.randn(shape).to(dtype) for shape in ((5, 67), (45, 67), (45, 67)))
    return x, base, base + (target * 0.1).to(dtype), torch.tensor([0.0, 0.3, 0.5, 1.0, -0.4])


def check(y: Tensor, x: Tensor, base: Tensor, target: Tensor, lam: Tensor) -> None:
    oracle = reference.lerp_linear(x, (base, target), lam)
    merged = torch.stack([(base.float() + weight * (target.float() - base.float())) for weight in lam]).to(x.dtype)
    plain = torch.stack([row @ weight.T for row, weight in zip(x, merged, strict=True)])
    assert_as_accurate(y, oracle, plain, factor_for(y.numel()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_where_the_package_cannot_be_imported(project: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    data = operands(dtype)
    torch.save(data, tmp_path / "in.pt")
    said = run(
        """
kernel = load(build / "torch-cpu")
x, base, target, lam = torch.load(files / "in.pt")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = kernel.lerp_linear(x, kernel.LerpWeight.pack(base, target), lam=lam)
torch.save(y, files / "out.pt")
print(caught[0].message, "|", sorted(kernel.__all__), hasattr(torch.ops.dami, "lerp_linear"))
""",
        project,
        tmp_path,
    )
    check(torch.load(tmp_path / "out.pt"), *data)
    assert "plain torch" in said
    assert "the package dami-kernels has them" in said
    assert "lerp_rms_norm" in said
    assert said.endswith("False\n")  # its operators are in a namespace of their own


def test_builds_live_beside_each_other_with_their_gradients(project: Path, tmp_path: Path) -> None:
    said = run(
        """
warnings.simplefilter("ignore")
for backend in ("cpu", "cuda"):
    kernel = load(build / f"torch-{backend}")
    base, target = torch.randn(2, 3, 4, 6)
    x, lam = torch.randn(5, 6, requires_grad=True), torch.rand(5, requires_grad=True)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    kernel.lerp_experts(x, kernel.LerpWeight.pack(base, target), lam, offsets).sum().backward()
    print(x.grad.shape, lam.grad.shape)
""",
        project,
        tmp_path,
    )
    assert said == "torch.Size([5, 6]) torch.Size([5])\n" * 2


def test_its_triton_kernels_run(project: Path, tmp_path: Path) -> None:
    """In Triton's interpreter, as there is no GPU; a kernel without loops, whose bounds NumPy refuses there."""
    pytest.importorskip("triton")
    _, base, target, lam = operands(torch.float32)
    ids = torch.tensor([44, 0, 7, 7, 12])
    torch.save((ids, base, target, lam), tmp_path / "in.pt")
    run(
        """
kernel = load(build / "torch-cuda")
triton = importlib.import_module(f"{kernel.__name__}.triton")
ids, base, target, lam = torch.load(files / "in.pt")
y = triton.lerp_embedding(ids, [base, target], lam, None, 1, "pair", torch.float32, base.shape[1])
torch.save(y, files / "out.pt")
""",
        project,
        tmp_path,
        TRITON_INTERPRET="1",
    )
    plain = torch.lerp(base[ids], target[ids], lam[:, None])
    oracle = reference.lerp_embedding(ids, (base, target), lam)
    assert_as_accurate(torch.load(tmp_path / "out.pt"), oracle, plain, factor_for(plain.numel()))


def test_tables_of_launch_parameters_go_along(tmp_path: Path) -> None:
    package = tmp_path / "dami_kernels"
    shutil.copytree(hub_kernels.ROOT / "dami_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "tuning" / "tables").mkdir(exist_ok=True)
    (package / "tuning" / "tables" / "NVIDIA_X.json").write_text("[]\n")
    hub_kernels.write(tmp_path / "out", package)
    for place in ("torch-ext/dami_kernels", "build/torch-cpu", "build/torch-cuda"):
        assert (tmp_path / "out" / place / "tuning" / "tables" / "NVIDIA_X.json").exists()


def test_a_change_of_the_sources_changes_the_namespace(project: Path, tmp_path: Path) -> None:
    package = tmp_path / "dami_kernels"
    shutil.copytree(hub_kernels.ROOT / "dami_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (package / "rows.py").open("a") as file:
        file.write("# more\n")
    hub_kernels.write(tmp_path / "out", package)
    ids = {
        json.loads((place / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
        for place in (project, tmp_path / "out")
    }
    assert len(ids) == 2


def test_the_package_kernels_takes_it(project: Path) -> None:
    """Its parsers of build.toml and metadata.json, the check of the digests, and its loader."""
    kernels = pytest.importorskip("kernels")
    rust = pytest.importorskip("kernels._rust")
    assert sorted(str(backend) for backend in rust.Build.open(project).general.backends) == ["cpu", "cuda"]
    for backend in hub_kernels.BACKENDS:
        variant = project / "build" / f"torch-{backend}"
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, variant))
    kernel = kernels.get_local_kernel(project, backend="cpu")
    weight = kernel.LerpWeight.pack(*torch.randn(2, 4, 6))
    assert isinstance(weight, kernel.LerpWeight)
    assert not isinstance(weight, LerpWeight)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import numpy\n", r"x.py:1 must import only torch, Triton and the standard library, got {'numpy'}"),
        ("import dami_kernels\n", r"must import only .*got {'dami_kernels'}"),
        ('"""Calls torch.ops.dami.x"""\n', r"x.py must name the package or its operators .*got 'torch.ops.dami'"),
        ('name = "dami_kernels.ops"\n', r"""x.py must name .*got '"dami_kernels.'"""),
    ],
)
def test_what_a_kernel_must_not_do_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub_kernels.converted(source, "x.py")


def test_names_become_relative_at_any_depth() -> None:
    source = (
        '"""λ."""\n\nimport importlib\n\nfrom dami_kernels import formats, native as n\n'
        "from dami_kernels.ops.x import (\n    a,\n    b,\n)\n\n\ndef f(name):  # stays\n"
        "    from dami_kernels.rows import lerp\n\n"
        '    importlib.import_module("dami_kernels.triton")\n'
        '    torch.library.impl(f"dami::{name}_λ", g)\n'
        "    return torch.ops.dami.lerp_linear\n"
    )
    assert hub_kernels.converted(source, "ops/library.py") == (
        '"""λ."""\n\nimport importlib\n\nfrom .. import formats, native as n\nfrom ..ops.x import a, b\n'
        "from .._ops import add_op_namespace_prefix, ops\n\n\ndef f(name):  # stays\n"
        "    from ..rows import lerp\n\n"
        '    importlib.import_module("..triton", __package__)\n'
        "    torch.library.impl(add_op_namespace_prefix(f'{name}_λ'), g)\n"
        "    return ops.lerp_linear\n"
    )


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="directory must be empty or hold an earlier project of kernel-builder, got"):
        hub_kernels.write(tmp_path)
    assert (tmp_path / "mine").exists()
