"""PEFT adapters on top of a patched model: the same adapter at every λ, or a refusal."""

from __future__ import annotations

import copy
import functools
import types
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
import transformers
from packaging import version
from transformers import PreTrainedModel
from transformers.integrations import peft as integration

from tests.dami.families import batch, pair, references
from tests.dami.test_checkpoints import save
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


def test_an_adapter_learns_of_each_row_what_it_would_on_a_copy_merged_at_its_lam(model: PreTrainedModel) -> None:
    """The gradient of a mixed batch is the sum of theirs, with and without activation checkpointing."""
    lora, inputs, lams = ADAPTERS["lora"], batch("right"), [0.0, 0.37, 1.0, 1.2]

    def gradients(model: Any, rows: slice, **options: Any) -> list[torch.Tensor]:
        logits = model(**{name: tensor[rows] for name, tensor in inputs.items()}, **options).logits
        (logits.double().square() * inputs["attention_mask"][rows].unsqueeze(-1)).sum().backward()
        return [p.grad for name, p in model.named_parameters() if "lora_" in name]

    plain = [
        gradients(adapted(copy.deepcopy(references("qwen3", lam)[0]), lora()), slice(row, row + 1))
        for row, lam in enumerate(lams)
    ]
    wanted = [sum(parts) for parts in zip(*plain, strict=True)]
    for checkpointed in (False, True):
        ours = adapted(dami.patch_model(*pair("qwen3")), lora()).train()
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradients(ours, slice(None), intensity=lams), wanted, rtol=1e-3, atol=1e-3)


def test_the_trainer_takes_a_packed_pair_with_an_adapter_and_no_other(tmp_path: Path) -> None:
    """It asks the quantiser of a loaded model whether it can be trained."""
    ends = [save(model, tmp_path / str(i)) for i, model in enumerate(pair("qwen3"))]
    packed, _ = dami.load_pair(dami.pack(*ends, tmp_path / "packed"))
    settings = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=2)
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        transformers.Trainer(packed, settings)
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5], "intensity": lam} for lam in (0.0, 0.5, 1.0)]
    adapter = adapted(packed, ADAPTERS["lora"]())
    before = [parameter.clone() for parameter in adapter.parameters() if parameter.requires_grad]
    transformers.Trainer(adapter, settings, train_dataset=rows).train()
    after = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    assert before
    assert not any(torch.equal(*both) for both in zip(before, after, strict=True))


FUSED: dict[str, Any] = {
    "fused_lm_head": lambda self, *args, fused_lm_head=False, **kwargs: None,
    "skip_logits": lambda self, *args, skip_logits=None, **kwargs: None,
}


@pytest.mark.parametrize("argument", FUSED)
def test_a_forward_that_reads_the_weight_of_the_head_is_refused(argument: str, model: PreTrainedModel) -> None:
    """TRL's trainers and Liger put one over a model's own, under its signature."""
    theirs = functools.wraps(type(model).forward)(FUSED[argument])
    with pytest.raises(ValueError, match=f"cannot give way to one with {argument}, .* Use transformers' Trainer"):
        model.forward = types.MethodType(theirs, model)
    model.forward = functools.partial(type(model).forward, model)  # as accelerate puts its own over it
    assert model(torch.tensor([[3, 4]]), intensity=0.5).logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: peft.LoraConfig(use_dora=True, **LORA),
            "the adapter 'default' uses use_dora=True; known to leave the weights alone",
        ),
        (lambda: peft.LoraConfig(init_lora_weights="pissa", **LORA), "uses init_lora_weights='pissa'; known"),
        (lambda: peft.LoraConfig(bias="all", **LORA), "uses bias='all'"),
        (lambda: peft.LoraConfig(modules_to_save=["norm"], **LORA), r"uses modules_to_save=\['norm'\]"),
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
def test_an_adapter_is_not_merged_into_one_end(model: PreTrainedModel) -> None:
    """Nor is anything changed by the attempt; a layer that was merged by hand is told of."""
    ours, inputs = adapted(model, ADAPTERS["lora"]()), prompts()
    wanted = ours(**inputs, intensity=0.5).logits
    for merge in (ours.merge_and_unload, ours.merge_adapter):
        with pytest.raises(ValueError, match="an adapter cannot be merged into a patched model: it would be in the"):
            merge()
    assert torch.equal(ours(**inputs, intensity=0.5).logits, wanted)
    layers = [module for module in ours.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.merge()
    for run in (ours, ours.generate):
        with pytest.raises(ValueError, match="the adapter 'default' is merged into the instruct end only"):
            run(**inputs)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(**inputs, intensity=0.5).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_plain_model_is_merged_as_ever(model: PreTrainedModel) -> None:
    """What keeps PEFT from merging into a pair leaves all others alone."""
    adapted(model, ADAPTERS["lora"]())
    plain = adapted(pair("qwen3")[0], ADAPTERS["lora"]())
    inputs = prompts()
    wanted = plain(**inputs).logits
    torch.testing.assert_close(plain.merge_and_unload()(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("injected", [False, True], ids=["on top", "injected"])
def test_what_would_lose_an_adapter_is_refused(model: PreTrainedModel, injected: bool, tmp_path: Path) -> None:
    """By every way to put one on; without it all is as before."""
    inputs = prompts()
    wanted = model(**inputs, intensity=1.0).logits
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **LORA)
    on_top = peft.inject_adapter_in_model(config, model) if injected else peft.get_peft_model(model, config)
    for run, what in (
        (lambda: dami.save_pair(model, tmp_path / "pair"), "save_pair"),
        (lambda: model.save_pretrained(tmp_path / "pair"), "save_pretrained of a pair"),
        (lambda: dami.materialize(model, 0.5), "materialize"),
    ):
        with pytest.raises(ValueError, match=rf"{what} takes a model without PEFT adapters, got one on \S*q_proj and"):
            run()
    assert not (tmp_path / "pair").exists()
    if not injected:
        on_top.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(dami.patch_model(*pair("qwen3")), tmp_path / "adapter")
        torch.testing.assert_close(again(**inputs).logits, on_top(**inputs).logits)
        assert torch.equal(on_top.unload()(**inputs, intensity=1.0).logits, wanted)
        copied = dami.materialize(model, 1.0)
        torch.testing.assert_close(copied(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_what_would_lose_an_adapter_is_refused_on_peft_s_own_model(
    kind: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    """Its save_pretrained writes the adapter alone, and it has a patch only by the model that it wraps."""
    on_top = peft.get_peft_model(model, ADAPTERS[kind]())
    got = {"lora": r"one on \S*q_proj and others", "prompt": "PeftModelForCausalLM"}[kind]
    with pytest.raises(ValueError, match=f"save_pair takes a model without PEFT adapters, got {got}: save the adapter"):
        dami.save_pair(on_top, tmp_path / "pair")
    with pytest.raises(ValueError, match=f"materialize takes a model without PEFT adapters, got {got}: take it off"):
        dami.materialize(on_top, 0.5)
    for wrapped in (on_top, torch.compile(model)):
        with pytest.raises(
            TypeError, match=f"be the patched model itself, got {type(wrapped).__name__}, which wraps it"
        ):
            dami.unpatch_model(wrapped)
    assert any(hasattr(module, "lerp") for module in model.modules())


def test_an_adapted_end_is_refused() -> None:
    for end in (0, 1):
        ends = pair("qwen3")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], **LORA), ends[end])
        with pytest.raises(ValueError, match=r"patch_model takes a model without PEFT adapters, .* merge it into"):
            dami.patch_model(*ends)
