"""What the benchmarks are made of: λ, counts of bytes and operations, timing, results, the check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import lams, limits
from benchmarks.check import WrongResult, check_linear
from benchmarks.linear import Case
from benchmarks.record import latest, load, store, text_table
from benchmarks.shapes import LAYERS
from benchmarks.timing import Budget, Times, interleaved
from benchmarks.weights import FORMATS, Copies, count_of, split
from dami_kernels import LerpWeight, formats, lerp_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1024, 4096])
@pytest.mark.parametrize("kind", lams.KINDS)
def test_every_row_has_its_lam(kind: str, rows: int) -> None:
    batch = lams.make(kind, rows)
    per_row = batch.per_row()
    assert per_row.shape == (rows,)
    assert per_row.dtype == torch.float32
    different = len(per_row.unique())
    assert different <= {"distinct": rows, "ends": 2, "identical": 1, "zero": 1, "zipf": 11}.get(kind, rows)
    if kind in ("uniform", "ragged"):
        assert different == (round(rows**0.5) if rows <= 1024 else rows // 1024) or rows in (2, 7)
    if kind in ("zero", "ends"):
        assert set(per_row.tolist()) <= {0.0, 1.0}
    if kind == "distinct":
        assert different > 0.99 * rows
    elif kind == "ragged":
        assert bool((batch.row_to_lam.diff() >= 0).all())  # a sequence lies in one piece
        if rows > 1024:
            assert len(batch.row_to_lam.bincount().unique()) > 1
    elif rows > 1024:
        assert batch.rows_per_lam == 1024


def test_zipf_prefers_the_first() -> None:
    counts = lams.make("zipf", 1000, torch.Generator().manual_seed(0)).lam.unique(return_counts=True)[1]
    assert counts[0] > 2 * counts[1] > 0


def test_bad_lams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'mixed'"):
        lams.make("mixed", 4)
    with pytest.raises(ValueError, match="rows beyond 1024 must be a multiple of it, got 1500"):
        lams.make("uniform", 1500)


@pytest.mark.parametrize(
    ("format", "at_zero", "between"),
    [("pair", 2, 4), ("int8", 2, 3.0625), ("int4", 2, 2.5625), ("w8d4", 1.0625, 1.625)],
)
def test_bytes_read(format: str, at_zero: float, between: float) -> None:
    weight = LerpWeight.pack(torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16(), format)
    n = weight.shape.numel()
    assert limits.bytes_read(weight, torch.zeros(3)) == at_zero * n
    assert limits.bytes_read(weight, torch.tensor([0.0, 0.5])) == limits.bytes_read(weight, torch.tensor([0.0, 1.0]))
    assert limits.bytes_read(weight, torch.rand(3)) == between * n
    assert limits.bytes_read(weight, torch.ones(3)) == (2 if format == "pair" else between) * n


def test_operations() -> None:
    weight = LerpWeight.pack(torch.randn(3, 5), torch.randn(3, 5))
    one = 2 * 3 * 5  # a row's product

    def operations(lam: list[float], rows_per_lam: int = 1) -> float:
        return limits.operations(weight, torch.tensor(lam).repeat_interleave(rows_per_lam)) / one

    assert operations([0, 1, 0]) == 3
    assert operations([0.2, 0.4, 0.6]) == 6  # two products each
    assert operations([0.2], 1000) == 1002  # blended once
    assert operations([0.2, 0.4, 0], 1000) == 3004
    assert limits.activation_bytes(4, 3, 5, torch.bfloat16) == 4 * 8 * 2


def test_a_low_rank_is_multiplied_in_two_steps() -> None:
    (weight,) = Copies((30, 50), torch.bfloat16, CPU, ["lowrank"], 1).weights["lowrank"]
    assert limits.operations(weight, torch.rand(7)) == 2 * 7 * (30 * 50 + 64 * 30 + 64 * 50)


def test_quantiles() -> None:
    assert Times.of([float(n) for n in range(1, 12)]) == (2.0, 6.0, 10.0, 11)


class Clock:
    """Stands still but for what is timed."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def stopwatch(self, seconds: float, log: list[float]) -> float:
        self.now += seconds
        log.append(seconds)
        return seconds


def test_methods_take_turns_and_a_slow_one_takes_fewer() -> None:
    clock, log = Clock(), []  # type: ignore[var-annotated]
    methods = {seconds: lambda seconds=seconds: clock.stopwatch(seconds, log) for seconds in (0.001, 0.002, 1.0)}
    times = interleaved(methods, 1.0, clock)
    assert log[:6] == [0.001, 0.001, 0.002, 0.002, 1.0, 1.0]  # the first calls, not counted
    assert log[6:9] == [0.001, 0.002, 1.0]
    assert times[0.001].count == times[0.002].count > times[1.0].count >= 5
    assert times[1.0].median == 1.0


def test_a_budget_names_what_it_leaves_out() -> None:
    clock = Clock()
    budget = Budget(10, clock)
    done = []
    for case in budget.spend("abcd"):
        clock.now += 4
        done.append(case)
    assert (done, budget.left_out) == (["a", "b", "c"], ["d"])


def test_results_are_appended_and_their_columns_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    store([{"date": 1, "a": "x"}], path)
    store([{"date": 3, "a": "x"}, {"date": 2, "a": "x"}, {"date": 2, "a": "y"}], path)
    store([], path)
    assert [row["date"] for row in load(path)] == ["1", "3", "2", "2"]
    assert load(path, a="y") == [{"date": "2", "a": "y"}]
    assert {key: row["date"] for key, row in latest(load(path), "a").items()} == {("x",): "3", ("y",): "2"}
    with pytest.raises(ValueError, match=r"has other columns: \['a', 'b'\]"):
        store([{"date": 1, "b": 2}], path)
    assert load(tmp_path / "none.csv") == []
    (empty := tmp_path / "empty.csv").touch()
    store([{"date": 1, "a": "x"}], empty)
    assert load(empty) == [{"date": "1", "a": "x"}]


def test_text_tables_line_up() -> None:
    assert text_table([["a", "ms"], ["longer", 1.5]]) == "a        ms\nlonger  1.5"


def test_copies_are_the_same_weight_in_other_places() -> None:
    copies = Copies((2000, 64), torch.bfloat16, CPU, FORMATS, 2)
    assert [*copies.weights] == FORMATS == ["pair", *sorted(set(formats.names()) - {"pair"})]
    for format, (first, second) in copies.weights.items():
        assert first.shape == (2000, 64)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first.tensors, second.tensors, strict=True))
        base, target = (end.float() for end in first.unpack())
        assert torch.equal(base, second.unpack()[0].float())
        assert (target - base).norm() / base.norm() == pytest.approx(0.03, rel=0.3), format
    assert copies.weights["int4"][1].tensors[0] is copies.ends[1][0]  # the base is shared with the plain methods
    assert len(copies.merged()) == 4
    for moved, (base, target) in zip(copies.in_huge_pages(), copies.ends, strict=False):  # none without such pages
        assert all(end.stride() == (128, 1) for end in moved.tensors)
        assert all(map(torch.equal, moved.tensors, (base, target)))
        assert moved.tensors[0].data_ptr() != base.data_ptr()
    assert count_of((3072, 3072), 2**28) == 18
    assert count_of((151936, 2560), 2**28) == 2
    assert count_of((64, 64), 2**28) == 64


@pytest.mark.parametrize("format", ["pair", "int4", "w8d4", "lowrank"])
def test_a_weight_is_split_by_features(format: str) -> None:
    (whole,) = Copies((90, 64), torch.float32, CPU, [format], 1).weights[format]
    parts = split(whole, [50, 40])
    assert [part.shape[0] for part in parts] == [50, 40]
    for end in (0, 1):
        assert torch.allclose(torch.cat([part.unpack()[end] for part in parts]), whole.unpack()[end], atol=1e-6)


def wrong(y: torch.Tensor) -> Iterator[torch.Tensor]:
    """Results that must be refused."""
    yield y + 0.01 * y.std() * torch.randn_like(y)
    for place in ((0, slice(None)), (slice(None), slice(32, 48)), (38, slice(None))):
        for value in (0.0, torch.nan):
            spoilt = y.clone()
            spoilt[place] = value
            yield spoilt
    yield y.roll(16, 1)
    yield y.roll(1, 0)


@pytest.mark.parametrize("format", ["pair", "int8", "int4", "w8d4", "lowrank"])
def test_the_check_passes_what_is_right_and_nothing_else(format: str) -> None:
    (weight,) = Copies((160, 96), torch.bfloat16, CPU, [format], 1).weights[format]
    x, lam = torch.randn(40, 96).bfloat16(), torch.rand(40)
    y = lerp_linear(x, weight, lam)
    check_linear(y, x, weight, lam)
    for spoilt in wrong(y):
        with pytest.raises(WrongResult):
            check_linear(spoilt, x, weight, lam)


def test_layers_are_those_of_the_models() -> None:
    assert LAYERS["Qwen3-4B"]["qkv"] == ((32 + 2 * 8) * 128, 2560)
    assert LAYERS["Qwen3-30B-A3B"]["qkv"] == ((32 + 2 * 4) * 128, 2048)
    for layers in LAYERS.values():
        if "down" in layers:  # gate and up beside each other, then down
            assert layers["gate_up"] == (2 * layers["down"][1], layers["down"][0])
    assert str(Case("Qwen3-4B", "o", 4, "zero")) == "Qwen3-4B o (N=2560, K=4096), M=4, zero: λ = 0 for all"
