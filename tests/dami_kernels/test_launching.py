"""Launches that are repeated, against Triton's own: a stand-in for CUDA's driver sees what both pass to it."""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is launched in the interpreter", allow_module_level=True)

from dami_kernels import (  # noqa: E402
    LerpWeight,
    launching,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
    native,
    upstream,
)
from dami_kernels.ops import library  # noqa: E402
from dami_kernels.triton import linear, norms  # noqa: E402
from dami_kernels.tuning import H100, Route, linear_config  # noqa: E402
from tests.dami_kernels.test_direct import Through, refuse_a_weight_without_dimensions  # noqa: E402
from tests.marks import slow  # noqa: E402
from tests.moving import break_place, ways  # noqa: E402

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
stand_in = pytest.importorskip("benchmarks.stand_in")

FORMATS = ["pair", "int8", "int4", "w8d4"]
ROWS, K, N, E = 6, 128, 32, 3  # codes are multiplied group by group
Call = Callable[[], Any]


@pytest.fixture(scope="module")
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(triton.knobs.compilation, "disable_line_info", True)  # which takes time
        with stand_in.playing_gpu() as playing:
            yield playing


@pytest.fixture
def gpu(_gpu: Any) -> Any:
    launching.forget()
    return _gpu


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton was asked to launch."""
    asked: list[str] = []
    plain = launching.Launch.by_triton

    def noted(launch: launching.Launch, *operands: Any) -> Any:
        asked.append(launch.kernel.__name__)
        return plain(launch, *operands)

    monkeypatch.setattr(launching.Launch, "by_triton", noted)
    return asked


def packed(*shape: int, format: str = "pair", dtype: torch.dtype = torch.bfloat16) -> LerpWeight:
    base = torch.randn(shape)
    return LerpWeight.pack(base.to(dtype), (base + 0.1 * torch.randn(shape)).to(dtype), format)


def call(name: str, format: str = "pair", **options: Any) -> Call:
    """An operator's call with tensors of its own."""
    lam = options.pop("lam", None)
    lam = torch.rand(ROWS) if lam is None else lam.clone()
    x, weight, bias = torch.randn(3, 2, K).bfloat16(), packed(N, K, format=format), packed(N)
    if name == "linear":
        return lambda: lerp_linear(x, weight, lam, bias, **options)
    if name == "linears":
        weights, biases = [weight, packed(2 * N, K, format=format)], [bias, packed(2 * N)]
        return lambda: lerp_linears(x, weights, lam, biases, **options)
    if name == "experts":
        flat, experts, offsets = x.flatten(0, 1), packed(E, N, K, format=format), torch.tensor([2, 2, 5]).int()
        ends = packed(E, N)
        return lambda: lerp_experts(flat, experts, lam, offsets, ends, **options)
    if name == "embedding":
        ids = torch.randint(0, N, (3, 2))
        return lambda: lerp_embedding(ids, weight, lam, **options)
    norm, shift = packed(K), packed(K)
    if name == "rms_norm":
        return lambda: lerp_rms_norm(x, norm, lam, 1e-5, offset=1.0, **options)
    return lambda: lerp_layer_norm(x, norm, lam, shift, 1e-5, **options)


LAMS: dict[str, dict[str, Any]] = {
    "one": {"lam": torch.tensor(0.3)},
    "rows": {},
    "sequences": {"lam": torch.rand(3), "rows_per_lam": 2},
    "map": {"lam": torch.rand(2), "row_to_lam": torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.int32)},
}
PRODUCTS = ("linear", "linears", "experts", "embedding")
# A pair has two tensors and w8d4 four. int8 and int4 have three, which one product shows.
TWO_FORMATS = ("pair", "w8d4")
CASES = [(name, format, "map") for name in PRODUCTS for format in TWO_FORMATS]
CASES += [("linear", "int8", "map")]
CASES += [(name, "pair", lam) for name in ("linear", "rms_norm", "layer_norm") for lam in LAMS]

OTHERS = [(name, format, "map") for name in PRODUCTS for format in FORMATS if (name, format, "map") not in CASES]


def seen(gpu: Any, call: Call) -> list[Any]:
    """What a call launches, with names in place of the addresses of what it allocates."""
    taken: list[Tensor] = []
    counters = launching.counters

    def noted(device: torch.device, count: int) -> Tensor:
        taken.append(counters(device, count))
        return taken[-1]

    before = gpu.count()
    with patch.object(launching, "counters", noted):
        y = call()
    launches = gpu.launches(before)
    first = y[0] if isinstance(y, tuple) else y
    names = {struct.pack("<Q", first.data_ptr()): b"result  "}
    for arrived in taken[-1:]:  # K is split
        address = struct.pack("<Q", arrived.data_ptr())
        at = launches[0].parameters.index(address)
        names |= {address: b"counters", launches[0].parameters[at - 8 : at]: b"parts   "}
    result = []
    for launch in launches:
        parameters = launch.parameters
        for address, name in names.items():
            assert parameters.count(address) <= 1
            parameters = parameters.replace(address, name)
        result.append((*(getattr(launch, field) for field in vars(launch) if field != "parameters"), parameters))
    assert result
    return result


def assert_as_triton(gpu: Any, call: Call) -> None:
    """What a call launches now is what Triton launches for it."""
    mine = seen(gpu, call)
    launching.forget()
    assert mine == seen(gpu, call)


@pytest.mark.parametrize(("name", "format", "lam"), [*dict.fromkeys(CASES), *slow(*OTHERS)])
def test_a_repeated_launch_is_tritons_byte_for_byte(
    name: str, format: str, lam: str, gpu: Any, by_triton: list[str]
) -> None:
    """Straight from the public function, and through torch's dispatcher; with other tensors than the first time."""
    first, other = (call(name, format, **LAMS[lam]) for _ in range(2))
    first()
    asked = len(by_triton)
    straight = seen(gpu, other)
    launching._calls.clear()
    assert straight == seen(gpu, other)
    assert len(by_triton) == asked > 0
    launching.forget()
    assert straight == seen(gpu, other)
    assert len(by_triton) == 2 * asked


def test_a_call_is_straight_only_where_nobody_watches(gpu: Any, by_triton: list[str]) -> None:
    made = call("linear")
    made(), made()
    with Through() as mode:
        made()
    assert "dami.lerp_linear.default" in mode.seen
    assert len(by_triton) == 1
    with torch.enable_grad():
        x, weight, lam = torch.randn(2, K, requires_grad=True), packed(N, K, dtype=torch.float32), torch.rand(2)
        for _ in range(2):
            assert lerp_linear(x, weight, lam).requires_grad
            assert not lerp_linear(x.detach(), weight, lam).requires_grad


def x_of(*shape: int, offset: int = 0, pad: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [*shape], `offset` numbers into its memory and with `pad` numbers between two rows."""
    *rows, columns = shape
    memory = torch.randn(offset + torch.Size(rows).numel() * (columns + pad)).to(dtype)
    return memory[offset:].view(*rows, columns + pad)[..., :columns]


def shifted(weight: LerpWeight, which: int, offset: int = 1, pad: int = 0) -> LerpWeight:
    """The same weight, with one tensor elsewhere in memory."""
    old = weight.tensors[which]
    memory = torch.zeros(offset + old.shape[:-1].numel() * (old.shape[-1] + pad), dtype=old.dtype)
    new = memory[offset:].view(*old.shape[:-1], -1)[..., : old.shape[-1]].copy_(old)
    tensors = (*weight.tensors[:which], new, *weight.tensors[which + 1 :])
    return LerpWeight(tensors, weight.format, weight.shape, weight.dtype)


def norm(x: Tensor, weight: LerpWeight | None = None, lam: Tensor | None = None, **options: Any) -> Call:
    weight = packed(x.shape[-1], dtype=x.dtype) if weight is None else weight
    lam = torch.rand(x.shape[:-1].numel()) if lam is None else lam
    return lambda: lerp_rms_norm(x, weight, lam, **options)


def product(x: Tensor, weight: LerpWeight, lam: Tensor | None = None, **options: Any) -> Call:
    lam = torch.rand(x.shape[:-1].numel()) if lam is None else lam
    return lambda: lerp_linear(x, weight, lam, **options)


def with_one_end() -> Call:
    end = torch.randn(K).bfloat16()
    return norm(x_of(2, K), LerpWeight.pack(end, end))


# Calls whose launches differ in something that Triton, a check or the launch parameters look at.
VARIANTS: dict[str, Callable[[], Call]] = {
    "plain": lambda: norm(x_of(2, K)),
    "x not aligned": lambda: norm(x_of(2, K, offset=1)),
    "x with rows apart": lambda: norm(x_of(2, K, pad=16)),
    "x with rows apart by an odd number": lambda: norm(x_of(2, K, pad=3)),
    "x with every other row": lambda: norm(x_of(2, 4, K)[:, ::2]),
    "one row": lambda: norm(x_of(1, K)),
    "three dimensions": lambda: norm(x_of(1, 2, K)),
    "17 rows": lambda: norm(x_of(17, K)),
    "another D": lambda: norm(x_of(2, 48)),
    "an odd D": lambda: norm(x_of(2, 33)),
    "float16": lambda: norm(x_of(2, K, dtype=torch.float16)),
    "target not aligned": lambda: norm(x_of(2, K), shifted(packed(K), 1)),
    "both ends one tensor": with_one_end,
    "one λ": lambda: norm(x_of(2, K), lam=torch.tensor(0.3)),
    "λ of two rows": lambda: norm(x_of(4, K), lam=torch.rand(2), rows_per_lam=2),
    "λ not aligned": lambda: norm(x_of(2, K), lam=torch.rand(3)[1:]),
    "a map": lambda: norm(x_of(3, K), lam=torch.rand(2), row_to_lam=torch.tensor([0, 1, 1], dtype=torch.int32)),
    "another eps": lambda: norm(x_of(2, K), eps=0.5),
    "another offset": lambda: norm(x_of(2, K), offset=1.0),
    "a product": lambda: product(x_of(2, K), packed(N, K)),
    "target with rows apart": lambda: product(x_of(2, K), shifted(packed(N, K), 1, 0, 16)),
    "invariant": lambda: product(x_of(2, K), packed(N, K), invariant=True),
    "K split": lambda: product(x_of(2, 2048), packed(N, 2048)),
    "w8d4 with K split": lambda: product(x_of(2, 2048), packed(N, 2048, format="w8d4")),
    "w8d4, not by group": lambda: product(x_of(2, 192), packed(N, 192, format="w8d4")),
    "w8d4, not by group, with a scale at no 32-bit word": lambda: product(
        x_of(2, 192), shifted(packed(N, 192, format="w8d4"), 1, 1)
    ),
    "w8d4": lambda: product(x_of(2, K), packed(N, K, format="w8d4")),
    "w8d4 with a scale at a 32-bit word": lambda: product(x_of(2, K), shifted(packed(N, K, format="w8d4"), 1, 2)),
    "w8d4 with codes at a 32-bit word": lambda: product(x_of(2, K), shifted(packed(N, K, format="w8d4"), 0, 4)),
}
COPIED: dict[str, Callable[[], Call]] = {
    "x transposed": lambda: norm(x_of(K, 2).mT),
    "x with rows apart in two ways": lambda: norm(x_of(2, 4, K)[:, :3], lam=torch.rand(6)),
    "λ with gaps": lambda: norm(x_of(4, K), lam=torch.rand(8)[::2]),
    "scale at no 32-bit word": lambda: product(x_of(2, K), shifted(packed(N, K, format="w8d4"), 1, 1)),
    "codes at no 32-bit word": lambda: product(x_of(2, K), shifted(packed(N, K, format="w8d4"), 0, 1)),
    "codes with rows an odd number apart": lambda: product(x_of(2, K), shifted(packed(N, K, format="int4"), 2, 0, 1)),
    "weight with gaps": lambda: norm(x_of(2, K), LerpWeight.pack(x_of(2 * K)[::2], x_of(2 * K)[::2])),
}


def test_no_launch_is_stale(gpu: Any) -> None:
    """Each call after all the others, and after a like one, launches what Triton launches for it afresh."""
    made = {name: (make(), make()) for name, make in VARIANTS.items()}
    for first, _ in made.values():
        first()
    assert len(launching._calls) == len(VARIANTS) - 1  # both ends being one tensor or two is the same
    steps, calls = dict(launching._steps), dict(launching._calls)
    for both in made.values():
        for each in both:
            launching._steps.update(steps)
            launching._calls.update(calls)
            assert_as_triton(gpu, each)


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
def test_what_was_copied_for_one_launch_is_copied_for_the_next(
    make: Callable[[], Call], gpu: Any, by_triton: list[str]
) -> None:
    made = make()
    before = gpu.count()
    made(), made(), made()
    assert not launching._calls
    first, *others = gpu.launches(before)
    assert len(others) == 2
    for other in others:
        assert (other.function, other.grid, len(other.parameters)) == (
            first.function,
            first.grid,
            len(first.parameters),
        )


@pytest.mark.parametrize("name", ["linear", "linears", "experts"])
@pytest.mark.parametrize("format", [*TWO_FORMATS, *slow("int8", "int4")])
def test_decoding_is_one_remembered_launch(name: str, format: str, gpu: Any, by_triton: list[str]) -> None:
    made = call(name, format)
    made()
    before = gpu.count()
    made(), made()
    assert (len(by_triton), len(launching._calls), gpu.count() - before) == (1, 1, 2)


def test_scratch_of_splits_belongs_to_each_launch(
    gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counters are asked for at each, when its stream is the current one."""
    made = product(x_of(2, 2048), packed(N, 2048))
    made()
    taken: list[tuple[Tensor, int]] = []

    def counters(device: torch.device, count: int, offset: int = 0) -> Tensor:
        taken.append((torch.zeros(count + offset, dtype=torch.int32)[offset:], gpu.stream))
        return taken[-1][0]

    monkeypatch.setattr(launching, "counters", counters)
    before = gpu.count()
    for stream in (7, 8, 7):
        monkeypatch.setattr(gpu, "stream", stream)
        made()
    assert len(by_triton) == 1
    for launched, (arrived, stream) in zip(gpu.launches(before), taken, strict=True):
        assert launched.stream == stream
        assert struct.pack("<Q", arrived.data_ptr()) in launched.parameters
    monkeypatch.setattr(launching, "counters", partial(counters, offset=1))
    made()
    assert len(by_triton) == 2  # Triton passes what is not aligned to another kernel


def test_lots_are_launched_again_one_after_the_other(
    gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dami_kernels.triton.product.MAX_PARTS", 1)
    made = product(x_of(2, 2048), packed(200, 2048))
    made()
    asked = len(by_triton)
    assert asked > 1
    launches = seen(gpu, made)
    assert len(by_triton) == len(launches) == asked
    assert len({launch[-1] for launch in launches}) == asked  # each has a first program of its own
    assert_as_triton(gpu, made)


def test_a_library_s_route_is_taken_anew_each_time(
    gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the launch remembered that looks up the route's results."""
    made = call("linear")
    asked: list[Any] = []

    def products(*args: Any) -> Route:
        asked.append(args)
        return Route.PRODUCTS

    with monkeypatch.context() as patched:
        patched.setattr(linear, "route", products)
        for _ in range(3):
            made()
    assert len(asked) == 3
    assert set(by_triton) == {"_lerp_embedding_kernel"}
    assert not launching._calls
    made()
    assert by_triton[-1] == "_lerp_linear_kernel"


def test_no_address_is_remembered(gpu: Any) -> None:
    x, lam = x_of(2, K), torch.rand(2)
    weight, other = packed(N, K), packed(N, K)
    for change in (
        lambda t, new: setattr(t, "data", new.clone()),
        lambda t, new: t.set_(new.clone()),
        lambda t, new: t.set_(torch.cat([new, new])[len(new) :]),
        lambda t, new: t.set_(torch.cat([new, new], 1)[:, : new.shape[1]]),
        lambda t, new: t.set_(new.t().contiguous().t()),
    ):
        for tensor, new in zip(weight.tensors, other.tensors, strict=True):
            change(tensor, new)
        lerp_linear(x, other, lam)
        assert_as_triton(gpu, lambda: lerp_linear(x, weight, lam))
    weight.tensors[1].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="its storage was resized"):
        lerp_linear(x, weight, lam)


def test_errors_stay(gpu: Any) -> None:
    """A call that is wrong is never like one that was right."""
    x, weight, lam = x_of(4, K), packed(N, K), torch.rand(4)
    lerp_linear(x, weight, lam), lerp_linear(x, weight, lam)
    wrong: dict[str, Call] = {
        "one λ per row": lambda: lerp_linear(x, weight, lam[:2]),
        "must equal the 4 rows": lambda: lerp_linear(x, weight, lam, rows_per_lam=2),
        "exclude each other": lambda: lerp_linear(x, weight, lam, rows_per_lam=1, row_to_lam=lam.int()),
        "dtype torch.float32": lambda: lerp_linear(x, weight, lam.double()),
        "x must have a last dimension": lambda: lerp_linear(x[:, :-1], weight, lam),
        "must have the input's dtype": lambda: lerp_linear(x.half(), weight, lam),
        "bias must be a LerpWeight": lambda: lerp_linear(x, weight, lam, x),  # type: ignore[arg-type]
        "lam must be a float32 Tensor": lambda: lerp_linear(x, weight, 0.5),  # type: ignore[arg-type]
    }
    for message, make in wrong.items():
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                make()


def test_a_weight_without_dimensions_is_refused(gpu: Any) -> None:
    refuse_a_weight_without_dimensions()


def test_settings_of_triton_are_looked_at(gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = call("linear")
    made(), made()
    assert len(by_triton) == 1
    plain = seen(gpu, made)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "debug", True)
        debugged = seen(gpu, made)
        assert len(by_triton) == 2
        assert debugged[0][1] != plain[0][1]  # another function
        assert_as_triton(gpu, made)
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.jit.JITFunction, "run", lambda *_, **options: None)
        made()
    assert seen(gpu, made) == plain


def test_launch_parameters_that_change_are_forgotten(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call("linear")
    made(), made()
    config = linear_config(ROWS, N, K, torch.bfloat16, "pair", H100)
    wide = replace(config, num_warps=2 * config.num_warps)
    monkeypatch.setattr(linear, "linear_config", lambda *_: wide)
    launching.forget()
    for _ in range(2):
        assert seen(gpu, made)[0][3] == (64 * config.num_warps, 1, 1)


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(which: str, gpu: Any, by_triton: list[str]) -> None:
    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    made = call("linear")
    made(), made()
    chain = getattr(triton.knobs.runtime, which)
    chain.add(hook)
    try:
        for _ in range(3):
            assert_as_triton(gpu, made)
    finally:
        chain.remove(hook)
    assert names == ["_lerp_linear_kernel"] * 6
    made(), made()
    asked = len(by_triton)
    made()
    assert (len(names), len(by_triton)) == (6, asked)


def test_hooks_of_other_kinds_see_every_launch(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    made = call("layer_norm")
    made(), made()
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", calls.append)
        made(), made()
    assert len(calls) == 2
    monkeypatch.setattr(norms._lerp_norm_kernel, "pre_run_hooks", norms._lerp_norm_kernel.pre_run_hooks)
    norms._lerp_norm_kernel.add_pre_run_hook(lambda *_, **options: calls.append(options["D"]))
    try:
        made(), made()
    finally:
        norms._lerp_norm_kernel.pre_run_hooks.clear()
    assert calls[2:] == [K, K]
    made()
    assert len(calls) == 4


def test_no_hooks_at_all(gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As other versions of Triton have it."""
    made = call("linear")
    for which in ("launch_enter_hook", "launch_exit_hook"):
        monkeypatch.setattr(triton.knobs.runtime, which, None)
    made(), made()
    assert len(by_triton) == 1
    assert_as_triton(gpu, made)


def test_the_stream_is_the_current_one(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call("linear")
    for stream in (7, 8, 9):
        monkeypatch.setattr(gpu, "stream", stream)
        assert {launch[5] for launch in seen(gpu, made)} == {stream}


def test_the_device_is_that_of_the_operands(gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: list[int] = []

    @contextlib.contextmanager
    def guard(device: int) -> Iterator[None]:
        guarded.append(device)
        before, gpu.device = gpu.device, device
        yield
        gpu.device = before

    made = call("linear")
    made()
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(gpu, "device", 1)
    made()
    assert (guarded, gpu.device, len(by_triton)) == ([0], 1, 1)


def test_an_output_that_is_not_aligned_is_launched_by_triton(
    gpu: Any, by_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = call("linear")
    made(), made()
    plain = torch.empty_like

    def shifted(like: Tensor, **options: Any) -> Tensor:
        size = like.numel()
        return plain(torch.empty(size + 1, dtype=like.dtype))[1:].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", shifted)
    made()
    assert len(by_triton) == 2


def test_results_are_memory_of_their_own(gpu: Any) -> None:
    for name, format in (("linear", "pair"), ("linears", "w8d4"), ("embedding", "pair"), ("experts", "w8d4")):
        made = call(name, format, **LAMS["map"])
        before = made()
        with torch.inference_mode():
            made()
        after = made()
        for one, two in zip(*((y if isinstance(y, tuple) else (y,)) for y in (before, after)), strict=True):
            assert one.data_ptr() != two.data_ptr()
            assert all(getattr(one, what)() == getattr(two, what)() for what in ("size", "stride", "storage_offset"))
            assert one.dtype == two.dtype
            assert not two.is_inference()
            two.zero_()


def test_what_is_remembered_has_no_memory_and_is_bounded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "LIMIT", 3)
    weight = packed(N, 2048)
    for rows in range(1, 6):
        for _ in range(2):
            lerp_linear(x_of(rows, 2048), weight, torch.rand(rows))
        assert 0 < len(launching._steps) <= 3
        assert 0 < len(launching._calls) <= 3
    likes = [like for step in launching._steps.values() for like in (step.y, step.parts) if like is not None]
    likes += [known.y for known in launching._calls.values()]
    assert {like.untyped_storage().data_ptr() for like in likes} == {
        launching._number(dtype, torch.device("cpu")).data_ptr() for dtype in (torch.bfloat16, torch.float32)
    }


BROKEN = [pytest.param(place, way, id=f"{place.path} {way}") for place in upstream.LAUNCHES for way in ways(place)]


@pytest.fixture
def ask_anew() -> Iterator[Callable[[], None]]:
    """What is asked of Triton once is asked again."""

    def ask() -> None:
        for cache in (
            upstream.why_triton_launches, upstream._fault_of, upstream._triton, launching._say_why_slow,
        ):  # fmt: skip
            cache.cache_clear()

    yield ask
    ask()


@pytest.mark.parametrize(("place", "way"), BROKEN)
def test_without_a_private_name_triton_launches_and_that_is_said(
    place: Any,
    way: str,
    gpu: Any,
    by_triton: list[str],
    ask_anew: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    made = call("linear")
    plain = seen(gpu, made)
    launching.forget()
    ask_anew()
    with monkeypatch.context() as patch:
        said = break_place(patch, place, way)
        assert said in str(upstream.why_triton_launches())
    with caplog.at_level(logging.WARNING, "dami_kernels"):
        assert [seen(gpu, made) for _ in range(3)] == [plain] * 3
    assert len(by_triton) == 4
    (line,) = caplog.messages
    assert line.startswith("Triton's own launches, which take tens of microseconds each: a fast launch does not fit")
    assert said in line


@pytest.mark.parametrize("way", ways(upstream.LAUNCHER[0]))
def test_without_tritons_launcher_its_python_is_called(
    way: str, gpu: Any, by_triton: list[str], ask_anew: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_anew()
    with monkeypatch.context() as patch:
        break_place(patch, upstream.LAUNCHER[0], way)
        assert upstream._fault_of(upstream.LAUNCHER) is not None
    made = call("linear")
    made()
    assert_as_triton(gpu, made)
    assert len(by_triton) == 2


def test_without_the_compiled_part_triton_launches_and_that_is_said(
    gpu: Any, ask_anew: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    made = call("linear")
    plain = seen(gpu, made)
    ask_anew()
    monkeypatch.setattr(launching, "_C", None)
    monkeypatch.setattr(native, "WHY_NOT", "the compiled part is missing")
    monkeypatch.setattr(library, "kernel_of", lambda name, device: getattr(native, name))
    with caplog.at_level(logging.WARNING, "dami_kernels"):
        assert [seen(gpu, made) for _ in range(2)] == [plain] * 2
    assert [line.endswith(": the compiled part is missing") for line in caplog.messages] == [True]


def test_the_facts_of_operands() -> None:
    """What the compiled part reads of them, and what it does not take."""
    facts: Any = launching._C.facts
    one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    assert facts(1, False, (one, (two,), None, 3))[1] == (one.data_ptr(), (two.data_ptr(),), None, 3)
    keys = [
        facts(1, False, operands)[0]
        for operands in (
            (one,), (one.t(),), (one.int(),), (one.half(),), (one[None],), (one.flatten(),), (one.view(-1)[1:],),
            (one[:, 1:],), ((one,),), (None,), (3,), (4,), ((),), (one, one), ((one, one),), ((one,), one),
            (one[1:],), (one[:0],), (torch.tensor(0.0),), (one[:, 2:],), (one[:, 1:3],),
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert facts(1, False, (one,))[0] == facts(1, False, (two,))[0]
    with torch.enable_grad():
        wanting = one.clone().requires_grad_()
    assert facts(1, False, (wanting,)) is not None
    for graph, operands in (
        (True, (wanting,)), (False, (torch._neg_view(one),)), (False, (one.to("meta"),)), (False, (one.to_sparse(),)),
        (False, (torch._efficientzerotensor(4),)), (False, ("text",)), (False, [one]), (False, (1.5,)),
        (False, (one.as_subclass(type("Other", (Tensor,), {})),)),
    ):  # fmt: skip
        assert facts(1, graph, operands) is None
    assert facts(2, False, (one,)) is None
    given_back = torch.zeros(4)
    given_back.untyped_storage().resize_(8)
    assert facts(1, False, ((given_back,),)) is None
    with pytest.raises(OverflowError):
        facts(1, False, (2**70,))
