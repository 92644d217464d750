"""The tables of the README and the docs are those of benchmarks/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_pages_show_the_newest_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run: python -m benchmarks.tables"


def test_every_table_is_shown() -> None:
    assert {name for page in tables.PAGES for name in tables.shown(page.read_text(encoding="utf-8"))} == {
        *tables.TABLES
    }


def row(method: str, format: str, median: float, **more: str) -> tables.Row:
    common = {"date": "2026-01-01", "device": "a CPU", "isa": "avx2", "threads": "2", "torch": "2", "dtype": "bf16"}
    case = {"commit": "abc", "lam": "distinct", "m": "4", "model": "Qwen3-4B", "layer": "o", "n": "8", "k": "9"}
    times = {"method": method, "format": format, "median_ms": str(median), "limit_ms": "1"}
    return common | case | times | more


def test_a_ratio_is_to_the_merged_weight_of_the_same_case() -> None:
    rows = [
        row(tables.OURS, "int4", 2, date="2025-01-01"),  # older than
        row(tables.MERGED, "", 2),
        row(tables.OURS, "int4", 3),
        row(tables.MERGED, "", 100, m="16"),
        row(tables.OURS, "int4", 50, m="16"),
        row(tables.OURS, "int8", 1, m="1"),  # has no merged one beside it
    ]
    assert "| `int4` | every row its own λ | – | **1.50** (33%) | **0.50** (2%) |" in tables.linear(rows)
    assert "| o | 4 | 2 ms | – | – | **1.50** (33%) | – | – | – |" in tables.by_case(rows, "layer", "m")
    rows.append(row(tables.TWO, "", 4))
    assert "| 4 | 2 ms | – | – | **1.50** (33%) | – | – | 2.00 |" in tables.by_case(rows, "m")
    rows.append(row(tables.OURS, "int4", 1, date="2027-01-01"))  # ran alone
    assert "| 4 | 2 ms | – | – | – | – | – | 2.00 |" in tables.by_case(rows, "m")


def test_only_the_device_measured_last_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.record import store

    store([row("a", "", 1), row("b", "", 1, date="2027", device="another")], tmp_path / "linear.csv")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert [found["method"] for found in tables.measured("linear.csv", tables.is_cpu)] == ["b"]
    assert tables.measured("linear.csv", tables.is_gpu) == tables.measured("step.csv", tables.is_cpu) == []
    assert tables.by_case([], "m") == tables.linear([]) == tables.kernels([]) == "Not measured yet."


def test_both_kernels_of_few_rows_are_told_beside_each_other() -> None:
    rows = [row(tables.OURS, "int4", 2e-3), row(tables.CUDA, "int4", 1.5e-3), row(tables.MERGED, "", 1e-3)]
    rows += [row(tables.OURS, "pair", 4e-3), row(tables.TRITON, "pair", 5e-3)]  # the operator chose the other one
    rows += [row(tables.OURS, "int8", 1e-3)]
    told = tables.kernels(rows)
    assert "| layer | N | K | M | format | Triton | CUDA C++ |" in told
    assert "| o | 8 | 9 | 4 | int4 | 2.0 µs | 1.5 µs |" in told
    assert "| o | 8 | 9 | 4 | pair | 5.0 µs | 4.0 µs |" in told
    assert "int8" not in told
    assert "**2.00**" in tables.by_case(rows, "layer", "m")  # what the operator does


def test_peers_are_compared_with_the_pair_at_five_lam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.record import store

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.peers("shipped") == tables.steps() == "Not measured yet."
    common = {"device": "a CPU", "isa": "avx2", "threads": "2", "torch": "2", "commit": "abc", "model": "shipped"}
    common |= {"questions": "20", "tokens": "32", "memory_gb": "0.50", "equal": "0.95", "dtype": "bfloat16"}

    def of(date: str, method: str, engine: str, rate: float, load: float) -> dict[str, object]:
        rates = {"tokens_per_second": f"{32 * rate:.1f}", "answers_per_second": f"{rate:.3f}"}
        return {**common, "date": date, "method": method, "engine": engine, "load_before": f"{load}", **rates}

    old = of("2026-01-01", "dami serve, five λ", "ours 1", 100, 0.1)
    ours, theirs = (
        of("2026-01-02", "dami serve, five λ", "ours 2", 2, 0.1),
        of("2026-01-02", "vLLM", "theirs 3", 3, 0.5),
    )
    store([old, ours, theirs], tmp_path / "peers.csv")
    text = tables.peers("shipped")
    assert "ours 2, theirs 3. 20 questions, 32 tokens each. Load average before a method: 0.1 to 0.5." in text
    assert "| dami serve, five λ | bfloat16 | 64 | 1.00 | 2.00 | 0.50 | 95 |" in text
    assert text.endswith("| vLLM | bfloat16 | 96 | 1.50 | 3.00 | 0.50 | 95 |")
