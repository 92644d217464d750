"""Activation checkpointing of a patched model: the gradients of λ and of adapters are those without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import dami
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.dami import architectures
from tests.dami.families import batch, pair

TYPES = {cls.model_type: cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING}


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3")).train()


def enable(model: Any, reentrant: bool) -> None:
    """Checkpoints every layer; the method has had a new name since transformers 5.24."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})


def as_argument(model: Any, inputs: Any, lam: Tensor) -> Tensor:
    return model(**inputs, intensity=lam).logits


def from_a_block(model: Any, inputs: Any, lam: Tensor) -> Tensor:
    with dami.intensity(model, lam):
        return model(**inputs).logits  # the block is left before the backward pass


def by_part(model: Any, inputs: Any, lam: Tensor) -> Tensor:
    return model(**inputs, intensity={"*": 0.25, "mlp": lam, ("attn", 1): 1 - lam}).logits


LAMS = {"scalar": torch.tensor(0.3), "rows": torch.tensor([0.0, 0.3, 0.7, 1.0])}


def gradient(run: Callable[..., Tensor], model: Any, inputs: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of a number that λ is computed from."""
    number = value.clone().requires_grad_()
    logits = run(model, inputs, number.sin() + 0.1)
    logits.square().mean().backward()
    assert number.grad is not None
    return logits.detach(), number.grad


@pytest.mark.parametrize("lam", LAMS.values(), ids=LAMS)
@pytest.mark.parametrize("run", [as_argument, from_a_block, by_part])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_run_again_at_the_same_lam(
    model: PreTrainedModel, reentrant: bool, run: Callable[..., Tensor], lam: Tensor
) -> None:
    inputs = batch("left")
    wanted = gradient(run, model, inputs, lam)
    enable(model, reentrant)
    found = gradient(run, model, inputs, lam)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        gradient(run, model, inputs, 1 - lam)[0], gradient(run, model.eval(), inputs, 1 - lam)[0]
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("type_", ["gemma3_text", "gpt2", "gpt_oss", "mamba2", "qwen3_moe"])
def test_layers_of_every_kind(type_: str, reentrant: bool) -> None:
    """Experts, routers, states, a Conv1D: whatever a layer reads, it reads at the λ of the pass again."""
    model = dami.patch_model(*architectures.pair(TYPES[type_])).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = {"input_ids": torch.randint(3, architectures.VOCABULARY, (4, 7))}
    wanted = gradient(as_argument, model, inputs, LAMS["rows"])
    enable(model, reentrant)
    torch.testing.assert_close(gradient(as_argument, model, inputs, LAMS["rows"]), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_wrapper_of_torch_and_fsdp(model: PreTrainedModel, reentrant: bool) -> None:
    inputs = {
        **batch("left"),
        "use_cache": False,
    }  # a cache would be filled twice: transformers turns it off for its own
    wanted = gradient(from_a_block, model, inputs, LAMS["rows"])
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model, partial(checkpoint_wrapper, checkpoint_impl=kind), check_fn=lambda m: type(m).__name__.endswith("Layer")
    )
    assert sum(isinstance(module, CheckpointWrapper) for module in model.modules()) == 2
    torch.testing.assert_close(gradient(from_a_block, model, inputs, LAMS["rows"]), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_adapter_learns_the_same(model: PreTrainedModel, reentrant: bool) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=True))
    inputs = batch("left")

    def gradients() -> list[Tensor]:
        adapted.zero_grad()
        adapted(**inputs, labels=inputs["input_ids"], intensity=[0.0, 0.3, 0.7, 1.0]).loss.backward()
        return [p.grad for p in adapted.parameters() if p.requires_grad]

    wanted = gradients()
    assert any(gradient.any() for gradient in wanted)
    enable(model, reentrant)
    torch.testing.assert_close(gradients(), wanted)


def test_a_copy_checkpoints_for_itself() -> None:
    """Also where it was enabled before patching. (Pickle fails on a hook of transformers' own, with any model.)"""
    instruct, thinking = pair("qwen3")
    enable(instruct.train(), False)
    model = dami.patch_model(instruct, thinking)
    inputs, lam = batch("left"), LAMS["rows"]
    others = copy.deepcopy(model), dami.twin(model)
    wanted = gradient(as_argument, model.eval(), inputs, lam)
    for each in (model.train(), *others):
        assert each.training
        torch.testing.assert_close(gradient(as_argument, each, inputs, lam), wanted)


def test_the_backward_pass_of_another_thread(model: PreTrainedModel) -> None:
    """On a GPU autograd has threads of its own, and works for one that may be inside a block."""
    inputs, lam = batch("left"), torch.tensor(0.5, requires_grad=True)
    wanted = torch.autograd.grad(as_argument(model, inputs, lam).mean(), lam)[0]
    enable(model, False)
    with ThreadPoolExecutor(1) as pool:
        with dami.intensity(model, 0.9):
            loss = as_argument(model, inputs, lam).mean()
            found = pool.submit(torch.autograd.grad, loss, lam).result()[0]
        torch.testing.assert_close(found, wanted)
        loss = as_argument(model, inputs, lam).mean()
        block = dami.intensity(model, 0.9)
        pool.submit(block.__enter__).result()  # and does not leave
        with pytest.raises(RuntimeError, match="in use by another thread"):
            loss.backward()


def test_a_pass_that_failed_leaves_nothing(model: PreTrainedModel) -> None:
    enable(model, False)
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    with pytest.raises(ValueError, match="got 2 for 4 sequences"):
        model(**batch("left"), intensity=[0.5, 0.5])
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 1000), intensity=0.5)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before


def test_a_whole_model_runs_again_at_a_lam_that_it_is_given(model: PreTrainedModel) -> None:
    inputs = batch("left")

    def whole(model: Any, inputs: Any, lam: Tensor) -> Tensor:
        return checkpoint(model, **inputs, intensity=lam, use_reentrant=False).logits

    wanted = gradient(as_argument, model, inputs, LAMS["rows"])
    torch.testing.assert_close(gradient(whole, model, inputs, LAMS["rows"]), wanted)


def test_what_would_run_again_at_another_lam_is_refused(model: PreTrainedModel) -> None:
    lam = torch.tensor(0.5, requires_grad=True)
    with dami.intensity(model, lam):
        loss = checkpoint(model, **batch("left"), use_reentrant=False).logits.mean()
    with pytest.raises(RuntimeError, match=r"runs again in the backward pass.*as an argument, model\(…, intensity=…\)"):
        loss.backward()
    with dami.intensity(model, lam):
        states = torch.randn(4, 7, 24, requires_grad=True)
        loss = checkpoint(model.model.layers[0].mlp, states, use_reentrant=False).mean()
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.mlp\.\w+ runs again in the backward pass.*gradient_checkpointing_enable"
    ):
        loss.backward()
