"""Device functions shared by the kernels: a row's λ, tiles of the formats, and how both ends are combined."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dami_kernels.triton.codes import rounded, scaled, spread, two

# A weight is stored as two matrices, its base and a second one. BASE_BITS and SECOND_BITS tell kernels the bits of
# their codes, or 0 if a matrix is stored as numbers. A second matrix of numbers is the target, one of codes the delta,
# target − base.
BASE: tl.constexpr = tl.constexpr(0)
SECOND: tl.constexpr = tl.constexpr(1)
GROUP: tl.constexpr = tl.constexpr(32)  # weights along K that share a scale
STEP: tl.constexpr = tl.constexpr(128)  # columns of four groups, which `groups` and `lanes` multiply at a time
LINE: tl.constexpr = tl.constexpr(128)  # bytes of a line of NVIDIA's L2 cache


@triton.constexpr_function
def first_tensor(end, base_bits):
    """Where BASE or SECOND begins among the tensors of its weight: numbers are one, codes and their scales are two."""
    return 0 if end == BASE.value else 1 if base_bits == 0 else 2


@triton.jit
def start():
    """Waits until all earlier launches are done, and lets the next one begin. Nothing that they share may come before.

    That is programmatic dependent launch, where the launch asks for it: see `host.early`.
    """
    if target_info.cuda_capability_geq(9):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_end(
    weight,
    strides,
    END: tl.constexpr,
    rows,
    k,
    K,
    COLUMNS: tl.constexpr,
    BASE_BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr,
):
    """Asks the L2 cache, which sees all that is written, for what `load_end` will read of COLUMNS columns from k on."""
    BITS: tl.constexpr = BASE_BITS if END == BASE else SECOND_BITS
    FIRST: tl.constexpr = first_tensor(END, BASE_BITS)
    if BITS == 0:
        fetch(weight[FIRST], strides[FIRST], rows, k, K, COLUMNS)
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        groups = tl.cdiv(K, GROUP)
        fetch(weight[FIRST], strides[FIRST], rows, k // PER_BYTE, groups * (GROUP // PER_BYTE), COLUMNS // PER_BYTE)
        fetch(weight[FIRST + 1], strides[FIRST + 1], rows, k // GROUP, groups, COLUMNS // GROUP)


@triton.jit
def fetch(tensor, strides, rows, first, end, COLUMNS: tl.constexpr):
    """Asks the L2 cache for COLUMNS columns of these rows, from `first` to before `end`."""
    if target_info.cuda_capability_geq(9):
        STEP: tl.constexpr = LINE * 8 // tensor.dtype.element_ty.primitive_bitwidth
        columns = tl.minimum(first + tl.arange(0, triton.cdiv(COLUMNS, STEP)) * STEP, end - 1).to(tl.int64)
        addresses = tensor + rows.to(tl.int64)[:, None] * strides[0] + columns[None, :] * strides[1]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def row_lam(lam, row_to_lam, rows, valid, rows_per_lam):
    """λ of each row, float32: `lam[row_to_lam[row]]`, or `lam[row // rows_per_lam]` without a map; 0 if not valid."""
    index = rows // rows_per_lam if row_to_lam is None else tl.load(row_to_lam + rows, mask=valid, other=0)
    return tl.load(lam + index, mask=valid, other=0.0)


@triton.jit
def late(number):
    """The same number, but the compiler does not know that, and keeps nothing that follows from it through a loop."""
    if target_info.is_cuda():
        number = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], tl.int32, is_pure=False, pack=1)
    return number


@triton.jit
def lerp(base, target, lam):
    """base + λ (target − base) in float32: exactly one end at λ = 0 and 1, even where the other end is not finite."""
    base = base.to(tl.float32)
    target = target.to(tl.float32)
    delta = target - base
    y = tl.where(lam < 0.5, base + lam * delta, target + (lam - 1.0) * delta)  # from the nearer end, as torch.lerp
    return tl.where(lam == 0.0, base, tl.where(lam == 1.0, target, y))


@triton.jit
def combine(base, second, lam, SECOND_BITS: tl.constexpr):
    """The result at λ, float32, from the results of the base and of the second matrix."""
    if SECOND_BITS == 0:
        return lerp(base, second, lam)
    return tl.where(lam == 0.0, base, base + lam * second)


@triton.jit
def blend(base, second, lam, SECOND_BITS: tl.constexpr):
    """The weight at one λ that is neither 0 nor 1, float32. Not `combine`, of which a mainloop has no time for more."""
    if SECOND_BITS == 0:
        second -= base
    return base + lam * second


@triton.jit
def load_end(
    weight,
    strides,
    END: tl.constexpr,
    rows,
    wanted,
    k,
    K,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    BASE_BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr,
):
    """Tile [rows, BLOCK_K] of the base or of the second matrix, 0 where it is not wanted.

    Args:
        weight, strides: the format's tensors and the strides of each. Codes and their scales are two.
        END: BASE or SECOND.
        rows, wanted: [rows] indices, and which of them to read.
        k, K: the first column, a multiple of BLOCK_K, and the weight's number of columns, None if all of them exist.
        DTYPE: what the tile is made of; codes times scales are computed in it, rounded once. Those in bfloat16 are in
            `codes.UNIT` if K is None, except on AMD.
    """
    BITS: tl.constexpr = BASE_BITS if END == BASE else SECOND_BITS
    FIRST: tl.constexpr = first_tensor(END, BASE_BITS)
    if BITS == 0:
        return load_float(weight[FIRST], strides[FIRST], rows, wanted, k, K, BLOCK_K).to(DTYPE)
    elif BITS == 8:
        return load_int8(weight, strides, FIRST, rows, wanted, k, K, BLOCK_K, DTYPE)
    else:
        tl.static_assert(BITS == 4, "codes have 8 or 4 bits")
        return load_int4(weight, strides, FIRST, rows, wanted, k, K, BLOCK_K, DTYPE)


@triton.jit
def load_float(tensor, strides, rows, wanted, start, end, COLUMNS: tl.constexpr):
    """Tile of a matrix as it is, from column `start`; columns from `end` on are 0. All rows if `wanted` is None."""
    columns = start + tl.arange(0, COLUMNS)
    offsets = rows.to(tl.int64)[:, None] * strides[0] + columns.to(tl.int64)[None, :] * strides[1]
    if wanted is None:
        tile = tl.load(tensor + offsets)
    else:
        mask = wanted[:, None] if end is None else wanted[:, None] & (columns < end)[None, :]
        tile = tl.load(tensor + offsets, mask=mask, other=0)
    return tile


@triton.jit
def load_int8(weight, strides, FIRST, rows, wanted, k, K, BLOCK_K, DTYPE: tl.constexpr):
    """Tile of codes times the scale of their group."""
    if K is None and tl.float32 != DTYPE and not target_info.is_hip():
        words = weight[FIRST].to(tl.pointer_type(tl.int16), bitcast=True)
        words = load_float(words, (strides[FIRST][0] // 2, 1), rows, wanted, k // 2, None, BLOCK_K // 2)
        words = words.to(tl.int32)
        if tl.bfloat16 == DTYPE:
            return _scaled_words(words, weight[FIRST + 1], strides[FIRST + 1], rows, wanted, k, BLOCK_K, 8)
        codes = two(spread(words, 0x4140) ^ 0x64806480, DTYPE).reshape(rows.shape[0], BLOCK_K) - (1024 + 128)
    else:
        padded = None if K is None else tl.cdiv(K, GROUP) * GROUP
        codes = load_float(weight[FIRST], strides[FIRST], rows, wanted, k, padded, BLOCK_K).to(tl.float32)
    return rounded(_scaled(codes, weight[FIRST + 1], strides[FIRST + 1], rows, wanted, k, K, BLOCK_K), DTYPE)


@triton.jit
def load_int4(weight, strides, FIRST, rows, wanted, k, K, BLOCK_K, DTYPE: tl.constexpr):
    """The same with two codes to a byte, the first in its low half, each stored plus 8."""
    padded = None if K is None else tl.cdiv(K, GROUP) * (GROUP // 2)
    pairs = load_float(weight[FIRST], strides[FIRST], rows, wanted, k // 2, padded, BLOCK_K // 2)
    if K is None and tl.bfloat16 == DTYPE and not target_info.is_hip():
        return _scaled_words(pairs.to(tl.int32), weight[FIRST + 1], strides[FIRST + 1], rows, wanted, k, BLOCK_K, 4)
    # AMD's units of bfloat16 only multiply matrices: everything else takes a detour through float32 at every step.
    CODES: tl.constexpr = tl.float32 if tl.bfloat16 == DTYPE and target_info.is_hip() else DTYPE
    # Under a float whose last bit counts ones, the code is its last bits: no conversion, which is slow.
    if tl.bfloat16 == CODES:
        BITS: tl.constexpr = 0x4300
        ZERO: tl.constexpr = 128 + 8
        pairs = pairs.to(tl.int16)
    elif tl.float16 == CODES:
        BITS: tl.constexpr = 0x6400
        ZERO: tl.constexpr = 1024 + 8
        pairs = pairs.to(tl.int16)
    else:
        BITS: tl.constexpr = 0x4B000000
        ZERO: tl.constexpr = 8388608 + 8
        pairs = pairs.to(tl.int32)
    codes = tl.join(pairs & 15 | BITS, pairs >> 4 | BITS).to(CODES, bitcast=True).reshape(rows.shape[0], BLOCK_K)
    return rounded(_scaled(codes - ZERO, weight[FIRST + 1], strides[FIRST + 1], rows, wanted, k, K, BLOCK_K), DTYPE)


@triton.jit
def load_words(weight, strides, FIRST, rows, k, ahead: tl.constexpr, BITS: tl.constexpr):
    """Codes as they are, int32 [rows, STEP · BITS / 32], and their scales [rows, STEP / GROUP], from k + ahead on.

    `host.in_words` has seen to both. All rows and columns exist. Columns ahead take no addresses of their own.
    """
    GROUPS: tl.constexpr = STEP // GROUP
    words = weight[FIRST].to(tl.pointer_type(tl.int32), bitcast=True)
    words += rows.to(tl.int64)[:, None] * (strides[FIRST][0] // 4) + tl.arange(0, STEP * BITS // 32)[None, :]
    first = tl.multiple_of(rows.to(tl.int64)[:, None] * strides[FIRST + 1][0], [1, GROUPS])
    scales = weight[FIRST + 1] + (first + tl.arange(0, GROUPS)[None, :])
    words += k // (32 // BITS)
    scales += k // GROUP
    return tl.load(words + ahead // (32 // BITS)), tl.load(scales + ahead // GROUP)


@triton.jit
def _scaled_words(words, scale, strides, rows, wanted, k, BLOCK_K: tl.constexpr, BITS: tl.constexpr):
    """Tile of the codes in words [rows, BLOCK_K / 2], times their scales, in `codes.UNIT`."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    if GROUPS % 2 == 0:
        scales = _pairs_of_scales(scale, strides, rows, wanted, k, GROUPS)
    else:
        scales = load_float(scale, strides, rows, wanted, k // GROUP, None, GROUPS)
        scales = scales.to(tl.int16, bitcast=True).to(tl.int32)
    values = scaled(words.reshape(rows.shape[0], GROUPS, GROUP // 2), scales, BITS)
    return values.reshape(rows.shape[0], BLOCK_K)


@triton.jit
def _pairs_of_scales(scale, strides, rows, wanted, k, GROUPS: tl.constexpr):
    """Two at a time, as `host.is_even` allows, for what is narrower than 32 bits is not copied ahead of time."""
    words = scale.to(tl.pointer_type(tl.int32), bitcast=True)
    return load_float(words, (strides[0] // 2, 1), rows, wanted, k // (2 * GROUP), None, GROUPS // 2)


@triton.jit
def _scaled(codes, scale, strides, rows, wanted, k, K, BLOCK_K: tl.constexpr):
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    if K is None and GROUPS % 2 == 0:
        words = _pairs_of_scales(scale, strides, rows, wanted, k, GROUPS)
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
        scale = tl.join(low, high).reshape(rows.shape[0], GROUPS)
    else:
        groups = None if K is None else tl.cdiv(K, GROUP)
        scale = load_float(scale, strides, rows, wanted, k // GROUP, groups, GROUPS)
    values = codes.reshape(rows.shape[0], GROUPS, GROUP) * scale.to(codes.dtype)[:, :, None]
    return values.reshape(rows.shape[0], BLOCK_K)
