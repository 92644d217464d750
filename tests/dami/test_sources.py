"""What files on disk tell of a pair before it is loaded; it says what loading would say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dami
import pytest
from dami import sources

PRESETS = {"presets": {"low": 0.3}, "estimator": None}


@pytest.fixture
def ends(tmp_path: Path) -> list[str]:
    for end in dami.example_pair():
        shutil.copytree(end, tmp_path / end.name)
    (tmp_path / "thinking" / "intensity" / "intensity.json").write_text(json.dumps(PRESETS))
    return [str(tmp_path / "instruct"), str(tmp_path / "thinking")]


def pack(directory: str, config: str = '{"quantization_config": {"quant_method": "dami", "format": "int4"}}') -> None:
    (Path(directory) / "config.json").write_text(config)


def test_a_good_pair_passes(ends: list[str]) -> None:
    sources.check_pair(ends, "int8", [0.3, "low", -1])
    sources.check_pair(["someone/instruct", "someone/thinking"], None, ["any", "auto"])  # on the hub: nobody knows yet
    pack(ends[1])
    sources.check_pair(ends[1:], "int4", ["low"])
    sources.check_pair(ends[1:], None)


def test_a_pair_that_cannot_be_loaded_is_told(ends: list[str]) -> None:
    with pytest.raises(ValueError, match=r"thinking must be given: .*instruct is a checkpoint, not a packed pair"):
        sources.check_pair(ends[:1], None)
    pack(ends[1])
    with pytest.raises(ValueError, match=r"thinking is a packed pair, not one end of a pair: load it alone"):
        sources.check_pair(ends, None)
    with pytest.raises(ValueError, match=r"format must be None or 'int4', in which .*thinking is packed, got 'int8'"):
        sources.check_pair(ends[1:], "int8")
    for damaged in ("{", "[]"):
        pack(ends[1], damaged)
        with pytest.raises(ValueError, match=r"thinking.config.json must be a JSON object"):
            sources.check_pair(ends, None)
    with pytest.raises(OSError, match=r"there is no checkpoint \./instruct"):
        sources.check_pair(["./instruct", ends[1]], None)


def test_names_of_intensities_must_be_known(ends: list[str]) -> None:
    with pytest.raises(ValueError, match=r"intensity must be a number, one of \['low'\] or 'auto', got 'high'"):
        sources.check_pair(ends, None, ["high"])
    with pytest.raises(ValueError, match='intensity="auto" needs an estimator'):
        sources.check_pair(ends, None, ["auto"])
    (Path(ends[1]) / "intensity" / "intensity.json").write_text("[")
    with pytest.raises(ValueError, match=r"intensity.json must hold an estimator's settings and presets"):
        sources.check_pair(ends, None, ["low"])
    shutil.rmtree(Path(ends[1]) / "intensity")
    with pytest.raises(ValueError, match=r"a preset, of which the model has none, or 'auto', got 'low'"):
        sources.check_pair(ends, None, ["low"])
