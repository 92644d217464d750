"""LoRA adapters on a pair: each adds the same to the weights at every λ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dami.serving.vllm.engines import engine, tokens_of
from tests.dami.serving.vllm.pairs import LAMS, answer, merged, prompts_of

vllm = pytest.importorskip("vllm")

PROMPTS = prompts_of(5, 17, 33, 9, 21)
WEIGHTS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
RANK = 4


def write_adapter(model: Any, directory: Path) -> dict[str, Tensor]:
    """Writes a random adapter as PEFT does, and returns what it adds to each weight, by name."""
    generator = torch.Generator().manual_seed(5)
    tensors, added = {}, {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in WEIGHTS:
            up, down = (
                torch.randn(shape, generator=generator) * 0.1
                for shape in ((weight.shape[0], RANK), (RANK, weight.shape[1]))
            )
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            added[name] = 2 * up @ down
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": WEIGHTS}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return added


def test_requests_with_and_without_an_adapter_in_one_batch(packed: Any, tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    pair = packed("qwen3", "int8")
    added = write_adapter(merged(pair, 0.0), tmp_path)
    adapted = (True, True, False, True, False)
    expected = []
    for prompt, lam, with_adapter in zip(PROMPTS, LAMS, adapted, strict=True):
        model = merged(pair, lam)
        with torch.no_grad():
            for name, change in added.items() if with_adapter else ():
                model.get_parameter(name).add_(change)
        expected.append(answer(model, prompt, 16))
    adapter = LoRARequest("adapter", 1, str(tmp_path))
    asked = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args={"intensity": lam})
        for lam in LAMS
    ]
    # on CPUs vLLM itself gives requests without an adapter that in its last place: so there has to be an empty one
    with engine(pair, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        found = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            asked,
            lora_request=[adapter if each else None for each in adapted],
            use_tqdm=False,
        )
    assert tokens_of(found) == expected
