"""What published pairs need, computed from recorded configs and recorded rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__, scale
from benchmarks.record import load

RATES = {(scale.DISK, scale.READ): 1e9, (scale.DISK, scale.WRITE): 5e8, **{("pack", f): 1e7 for f in scale.FORMATS}}


def test_needs_are_those_of_the_models() -> None:
    small, middle, large = ([*scale.needs(pair, RATES)] for pair in scale.shown())
    for needs, parameters, active in ((small, 4.02e9, 4.02e9), (middle, 30.5e9, 3.3e9), (large, 235.1e9, 22e9)):
        pair = needs[0]
        assert pair.format == "pair"
        assert pair.nbytes == pytest.approx(4 * parameters, rel=0.01)
        assert pair.per_token == pytest.approx(4 * active, rel=0.15)
        assert pair.load == pair.nbytes / 1e9
        assert pair.pack == pytest.approx(4 * parameters / 1e9 + parameters / 1e7 + pair.nbytes / 5e8, rel=0.01)
        assert [need.nbytes for need in needs] == sorted((need.nbytes for need in needs), reverse=True)
    assert small[0].gpus == "RTX 4090"
    assert small[0].token == small[0].per_token / 1.008e12
    assert large[0].gpus == "6 × MI300X"
    assert large[0].token == large[0].per_token / (6 * 5.3e12)


def test_rates_are_measured_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no rates are recorded"):
        __main__.main(["scale", "--results", str(tmp_path)])
    small = ["--bytes", str(scale.CHUNK), "--size", "64", "--folder", str(tmp_path)]
    __main__.main(["scale", "--measure", "--results", str(tmp_path), *small])
    rows = load(tmp_path / "scale.csv")
    assert {(row["what"], row["of"]) for row in rows} == RATES.keys()
    assert all(float(row["per_second"]) > 0 for row in rows)
    assert "Qwen3-235B-A22B-Thinking-2507" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_durations_are_told_in_a_unit_that_suits_them(seconds: float, told: str) -> None:
    assert scale.lasting(seconds) == told
