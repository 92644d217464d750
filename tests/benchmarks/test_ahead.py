"""Kernels are compiled before they are asked for: without a GPU's memory, each by one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks import ahead, linear, operators, shapes, step, suite, tune  # noqa: E402
from dami_kernels.triton import embedding, experts, norms, product  # noqa: E402
from dami_kernels.triton import linear as triton_linear  # noqa: E402
from dami_kernels.tuning import device_of  # noqa: E402
from tests.dami_kernels.triton_targets import TARGETS, Driver  # noqa: E402

H100 = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    name="H100", total_memory=80 * 10**9,
)  # fmt: skip

TINY = ["--models", "tiny", "--rows", "1", "--lams", "distinct", "--compile-only"]


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    before = driver._active
    driver.set_active(Driver(TARGETS["sm_90"]))
    forget()
    yield
    driver._active = before
    forget()


def forget() -> None:
    """Lets nothing be known of a device, nor of what other tests have compiled for theirs."""
    device_of.cache_clear()
    for module in (embedding, experts, triton_linear, norms, product):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The kernels that would be compiled, by name and variant; none is."""
    kernels: list[tuple[str, str]] = []

    def compile(self: JITFunction, key: str, *rest: object) -> None:
        hook = triton.knobs.runtime.jit_cache_hook
        if not hook(key=key, fn=SimpleNamespace(name=self.__name__)):
            kernels.append((self.__name__, key))

    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    return kernels


def test_it_fills_the_cache_and_launches_nothing(tmp_path: Path) -> None:
    with ahead.compiling():
        linear.main([*TINY, "--formats", "pair"])
    assert len([*tmp_path.rglob("_lerp_linear_kernel.cubin")]) == 1
    assert JITFunction.run.__module__ == "triton.runtime.jit"  # as before


def test_every_operator_and_format_is_asked_for(asked: list[tuple[str, str]]) -> None:
    with ahead.compiling():
        operators.main(["--rows", "1", "--compile-only"])
        step.main(["--rows", "1", "--layers", "1", "--compile-only"])
    assert {name for name, _ in asked} >= {
        "_lerp_linear_kernel", "_lerp_experts_kernel", "_lerp_embedding_kernel", "_lerp_norm_kernel",
    }  # fmt: skip
    for bits in ((0, 0), (0, 8), (0, 4), (8, 4)):  # of the base and of the second matrix
        assert any("('constexpr', {}), ('constexpr', {})".format(*bits) in key for _, key in asked), bits


def test_processes_share_the_kernels(asked: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "Qwen3-4B", "--layers", "gate_up", "down", "--lams", "distinct", "ragged"]
    arguments += ["--rows", "1", "64", "4096", "--compile-only"]
    with ahead.compiling():
        linear.main(arguments)
    whole = {*asked}
    shares = []
    for i in range(3):
        asked.clear()
        with ahead.compiling((i, 3)):
            linear.main(arguments)
        shares.append({*asked})
    assert len(whole) > 6
    assert all(shares)
    assert set().union(*shares) == whole
    assert sum(map(len, shares)) == len(whole)  # none twice
    assert "FAILED" not in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton.runtime.errors import PTXASError

    def fails(self: JITFunction, key: str, *rest: object) -> None:
        if "('constexpr', 0), ('constexpr', 4)" in key:  # numbers and codes of 4 bits: int4
            raise PTXASError("Internal Triton PTX codegen error")

    monkeypatch.setattr(JITFunction, "_do_compile", fails)
    with ahead.compiling():
        linear.main(TINY)
    out = capsys.readouterr().out
    assert out.count("FAILED") == 1
    assert "lerp_linear int4: PTXASError: PTXAS error: Internal Triton PTX codegen error" in out


def test_the_suite_and_the_tuner_know_what_to_compile(
    asked: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.os, "nice", lambda by: 0)
    monkeypatch.setattr(suite, "GPU", suite.GPU[:1])
    assert suite.main(["--compile", "0/1"]) == 0
    for_suite = {*asked}
    asked.clear()
    monkeypatch.setitem(shapes.LAYERS, "Qwen3-4B", {"gate_up": shapes.LAYERS["Qwen3-4B"]["gate_up"]})
    assert tune.main(["--rows", "1", "--compile", "0/1"]) == 0
    assert len({*asked}) > 20
    assert {key for _, key in for_suite} & {key for _, key in asked}  # what runs now is a candidate


def test_a_share_is_read() -> None:
    assert ahead.share("2/8") == (2, 8)
