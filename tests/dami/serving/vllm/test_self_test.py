"""The self-test, on a model that is right and then broken in one way after another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dami.upstream import buffers_of, parameters_of

from tests.dami.serving.vllm.engines import engine, model_of

vllm = pytest.importorskip("vllm")

from dami.serving.vllm import self_test  # noqa: E402


@pytest.fixture(scope="module")
def pair(packed: Any) -> Iterator[tuple[Any, Any]]:
    with engine(packed("qwen3", "int8")) as llm:
        yield model_of(llm), llm.llm_engine.vllm_config


@pytest.fixture
def fails(pair: tuple[Any, Any]) -> Any:
    def check(said: str) -> None:
        with pytest.raises(RuntimeError, match=f"the pair fails its self-test: {said}"):
            self_test.run(*pair)

    return check


@pytest.fixture
def layer(pair: tuple[Any, Any]) -> Any:
    return pair[0].model.layers[1]


def test_a_model_that_is_right_passes_once_more(pair: tuple[Any, Any]) -> None:
    self_test.run(*pair)
    assert not pair[0].pair.rows.tokens.any()  # for the warm-up runs to come


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.qkv_proj", "input_layernorm"])
def test_a_layer_that_stays_at_one_end(layer: Any, fails: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = buffers_of(layer.get_submodule(name))
    monkeypatch.setitem(buffers, "intensity", torch.zeros_like(buffers["intensity"]))
    fails("at λ=0.5 a token's output is off by .*, where that at the next λ is .* away; it is not served")


def test_a_weight_that_is_read_past_the_operators(layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    down, forward = layer.mlp.down_proj, layer.mlp.down_proj.forward
    monkeypatch.setattr(down, "forward", lambda x: (forward(x)[0] + 0.1 * F.linear(x, down.weight), None))
    fails("something reads weight of RowParallelLinear past dami's operators")


def test_a_norm_that_is_read_past_the_operators(layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, forward = layer.self_attn.q_norm, layer.self_attn.q_norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) * norm.weight)
    fails("something reads weight of PairRMSNorm past dami's operators")


def test_a_matrix_that_was_computed_while_loading(layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSeek's attention would: a layer's method, asked before there is a λ, gives NaN."""
    down, forward = layer.mlp.down_proj, layer.mlp.down_proj.forward
    with monkeypatch.context() as loading:
        loading.setitem(buffers_of(down), "intensity", torch.full((128,), torch.nan))
        absorbed = down.quant_method.apply(down, torch.eye(128)).T
    monkeypatch.setattr(down, "forward", lambda x: (forward(x)[0] + F.linear(x, absorbed), None))
    fails("it gives NaN, so something is computed from its weights while they are loaded")


def test_a_layer_that_is_not_reached(pair: Any, layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = copy.copy(layer.mlp.down_proj)
    tower.quant_method = copy.copy(tower.quant_method)
    monkeypatch.setattr(pair[0], "tower", tower, raising=False)
    fails("these layers differ between the ends, and are not computed .*--language-model-only.*: tower")


def test_a_layer_that_is_computed_otherwise(layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    down = layer.mlp.down_proj
    monkeypatch.setattr(down, "forward", lambda x: (F.linear(x, down.weight), None))
    fails("these layers differ between the ends, and are not computed .*: model.layers.1.mlp.down_proj")


def test_rows_that_no_token_has(layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    down, forward = layer.mlp.down_proj, layer.mlp.down_proj.forward
    monkeypatch.setattr(down, "forward", lambda x: (forward(F.pad(x, (0, 0, 0, 1)))[0][:-1], None))
    fails(r"model.layers.1.mlp.down_proj gets rows of shape \[14\] for 13 tokens")


def test_a_lambda_that_reaches_another_request(layer: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both ends are the same, only λ = NaN tells."""
    norm = layer.post_attention_layernorm
    base, target = norm.pair_ends["weight"].names
    monkeypatch.setitem(parameters_of(norm), target, parameters_of(norm)[base])
    monkeypatch.setattr(type(norm), "normed", shifted(type(norm).normed, norm))
    fails("the λ of one request reaches another")


def shifted(normed: Any, norm: Any) -> Any:
    """A norm's method, that takes other rows' λ."""

    def method(self: Any, x: Any) -> Any:
        if self is not norm:
            return normed(self, x)
        before = self.intensity
        self.intensity = before[: x.shape[0]].roll(4)
        try:
            return normed(self, x)
        finally:
            self.intensity = before

    return method
