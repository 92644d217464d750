"""A calibration without labels: the λ it finds usable, and the estimator that it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dami
import pytest
from dami import cli
from dami.chat import ask
from dami.estimators.calibrated import CalibratedEstimator, Signature
from dami.estimators.files import StoredIntensity
from dami.evaluation.calibration import Calibration, agreement_of, calibrate
from dami.evaluation.sweeps import Record
from typer.testing import CliRunner

LAMS = (0.0, 0.5, 1.0)
PROMPTS = [f"{place} + {20 - place % 7} =" for place in range(20, 40)]
SETTINGS: dict[str, Any] = {"samples": 2, "rows": 60, "max_new_tokens": 48, "trial": 2}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return dami.load_pair(*dami.example_pair())


@pytest.fixture(scope="module")
def calibrated(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, Path]:
    directory = tmp_path_factory.mktemp("run") / "intensity"
    return calibrate(*pair, PROMPTS, directory, LAMS, price=0.3, **SETTINGS), directory


def test_it_attaches_and_answers(calibrated: tuple[Calibration, Path], pair: tuple[Any, Any], tmp_path: Path) -> None:
    """From its directory, and with a saved pair."""
    found, directory = calibrated
    model, tokenizer = pair
    estimator = found.stored.estimator
    assert isinstance(estimator, CalibratedEstimator)
    assert estimator.takes_cache
    assert (estimator.intensities, estimator.price, len(estimator.budgets)) == (found.usable, 0.3, 14)
    assert [point.intensity for point in found.points] == [*LAMS]
    assert json.loads((directory / "calibration.json").read_text())["usable"] == [*found.usable]
    before = model.dami_patch.estimator, model.dami_patch.presets, model.dami_patch.frontier
    try:
        dami.attach(model, directory)
        assert model.dami_patch.presets == found.stored.presets
        answers = ask(model, tokenizer, PROMPTS[:3], "auto", max_new_tokens=4)
        assert {answer.intensity for answer in answers} <= {*found.usable}
        again, _ = dami.load_pair(dami.save_pair(model, tmp_path / "saved", tokenizer))
        assert [a.intensity for a in ask(again, tokenizer, PROMPTS[:3], "auto", max_new_tokens=1)] == [
            answer.intensity for answer in answers
        ]
    finally:
        model.dami_patch.estimator, model.dami_patch.presets, model.dami_patch.frontier = before


def test_it_resumes(calibrated: tuple[Calibration, Path], pair: tuple[Any, Any]) -> None:
    """Without asking again: the second time all answers come from the file."""
    _, directory = calibrated
    news: list[int] = []
    calibrate(*pair, PROMPTS, directory, LAMS, **SETTINGS, on_batch=lambda records: news.append(len(records)))
    assert news == [len(PROMPTS) * len(LAMS) * 2]


def record(index: int, lam: float, text: str, finished: bool = True) -> Record:
    return Record("prompts", index, 0, lam, 0, 0.0, int(10 + 10 * lam), "", text, finished)


def test_a_lam_whose_answers_do_not_end_is_not_usable() -> None:
    """And has no vote. Its agreement is shown nevertheless."""
    records = [record(index, lam, "8", lam != 0.5 or index < 5) for index in range(20) for lam in LAMS]
    frontier, points = agreement_of(records, "word")
    assert frontier.intensities == (0.0, 1.0)
    assert [point.accuracy.value for point in points] == [1, 0.25, 1]
    assert [point.well_formed for point in points] == [1, 0.25, 1]


def test_with_one_usable_lam_there_is_nothing_to_choose(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record(index, lam, "8", lam == 0) for index in range(20) for lam in LAMS for _ in range(2)]
    monkeypatch.setattr("dami.evaluation.calibration.sweep", lambda *_, **__: records)
    (tmp_path / "run").mkdir()
    found = calibrate(*pair, PROMPTS, tmp_path / "run", LAMS)
    assert found.usable == (0.0,)
    assert StoredIntensity.load(tmp_path / "run").estimator == dami.estimators.StaticIntensity(0.0)


def test_mistakes_are_named(pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="questions must be at least 20, got 19"):
        calibrate(*pair, PROMPTS[:19], tmp_path)
    with pytest.raises(ValueError, match=r"compare must be one of \['math', 'text', 'word'\], got 'letters'"):
        calibrate(*pair, PROMPTS, tmp_path, compare="letters")
    with pytest.raises(ValueError, match=r"names must be of \[.*\], one at least, got \['mood'\]"):
        calibrate(*pair, PROMPTS, tmp_path, signals=["mood"])
    told = [record(index, lam, str(index * 3 + lam)) for index in range(20) for lam in LAMS]
    monkeypatch.setattr("dami.evaluation.calibration.sweep", lambda *_, **__: told)
    with pytest.raises(ValueError, match=r"answers must agree on at least 20 prompts, compared by 'word', got 0 of 20"):
        calibrate(*pair, PROMPTS, tmp_path, LAMS)
    assert not any(tmp_path.iterdir())
    assert Signature(("states",)).tokens == 8


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["calibrate", *arguments], env={"COLUMNS": "100"})


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    output = str(tmp_path / "found")
    done = run(str(file), "-o", output, "-l", "0", "-l", "1", "--samples", "2", "--max-tokens", "48")
    assert done.exit_code == 0, done.output
    assert "comes to its end" in done.stdout
    assert "an estimator at price 0.2; low λ=" in done.stdout
    assert StoredIntensity.load(output).estimator is not None
    file.write_text("\n".join(PROMPTS[:19]))
    for arguments, message in (
        ([str(file), "-o", output], "prompts must be at least 20, got 19"),
        (["-o", output, "--compare", "letters"], "compare must be one of ['math', 'text', 'word'], got 'letters'"),
        (["-o", output, "--pair", str(tmp_path)], "prompts are needed for a pair of your own"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert message in done.output
