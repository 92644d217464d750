"""Architectures, packed or from two ends, against merged models: docs/vllm.md lists them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dami.serving.vllm import pairs
from tests.dami.serving.vllm.engines import ask, engine, tokens_of, vllm_answers
from tests.dami.serving.vllm.pairs import LAMS, answers, prompts_of

PROMPTS = prompts_of(5, 17, 33, 9, 21)
# whose tiny models vLLM and transformers answer differently, at λ=0 as well: compared with vLLM's own answers
VLLM_S_OWN = {"deepseek_v3", "lfm2"}
QUICK = {  # family and format: norms of each formula, transformers' own code, fused names, MLA, routers with a bias
    "cohere2": "int8",
    "gemma3_text": "int4",
    "glm4": "w8d4",
    "mixtral": "int8",
    "olmo3": "int4",
}
OTHERS = sorted(pairs.FAMILIES.keys() - QUICK.keys())


def wanted(family: str, pair: Path) -> list[list[int]]:
    return (vllm_answers if family in VLLM_S_OWN else answers)(pair, PROMPTS, LAMS, 16)


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_packed_pair(packed: Any, family: str) -> None:
    pair = packed(family, QUICK.get(family, "int8"))
    with engine(pair) as llm:
        found = tokens_of(ask(llm, PROMPTS))
    assert found == wanted(family, pair)
