"""The tuner keeps the fastest of the candidates that run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, shapes, tune
from benchmarks.machine import Cpu
from dami_kernels import native, tuning

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources


class StandIn(Cpu):
    """Runs the CPU's kernels and tells times made up from the parameters that were forced on the GPU's."""

    cold_bytes = 2**18

    def stopwatch(self, call: Callable[[int], object], copies: int) -> Callable[[], float]:
        from dami_kernels.triton import linear

        config = linear.linear_config()  # type: ignore[call-arg]
        return lambda: 1e-4 * abs(config.split_k - 2) + 1e-6 * config.num_stages


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "Gpu", StandIn)
    monkeypatch.setattr(tune, "table_path", lambda name: tmp_path / "tables" / "GPU.json")
    monkeypatch.setitem(shapes.LAYERS, "Qwen3-4B", {"o": (64, 512), "lm_head": (96, 256)})


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.usefixtures("_stand_in")
def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    journal = ["--journal", str(tmp_path / "journal"), "--results", str(tmp_path)]
    code = __main__.main(["--tune", "--rows", "512", "1", "--formats", "int4", *journal])
    assert code == 0
    assert (tmp_path / "GPU.json").read_text() == (tmp_path / "tables" / "GPU.json").read_text()
    monkeypatch.setattr(tuning.tables, "TABLES", tmp_path / "tables")
    tuning.load_table.cache_clear()
    table = tuning.load_table("GPU")
    assert {key: [entry.M for entry in entries] for key, entries in table.items()} == {
        (64, 512, torch.bfloat16, "int4"): [1, 512],
        (96, 256, torch.bfloat16, "int4"): [1],  # few rows of the head
    }
    for (N, K, dtype, format), entries in table.items():
        for entry in entries:
            candidates = tuning.linear_candidates(entry.M, N, K, dtype, format, tuning.H100)
            splits = {config.split_k for config in candidates}
            assert entry.config.split_k == min(splits, key=lambda split_k: abs(split_k - 2))
            assert entry.config.num_stages == 2


@pytest.mark.usefixtures("_stand_in")
def test_candidates_that_fail_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tune, "lerp_linear", fails)
    assert tune.main(["--rows", "1", "--formats", "pair", "--journal", str(tmp_path / "journal")]) == 0
    assert "OutOfResources: out of resource: shared memory" in capsys.readouterr().out
    assert not (tmp_path / "tables").exists()


def test_parameters_are_forced_on_the_kernel_only_within() -> None:
    from dami_kernels.triton import linear

    before = linear.linear_config
    config = tuning.linear_config(1, 64, 64, torch.bfloat16, "pair", tuning.H100)
    with tune.forced(config):
        assert linear.linear_config(7, 8, 9) is config  # type: ignore[call-arg, arg-type]
    assert linear.linear_config is before


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this needs a GPU, and torch finds none"):
        __main__.main(["--tune"])
