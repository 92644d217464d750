"""The products of torch's library in place of our kernel: when they are chosen, and that they keep the contracts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dami_kernels import LerpWeight, lerp_linear, lerp_linears, products, reference
from dami_kernels.ops import direct
from dami_kernels.tuning import (
    H100,
    Device,
    LinearEntry,
    Route,
    linear_config,
    load_table,
    route,
    rows_together,
    save_table,
    table_path,
)
from dami_kernels.tuning import routes as tuning
from tests.dami_kernels.test_triton_plan import DEVICES, ROWS, SHAPES
from tests.tolerance import assert_as_accurate

FORMATS = ["pair", "int8", "int4", "w8d4"]
LIBRARY = [Route.PRODUCTS, Route.BLEND]
every_format = pytest.mark.parametrize("format", FORMATS)
both_ways = pytest.mark.parametrize("way", LIBRARY)
AMX = Device("amx", processors=1, shared=0)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    for function in (load_table, route, linear_config):
        function.cache_clear()
    yield
    for function in (load_table, route, linear_config):
        function.cache_clear()


def packed(
    *shape: int, format: str = "pair", dtype: torch.dtype = torch.bfloat16, distance: float = 0.03
) -> LerpWeight:
    base = torch.randn(shape)
    return LerpWeight.pack(*((0.05 * end).to(dtype) for end in (base, base + distance * torch.randn(shape))), format)


def test_without_measurements_few_rows_are_our_kernel_s() -> None:
    for (name, device), format in itertools.product(DEVICES.items(), FORMATS):
        for M in ROWS:
            for together in (1, M):
                chosen = {route(M, N, K, torch.bfloat16, format, device, together) for N, K in SHAPES}
                if M <= 64 or name not in ("sm_90", "sm_100"):
                    assert chosen == {Route.KERNEL}, (name, format, M, together)
                assert Route.PRODUCTS not in chosen or together == 1
                assert Route.BLEND not in chosen or together == M


@pytest.mark.parametrize(
    ("arch", "format", "together", "way"),
    [
        ("sm_90", "pair", 4096, Route.BLEND),  # 2.4 cycles a weight against 3.3, of which L2 takes most
        ("sm_90", "int4", 4096, Route.BLEND),
        ("sm_90", "w8d4", 4096, Route.KERNEL),  # which reads least
        ("sm_90", "pair", 1024, Route.KERNEL),  # the weight would be blended four times
        ("sm_90", "pair", 1, Route.KERNEL),  # 4.9 against 6.5, most of which is float32 results
        ("sm_90", "w8d4", 1, Route.KERNEL),
        ("sm_100", "pair", 4096, Route.BLEND),
        ("sm_100", "pair", 1024, Route.BLEND),
        ("sm_100", "pair", 1, Route.PRODUCTS),  # 3.6 against 8.2: its kernel takes 64 rows at a time
        ("sm_80", "pair", 4096, Route.KERNEL),  # not counted
    ],
)
def test_counts_decide_for_many_rows(arch: str, format: str, together: int, way: Route) -> None:
    """gate_up of Qwen3-4B, 4096 rows."""
    assert route(4096, 19456, 2560, torch.bfloat16, format, DEVICES[arch], together) is way
    assert route(4096, 19456, 2560, torch.float32, format, DEVICES[arch], together) is Route.KERNEL
    assert route(4096, 19456, 2560, torch.bfloat16, format, DEVICES[arch], together, True) is Route.KERNEL


def test_with_amx_rows_at_one_lam_are_blended_from_some_number_on() -> None:
    def way(together: int, dtype: torch.dtype = torch.bfloat16, K: int = 64, **more: Any) -> Route:
        return route(4096, 64, K, dtype, "pair", AMX, together, **more)

    assert [way(rows) for rows in (1, 2047, 2048, 4096)] == [Route.KERNEL] * 2 + [Route.BLEND] * 2
    assert way(4096, torch.float32) is way(4096, torch.float16) is way(4096, invariant=True) is Route.KERNEL
    assert way(4096, K=70) is Route.KERNEL  # where oneDNN would let a NaN into another row
    assert tuning.candidates(4096, AMX) == [Route.KERNEL, Route.BLEND]
    assert tuning.candidates(1, AMX) == [Route.KERNEL]  # no product with float32 results
    assert tuning.candidates(1, H100) == [Route.KERNEL, Route.PRODUCTS]


def test_what_rows_share_is_known_without_reading_lam() -> None:
    assert rows_together(4096, 4096, False) == 4096  # one λ for all
    assert rows_together(4096, 1024, False) == 1024
    assert rows_together(4096, 1, False) == 1
    assert rows_together(4096, 1, True) == 1  # a map is data


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    """A GPU with a made-up table for N=64, K=96: products for many mixed rows, a blend for 1024 at one λ."""
    device = replace(H100, name="Some GPU")
    monkeypatch.setattr("dami_kernels.tuning.tables.TABLES", tmp_path)
    config = linear_config(64, 64, 96, torch.bfloat16, "int4", H100)
    few = LinearEntry(16, 64, 96, torch.bfloat16, "int4", config)
    many = replace(few, M=1024, one=Route.BLEND, mixed=Route.PRODUCTS)
    save_table(table_path(device.name), [few, many])
    return device


def test_what_was_measured_decides_at_the_nearest_rows(measured: Device) -> None:
    def way(M: int, together: int, N: int = 64, **more: Any) -> Route:
        return route(M, N, 96, torch.bfloat16, "int4", measured, together, **more)

    assert [way(M, 1) for M in (1, 16, 127, 200, 9000)] == [Route.KERNEL] * 3 + [Route.PRODUCTS] * 2
    assert [way(M, M) for M in (1, 16, 64, 1024)] == [Route.KERNEL] * 3 + [Route.BLEND]
    assert way(4096, 1024) is Route.BLEND  # four sequences of 1024 tokens
    assert way(4096, 64) is Route.KERNEL
    assert way(4096, 1, N=65) is way(4096, 1, invariant=True) is Route.KERNEL


def test_tables_without_routes_are_still_read(measured: Device) -> None:
    path = table_path(measured.name)
    lines = [
        {name: line[name] for name in line if name not in ("one", "mixed")} for line in json.loads(path.read_text())
    ]
    path.write_text(json.dumps(lines))
    load_table.cache_clear()
    assert {entry.mixed for entry in load_table(measured.name)[64, 96, torch.bfloat16, "int4"]} == {Route.KERNEL}


def run(way: Route, x: Tensor, weight: LerpWeight, lam: Tensor, bias: LerpWeight | None, each: int = 1) -> Tensor:
    ends = [] if bias is None else [*bias.tensors]
    return products.lerp_linear(x, [*weight.tensors], ends, lam, None, each, weight.format, way)


def merged(x: Tensor, weight: LerpWeight, lam: Tensor, bias: LerpWeight | None) -> Tensor:
    """Plain PyTorch: every row by the weight merged at its λ."""
    biases = [None if bias is None else bias.materialize(value) for value in lam.tolist()]
    rows = [F.linear(x[i], weight.materialize(value), biases[i]) for i, value in enumerate(lam.tolist())]
    return torch.stack(rows)


@both_ways
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_both_ways_are_as_accurate_as_the_contract_asks(
    way: Route, format: str, dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any λ, in pieces of features and of rows that do not divide them."""
    monkeypatch.setattr(tuning, "SCRATCH", 1)  # 64 features at a time
    monkeypatch.setattr(products, "ROWS", 25)
    each = 8 if way is Route.BLEND else 1
    x, weight = torch.randn(40, 70).to(dtype), packed(150, 70, format=format, dtype=dtype)
    bias = packed(150, dtype=dtype) if has_bias else None
    lam = torch.tensor([0.0, 1.0, 0.3, -0.5, 1.5]).repeat(8 // each)
    per_row = lam.repeat_interleave(each)
    y = run(way, x, weight, lam, bias, each)
    oracle = reference.lerp_linear(x, weight.unpack(), per_row, None if bias is None else bias.unpack())
    for value in lam[:5]:
        rows = per_row == value
        of = None if bias is None else bias
        assert_as_accurate(y[rows], oracle[rows], merged(x[rows], weight, per_row[rows], of))


def test_unrelated_ends_too() -> None:
    """Where a blend rounds most against what it keeps of the ends."""
    x, weight = torch.randn(40, 300).bfloat16(), packed(150, 300, distance=1.5)
    for way in LIBRARY:
        lam = torch.full((1,), 0.6) if way is Route.BLEND else torch.full((40,), 0.6)
        y = run(way, x, weight, lam, None, 40 // len(lam))
        per_row = torch.full((40,), 0.6)
        oracle = reference.lerp_linear(x, weight.unpack(), per_row)
        assert_as_accurate(y, oracle, merged(x, weight, per_row, None))


@both_ways
@pytest.mark.parametrize("end", [0, 1])
def test_an_end_has_the_bits_of_that_end_alone(way: Route, end: int) -> None:
    """Where the other end is NaN too, for each row by itself."""
    x, weight, bias = torch.randn(64, 70).bfloat16(), packed(150, 70), packed(150)
    each = 32 if way is Route.BLEND else 1
    lam = torch.tensor([float(end), 0.3]).repeat(32 // each)
    alone = [LerpWeight.pack(w.tensors[end], w.tensors[end]) for w in (weight, bias)]
    expected = run(way, x, alone[0], lam, alone[1], each)
    for w in (weight, bias):
        w.tensors[1 - end].fill_(torch.nan)
    y = run(way, x, weight, lam, bias, each)
    rows = lam.repeat_interleave(each) == end
    assert torch.equal(y[rows], expected[rows])
    assert y[~rows].isnan().all()


@both_ways
def test_no_row_reaches_another(way: Route) -> None:
    x, weight, each = torch.randn(64, 96).bfloat16(), packed(150, 96), 64 if way is Route.BLEND else 1
    lam = torch.rand(64 // each)
    expected = run(way, x, weight, lam, None, each)
    x[5] = torch.nan
    y = run(way, x, weight, lam, None, each)
    others = torch.arange(64) != 5
    assert torch.equal(y[others], expected[others])
    assert y[5].isnan().all()


def test_a_map_is_followed_row_by_row() -> None:
    x, weight, lam = torch.randn(40, 70).bfloat16(), packed(150, 70), torch.rand(3)
    index = torch.randint(3, (40,), dtype=torch.int32)
    y = products.lerp_linear(x, [*weight.tensors], [], lam, index, 1, "pair", Route.PRODUCTS)
    assert torch.equal(y, run(Route.PRODUCTS, x, weight, lam[index], None))
    with pytest.raises(ValueError, match="row_to_lam must be None to blend the weight of rows at one λ, got a map"):
        products.lerp_linear(x, [*weight.tensors], [], lam, index, 1, "pair", Route.BLEND)


@both_ways
@pytest.mark.parametrize("format", FORMATS)
def test_no_value_is_read_back(way: Route, format: str) -> None:
    """Tensors on "meta" have none: a captured graph replays with any λ."""
    weight = [tensor.to("meta") for tensor in packed(150, 70, format=format).tensors]
    x, lam = torch.empty(40, 70, dtype=torch.bfloat16, device="meta"), torch.empty(4, device="meta")
    y = products.lerp_linear(x, weight, [x.new_empty(150)] * 2, lam, None, 10, format, way)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (40, 150), torch.bfloat16)


class Largest(TorchDispatchMode):
    """The most bytes that one of torch's operators returns within."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(
            isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
            for arg in args
        ):
            self.bytes = max(self.bytes, result.nbytes)
        return result


@both_ways
@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_scratch_does_not_grow_with_the_weight(way: Route, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = 400_000
    monkeypatch.setattr(tuning, "SCRATCH", scratch)
    monkeypatch.setattr(products, "_product", lambda x, w: F.linear(x, w).float())  # without this CPU's copy of w
    x = torch.randn(32, 512).bfloat16()
    for N in (128, 5000):
        weight = packed(N, 512, format=format)
        lam = torch.rand(1 if way is Route.BLEND else 32)
        with Largest() as largest:
            y = run(way, x, weight, lam, None, 32 // len(lam))
        assert largest.bytes <= max(scratch, y.nbytes)


@pytest.mark.parametrize("weights", [1, 2])
def test_a_gpu_s_operator_takes_the_route(weights: int, measured: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU, where no kernel of Triton's can run: the library does."""
    pytest.importorskip("triton")
    from dami_kernels import triton
    from dami_kernels.triton import linear

    monkeypatch.setattr(linear, "device_of", lambda _: measured)
    x, each = torch.randn(1024, 96).bfloat16(), [packed(64 // weights, 96, format="int4") for _ in range(weights)]
    tensors = [tensor for weight in each for tensor in weight.tensors]
    for way, lam in ((Route.BLEND, torch.rand(1)), (Route.PRODUCTS, torch.rand(1024))):
        rows_per_lam = 1024 // len(lam)
        y = triton.lerp_linears(x, tensors, [], lam, None, rows_per_lam, "int4", False)
        expected = [run(way, x, weight, lam, None, rows_per_lam).flatten() for weight in each]
        assert torch.equal(y, torch.cat(expected))


def test_a_cpu_with_amx_takes_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls of many rows at one λ; what has gradients, few rows or mixed ones stays with the kernel."""
    monkeypatch.setattr(direct, "HAS_AMX", True)
    monkeypatch.setattr(tuning, "cpu", lambda: AMX)
    taken: list[Route] = []
    plain = products.lerp_linear

    def noted(*args: Any) -> Tensor:
        taken.append(args[-1])
        return plain(*args)

    monkeypatch.setattr(products, "lerp_linear", noted)
    x, weight, bias = torch.randn(2, 2048, 96).bfloat16(), packed(40, 96), packed(40)
    lam = torch.tensor(0.3)
    y = lerp_linear(x, weight, lam, bias)
    assert torch.equal(y, F.linear(x, weight.materialize(0.3), bias.materialize(0.3)))
    two = lerp_linears(x, [weight, weight], torch.tensor([0.3, 0.7]), [bias, bias], rows_per_lam=2048)
    assert torch.equal(two[0][0], F.linear(x[0], weight.materialize(0.3), bias.materialize(0.3)))
    assert torch.equal(two[1], two[0])
    assert taken == [Route.BLEND] * 3
    lerp_linear(x[:, :1000], weight, lam)
    lerp_linear(x, weight, lam, invariant=True)
    lerp_linear(x, weight, torch.rand(4096))
    lerp_linear(x.clone().requires_grad_(), weight, lam).sum().backward()
    assert len(taken) == 3
