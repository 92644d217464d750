"""Fused experts in every storage format, each token routed and computed at its own sequence's λ."""

from __future__ import annotations

from typing import Any

import dami
import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig, PreTrainedConfig, PreTrainedModel

from dami_kernels import formats
from tests.dami import architectures
from tests.dami.architectures import VOCABULARY
from tests.tolerance import assert_as_accurate

LAM = [0.0, 0.37, 1.0, 1.2]
# with a gate; transposed, with biases and a gate of its own; without a gate
CONFIGS = [MixtralConfig, GptOssConfig, NemotronHConfig]


def experts_of(model: PreTrainedModel) -> Any:
    return next(m for m in model.modules() if hasattr(m, "has_gate"))


@pytest.mark.parametrize("format", sorted({*formats.names()} - {"lowrank"}))  # random ends are of full rank
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_experts_of_a_mixed_batch_are_those_at_one_lam(config: type[PreTrainedConfig], format: str) -> None:
    model = dami.patch_model(*architectures.pair(config), format)
    assert {row.kind for row in dami.describe(model).rows if row.name.endswith(".experts.down_proj")} == {"experts"}
    experts = experts_of(model)
    tokens, k = 4 * 7, 2
    x = torch.randn(tokens, experts.down_proj.shape[2 if experts.is_transposed else 1])
    index, weights = torch.rand(tokens, 4).topk(k).indices, torch.rand(tokens, k)
    with dami.intensity(model, LAM):
        mixed = experts(x, index, weights).unflatten(0, (4, 7))
    for row, lam in enumerate(LAM):
        with dami.intensity(model, lam):
            alone = experts(x, index, weights).unflatten(0, (4, 7))[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_experts_are_as_accurate_as_the_merged_model_and_come_back(config: type[PreTrainedConfig]) -> None:
    instruct, thinking = architectures.pair(config)
    own = dict(experts_of(instruct).named_parameters())
    strides = {name: parameter.stride() for name, parameter in own.items()}
    plain = architectures.merged(instruct, thinking, 0.37)
    oracle = architectures.merged(instruct, thinking, 0.37).double()
    ids = torch.randint(4, VOCABULARY, (4, 7))
    model = dami.patch_model(instruct, thinking)
    experts = experts_of(model)
    x = torch.randn(28, 32)
    index, weights = torch.rand(28, 4).topk(2).indices, torch.rand(28, 2)
    with dami.intensity(model, 0.37):
        y = experts(x, index, weights)
    for each in (plain, oracle):
        each.set_experts_implementation("eager")
    assert_as_accurate(
        y, experts_of(oracle)(x.double(), index, weights.double()), experts_of(plain)(x, index, weights), factor=2
    )
    logits = model(ids, intensity=0.0).logits
    dami.unpatch_model(model)
    assert {name: parameter.stride() for name, parameter in experts_of(model).named_parameters()} == strides
    assert all(parameter is own[name] for name, parameter in experts_of(model).named_parameters())
    torch.testing.assert_close(model(ids).logits, logits)


@torch.no_grad()
def test_each_row_is_routed_at_its_own_lam() -> None:
    """Ends whose routers choose different experts: at λ = 0 and λ = 1 a token goes to either's."""
    instruct, thinking = architectures.pair(MixtralConfig)
    for end, sign in ((instruct, 1.0), (thinking, -1.0)):
        for layer in end.model.layers:
            layer.mlp.gate.weight.copy_(sign * torch.linspace(-1, 1, layer.mlp.gate.weight.numel()).view(4, 32))
    chosen = []
    model = dami.patch_model(instruct, thinking)
    experts_of(model).register_forward_pre_hook(lambda module, args: chosen.append(args[1].sort().values))
    ids = torch.randint(4, VOCABULARY, (1, 7)).expand(2, 7)
    model(ids, intensity=[0.0, 1.0])
    for lam in (0.0, 1.0):
        model(ids, intensity=lam)
    mixed, *alone = (each.view(2, 7, 2) for each in chosen[-3:])
    assert torch.equal(mixed[0], alone[0][0])
    assert torch.equal(mixed[1], alone[1][1])
    assert not torch.equal(mixed[0], mixed[1])
