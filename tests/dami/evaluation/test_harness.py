"""The model that lm-evaluation-harness knows as "dami"."""

from __future__ import annotations

from typing import Any

import dami
import pytest

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

from dami.evaluation.harness import DamiLM  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

CONTEXT = "<|user|>What is 2 + 3?<|assistant|>"


@pytest.fixture(scope="module")
def models() -> dict[float, tuple[Any, Any]]:
    """Of each end the pair turned there, and the plain checkpoint."""
    instruct, thinking = dami.example_pair()
    common = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    return {
        lam: (
            DamiLM(instruct=str(instruct), thinking=str(thinking), intensity=lam, **common),
            HFLM(pretrained=str(end), **common),
        )
        for lam, end in ((0.0, instruct), (1.0, thinking))
    }


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_harness_hears_the_end_that_it_asked_for(models: dict[float, tuple[Any, Any]], lam: float) -> None:
    ours, plain = models[lam]
    requests = [Instance("loglikelihood", {}, (CONTEXT, end), i) for i, end in enumerate(("5", "6", "7 or 8"))]
    for (value, greedy), (wanted, same) in zip(
        ours.loglikelihood(requests), plain.loglikelihood(requests), strict=True
    ):
        assert value == pytest.approx(wanted, rel=1e-4)
        assert greedy == same
    settings = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 12}
    requests = [Instance("generate_until", {}, (CONTEXT, dict(settings)), 0)]
    (said,) = ours.generate_until(requests)
    assert said
    assert len(ours.tokenizer(said)["input_ids"]) <= 12


def test_it_is_registered() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("dami") is DamiLM


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="pair must be a packed pair, or instruct and thinking two checkpoints, got"):
        DamiLM(instruct="a")
    with pytest.raises(ValueError, match="intensity must be a number or \"auto\", got 'high'"):
        DamiLM(pair="a", intensity="high")


def test_options_reach_the_checkpoints_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(*_: Any, **options: Any) -> Any:
        asked.update(options)
        raise OSError("asked")

    monkeypatch.setattr(dami, "load_pair", load)
    own = {"revision": "v1", "thinking_revision": "v2", "subfolder": "a", "trust_remote_code": True}
    with pytest.raises(OSError, match="asked"):
        DamiLM(instruct="a", thinking="b", batch_size=2, **own)
    assert own.items() <= asked.items()
    assert "batch_size" not in asked
    with pytest.raises(TypeError, match=r"the model \"dami\" has no \['revison'\]: it takes \["):
        DamiLM(instruct="a", thinking="b", revison="v1")
