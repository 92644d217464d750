"""PEFT adapters on top of a patched model: the same adapter at every λ, or a refusal."""

from __future__ import annotations

import copy
from typing import Any

import dami
import pytest
import torch
from packaging import version
from transformers import PreTrainedModel
from transformers.integrations import peft as integration

from tests.dami.families import batch, pair, references
from tests.dami.test_generation import GREEDY, LAM, assert_rows_match, prompts

peft = pytest.importorskip("peft")


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3"))


def adapted(model: Any, config: Any) -> Any:
    """A PEFT model whose adapter does something."""
    torch.manual_seed(5)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt_" in name or "ia3_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


LORA = {"task_type": "CAUSAL_LM", "r": 2}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", **LORA),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_top_of_a_patched_model(model: PreTrainedModel, kind: str) -> None:
    inputs = prompts()

    def plain(lam: float) -> Any:
        return adapted(copy.deepcopy(references("qwen3", lam)[0]), ADAPTERS[kind]())

    ours = adapted(model, ADAPTERS[kind]())
    assert_rows_match(ours, plain, inputs, LAM, **GREEDY)
    with torch.no_grad(), dami.intensity(ours, LAM):  # around the call: PEFT looks embeddings up by itself
        logits = ours(**inputs).logits
    seen = inputs["attention_mask"].bool()
    for row, lam in enumerate(LAM):
        wanted = plain(lam)(**inputs).logits[row, -7:][seen[row]]
        torch.testing.assert_close(logits[row, -7:][seen[row]], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(getattr(integration, "MIN_PEFT_VERSION", "0")),
    reason="transformers wants a newer PEFT for this",
)
def test_an_adapter_can_be_trained_and_taken_off(model: PreTrainedModel) -> None:
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "down_proj"], **LORA))
    model(**batch("left"), intensity=LAM).logits.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    model.delete_adapter("default")
    assert not any(hasattr(module, "lerp") for module in dami.unpatch_model(model).modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: peft.LoraConfig(use_dora=True, **LORA),
            "the adapter 'default' uses use_dora=True; known to leave the weights alone",
        ),
        (lambda: peft.LoraConfig(init_lora_weights="pissa", **LORA), "uses init_lora_weights='pissa'; known"),
        (lambda: peft.LoraConfig(trainable_token_indices=[1], **LORA), r"uses trainable_token_indices=\[1\]"),
        (lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), "uses LOHA; known"),
    ],
)
def test_an_adapter_that_needs_the_weights_is_refused(model: PreTrainedModel, config: Any, message: str) -> None:
    adapted = peft.get_peft_model(model, config())
    with pytest.raises(ValueError, match=message):
        adapted(**prompts())
    with pytest.raises(ValueError, match=message):
        adapted.generate(**prompts(), **GREEDY)


@torch.no_grad()
def test_a_merged_adapter_is_refused(model: PreTrainedModel) -> None:
    ours, inputs = adapted(model, ADAPTERS["lora"]()), prompts()
    wanted = ours(**inputs, intensity=0.5).logits
    ours.merge_adapter()
    for run in (ours, ours.generate):
        with pytest.raises(ValueError, match="the adapter 'default' is merged into the instruct end only"):
            run(**inputs)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(**inputs, intensity=0.5).logits, wanted, rtol=1e-4, atol=1e-4)
