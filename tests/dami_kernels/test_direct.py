"""Calls that go straight to a CPU kernel, and the kernels that torch's dispatcher runs without Python."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dami_kernels import (
    LerpWeight,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
    native,
)
from dami_kernels.ops import direct, library

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))

FORMATS = ["pair", "int8", "int4", "w8d4"]
ROWS, K, N, E = 6, 67, 9, 3
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
IDS = torch.tensor([[8, 0], [3, 3], [1, 7]])


def packed(*shape: int, format: str = "pair", dtype: torch.dtype = torch.float32) -> LerpWeight:
    base = torch.randn(shape)
    return LerpWeight.pack(base.to(dtype), (base + 0.1 * torch.randn(shape)).to(dtype), format)


def calls(dtype: torch.dtype, format: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every operator with arguments, λ being the third."""
    x = torch.randn(3, 2, K, dtype=dtype)
    linear, norm, bias = packed(N, K, format=format, dtype=dtype), packed(K, dtype=dtype), packed(N, dtype=dtype)
    experts, experts_bias = packed(E, N, K, format=format, dtype=dtype), packed(E, N, dtype=dtype)
    return {
        "linear": (lerp_linear, (x, linear, None, bias)),
        "linears": (lerp_linears, (x, [linear, linear], None, [bias, bias])),
        "experts": (lerp_experts, (x.flatten(0, 1), experts, None, OFFSETS, experts_bias)),
        "embedding": (lerp_embedding, (IDS, linear, None)),
        "rms_norm": (lerp_rms_norm, (x, norm, None, 1e-5)),
        "layer_norm": (lerp_layer_norm, (x, norm, None, packed(K, dtype=dtype), 1e-5)),
    }


LAMS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "one": (torch.tensor(0.3), {}),
    "rows": (torch.tensor([0.0, 1.0, 0.5, 0.2, 1.3, 0.5]), {}),
    "sequences": (torch.tensor([0.0, 0.6, 1.0]), {"rows_per_lam": 2}),
    "map": (torch.tensor([0.9, 0.1]), {"row_to_lam": torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.int32)}),
}
every_operator = pytest.mark.parametrize("name", list(calls(torch.float32, "pair")))


def flat(y: Any) -> Tensor:
    return torch.cat(y, -1) if isinstance(y, tuple) else y


class Through(TorchDispatchMode):
    """Lets calls pass as they are, but through torch's dispatcher; `seen` has their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_operator
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lam", LAMS)
def test_the_direct_way_gives_the_dispatchers_bits(name: str, format: str, dtype: torch.dtype, lam: str) -> None:
    run, (first, weight, _, *rest) = calls(dtype, format)[name]
    value, rows = LAMS[lam]
    straight = getattr(direct, run.__name__)(False, first, weight, value, *rest, **rows)
    assert straight is not None
    assert torch.equal(flat(run(first, weight, value, *rest, **rows)), flat(straight))
    with Through() as mode:
        dispatched = run(first, weight, value, *rest, **rows)
    assert f"dami.{run.__name__}.default" in mode.seen
    assert torch.equal(flat(dispatched), flat(straight))


def intercepted() -> TorchFunctionMode:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return Mode()


def test_who_records_or_intercepts_calls_sees_them() -> None:
    x, weight, lam = torch.randn(3, K), packed(N, K), torch.rand(3)
    assert library.is_eager()
    for watched in (
        Through(),
        intercepted(),
        torch.autocast("cpu"),
        FakeTensorMode(),
        torch.autograd.forward_ad.dual_level(),
    ):
        with watched:
            assert not library.is_eager()
    with torch.no_grad(), torch.inference_mode():
        assert library.is_eager()
    torch.vmap(lambda x: (x, [library.is_eager()] == [False] or pytest.fail("vmap"))[0])(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        lerp_linear(x, weight, lam)
    assert "dami::lerp_linear" in {event.key for event in profiled.key_averages()}


def test_what_wants_a_gradient_or_is_no_plain_tensor_is_not_taken() -> None:
    class Other(Tensor):
        pass

    x, weight, lam = torch.randn(3, K), packed(N, K), torch.rand(3)

    def taken(x: Tensor, lam: Tensor, graph: bool = True) -> bool:
        return direct.lerp_linear(graph, x, weight, lam) is not None

    assert taken(x, lam)
    assert not taken(x.clone().requires_grad_(), lam)
    assert taken(x.clone().requires_grad_(), lam, graph=False)
    assert not taken(x, lam.clone().requires_grad_())
    assert not taken(x.as_subclass(Other), lam)
    assert not taken(x, lam.as_subclass(Other))
    assert not taken(x.to("meta"), lam)
    assert not taken(x.to_sparse(), lam)
    assert not taken(x.double(), lam)
    assert not taken(torch._neg_view(x), lam)
    assert not taken(x, torch._neg_view(lam))
    assert torch.equal(lerp_linear(torch._neg_view(x), weight, lam), lerp_linear(-x, weight, lam))
    assert torch.equal(lerp_linear(x, weight, torch._neg_view(-lam)), lerp_linear(x, weight, lam))
    negative = replace(weight, tensors=tuple(torch._neg_view(-tensor) for tensor in weight.tensors))
    assert torch.equal(lerp_linear(x, negative, lam), lerp_linear(x, weight, lam))


def test_empty_biases_are_still_refused() -> None:
    with pytest.raises(ValueError, match="biases must hold one for each of the 1 weights, got 0"):
        lerp_linears(torch.randn(2, K), [packed(N, K)], torch.rand(2), [])


def refuse_a_weight_without_dimensions() -> None:
    x, lam, number = torch.randn(2, K), torch.rand(2), LerpWeight.pack(torch.tensor(1.0), torch.tensor(2.0))
    ids, offsets = torch.tensor([0, 0]), torch.tensor([2], dtype=torch.int32)
    wrong: list[Callable[[], Any]] = [
        lambda: lerp_linear(x, number, lam),
        lambda: lerp_linear(x, packed(N, K), lam, number),
        lambda: lerp_linears(x, [number], lam),
        lambda: lerp_experts(x, number, lam, offsets),
        lambda: lerp_experts(x, packed(1, N, K), lam, offsets, number),
        lambda: lerp_embedding(ids, number, lam),
        lambda: lerp_rms_norm(x, number, lam),
        lambda: lerp_layer_norm(x, packed(K), lam, number),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"must have \d dimensions, got shape \[\]"):
            call()


def test_a_weight_without_dimensions_is_refused() -> None:
    refuse_a_weight_without_dimensions()


@pytest.mark.parametrize("format", FORMATS)
def test_no_address_is_remembered(format: str) -> None:
    """A tensor that is moved, replaced or changed in place is read where and as it is at the next call."""
    x, lam = torch.randn(4, 64), torch.rand(4)
    weight, other = packed(8, 64, format=format), packed(8, 64, format=format)
    expected = lerp_linear(x, other, lam)
    for change in (
        lambda t, new: setattr(t, "data", new.clone()),
        lambda t, new: t.set_(new.clone()),
        lambda t, new: t.copy_(new),
        lambda t, new: t.set_(torch.cat([new, new])[len(new) :]),
        lambda t, new: t.set_(new.t().contiguous().t()),
    ):
        mine = replace(weight, tensors=tuple(tensor.clone() for tensor in weight.tensors))
        assert not torch.equal(lerp_linear(x, mine, lam), expected)
        for tensor, new in zip(mine.tensors, other.tensors, strict=True):
            change(tensor, new)
        with (
            pytest.warns(UserWarning, match="is copied at every call") if mine.tensors[0].stride(1) != 1 else nothing()
        ):
            assert torch.equal(lerp_linear(x, mine, lam), expected)


def nothing() -> Any:
    native._warn_of_copies.cache_clear()
    return torch.no_grad()


@pytest.mark.parametrize("size", [0, 4, 8 * 64 - 1])
def test_memory_that_was_given_back_is_never_read(size: int) -> None:
    weight = packed(8, 64)
    weight.tensors[1].untyped_storage().resize_(4 * size)
    with pytest.raises(ValueError, match=f"must have 2048 bytes of memory, got {4 * size}: its storage was resized"):
        lerp_linear(torch.randn(2, 64), weight, torch.rand(2))


def test_nothing_is_kept_of_a_call() -> None:
    """All tensors of calls that a kernel takes, hands to Python, or refuses are freed with their last reference."""
    op = torch.ops.dami.lerp_linear.default
    alive = []
    for spoil in (lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x[:, :-1]):
        x, ends, bias = (
            spoil(torch.randn(4, 8)),
            [torch.randn(3, 8) for _ in range(2)],
            [torch.randn(3) for _ in range(2)],
        )
        lam, rows = torch.rand(2), torch.tensor([0, 1, 1, 0], dtype=torch.int32)
        alive += [weakref.ref(tensor.untyped_storage()) for tensor in (x, lam, rows, *ends, *bias)]
        for run in (op, native.lerp_linear):
            with nullcontext() if x.shape[1] == 8 else pytest.raises((ValueError, NotImplementedError)):
                alive.append(weakref.ref(run(x, ends, bias, lam, rows, 1, "pair", False)))
    del x, ends, bias, lam, rows
    gc.collect()
    assert not [each for each in alive if each() is not None]


def test_the_dispatcher_runs_no_python_for_what_a_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, lam = torch.randn(3, K), packed(N, K), torch.rand(3)
    op, expected = torch.ops.dami.lerp_linear.default, lerp_linear(x, weight, lam)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("Python was asked")

    monkeypatch.setitem(library.CHECKED, "lerp_linear", refuse)
    arguments = [x, list(weight.tensors), [], lam, None, 1, "pair", False]
    assert torch.equal(op(*arguments), expected)
    for place, value in ((0, x.t().contiguous().t()), (6, "lowrank"), (3, lam[:2])):
        with pytest.raises(Exception, match="Python was asked"):
            op(*arguments[:place], value, *arguments[place + 1 :])


def test_the_dispatchers_errors_are_pythons() -> None:
    x, weight, lam = torch.randn(3, K), packed(N, K), torch.rand(3)
    op = torch.ops.dami.lerp_linear.default
    with pytest.raises(TypeError, match=r"must be torch\.float64 of shape"):
        op(x.double(), list(weight.tensors), [], lam, None, 1, "pair", False)
    with pytest.raises(ValueError, match="must equal the 3 rows, got 2"):
        op(x, list(weight.tensors), [], lam[:2], None, 1, "pair", False)
    with pytest.raises(IndexError, match=r"row_to_lam must be in \[0, 3\), got 5"):
        op(x, list(weight.tensors), [], lam, torch.tensor([0, 5, 1], dtype=torch.int32), 1, "pair", False)


class Operators(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.table = packed(K, K), packed(K), packed(N, K, format="w8d4")

    def forward(self, ids: Tensor, lam: Tensor) -> Tensor:
        x = lerp_embedding(ids, self.table, lam)
        return lerp_linear(lerp_rms_norm(x, self.norm, lam), self.linear, lam).sin()


@pytest.mark.slow
def test_an_exported_program_runs_no_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """AOTInductor's library calls the kernels through the dispatcher and nothing else."""
    module, ids, lam = Operators().eval(), torch.tensor([1, 4, 0]), torch.rand(3)
    expected = module(ids, lam)
    exported = torch.export.export(module, (ids, lam))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "operators.pt2"))
    program = torch._inductor.aoti_load_package(path)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("Python was asked")

    for name in library.CHECKED:
        monkeypatch.setitem(library.CHECKED, name, refuse)
    with torch.inference_mode():  # else autograd's key, which is Python, comes first
        torch.testing.assert_close(program(ids, lam), expected)


@pytest.mark.slow
def test_inductors_cpp_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    module, ids, lam = Operators().eval(), torch.tensor([1, 4, 0]), torch.rand(3)
    expected = module(ids, lam)
    compiled = torch.compile(module, fullgraph=True, options={"cpp_wrapper": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, lam), expected)
        for name in library.CHECKED:
            monkeypatch.setitem(library.CHECKED, name, lambda *_: pytest.fail("Python was asked"))
        torch.testing.assert_close(compiled(ids, lam.flip(0)), module(ids, lam.flip(0)))


def test_tensors_without_memory_and_maps_that_overflow_are_not_taken() -> None:
    x, weight, lam = torch.randn(4, K), packed(N, K), torch.rand(4)
    zeros = torch._efficientzerotensor(4, K)
    assert torch.equal(lerp_linear(zeros, weight, lam), torch.zeros(4, N))
    assert torch.equal(lerp_linear(x, weight, torch._efficientzerotensor(4)), lerp_linear(x, weight, torch.zeros(4)))
    for rows_per_lam in (2**62 + 1, 2**70):
        with pytest.raises((ValueError, RuntimeError), match="rows"):
            lerp_linear(x, weight, lam, rows_per_lam=rows_per_lam)
    with Through():
        assert lerp_linear(x[:0], weight, torch.tensor(0.3)).shape == (0, N)
    none = LerpWeight((torch.empty(0, N, K),) * 2, "pair", torch.Size((0, N, K)), torch.float32)
    y = lerp_experts(x, none, lam, torch.empty(0, dtype=torch.int32))
    assert torch.equal(y, torch.zeros(4, N))
