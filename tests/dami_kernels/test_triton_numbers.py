"""What is particular to the Triton kernels' numbers: tiles, splits, strides, large offsets.

On a GPU (`-m gpu`) these tests run the compiled kernels. Without one, test_triton.py runs them in Triton's interpreter,
and test_ops.py with the operators' contracts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from dami_kernels import LerpWeight, formats, reference  # noqa: E402
from dami_kernels.triton import codes, product  # noqa: E402
from dami_kernels.tuning import LinearConfig, row_span  # noqa: E402
from tests.marks import slow  # noqa: E402
from tests.tolerance import assert_as_accurate  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
pytestmark = [] if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", [*DTYPES[:2], *slow(torch.float16)], ids=str)

Ends = list[Tensor]
Kernel = Callable[..., Tensor]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """The launching functions, by the operator's name."""
    from dami_kernels import triton as module

    return {name: getattr(module, name) for name in module.__all__}


@pytest.fixture
def linear(kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """`linear(config, x, weight, bias, lam)`, with λ per row and the launch parameters given."""

    def run(
        config: LinearConfig, x: Tensor, weight: Ends, bias: Ends, lam: Tensor, format: str = "pair", each: int = 1
    ) -> Tensor:
        monkeypatch.setattr("dami_kernels.triton.linear.linear_config", lambda *_: config)
        y = kernels["lerp_linears"](x, weight, bias, lam, None, each, format, False)
        return y.view(len(x), len(weight[0])) if len(weight) == len(formats.get(format).TENSORS) else y

    return run


def config(split_k: int = 1, use_blend: bool = False, block_m: int = 16, mixed_m: int = 16) -> LinearConfig:
    return LinearConfig(block_m, 16, 32, mixed_m, split_k, use_blend, num_warps=4, num_stages=2)


def ends(*shape: int, dtype: torch.dtype, distance: float = 0.03) -> Ends:
    base = torch.randn(shape, device=DEVICE)
    return [(0.05 * end).to(dtype) for end in (base, base + distance * torch.randn(shape, device=DEVICE))]


def every_kind_of_tile() -> Tensor:
    """λ of 70 rows for tiles of 16: all base, all target, one λ, all different, and a last one of six equal rows."""
    kinds = [
        torch.zeros(16),
        torch.ones(16),
        torch.full((16,), 0.3),
        torch.linspace(-0.5, 1.5, 16),
        torch.full((6,), 0.6),
    ]
    return torch.cat(kinds).to(DEVICE)


def merged_rows(x: Tensor, weight: Ends, bias: Ends, lam: Tensor) -> Tensor:
    """Plain PyTorch: every row by the weight merged in float32 at its λ and rounded once, as is the result."""

    def merge(pair: Ends, value: Tensor) -> Tensor:
        return torch.lerp(pair[0].float(), pair[1].float(), value).to(pair[0].dtype).float()

    y = x.new_empty(len(x), len(weight[0]))
    for value in lam.unique():
        rows = lam == value
        y[rows] = F.linear(x[rows].float(), merge(weight, value), merge(bias, value) if bias else None).to(x.dtype)
    return y


@every_dtype
@pytest.mark.parametrize(("bias", "distance"), [(False, 0.03), (True, 1.0)], ids=["near", "far, bias"])
@pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])
@pytest.mark.parametrize("split_k", [1, 4], ids=["", "split"])
def test_every_kind_of_tile(
    linear: Kernel, dtype: torch.dtype, bias: bool, use_blend: bool, split_k: int, distance: float
) -> None:
    """Each kind on its own is as accurate as the contract asks, however far the ends are apart."""
    lam = every_kind_of_tile()
    N, K = 21, 150
    x = torch.randn(len(lam), K, dtype=dtype, device=DEVICE)
    weight, b = ends(N, K, dtype=dtype, distance=distance), ends(N, dtype=dtype) if bias else []
    y = linear(config(split_k, use_blend), x, weight, b, lam)
    oracle = reference.lerp_linear(x, tuple(weight), lam, tuple(b) if b else None)
    plain = merged_rows(x, weight, b, lam)
    for tile in torch.arange(len(lam)).split(16):
        assert_as_accurate(y[tile], oracle[tile], plain[tile])


def fused(a: Any, b: Any, d: Any) -> Any:
    """a · b + d in float32 as a GPU's cores compute it: one fused multiply-add after the other, for each element."""
    d = d.copy()
    for k in range(a.shape[1]):
        d = (a[:, k, None].astype(np.float64) * b[k] + d).astype(np.float32)
    return d


@pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])
@pytest.mark.parametrize("format", ["pair", "int8"])
def test_float32_is_as_accurate_over_a_long_k(
    linear: Kernel, monkeypatch: pytest.MonkeyPatch, format: str, use_blend: bool
) -> None:
    """However long K is: products in one chain would err with its root, twelve times as much as a step of 32 does."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
            return TensorHandle(fused(a.data, b.data, d.data), d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    M, N, K = 3, 16, 4864
    x, both = torch.randn(M, K, device=DEVICE), ends(N, K, dtype=torch.float32)
    weight = LerpWeight.pack(*both, format)
    for lam in (torch.zeros(M), torch.full((M,), 0.3), torch.rand(M)):
        lam = lam.to(DEVICE)
        y = linear(config(use_blend=use_blend), x, list(weight.tensors), [], lam, format)
        unpacked = [end.float() for end in weight.unpack()]
        oracle = reference.lerp_linear(x, tuple(unpacked), lam)
        error = (y - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()
        # A chain of 32 products errs by √(32/2) roundings, 2⁻²⁴/√3 each, at most; then there is the blend's.
        assert error < 1.5 * (32 / 2) ** 0.5 * 2**-24 / 3**0.5 + 2**-23


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_float32_overflows_to_infinity(linear: Kernel) -> None:
    """And not to the NaN that its carry then is."""
    x, end = torch.full((2, 96), 1e30, device=DEVICE), torch.full((16, 96), 1e30, device=DEVICE)
    y = linear(config(), x, [end, end], [], torch.zeros(2, device=DEVICE))
    assert (y == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_blended_tile_equals_the_merged_weight(linear: Kernel, dtype: torch.dtype) -> None:
    """Bit for bit at λ = 1/4, where float32 holds the blend exactly; two accumulators give other bits.

    Three rows of the tile are beyond the batch, and must not make it a mixed one.
    """
    x, weight = torch.randn(13, 64, dtype=dtype, device=DEVICE), ends(16, 64, dtype=dtype)
    lam = torch.full((13,), 0.25, device=DEVICE)
    merged = (weight[0].float() + 0.25 * (weight[1].float() - weight[0].float())).to(dtype)
    expected = linear(config(use_blend=True), x, [merged, merged], [], torch.zeros_like(lam))
    assert torch.equal(linear(config(use_blend=True), x, weight, [], lam), expected)
    assert not torch.equal(linear(config(use_blend=False), x, weight, [], lam), expected)


@every_dtype
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("split_k", [1, 4], ids=["", "split"])
def test_an_end_never_sees_the_other(linear: Kernel, dtype: torch.dtype, end: int, split_k: int) -> None:
    """Not even an other end of NaN: in a tile of that end alone, nor in a row of it among others."""
    x, weight, bias = (
        torch.randn(48, 150, dtype=dtype, device=DEVICE),
        ends(21, 150, dtype=dtype),
        ends(21, dtype=dtype),
    )
    lam = torch.full((48,), float(end), device=DEVICE)
    lam[32:48:2] = 0.3
    expected = linear(config(split_k), x, [weight[end]] * 2, [bias[end]] * 2, lam)
    weight[1 - end].fill_(torch.nan)
    bias[1 - end].fill_(torch.nan)
    y = linear(config(split_k), x, weight, bias, lam)
    of_the_end = lam == end
    assert torch.equal(y[of_the_end], expected[of_the_end])
    assert y[~of_the_end].isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can be asked what was read")
@pytest.mark.parametrize("end", [0, 1])
def test_an_end_alone_reads_half_the_bytes(
    kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    weight, lam = ends(21, 40, dtype=torch.float32), torch.full((5,), float(end))
    read: list[int] = []
    load = InterpreterBuilder.create_masked_load

    def recording(builder: InterpreterBuilder, pointers: Any, mask: Any, *options: Any) -> Any:
        read.extend(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].tolist())
        return load(builder, pointers, mask, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recording)
    ids = torch.arange(5)
    for run in (
        lambda: kernels["lerp_linear"](torch.randn(5, 40), weight, [], lam, None, 1, "pair", False),
        lambda: kernels["lerp_embedding"](ids, weight, lam, None, 1, "pair", weight[0].dtype, weight[0].shape[1]),
    ):
        read.clear()
        run()
        counts = [sum(0 <= address - e.data_ptr() < e.nbytes for address in read) for e in weight]
        assert counts[end] >= 5 * 40
        assert counts[1 - end] == 0


@pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])
def test_a_nan_lam_stays_in_its_row(linear: Kernel, use_blend: bool) -> None:
    x, weight = torch.randn(32, 40, device=DEVICE), ends(16, 40, dtype=torch.float32)
    lam = torch.full((32,), 0.3, device=DEVICE)
    expected = linear(config(use_blend=use_blend), x, weight, [], lam)
    for bad in (0, 5, 15):  # of the first tile; the second keeps its one λ
        with_nan = lam.clone()
        with_nan[bad] = torch.nan
        y = linear(config(use_blend=use_blend), x, weight, [], with_nan)
        assert y[bad].isnan().all()
        others = torch.arange(32) != bad
        torch.testing.assert_close(y[others], expected[others], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@every_dtype
def test_a_split_is_the_same_every_time(linear: Kernel, dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(20, 150, dtype=dtype, device=DEVICE),
        ends(21, 150, dtype=dtype),
        ends(21, dtype=dtype),
    )
    lam = torch.rand(20, device=DEVICE)
    y = linear(config(split_k=4), x, weight, bias, lam)
    assert all(torch.equal(y, linear(config(split_k=4), x, weight, bias, lam)) for _ in range(3))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's programs run in an order that can be chosen")
@pytest.mark.parametrize("format", ["pair", "int4"])
def test_whichever_split_comes_last_sums_them(linear: Kernel, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """In the same order, with the same bits; and it leaves zeros for the next launch, as it found them."""
    from triton.runtime.interpreter import InterpreterBuilder

    x, weight = torch.randn(20, 150, dtype=torch.bfloat16), packed(format, 21, 150)
    lam, arrived = torch.rand(20), torch.zeros(99, dtype=torch.int32)
    monkeypatch.setattr("dami_kernels.launching.counters", lambda *_: arrived)
    y = linear(config(split_k=4), x, [*weight.tensors], [], lam, format)
    plain = InterpreterBuilder.set_grid_idx
    for order in ([2, 1, 0], [1, 2, 0]):  # 150 columns are five steps, two in a split
        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, i, j, k, o=order: plain(self, i, o[j], k))
            assert torch.equal(linear(config(split_k=4), x, [*weight.tensors], [], lam, format), y)
        assert not arrived.any()


@pytest.mark.parametrize("use_blend", [False, *slow(True)], ids=["two accumulators", "blend"])
def test_parts_of_splits_are_bounded(linear: Kernel, monkeypatch: pytest.MonkeyPatch, use_blend: bool) -> None:
    """Too many tiles at once are launched one lot after the other, with the same bits."""
    lam = every_kind_of_tile()
    x, weights = torch.randn(len(lam), 150, device=DEVICE), [ends(n, 150, dtype=torch.float32) for n in (21, 40)]
    split = config(4, use_blend, block_m=32)
    y = linear(split, x, [*chain(*weights)], [], lam)
    monkeypatch.setattr("dami_kernels.triton.product.MAX_PARTS", 4 * 4 * 32 * 16 + 5)
    assert torch.equal(linear(split, x, [*chain(*weights)], [], lam), y)


def test_counters_are_shared_by_nothing_that_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA: a stream's launches share theirs, and each captured launch has its own."""
    from dami_kernels import counters as module

    for name in ("_for_graphs", "_of_streams"):
        monkeypatch.setattr(module, name, {})
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    stream, capturing = "first", True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def places(count: int) -> set[int]:
        tensor = module.counters(torch.device("cuda", 0), count)
        taken.append(tensor)
        assert tensor.dtype == torch.int32
        assert not tensor.any()
        return set(range(tensor.data_ptr(), tensor.data_ptr() + 4 * count, 4))

    taken: list[Tensor] = []
    before = places(5)  # captured before anything else has run
    capturing = False
    eager = places(5)
    assert places(5) == eager
    stream = "second"
    other = places(3000)
    capturing = True
    graphs = [places(5), places(7), places(1 << 20)]  # the last does not fit
    everything = [before, eager, other, *graphs]
    assert len(set().union(*everything)) == sum(map(len, everything))


def test_more_splits_than_steps(linear: Kernel) -> None:
    x, weight = torch.randn(3, 40, device=DEVICE), ends(5, 40, dtype=torch.float32)
    lam = torch.rand(3, device=DEVICE)
    y = linear(config(split_k=4), x, weight, [], lam)
    assert_as_accurate(y, reference.lerp_linear(x, tuple(weight), lam), merged_rows(x, weight, [], lam))


@pytest.mark.parametrize("M", [1, 20])
def test_no_inner_size_leaves_the_bias(linear: Kernel, M: int) -> None:
    bias, lam = ends(5, dtype=torch.float32), torch.rand(M, device=DEVICE)
    weight = [torch.empty(5, 0, device=DEVICE)] * 2
    y = linear(config(), torch.empty(M, 0, device=DEVICE), weight, bias, lam)
    torch.testing.assert_close(y, torch.lerp(*bias, lam[:, None]))


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (70, 70, 70)),
        (torch.bfloat16, (70, 130, 33)),
        (torch.float16, (5, 260, 520)),
        (torch.bfloat16, (260, 20, 100)),
    ],
    ids=str,
)
def test_the_plan_s_own_tiles(kernels: dict[str, Kernel], dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    M, N, K = sizes
    x, weight, bias = torch.randn(M, K, dtype=dtype, device=DEVICE), ends(N, K, dtype=dtype), ends(N, dtype=dtype)
    for values in (torch.rand(M), torch.full((M,), 0.3)):
        lam = values.to(DEVICE)
        y = kernels["lerp_linear"](x, weight, bias, lam, None, 1, "pair", False)
        oracle = reference.lerp_linear(x, tuple(weight), lam, tuple(bias))
        assert_as_accurate(y, oracle, merged_rows(x, weight, bias, lam))


@every_dtype
def test_strides(linear: Kernel, kernels: dict[str, Kernel], dtype: torch.dtype) -> None:
    """Rows with gaps, columns with gaps, and ends that lie in memory differently, one of them transposed."""
    wide, weight, lam = torch.randn(20, 80, dtype=dtype, device=DEVICE), ends(21, 40, dtype=dtype), torch.rand(20)
    lam = lam.to(DEVICE)
    transposed = [weight[0], weight[1].t().contiguous().t()]
    for x in (wide[:, :40], wide[:, 1:41], wide[:, ::2]):
        expected = linear(config(), x.contiguous(), weight, [], lam)
        assert torch.equal(linear(config(), x, transposed, [], lam), expected)
        for name, extra in (("lerp_rms_norm", (1e-6, 0.0)), ("lerp_layer_norm", (1e-6,))):
            vectors = [end[::2, 0] for end in ends(80, 3, dtype=dtype)]
            bias = () if name == "lerp_rms_norm" else (vectors,)
            args = (vectors, *bias, lam, None, 1, *extra)
            dense = ([v.contiguous() for v in vectors], *([v.contiguous() for v in vectors] for _ in bias), *args[-4:])
            dense = dense if name == "lerp_layer_norm" else ([v.contiguous() for v in vectors], *args[1:])
            assert torch.equal(kernels[name](x, *args), kernels[name](x.contiguous(), *dense))


@every_dtype
@pytest.mark.parametrize("D", [1, 3, 1030, 9000])
@pytest.mark.parametrize("M", [1, 9])
def test_norms_of_any_size(kernels: dict[str, Kernel], D: int, M: int, dtype: torch.dtype) -> None:
    """Rows shorter than a tile, longer than one, and with a mean far above their deviation."""
    x = (torch.randn(M, D, device=DEVICE) + 30).to(dtype)
    weight, bias, lam = ends(D, dtype=dtype), ends(D, dtype=dtype), torch.rand(M, device=DEVICE)
    merged = [[torch.lerp(e[0].float(), e[1].float(), v).to(dtype) for v in lam] for e in (weight, bias)]
    y = kernels["lerp_rms_norm"](x, weight, lam, None, 1, 1e-6, 0.0)
    plain = torch.stack([F.rms_norm(row, (D,), w, 1e-6) for row, w in zip(x, merged[0], strict=True)])
    assert_as_accurate(y, reference.lerp_rms_norm(x, tuple(weight), lam, 1e-6), plain)
    y = kernels["lerp_layer_norm"](x, weight, bias, lam, None, 1, 1e-5)
    plain = torch.stack([F.layer_norm(row, (D,), w, b, 1e-5) for row, w, b in zip(x, *merged, strict=True)])
    assert_as_accurate(y, reference.lerp_layer_norm(x, tuple(weight), lam, 1e-5, tuple(bias)), plain)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding_of_strided_weights(kernels: dict[str, Kernel], ids_dtype: torch.dtype) -> None:
    weight = [end.t() for end in ends(1030, 11, dtype=torch.bfloat16)]
    ids = torch.randint(0, 11, (9,), dtype=ids_dtype, device=DEVICE)
    lam = torch.tensor([0.0, 1.0, 0.5] * 3, device=DEVICE)
    y = kernels["lerp_embedding"](ids, weight, lam, None, 1, "pair", weight[0].dtype, weight[0].shape[1])
    oracle = reference.lerp_embedding(ids.long(), tuple(weight), lam)
    assert_as_accurate(y, oracle, oracle.bfloat16(), factor=1.0)


def test_offsets_beyond_32_bits(kernels: dict[str, Kernel]) -> None:
    """Rows of x, of the weight and of the table that start 2³¹ elements and more into their tensors."""

    def far(rows: int, columns: int) -> Tensor:
        """[rows, columns] spread over more than 2³¹ elements, of which only the pages that are written to exist."""
        stride = 2**31 // (rows - 1) + 8
        memory = (
            torch.from_numpy(np.zeros(stride * rows, np.int16))
            if INTERPRETED
            else torch.zeros(stride * rows, dtype=torch.int16, device=DEVICE)
        )
        tensor = memory.view(torch.bfloat16).as_strided((rows, columns), (stride, 1))
        return tensor.copy_(torch.randn(rows, columns))

    near = ends(5, 40, dtype=torch.bfloat16)
    lam = torch.rand(3, device=DEVICE)
    x = far(3, 40)
    expected = kernels["lerp_linear"](x.contiguous(), near, [], lam, None, 1, "pair", False)
    assert torch.equal(kernels["lerp_linear"](x, near, [], lam, None, 1, "pair", False), expected)
    weight = far(5, 40)
    dense = weight.contiguous()
    args = ([], lam, None, 1, "pair", False)
    x = x.contiguous()
    assert torch.equal(kernels["lerp_linear"](x, [weight] * 2, *args), kernels["lerp_linear"](x, [dense] * 2, *args))
    ids = torch.tensor([4, 0, 4], device=DEVICE)
    args = (lam, None, 1, "pair", torch.bfloat16, 40)
    assert torch.equal(
        kernels["lerp_embedding"](ids, [weight] * 2, *args), kernels["lerp_embedding"](ids, [dense] * 2, *args)
    )


@pytest.fixture
def _corners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large grid only the first and the last program run, and memory that nobody touches takes none."""
    from triton.runtime import interpreter

    def ends_of(*bounds: int) -> range:
        whole = range(*bounds)
        return whole[:: len(whole) - 1] if len(bounds) == 1 and len(whole) > 2**14 else whole

    monkeypatch.setattr(interpreter, "range", ends_of, raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.skipif(not INTERPRETED, reason="takes more memory than the tests' share of a GPU")
@pytest.mark.usefixtures("_corners")
@pytest.mark.slow
def test_outputs_beyond_32_bits(linear: Kernel, kernels: dict[str, Kernel]) -> None:
    """The last numbers of outputs of more than 2³¹. Parts of splits never are so many: they have at most 32 MB."""
    row, weight = torch.randn(1, 128).bfloat16(), ends(1, 128, dtype=torch.bfloat16)
    lam = torch.tensor([0.3])
    expected = kernels["lerp_linear"](row, weight, [], lam, None, 1, "pair", True).item()
    M, N = 2**17, 2**14 + 16
    both = [end.expand(N, 128) for end in weight]
    y = linear(replace(config(1), block_k=16), row.expand(M, 128), both, [], lam, each=M)
    torch.testing.assert_close(y[-1, -16:].float(), torch.full((16,), expected), rtol=0.02, atol=1e-3)
    M, E, N = 2**17 + 2, 2, 2**14 + 16  # with one row of the first expert, no program is left without rows
    experts, offsets = [end.expand(E, N, 128) for end in weight], torch.tensor([1, M], dtype=torch.int32)
    y = kernels["lerp_experts"](row.expand(M, 128), experts, [], lam, None, M, offsets, "pair", False)
    torch.testing.assert_close(y[-1, -16:].float(), torch.full((16,), expected), rtol=0.02, atol=1e-3)
    ids, table = torch.zeros(2**19 + 8, dtype=torch.int32), ends(1, 4096, dtype=torch.bfloat16)
    y = kernels["lerp_embedding"](ids, table, lam, None, len(ids), "pair", torch.bfloat16, 4096)
    torch.testing.assert_close(y[-1].float(), torch.lerp(*[end[0].float() for end in table], lam), rtol=0.01, atol=0)
    x, vector = torch.randn(1, 2**16).bfloat16().expand(2**15 + 8, -1), ends(2**16, dtype=torch.bfloat16)
    y = kernels["lerp_rms_norm"](x, vector, lam, None, len(x), 1e-6, 0.0)
    assert torch.equal(y[-1], kernels["lerp_rms_norm"](x[:1], vector, lam, None, 1, 1e-6, 0.0)[0])


FORMATS = ["pair", "int8", "int4", "w8d4"]
every_format = pytest.mark.parametrize("format", FORMATS)
two_formats = pytest.mark.parametrize("format", ["pair", "w8d4", *slow("int8", "int4")])


def packed(format: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> LerpWeight:
    return LerpWeight.pack(*ends(*shape, dtype=dtype), format)


@two_formats
@pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])
@pytest.mark.parametrize("split_k", [1, 4], ids=["", "split"])
def test_every_kind_of_tile_in_every_format(linear: Kernel, format: str, use_blend: bool, split_k: int) -> None:
    """And a tile of 64 rows with several λ, 16 at a time."""
    lam = every_kind_of_tile()
    x, weight = torch.randn(len(lam), 150, device=DEVICE, dtype=torch.bfloat16), packed(format, 21, 150)
    bias = ends(21, dtype=torch.bfloat16)
    y = linear(config(split_k, use_blend), x, [*weight.tensors], bias, lam, format)
    unpacked = weight.unpack()
    oracle = reference.lerp_linear(x, unpacked, lam, tuple(bias))
    merged = torch.stack(
        [
            F.linear(row.float(), weight.materialize(v).float(), torch.lerp(bias[0].float(), bias[1].float(), v))
            for row, v in zip(x, lam.tolist(), strict=True)
        ]
    ).bfloat16()
    for tile in torch.arange(len(lam)).split(16):
        assert_as_accurate(y[tile], oracle[tile], merged[tile])
    in_parts = linear(config(split_k, use_blend, 64), x, [*weight.tensors], bias, lam, format)
    assert torch.equal(in_parts[:64], linear(config(split_k), x, [*weight.tensors], bias, lam, format)[:64])


@pytest.mark.parametrize("format", ["w8d4", *slow("int8", "int4")])
@pytest.mark.parametrize("block_m", [64, 128])
def test_ends_stacked_in_runs_of_features(linear: Kernel, format: str, block_m: int) -> None:
    """One run of 64 features for tiles of four warps, eight runs of 8 for those of eight."""
    lam = every_kind_of_tile()
    x, weight = torch.randn(len(lam), 64, device=DEVICE, dtype=torch.bfloat16), packed(format, 70, 64)
    tile = LinearConfig(block_m, 64, 32, block_m, 1, False, num_warps=block_m // 16, num_stages=2)
    y = linear(tile, x, [*weight.tensors], [], lam, format)
    merged = [F.linear(row.float(), weight.materialize(v).float()) for row, v in zip(x, lam.tolist(), strict=True)]
    assert_as_accurate(y, reference.lerp_linear(x, weight.unpack(), lam), torch.stack(merged).bfloat16())


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the code for itself only")
@pytest.mark.parametrize("format", ["w8d4", *slow("int8", "int4")])
@pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_gpus_code_is_as_accurate(
    linear: Kernel, monkeypatch: pytest.MonkeyPatch, format: str, use_blend: bool, arch: str
) -> None:
    """Where both ends are multiplied one after the other, and where AMD makes bfloat16 numbers of float32 ones."""
    if arch == "sm_100":
        monkeypatch.setattr(product.target_info, "cuda_capability_geq", lambda major: major == 10)
    else:
        monkeypatch.setattr(product.target_info, "is_hip", lambda: True)
    lam = every_kind_of_tile()
    x, weight = torch.randn(len(lam), 128, dtype=torch.bfloat16), packed(format, 21, 128)
    y = linear(config(1, use_blend), x, [*weight.tensors], [], lam, format)
    rows = [F.linear(row.float(), weight.materialize(v).float()) for row, v in zip(x, lam.tolist(), strict=True)]
    oracle, merged = reference.lerp_linear(x, weight.unpack(), lam), torch.stack(rows).bfloat16()
    for tile in torch.arange(len(lam)).split(16):
        assert_as_accurate(y[tile], oracle[tile], merged[tile])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the code for itself only")
def test_amd_s_bfloat16_numbers_are_rounded_as_torch_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product.target_info, "is_hip", lambda: True)
    values = torch.cat(
        [torch.randn(1000) * 2.0 ** torch.randint(-140, 127, (1000,)), torch.randn(22).bfloat16().float()]
    )
    values = torch.cat([values, torch.tensor([torch.inf, -torch.nan])])
    between = values.view(torch.int32)[:1000] & -0x10000 | 0x8000  # half-way to the next number
    for given in (values, torch.cat([between.view(torch.float32), values[1000:]])):
        rounded = torch.empty(1024, dtype=torch.bfloat16)
        _round[(1,)](given, rounded)
        torch.testing.assert_close(rounded, given.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _round(given, y):
    places = tl.arange(0, 1024)
    tl.store(y + places, codes.rounded(tl.load(given + places), tl.bfloat16))


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 33, 64), (19, 70, 96), pytest.param((130, 66, 64), marks=pytest.mark.slow)], ids=str
)
def test_the_plan_s_own_tiles_of_every_format(
    kernels: dict[str, Kernel], format: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    M, N, K = sizes
    x, weight = torch.randn(M, K, dtype=dtype, device=DEVICE), packed(format, N, K, dtype=dtype)
    for value in (0.0, 0.3, 1.0):
        lam = torch.full((M,), value, device=DEVICE)
        y = kernels["lerp_linear"](x, [*weight.tensors], [], lam, None, 1, format, False)
        plain = F.linear(x.float(), weight.materialize(value).float()).to(dtype)
        assert_as_accurate(y, reference.lerp_linear(x, weight.unpack(), lam), plain)


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("size", [2.0**-60, 2.0**20])
def test_weights_of_other_sizes(kernels: dict[str, Kernel], format: str, size: float) -> None:
    """Codes become numbers in a unit of their own, between subnormal numbers and infinity."""
    x, lam = torch.randn(20, 64, dtype=torch.bfloat16, device=DEVICE), torch.full((20,), 0.3, device=DEVICE)
    weight = LerpWeight.pack(*((size * end.float()).bfloat16() for end in ends(33, 64, dtype=torch.bfloat16)), format)
    y = kernels["lerp_linear"](x, [*weight.tensors], [], lam, None, 1, format, False)
    plain = F.linear(x.float(), weight.materialize(0.3).float()).bfloat16()
    assert_as_accurate(y, reference.lerp_linear(x, weight.unpack(), lam), plain)


@two_formats
@pytest.mark.parametrize(("split_k", "bias"), [(1, True), (4, False), *slow((1, False), (4, True))], ids=str)
def test_several_weights_in_one_launch(linear: Kernel, format: str, split_k: int, bias: bool) -> None:
    """Equal to one after the other bit for bit, also where one of them lies in memory differently."""
    x, lam = torch.randn(20, 150, device=DEVICE, dtype=torch.bfloat16), torch.rand(20, device=DEVICE)
    weights = [[*packed(format, n, 150).tensors] for n in (21, 48, 5)]
    biases = [ends(n, dtype=torch.bfloat16) if bias else [] for n in (21, 48, 5)]

    def at_once() -> Tensor:
        return linear(config(split_k), x, [*chain(*weights)], [*chain(*biases)], lam, format)

    each = [linear(config(split_k), x, w, b, lam, format) for w, b in zip(weights, biases, strict=True)]
    expected = torch.cat([y.flatten() for y in each])
    assert torch.equal(at_once(), expected)
    weights[1][0] = F.pad(weights[1][0], (0, 8))[:, :-8]
    assert torch.equal(at_once(), expected)


@pytest.mark.parametrize("length", [12, 28, 31])
def test_tiles_end_where_lam_changes(linear: Kernel, length: int) -> None:
    """A padded batch, of whose tiles none is a mixed one, so that every row has the bits of the merged weight."""
    blending = config(use_blend=True)
    lam = torch.tensor([0.25, 0.5, 0.75, 0.25], device=DEVICE)
    assert row_span(4 * length, length, blending) == length
    x, weight = torch.randn(4 * length, 64, device=DEVICE, dtype=torch.bfloat16), ends(16, 64, dtype=torch.bfloat16)
    y = linear(blending, x, weight, [], lam, each=length)
    for value, rows in zip(lam, torch.arange(4 * length).split(length), strict=True):
        merged = torch.lerp(weight[0].float(), weight[1].float(), value).bfloat16()
        zeros = torch.zeros(length, device=DEVICE)
        assert torch.equal(y[rows], linear(blending, x[rows], [merged, merged], [], zeros))


@two_formats
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_invariant_rows_do_not_see_their_neighbours(
    kernels: dict[str, Kernel], format: str, dtype: torch.dtype
) -> None:
    """A row has the same bits alone, among others of any λ, and at any place."""
    x, weight = torch.randn(70, 160, dtype=dtype, device=DEVICE), packed(format, 70, 160, dtype=dtype)

    def run(rows: Tensor, lam: Tensor) -> Tensor:
        return kernels["lerp_linear"](x[rows], [*weight.tensors], [], lam[rows], None, 1, format, True)

    everything = torch.arange(70, device=DEVICE)
    alike, mixed = torch.full((70,), 0.3, device=DEVICE), torch.rand(70, device=DEVICE)
    mixed[::2] = 0.3
    y = run(everything, alike)
    assert torch.equal(run(everything, mixed)[::2], y[::2])
    assert torch.equal(run(everything.flip(0), alike).flip(0), y)
    for row in (0, 7, 69):
        assert torch.equal(run(everything[row : row + 1], alike)[0], y[row])


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_in_every_format(kernels: dict[str, Kernel], format: str, dtype: torch.dtype) -> None:
    weight = packed(format, 11, 150, dtype=dtype)
    ids = torch.randint(0, 11, (9,), device=DEVICE)
    lam = torch.tensor([0.0, 1.0, 0.5] * 3, device=DEVICE)
    y = kernels["lerp_embedding"](ids, [*weight.tensors], lam, None, 1, format, dtype, 150)
    oracle = reference.lerp_embedding(ids, weight.unpack(), lam)
    assert_as_accurate(y, oracle, oracle.to(dtype), factor=1.0)


@every_format
@pytest.mark.parametrize("D", [1, 8, 16, 17])
def test_embedding_of_less_than_a_group(kernels: dict[str, Kernel], format: str, D: int) -> None:
    weight, lam = packed(format, 11, D), torch.tensor([0.0, 1.0, 0.5], device=DEVICE)
    ids = torch.tensor([10, 0, 3], device=DEVICE)
    y = kernels["lerp_embedding"](ids, [*weight.tensors], lam, None, 1, format, torch.bfloat16, D)
    oracle = reference.lerp_embedding(ids, weight.unpack(), lam)
    assert_as_accurate(y, oracle, oracle.bfloat16(), factor=1.0)


def test_scales_are_read_in_pairs_where_pairs_are_aligned() -> None:
    """The interpreter reads words at any address, a GPU at multiples of four."""
    from dami_kernels.triton.host import is_even

    base, scale = torch.zeros(8, 256), torch.zeros(9, 24, dtype=torch.bfloat16)

    def even(scale: Tensor, K: int = 256, block_k: int = 64) -> bool:
        return is_even([[base, base, scale]], "int8", K, block_k)

    assert even(scale[:8, :8])
    assert even(scale[1:, 2:10])
    assert not even(scale[:8, 1:9])
    assert not even(scale[:8, ::3])
    assert not even(scale.flatten()[: 8 * 23].view(8, 23)[:, :8])
    assert not even(scale.t()[:8, :8])
    assert even(scale[:8, 1:9], block_k=32)
    assert not even(scale[:8, :8], K=250)
    assert is_even([[base, base]], "pair", 256, 64)
    codes = torch.zeros(9, 260, dtype=torch.int8)  # which are read in pairs, too

    def even_codes(codes: Tensor) -> bool:
        return is_even([[base, codes, scale[:8, :8]]], "int8", 256, 64)

    assert even_codes(codes[1:, 2:258])
    assert not even_codes(codes[1:, 1:257])
    assert not even_codes(codes.flatten()[: 8 * 259].view(8, 259)[:, :256])
    assert not is_even([[base, base, scale[:8, :8]], [base, base, scale[:8, 1:9]]], "int8", 256, 64)


@pytest.mark.parametrize(("base_bits", "delta_bits"), [(8, 8), (4, 4)])
@pytest.mark.parametrize("use_blend", [False, True], ids=["two accumulators", "blend"])
def test_matrices_in_a_combination_of_ones_own(
    linear: Kernel, monkeypatch: pytest.MonkeyPatch, base_bits: int, delta_bits: int, use_blend: bool
) -> None:
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    both = formats.Codes("_base", base_bits), formats.Codes("_delta", delta_bits)
    formats.register_format("own", formats.Matrices("Both as codes.", *both))
    lam = every_kind_of_tile()
    x, weight = torch.randn(len(lam), 100, device=DEVICE, dtype=torch.bfloat16), packed("own", 19, 100)
    y = linear(config(1, use_blend), x, [*weight.tensors], [], lam, "own")
    unpacked = weight.unpack()
    rows = [F.linear(row.float(), weight.materialize(v).float()) for row, v in zip(x, lam.tolist(), strict=True)]
    assert_as_accurate(y, reference.lerp_linear(x, unpacked, lam), torch.stack(rows).bfloat16())


def test_unknown_formats_are_left_to_the_plain_version(kernels: dict[str, Kernel]) -> None:
    with pytest.raises(NotImplementedError, match="no kernel reads the format 'lowrank'"):
        kernels["lerp_linear"](torch.ones(1, 8), [torch.ones(1, 8)] * 3, [], torch.ones(1), None, 1, "lowrank", False)
