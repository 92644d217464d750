"""What is patched, and what is refused: by module type, shape and what a module computes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import dami
import pytest
import torch
from dami.layers import kinds
from dami.layers.kinds import LerpRMSNorm, kind_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from tests.dami import architectures
from tests.dami.families import batch, merged, pair, references
from tests.tolerance import assert_as_accurate


class Cosine(nn.Module):
    """Divides by the norm, not by the root of the mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)


class Gate(nn.Module):
    """A vector of weights as a norm has, and another signature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "eps", "offset"),
    [
        (LlamaRMSNorm(16, eps=1e-5), 1e-5, 0.0),
        (Gemma3RMSNorm(16, eps=1e-6), 1e-6, 1.0),
        (T5LayerNorm(16, eps=1e-3), 1e-3, 0.0),
        (nn.RMSNorm(16, eps=1e-4), 1e-4, 0.0),
        (nn.RMSNorm(16, eps=1.0), 1.0, 0.0),
        (LlamaRMSNorm(16, eps=7), 7.0, 0.0),
        (Gemma3RMSNorm(16, eps=2.5), 2.5, 1.0),
        (nn.RMSNorm(16), torch.finfo(torch.float32).eps, 0.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_the_formula_of_a_norm_is_found_by_running_it(
    module: nn.Module, eps: float, offset: float, dtype: torch.dtype
) -> None:
    assert kind_of(copy.deepcopy(module).to(dtype)) == (LerpRMSNorm, {"eps": eps, "offset": offset})


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    pass


class Rewritten(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T.abs()


def _overridden() -> nn.Module:
    module = nn.Linear(16, 16)
    module.forward = module.forward  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(16, 16), "linear"),
        (Scaled(16, 16), "linear"),
        (Renamed(16, 16), "linear"),
        (Rewritten(16, 16), "parameters"),
        (_overridden(), "parameters"),
        (Conv1D(16, 16), "conv1d"),
        (nn.Embedding(9, 16), "embedding"),
        (nn.Embedding(9, 16, max_norm=1.0), "parameters"),
        (nn.LayerNorm(16), "layer_norm"),
        (nn.LayerNorm(16, bias=False), "layer_norm"),
        (nn.LayerNorm((4, 4)), "parameters"),
        (nn.BatchNorm1d(16), "parameters"),
        (MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=4)), "experts"),
        (Cosine(), "parameters"),
        (Gate(), "parameters"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_an_operator_takes_the_place_of_a_forward_only_if_it_computes_the_same(module: nn.Module, kind: str) -> None:
    assert kind_of(module)[0].kind == kind


def test_identical_parameters_stay_untouched_and_cost_nothing() -> None:
    model, thinking = pair("llama")
    with torch.no_grad():
        thinking.model.layers[0].mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
        thinking.model.layers[1].self_attn.q_proj.weight.copy_(model.model.layers[1].self_attn.q_proj.weight)
        thinking.model.layers[1].self_attn.k_proj.bias.copy_(model.model.layers[1].self_attn.k_proj.bias)
    reference = merged(model, thinking, 0.37, torch.float32)
    inputs = batch("left")
    wanted = reference(**inputs).logits
    dami.patch_model(model, thinking)
    same = {row.name for row in dami.describe(model).rows if not row.interpolated}
    assert same == {
        *(f"model.layers.0.mlp.{name}_proj.{end}" for name in ("gate", "up", "down") for end in ("weight", "bias")),
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
    }
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    rows = dami.describe(model).rows
    assert all(row.nbytes == (2 if row.interpolated else 1) * 4 * torch.Size(row.shape).numel() for row in rows)
    torch.testing.assert_close(model(**inputs, intensity=0.37).logits, wanted)


def test_a_pair_of_one_model_is_that_model() -> None:
    model, _ = pair("qwen3")
    description = dami.describe(dami.patch_model(model, copy.deepcopy(model)))
    assert not any(row.interpolated for row in description.rows)
    assert type(model.model.norm).__name__ == "Qwen3RMSNorm"


@torch.no_grad()
def test_tied_parameters_stay_tied_at_both_ends() -> None:
    model = dami.patch_model(*pair("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight_target is model.transformer.wte.weight_target


@torch.no_grad()
def test_conv1d_stores_no_further_copy() -> None:
    model = dami.patch_model(*pair("gpt2"))
    conv = model.transformer.h[0].mlp.c_fc
    for end in (conv.weight, conv.weight_target):
        assert end.shape == (conv.nx, conv.nf)
        assert end.t().is_contiguous()
    assert all(
        tensor.data_ptr() in (conv.weight.data_ptr(), conv.weight_target.data_ptr())
        for tensor in conv.ends("weight").tensors
    )


@torch.no_grad()
def test_pair_shares_memory_with_the_thinking_model() -> None:
    model, thinking = pair("llama")
    dami.patch_model(model, thinking)
    assert model.lm_head.weight_target.data_ptr() == thinking.lm_head.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in thinking.parameters())


@torch.no_grad()
def test_forward_hooks_go_on_working() -> None:
    model, thinking = pair("qwen3")
    seen: list[torch.Size] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    dami.patch_model(model, thinking)
    model(**batch("left"), intensity=[0.0, 0.3, 0.7, 1.0])
    assert seen == [(4, 7, 24)]


@torch.no_grad()
def test_what_is_captured_is_captured_from_the_first_mixed_batch_on() -> None:
    """transformers installs its hooks in the first pass that wants them, which is that of the check of independence."""
    model, inputs = dami.patch_model(*pair("qwen3")), batch("left")
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    heard = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: heard.append(output.shape[:2]))
    for lam in ([0.0, 0.37, 1.0, 1.2], 0.37, [1.2, 1.0, 0.37, 0.0]):
        out = model(**inputs, intensity=lam)
        assert [len(each) for each in (out.hidden_states, out.attentions)] == [3, 2]
    assert heard == [(4, 7)] * 3
    handle.remove()
    model(**inputs)
    assert len(heard) == 3


@torch.no_grad()
def test_modules_under_accelerate_hooks_are_patched_and_restored() -> None:
    from accelerate import dispatch_model

    model, thinking = pair("gemma3")
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    inputs = batch("left")
    dami.patch_model(model, thinking)
    for lam in (0.0, 1.0):
        torch.testing.assert_close(model(**inputs, intensity=lam).logits, references("gemma3", lam)[0](**inputs).logits)
    dami.unpatch_model(model)
    torch.testing.assert_close(model(**inputs).logits, references("gemma3", 0.0)[0](**inputs).logits)


@pytest.mark.parametrize("config", [MambaConfig, Mamba2Config, FalconMambaConfig])
@torch.no_grad()
def test_a_norm_over_a_float32_residual(config: type[PreTrainedConfig]) -> None:
    lams, ids = [0.0, 0.37, 1.0, 1.2], torch.randint(4, architectures.VOCABULARY, (4, 7))
    ends = architectures.pair(config)
    oracles = [architectures.merged(*ends, lam).double() for lam in lams]
    ends = tuple(end.bfloat16() for end in ends)
    plain = [architectures.merged(*ends, lam)(ids).logits for lam in lams]
    model = dami.patch_model(*ends)
    logits = model(ids, intensity=lams).logits
    assert logits.dtype == plain[0].dtype
    for row, oracle in enumerate(oracles):
        # the whole model's error, which is mostly that of the ends in bfloat16
        assert_as_accurate(logits[row], oracle(ids).logits[row], plain[row][row], factor=1.5)
        one = model(ids, intensity=lams[row]).logits[row]
        assert_as_accurate(one, oracle(ids).logits[row], plain[row][row], factor=1.5)


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm, T5LayerNorm, nn.RMSNorm])
@torch.no_grad()
def test_a_norm_of_another_dtype_than_its_input_is_what_it_was(norm: type[nn.Module], inside: torch.dtype) -> None:
    outside = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[inside]
    ends = pair("llama")
    for end in ends:
        end.model.norm = norm(24, eps=1e-3)
        for parameter in end.model.norm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(4, 7, 24, dtype=outside)
    plain = [merged(*ends, lam, torch.float32).model.norm.to(inside)(x) for lam in (0.0, 0.37, 1.0, 1.2)]
    for end in ends:
        end.model.norm.to(inside)
    model = dami.patch_model(*ends)
    for lam in ([0.0, 0.37, 1.0, 1.2], 0.37):
        with dami.intensity(model, lam):
            y = model.model.norm(x)
        assert y.dtype == plain[0].dtype
        for row in range(4):
            expected = plain[row] if isinstance(lam, list) else plain[1]
            torch.testing.assert_close(y[row], expected[row], rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_patched_model_is_copied_and_pickled() -> None:
    model = dami.patch_model(*pair("gemma3"))
    inputs = batch("left")
    wanted = model(**inputs, intensity=[0.0, 0.3, 0.7, 1.0]).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.dami_patch.dial is not model.dami_patch.dial
        assert twin.lm_head.lerp.dial is twin.dami_patch.dial
        assert torch.equal(twin(**inputs, intensity=[0.0, 0.3, 0.7, 1.0]).logits, wanted)
        dami.unpatch_model(twin)


@torch.no_grad()
def test_a_saved_model_is_the_instruct_end_with_the_target_beside_it(tmp_path: Path) -> None:
    model = dami.patch_model(*pair("gpt2"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["transformer.wte.weight_target"], model.lm_head.weight_target)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = batch("left")
    torch.testing.assert_close(plain(**inputs).logits, pair("gpt2")[0](**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_before_or_after_patching(dtype: torch.dtype) -> None:
    inputs = batch("left")
    before = dami.patch_model(*pair("qwen2", dtype))(**inputs, intensity=[0.0, 0.3, 0.7, 1.0]).logits
    after = dami.patch_model(*pair("qwen2")).to(dtype)(**inputs, intensity=[0.0, 0.3, 0.7, 1.0]).logits
    assert before.dtype == dtype
    assert torch.equal(before, after)
    full = dami.patch_model(*pair("qwen2"))(**inputs, intensity=[0.0, 0.3, 0.7, 1.0]).logits
    plain = references("qwen2", 0.3)[0]
    rounded = copy.deepcopy(plain).to(dtype)(**inputs).logits[1].float()
    seen = inputs["attention_mask"][1].bool()
    error, yardstick = ((logits - full[1])[seen].norm() for logits in (before[1].float(), rounded))
    assert error < 2 * yardstick


def test_gradients_reach_intensity_through_the_whole_model() -> None:
    """Against autograd through plain models whose weights are merged by differentiable operations."""
    instruct, thinking = pair("gpt2")
    inputs = batch("left")
    lam = torch.tensor([0.1, 0.4, 0.8, 1.0], requires_grad=True)

    def loss(logits: Tensor) -> Tensor:
        return (logits * torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape)).sum()

    ends = [dict(end.named_parameters()) for end in (instruct, thinking)]
    wanted = []
    for row in range(4):
        mine = lam[row].detach().requires_grad_()
        weights = {name: torch.lerp(ends[0][name], ends[1][name], mine) for name in ends[0]}
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        logits = torch.func.functional_call(instruct, weights, (), one).logits
        wanted.append(torch.autograd.grad(loss(logits), mine)[0])
    model = dami.patch_model(instruct, thinking)
    loss(model(**inputs, intensity=lam).logits).backward()
    torch.testing.assert_close(lam.grad, torch.stack(wanted), rtol=1e-3, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
def test_modules_that_are_alike_are_looked_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(family)[0]
    expected = {module: kinds.kind_of(module) for module in model.modules()}
    looked = []
    look = kinds.kind_of
    monkeypatch.setattr(kinds, "kind_of", lambda module: looked.append(module) or look(module))
    assert kinds.kinds_of(model) == expected
    leaves = [module for module in looked if next(module.children(), None) is None]
    assert len(leaves) < 0.6 * sum(next(module.children(), None) is None for module in model.modules())


def test_a_module_that_differs_in_one_number_is_looked_at_by_itself() -> None:
    model = pair("qwen3")[0]
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3
    found = kinds.kinds_of(model)
    assert found[model.model.layers[0].input_layernorm][1]["eps"] == pytest.approx(1e-6)
    assert found[model.model.layers[1].input_layernorm][1]["eps"] == pytest.approx(1e-3)
    assert found[model.model.layers[1].input_layernorm][0] is LerpRMSNorm
