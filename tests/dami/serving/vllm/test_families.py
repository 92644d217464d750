"""Architectures, packed or from two ends, against merged models: docs/vllm.md lists them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dami.loading.checkpoint import headers_in
from safetensors.torch import save_file

from dami_kernels import LerpWeight
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
    pair = packed("gpt_oss", "int4")
    expected = wanted("gpt_oss", pair)
    assert found("gpt_oss", pair) == expected
    with engine(*ends("gpt_oss"), format="int4") as llm:
        assert tokens_of(ask(llm, PROMPTS, lams_of("gpt_oss"))) == expected


def test_what_experts_cannot_have_is_named() -> None:
    from dami.serving.vllm.methods import ExpertsMethod
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    processes = SimpleNamespace(tp_size=2)
    sizes = {"hidden_dim_unpadded": 60, "intermediate_size_per_partition_unpadded": 32}
    moe = SimpleNamespace(has_bias=True, moe_parallel_config=processes, **sizes)
    method: Any = SimpleNamespace(moe=moe, up="int4", down="int4")
    limits = {"swiglu_limit": 7.0, "swiglu_alpha": None, "swiglu_beta": None}
    layer = SimpleNamespace(activation=MoEActivation.RELU2, apply_router_weight_on_input=True, **limits)
    said = (
        "a pair's experts cannot have the activation relu2, a limit of their own, biases in another format than 'pair' "
        r"over several processes \(--enable-expert-parallel\), router weights on their input, sizes that are rounded up"
    )
    with pytest.raises(ValueError, match=said):
        ExpertsMethod.create_weights(method, layer, 8, 64, 32, torch.float32)


def test_what_has_no_operator_is_named(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dami.serving.vllm import convert

    monkeypatch.setattr(convert, "_read_by", lambda layer: [])  # as if gated delta nets were unknown
    said = (
        r"these parameters differ between the ends, and dami has no operator for their layers in vLLM:\n(.|\n)*"
        r"model.layers.0.linear_attn.dt_bias \(in a QwenGatedDeltaNetAttention\)"
    )
    with pytest.raises(Exception, match=said):
        found("qwen3_next", *ends("qwen3_next"))


@pytest.mark.parametrize("format", ["pair", "int4"])
@pytest.mark.parametrize("intermediate", [32, 64, 96])  # gate_up is square, down is, neither
def test_experts_are_read_alike_as_the_hub_and_as_transformers_has_them(
    tmp_path: Path, format: str, intermediate: int
) -> None:
    """Qwen3-VL's, which vLLM transposes."""
    from dami.serving.vllm.files import TwoEnds

    shapes = {"experts.gate_up_proj": (3, 2 * intermediate, 64), "experts.down_proj": (3, 64, intermediate)}
    ends = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    read = []
    for layout in ("transformers", "hub"):
        located = []
        for number, end in enumerate(ends):
            path = tmp_path / f"{layout}{number}.safetensors"
            save_file({name: (e.mT if layout == "hub" else e).contiguous() for name, e in end.items()}, path)
            located.append({name: (path, header) for name, header in headers_in(path).items()})
        pair: Any = SimpleNamespace(formats=lambda: dict.fromkeys(shapes, format))
        config: Any = SimpleNamespace(model_type="qwen3_vl_moe")
        config.get_text_config = lambda: SimpleNamespace(hidden_size=64)
        files = TwoEnds((located[0], located[1]), pair, set(), config)
        read.append([{name: tensor.mT for name, tensor in each} for each in files.passes()])
    for name in shapes:
        expected = LerpWeight.pack(ends[0][name], ends[1][name], format).tensors
        for tensors in read:
            assert len(tensors) == len(expected)
            assert all(torch.equal(each[name], part) for each, part in zip(tensors, expected, strict=True))
