"""Layers that repeat the call of the first of their kind, and those which must not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dami
import pytest
import torch
from dami.generation import compiled
from dami.generation.repeated_calls import Call, FirstCall, OwnTensors, Recorder
from torch import Tensor, nn

from tests.dami.families import pair
from tests.dami.test_compiled import OPTIONS, deepen
from tests.dami.test_generation import LAM, prompts

LAYERS, STEPS = 4, OPTIONS["max_new_tokens"] - 1


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, graphs: list[Any]) -> list[int]:
    """The number of calls that torch makes. Graphs run as they are."""
    count, compiles = [0], torch.compile

    def compile(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        call = compiles(run, **options)

        def counted(*inputs: Any, **named: Any) -> Any:
            count[0] += 1
            return call(*inputs, **named)

        return counted

    monkeypatch.setattr(torch, "compile", compile)
    return count


def patched(family: str = "qwen3", change: Callable[[nn.Module], None] = lambda layer: None) -> Any:
    ends = pair(family)
    for end in ends:
        deepen(end, LAYERS)
        for layer in end.model.layers:
            change(layer)
    return dami.patch_model(*ends)


def check(model: Any, intensity: Any) -> None:
    """Compares the logits of a compiled answer with those of a plain one."""
    options = {**prompts(), **OPTIONS, "intensity": intensity, "output_logits": True, "return_dict_in_generate": True}
    plain, by_graphs = (torch.stack(model.generate(**options, compile=way).logits) for way in (False, True))
    torch.testing.assert_close(by_graphs, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lam", [0.3, LAM], ids=["one λ", "λ of each"])
@torch.no_grad()
def test_torch_calls_one_layer_of_a_kind(counts: list[int], lam: Any) -> None:
    model = patched()
    check(model, lam)
    assert counts == [STEPS]
    for parameter in model.parameters():  # other layers' weights are read anew, not those of the call before
        parameter.mul_(1.01)
    check(model, lam)
    assert counts == [2 * STEPS]


def test_layers_whose_parts_have_a_lam_of_their_own_are_called_by_torch(counts: list[int]) -> None:
    check(patched(), {("mlp", layer): 0.2 * layer for layer in range(LAYERS)})
    assert counts == [STEPS * LAYERS]


def test_layers_that_change_more_than_tensors_are_called_by_torch(counts: list[int]) -> None:
    class Keeping(nn.Module):
        last: Tensor | None = None

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.mlp(x)
            return self.last

    model = patched(change=lambda layer: setattr(layer, "mlp", Keeping(layer.mlp)))
    check(model, 0.4)
    assert counts == [STEPS * LAYERS]
    last = [layer.mlp.last for layer in model.model.layers]
    assert all(each.shape[1] == 1 for each in last)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(last))


@pytest.mark.parametrize(
    "kinds", [compiled.KINDS, pytest.param(0, marks=pytest.mark.slow)], ids=["layers", "one graph"]
)
def test_hooks_inside_layers_run_in_every_step(kinds: int, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "KINDS", kinds)
    model, seen = patched(), []

    def record(module: nn.Module, inputs: Any, y: Tensor) -> None:
        seen.append(y.shape)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(record)
    check(model, 0.4)
    assert counts == [0 if kinds else STEPS]  # a layer in which hooks run has no graph
    by_steps, by_graphs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(by_graphs) == LAYERS * OPTIONS["max_new_tokens"]
    assert by_graphs == by_steps


def test_layers_that_share_a_tensor_inside_are_called_by_torch(counts: list[int]) -> None:
    def share(layer: Any) -> None:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight

    check(patched(change=share), 0.4)
    assert counts == [STEPS * LAYERS]


def test_hidden_states_that_are_another_input_as_well(counts: list[int]) -> None:
    """In the first layer, the embeddings are its hidden states."""

    def mix(layer: Any) -> None:
        plain = type(layer).forward

        class Mixing(type(layer)):  # type: ignore[misc]
            def forward(self, hidden_states: Tensor, embeddings: Tensor | None = None, **named: Any) -> Tensor:
                return plain(self, hidden_states, **named) + 0.3 * embeddings

        layer.__class__ = Mixing

    model, kept = patched(), {}
    mix(model.model.layers[0])
    for layer in model.model.layers:
        layer.__class__ = type(model.model.layers[0])
        layer.register_forward_pre_hook(lambda _, args, named: (args, {**named, **kept}), with_kwargs=True)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, y: kept.update(embeddings=y))
    check(model, LAM)


def test_a_hook_outside_layers_runs_as_it_is_now_in_one_graph(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "KINDS", 0)
    model, scale = patched(), {"by": 1.0}
    model.model.norm.register_forward_hook(lambda module, inputs, y: y * scale["by"])
    check(model, 0.4)
    scale["by"] = 3.0
    check(model, 0.4)


def test_windows_that_fill_up(counts: list[int]) -> None:
    """Their cache counts tokens in Python."""
    model = patched("mistral")
    assert model.config.sliding_window < prompts()["input_ids"].shape[1] + OPTIONS["max_new_tokens"]
    check(model, LAM)


@pytest.mark.parametrize("adds", [False, True])
def test_a_call_to_which_torch_adds_is_not_kept(adds: bool) -> None:
    def compiler(graph: Any, inputs: Any, wrap: Callable[..., Any]) -> Callable[..., Any]:
        code = wrap(lambda arguments: [arguments.pop() + 1])
        return lambda *arguments: [y.clone() if adds else y for y in code([*arguments])]

    recorder, x = Recorder(compiler), torch.ones(2)
    (y,) = recorder(None, None)(x)
    if adds:
        assert recorder.last is None
    else:
        assert recorder.last is not None
        assert recorder.last.arguments[0] is x
        assert recorder.last.results[0] is y


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("shift", torch.randn(3))


def test_a_repeated_call_takes_the_other_layers_tensors() -> None:
    first, second, x = Layer(), Layer(), torch.randn(2, 3)
    caches = [SimpleNamespace(keys=torch.randn(3), size=3) for _ in range(2)]
    mask = {"mask": (torch.randn(3),)}

    def code(arguments: list[Tensor]) -> list[Tensor]:
        keys, weight, hidden, mask, shift = arguments
        return [hidden, hidden @ weight + keys * mask + shift]

    arguments = [caches[0].keys, first.weight, x, mask["mask"][0], first.shift]
    results = code(arguments)
    call = Call(code, arguments, results)
    found = FirstCall(call, OwnTensors(first), (x,), mask, caches[0], results[1])
    hidden = torch.randn(2, 3)
    own = found.own_arguments(OwnTensors(second), caches[1])
    assert own is not None
    assert found.is_like((hidden,), mask)
    expected = code([caches[1].keys, second.weight, hidden, mask["mask"][0], second.shift])[1]
    assert torch.equal(found.repeat(hidden, own), expected)

    assert not found.is_like((hidden.double(),), mask)
    assert not found.is_like((hidden.T.contiguous().T,), mask)
    assert not found.is_like((hidden,), {"mask": (mask["mask"][0],)})
    assert not found.is_like((hidden,), {})
    assert not found.is_like((hidden, 1), mask)
    assert found.own_arguments(OwnTensors(second), SimpleNamespace(keys=torch.randn(3), size=4)) is None
    assert found.own_arguments(OwnTensors(second), SimpleNamespace(keys=torch.randn(4), size=3)) is None

    unknown = Call(code, [*arguments[:-1], first.shift.clone()], results)
    with pytest.raises(LookupError, match="argument 4"):
        FirstCall(unknown, OwnTensors(first), (x,), mask, caches[0], results[1])
    with pytest.raises(LookupError):
        FirstCall(call, OwnTensors(first), (x,), mask, caches[0], results[1].clone())
    with torch.autocast("cpu"), pytest.raises(LookupError, match="autocast"):
        FirstCall(call, OwnTensors(first), (x,), mask, caches[0], results[1])
    second.shift = second.weight
    second.register_parameter("tied", second.weight)
    with pytest.raises(LookupError, match="told apart"):
        FirstCall(call, OwnTensors(second), (x,), mask, caches[0], results[1])
