"""Layers that read one input are computed in one call, and whoever looks cannot tell."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import dami
import pytest
import torch
from dami.layers import kinds, siblings
from dami.layers.kinds import LerpLinear
from torch import Tensor, nn

from tests.dami.families import pair

IDS = torch.tensor([[5, 3, 8, 1], [2, 2, 7, 4]])
LAMS = [0.3, 1.0]


class Counted:
    """How many layers were computed alone, and how many at once in each call."""

    def __init__(self) -> None:
        self.alone, self.together = 0, []  # type: tuple[int, list[int]]

    def reset(self) -> None:
        self.alone, self.together = 0, []


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    calls, one, several = Counted(), kinds.lerp_linear, siblings.lerp_linears

    def lerp_linear(*args: Any, **options: Any) -> Tensor:
        calls.alone += 1
        return one(*args, **options)

    def lerp_linears(x: Tensor, weights: Any, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.together.append(len(weights))
        return several(x, weights, *args, **options)

    monkeypatch.setattr(kinds, "pays", lambda x: True)  # as on a GPU
    monkeypatch.setattr(kinds, "lerp_linear", lerp_linear)
    monkeypatch.setattr(siblings, "lerp_linears", lerp_linears)
    return calls


def patched(format: str = "pair", family: str = "llama") -> Any:
    return dami.patch_model(*pair(family), format=format)


def run(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **{"intensity": LAMS, **options}).logits


def apart(model: Any) -> Any:
    """The model with layers that compute alone for good."""
    for module in model.modules():
        if isinstance(module, LerpLinear):
            module.lerp.alone = True
    return model


@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_from_the_second_pass_on_q_k_v_and_gate_up_are_one_call_each(counted: Counted, format: str) -> None:
    model, alone = patched(format), apart(patched(format))
    layers = model.config.num_hidden_layers
    run(model, intensity=0.5)
    assert counted.together == []
    linear = counted.alone
    for lam in (0.5, LAMS, LAMS[::-1], 0.5):
        expected = run(alone, intensity=lam)
        run(model, intensity=lam)  # where it is new, it is checked that sequences do not see each other
        counted.reset()
        assert torch.equal(run(model, intensity=lam), expected)
        assert counted.together == [3, 2] * layers
        assert counted.alone == linear - 5 * layers


def test_biases_go_along(counted: Counted) -> None:
    model = patched(family="qwen2")
    first = run(model)
    assert torch.equal(run(model), first)
    assert counted.together[0] == 3


def test_a_part_at_another_intensity_computes_alone_and_then_together_again(counted: Counted) -> None:
    model = patched()
    plain = run(model)
    run(model)
    with dami.intensity(model, {"*": LAMS, "*.k_proj": 0.9}):
        counted.reset()
        with torch.no_grad():
            parts = model(IDS).logits
        assert 3 not in counted.together
    fresh = patched()
    with dami.intensity(fresh, {"*": LAMS, "*.k_proj": 0.9}), torch.no_grad():
        assert torch.equal(parts, fresh(IDS).logits)
    counted.reset()
    assert torch.equal(run(model), plain)
    assert 3 in counted.together


def test_who_wants_a_gradient_compiles_or_is_in_inference_mode_computes_alone(counted: Counted) -> None:
    model = patched()
    expected = run(model)
    run(model)
    counted.reset()
    lam = torch.tensor(LAMS, requires_grad=True)
    model(IDS, intensity=lam).logits.sum().backward()
    assert lam.grad is not None
    with torch.inference_mode():
        assert torch.equal(model(IDS, intensity=LAMS).logits, expected)
    assert counted.together == []


def layer_of(model: Any, name: str) -> LerpLinear:
    return model.get_submodule(f"model.layers.0.self_attn.{name}")


def test_a_hook_before_a_layer_keeps_it_alone(counted: Counted) -> None:
    model = patched()
    run(model)
    run(model)
    handle = layer_of(model, "k_proj").register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    fresh = patched()
    layer_of(fresh, "k_proj").register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    assert torch.equal(run(model), run(fresh))
    handle.remove()
    assert torch.equal(run(model), run(patched()))


def test_a_hook_after_a_layer_sees_its_result(counted: Counted) -> None:
    model, seen = patched(), []
    run(model)
    layer_of(model, "v_proj").register_forward_hook(lambda module, inputs, output: seen.append(output))
    run(model)
    assert counted.together
    assert seen[0].is_contiguous()


def test_an_input_that_was_changed_in_place_is_not_the_same(counted: Counted) -> None:
    """Found out before it matters: the results that wait are thrown away, and the layers part for good."""
    model = patched()
    run(model)
    run(model)
    layer, x = layer_of(model, "q_proj"), torch.randn(2, 4, model.config.hidden_size)
    key = layer_of(model, "k_proj")
    with torch.no_grad(), model.dami_patch.running.entered():
        layer(x)
        waiting = key(x.clone())
        layer(x)
        x.mul_(2)
        counted.reset()
        changed = key(x)
        assert counted.alone == 1
        assert torch.equal(changed, key(x))
        assert torch.equal(waiting, key(x / 2))


def test_layers_part_when_one_is_left_out_again_and_again(counted: Counted) -> None:
    model = patched()
    run(model)
    run(model)
    layer, x = layer_of(model, "q_proj"), torch.randn(2, 4, model.config.hidden_size)
    for together in (1, 1, 1, 0, 0):
        counted.reset()
        with torch.no_grad(), model.dami_patch.running.entered():
            layer(x)
        assert len(counted.together) == together
        assert not model.dami_patch.running.results


def test_nothing_is_kept_after_a_pass_whatever_ends_it(counted: Counted) -> None:
    model = patched()
    expected = run(model)
    run(model)
    stop = layer_of(model, "q_proj").register_forward_hook(lambda *_: 1 / 0)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            run(model)
        assert model.dami_patch.running.last is None
        assert not model.dami_patch.running.results
    stop.remove()
    assert torch.equal(run(model), expected)


def test_weights_that_come_just_before_a_layer_runs_are_waited_for(counted: Counted) -> None:
    """As some ways of offloading bring them: by a hook of the layer before, and away again behind the layer itself."""
    model, expected = patched(), run(patched())
    query, key = layer_of(model, "q_proj"), layer_of(model, "k_proj")
    held = {name: key.tensor(name).data for name in ("weight", "weight_target")}

    def bring(*_: Any) -> None:
        for name, data in held.items():
            key.tensor(name).data = data.clone()

    def take(*_: Any) -> None:
        for name, data in held.items():
            key.tensor(name).data = torch.full_like(data, torch.nan)

    query.register_forward_hook(bring)
    key.register_forward_hook(take)
    for _ in range(3):
        assert torch.equal(run(model), expected)


def test_a_model_is_freed_with_its_last_reference(counted: Counted) -> None:
    model = patched()
    for _ in range(3):
        run(model)
    assert counted.together
    alive = weakref.ref(layer_of(model, "q_proj").tensor("weight"))
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_copies_and_unpatched_models_know_nothing_of_it(counted: Counted) -> None:
    instruct, thinking = pair("llama")
    plain = copy.deepcopy(instruct)
    model = dami.patch_model(instruct, thinking)
    expected = run(model)
    run(model)
    twin = dami.twin(model)
    counted.reset()
    assert torch.equal(run(twin), expected)
    assert counted.together == []
    assert layer_of(twin, "q_proj").lerp.siblings is not layer_of(model, "q_proj").lerp.siblings
    assert torch.equal(run(copy.deepcopy(model)), expected)
    unpatched = dami.unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(unpatched(IDS).logits, plain(IDS).logits)


def doubled(model: Any) -> Any:
    """The model with a k_proj twice as large, changed in place."""
    key = layer_of(model, "k_proj")
    for name in ("weight", "weight_target"):
        key.tensor(name).data.mul_(2)
    return model


def test_weights_that_were_changed_moved_or_replaced_are_the_ones_used(counted: Counted) -> None:
    """What a module keeps between calls is looked at before it is used."""
    model, expected = patched(), run(doubled(patched()))
    run(model)
    assert not torch.equal(run(model), expected)
    assert torch.equal(run(doubled(model)), expected)
    replaced = patched()
    run(replaced)
    key = layer_of(replaced, "k_proj")
    key.weight = nn.Parameter(2 * key.tensor("weight"), requires_grad=False)
    key.weight_target.data = 2 * key.tensor("weight_target")
    assert torch.equal(run(replaced), expected)
    half = run(doubled(patched()).to(torch.bfloat16))
    assert torch.equal(run(model.to(torch.bfloat16)), half)


def test_on_the_cpu_every_layer_computes_alone() -> None:
    model = patched()
    run(model)
    run(model)
    assert layer_of(model, "q_proj").lerp.siblings is None
