"""Architectures, packed or from two ends, against merged models: docs/vllm.md lists them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.dami.serving.vllm import pairs
from tests.dami.serving.vllm.engines import ask, engine, tokens_of, vllm_answers
from tests.dami.serving.vllm.pairs import LAMS, answers, prompts_of

PROMPTS = prompts_of(5, 17, 33, 9, 21)
# whose tiny models vLLM and transformers answer differently, without a pair as well: compared with vLLM's own answers
VLLM_S_OWN = {"deepseek_v2", "deepseek_v3", "lfm2"}
QUICK = {  # family and format: norms of each formula, transformers' own code, fused weights, MLA, other names
    "cohere2": "int8",
    "deepseek_v3": "pair",
    "gemma3_text": "int4",
    "glm4": "w8d4",
    "mixtral": "int8",
    "olmo3": "int4",
}
OTHERS = sorted(pairs.FAMILIES.keys() - QUICK.keys() - {"gpt_oss", "qwen3_next"})  # below, and test_delta_net.py


def lams_of(family: str) -> Sequence[float]:
    return (0.3, 1.0, 1.0, 0.3, 0.3) if family in VLLM_S_OWN else LAMS


def wanted(family: str, pair: Path) -> list[list[int]]:
    """What merged models answer: to ask before an engine starts, as vLLM changes transformers' classes that it runs."""
    return (vllm_answers if family in VLLM_S_OWN else answers)(pair, PROMPTS, lams_of(family), 16)


def found(family: str, *pair: Path) -> list[list[int]]:
    """What a packed pair, or two ends, answer."""
    with engine(*pair, language_model_only=family in pairs.WITH_TOWER) as llm:
        return tokens_of(ask(llm, PROMPTS, lams_of(family)))


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_packed_pair(packed: Any, family: str) -> None:
    if family in pairs.WITH_TOWER:
        pytest.importorskip("torchvision")
    pair = packed(family, QUICK.get(family, "int8"))
    expected = wanted(family, pair)
    assert found(family, pair) == expected


def test_two_ends_whose_experts_have_biases(ends: Any, packed: Any) -> None:
    """GPT-OSS, whose attention also has sinks."""
    expected = wanted("gpt_oss", packed("gpt_oss", "pair"))
    assert found("gpt_oss", *ends("gpt_oss")) == expected
    with pytest.raises(Exception, match="a pair's experts cannot have biases in another format than 'pair'"):
        found("gpt_oss", packed("gpt_oss", "int8"))


def test_what_has_no_operator_is_named(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dami.serving.vllm import convert

    monkeypatch.setattr(convert, "_read_by", lambda layer: [])  # as if gated delta nets were unknown
    said = (
        r"these parameters differ between the ends, and dami has no operator for their layers in vLLM:\n(.|\n)*"
        r"model.layers.0.linear_attn.dt_bias \(in a QwenGatedDeltaNetAttention\)"
    )
    with pytest.raises(Exception, match=said):
        found("qwen3_next", *ends("qwen3_next"))
