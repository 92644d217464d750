"""Products with codes for few rows, group by group: a scale applies to the sum over its group and not to each code.

The groups of a step over K are the batches of a batched `tl.dot`. Triton gives every warp batches of its own, so a warp
reads its groups of x only, and has many features to use them for.

Codes become numbers without a conversion and without a move between threads: a lane of `mma.sync` needs *some* columns
of W and the same columns of x, in any order. So lanes take *octets*, eight columns that lie together in memory, in the
order in which they come out of their words, and x is read in that order. Which lane takes which column follows from the
layouts that Triton infers; they change the time and not the result.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from dami_kernels.triton.device import BASE, GROUP, load_float


@triton.jit
def add_groups(y, weight, strides, END: tl.constexpr, rows, k, x, BASE_BITS: tl.constexpr, SECOND_BITS: tl.constexpr):
    """y + W · x for each group: [GROUPS, rows, M] float32, from whole groups of one matrix and x [GROUPS · 32, M].

    The arguments are as in `device.load_end`. All rows exist, and `host.in_words` has seen to the codes and scales.
    """
    BITS: tl.constexpr = BASE_BITS if END == BASE else SECOND_BITS
    FIRST: tl.constexpr = 0 if END == BASE else (1 if BASE_BITS == 0 else 2)
    GROUPS: tl.constexpr = y.shape[0]
    in_groups = x.reshape(GROUPS, GROUP, x.shape[1])
    if BITS == 0:
        values = load_float(weight[FIRST], strides[FIRST], rows, None, k, None, GROUPS * GROUP)
        y = tl.dot(values.reshape(rows.shape[0], GROUPS, GROUP).permute(1, 0, 2), in_groups, y)
    else:
        words = weight[FIRST].to(tl.pointer_type(tl.int32), bitcast=True)
        WORDS: tl.constexpr = GROUPS * GROUP * BITS // 32
        words = load_float(words, (strides[FIRST][0] // 4, 1), rows, None, k // (32 // BITS), None, WORDS)
        first = rows.to(tl.int64)[:, None] * strides[FIRST + 1][0] + k // GROUP
        scales = tl.load(weight[FIRST + 1] + (tl.multiple_of(first, [1, GROUPS]) + tl.arange(0, GROUPS)[None, :]))
        sums = _dot_int8(words, x, in_groups, GROUPS) if BITS == 8 else _dot_int4(words, x, in_groups, GROUPS)
        y += sums * scales.to(tl.float32).permute(1, 0)[:, :, None]
    return y


@triton.jit
def _dot_int4(words, x, in_groups, GROUPS: tl.constexpr):
    """Products with the codes of words [N, GROUPS · 4], each of which holds an octet, plus 8 each."""
    # Under a number whose last bit counts ones, the code is its last bits.
    BITS: tl.constexpr = 0x43004300 if x.dtype == tl.bfloat16 else 0x64006400
    ZERO: tl.constexpr = 128 + 8 if x.dtype == tl.bfloat16 else 1024 + 8
    N: tl.constexpr = words.shape[0]
    a, b = _two(_masked(words, 0x000F000F, BITS), x.dtype), _two(_masked(words >> 4, 0x000F000F, BITS), x.dtype)
    c, d = _two(_masked(words >> 8, 0x000F000F, BITS), x.dtype), _two(_masked(words >> 12, 0x000F000F, BITS), x.dtype)
    # Dimensions of a group: lane, then of a nibble in its word the half, the byte, and the place in the byte.
    codes = tl.join(tl.join(a, c), tl.join(b, d)).reshape(N, GROUPS, 4, 2, 2, 2).permute(1, 0, 4, 2, 5, 3)
    x = x.reshape(GROUPS, 4, 2, 2, 2, x.shape[1]).permute(0, 3, 1, 4, 2, 5).reshape(in_groups.shape)
    # What is too much in each code is taken from the sum, once for all features.
    sums = tl.dot(tl.full((GROUPS, N, GROUP), -ZERO, x.dtype), in_groups)
    return tl.dot(codes.reshape(GROUPS, N, GROUP), x, sums)


@triton.jit
def _dot_int8(words, x, in_groups, GROUPS: tl.constexpr):
    """Products with the codes of words [N, GROUPS · 8], two of which hold an octet."""
    # Dimensions of a group: lane, word, and of a byte in it the half and the place in the half.
    order = x.reshape(GROUPS, 4, 2, 2, 2, x.shape[1]).permute(0, 2, 1, 4, 3, 5).reshape(in_groups.shape)
    if x.dtype == tl.bfloat16:
        # There are seven bits below 128. The eighth, the sign, makes another number: (128 + bits) − (128 or 256).
        low = _octets(words, 0x007F007F, 0x43004300, x.dtype, GROUPS)
        high = _octets(words, 0x00800080, 0xC300C300 - (1 << 32), x.dtype, GROUPS)
        return tl.dot(high, order, tl.dot(low, order))
    ZERO: tl.constexpr = 1024 + 128
    codes = _octets(words, 0x00FF00FF, 0x64806480, x.dtype, GROUPS)  # each plus 128, by its inverted sign
    sums = tl.dot(tl.full((GROUPS, words.shape[0], GROUP), -ZERO, x.dtype), in_groups)
    return tl.dot(codes, order, sums)


@triton.jit
def _octets(words, MASK: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """Numbers [GROUPS, N, 32] made of the bytes of words, in the order in which `_dot_int8` reads x."""
    even, odd = _two(_masked(words, MASK, BITS), DTYPE), _two(_masked(words >> 8, MASK, BITS), DTYPE)
    numbers = tl.join(even, odd).reshape(words.shape[0], GROUPS, 4, 2, 2, 2).permute(1, 0, 3, 2, 5, 4)
    return numbers.reshape(GROUPS, words.shape[0], GROUP)


@triton.jit
def _masked(words, MASK: tl.constexpr, BITS: tl.constexpr):
    """words & MASK ^ BITS."""
    if target_info.is_cuda():
        # ptxas would make two instructions of it, as one cannot hold both constants.
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASK}, {BITS}, 0x6a;", "=r,r", [words], tl.int32, is_pure=True, pack=1
        )
    return words & MASK ^ BITS


@triton.jit
def _two(words, DTYPE: tl.constexpr):
    """The numbers in the low and in the high half of each word, as another dimension; no instruction is left of it."""
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
