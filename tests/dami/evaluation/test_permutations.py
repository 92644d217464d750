"""Neurons and heads in another order: the same function, other weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from dami.evaluation.permutations import permute
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.dami.families import FAMILIES

SMALL = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 6}
CONFIGS = {
    **FAMILIES,
    "olmo2": lambda: transformers.Olmo2Config(**SMALL, **GROUPED),  # norms of all queries and all keys at once
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),  # queries, keys and values by turns
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24),  # an MLP in the layer itself
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(  # gate and up by turns, and a number per head
        **SMALL, **GROUPED, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
}
IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61], [4, 4, 90, 33, 12, 7, 25]])


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_permuted_model_computes_the_same(name: str) -> None:
    model = random_model(name)
    before, weights = model(IDS).logits, {key: value.clone() for key, value in model.state_dict().items()}
    permuted = permute(model, {"input_ids": IDS}, seed=3)
    assert len(permuted) == 4  # an MLP and an attention in each of two layers
    after = model(torch.flip(IDS, [1])).logits  # not only for the ids that it was tried with
    assert (model(IDS).logits - before).abs().max() < 1e-5 * before.abs().max()
    model.load_state_dict(weights)
    assert (model(torch.flip(IDS, [1])).logits - after).abs().max() < 1e-5 * after.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_what_comes_between_is_another_model(name: str) -> None:
    model = random_model(name)
    before, weights = model(IDS).logits, {key: value.clone() for key, value in model.state_dict().items()}
    permute(model, {"input_ids": IDS})
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert len(moved) >= 12
    model.load_state_dict({key: (value + weights[key]) / 2 for key, value in model.state_dict().items()})
    assert (model(IDS).logits - before).abs().max() > 0.05 * before.abs().max()


@torch.no_grad()
def test_seeds_give_orders() -> None:
    one, same, other = (random_model("qwen3") for _ in range(3))
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        permute(model, {"input_ids": IDS}, seed)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


@torch.no_grad()
def test_heads_that_differ_by_their_number_stay() -> None:
    """ALiBi gives each head a slope of its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        transformers.BloomConfig(vocab_size=101, hidden_size=24, n_layer=2, n_head=4)
    ).eval()
    heads = model.transformer.h[0].self_attention.query_key_value.weight.clone()
    before = model(IDS).logits
    assert permute(model, {"input_ids": IDS}) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert torch.equal(model.transformer.h[0].self_attention.query_key_value.weight, heads)
    assert (model(IDS).logits - before).abs().max() < 1e-5


def test_a_model_without_free_orders_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        transformers.MambaConfig(vocab_size=101, hidden_size=24, state_size=4, num_hidden_layers=1, use_mambapy=False)
    ).eval()
    with pytest.raises(ValueError, match="must have MLPs or attention heads whose order is free, got MambaForCausalLM"):
        permute(model, {"input_ids": IDS})


@torch.no_grad()
def test_bfloat16_weights_are_moved_not_rounded() -> None:
    model = random_model("qwen3").to(torch.bfloat16)
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    permute(model, {"input_ids": IDS})
    after = model.model.layers[1].mlp.down_proj.weight
    assert after.dtype == torch.bfloat16
    assert torch.equal(after.sort(1).values, before.sort(1).values)
    assert not torch.equal(after, before)
