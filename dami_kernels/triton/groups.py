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

from dami_kernels.triton.codes import fma, masked, two, word
from dami_kernels.triton.device import BASE, GROUP, STEP, first_tensor, load_float, load_words


@triton.jit
def add_groups(
    y,
    weight,
    strides,
    END: tl.constexpr,
    rows,
    k,
    ahead: tl.constexpr,
    x,
    BASE_BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr,
):
    """y + W · x for each group of a step: [GROUPS, rows, M] float32, from one matrix and x [STEP, M].

    For what these sums count in, see `in_ones`. The step begins at column k + ahead. The other arguments are as in
    `device.load_end`. All rows exist, and `host.in_words` has seen to the codes and scales.
    """
    BITS: tl.constexpr = BASE_BITS if END == BASE else SECOND_BITS
    FIRST: tl.constexpr = first_tensor(END, BASE_BITS)
    GROUPS: tl.constexpr = y.shape[0]
    in_groups = x.reshape(GROUPS, GROUP, x.shape[1])
    if BITS == 0:
        values = load_float(weight[FIRST], strides[FIRST], rows, None, k + ahead, None, STEP)
        y = tl.dot(values.reshape(rows.shape[0], GROUPS, GROUP).permute(1, 0, 2), in_groups, y)
    else:
        words, scales = load_words(weight, strides, FIRST, rows, k, ahead, BITS)
        sums = _dot_int8(words, x, in_groups, GROUPS) if BITS == 8 else _dot_int4(words, x, in_groups, GROUPS)
        y += sums * scales.to(tl.float32).permute(1, 0)[:, :, None]
    return y


@triton.jit
def in_ones(y, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Sums of `add_groups` as they should be: those of 8-bit codes in bfloat16 count in 2⁻⁶."""
    return y * 64.0 if BITS == 8 and tl.bfloat16 == DTYPE else y


@triton.jit
def _dot_int4(words, x, in_groups, GROUPS: tl.constexpr):
    """Products with the codes of words [N, GROUPS · 4], each of which holds an octet, plus 8 each."""
    # Under a number whose last bit counts ones, the code is its last bits.
    BITS: tl.constexpr = 0x43004300 if x.dtype == tl.bfloat16 else 0x64006400
    ZERO: tl.constexpr = 128 + 8 if x.dtype == tl.bfloat16 else 1024 + 8
    N: tl.constexpr = words.shape[0]
    a, b = two(masked(words, 0x000F000F, BITS), x.dtype), two(masked(words >> 4, 0x000F000F, BITS), x.dtype)
    c, d = two(masked(words >> 8, 0x000F000F, BITS), x.dtype), two(masked(words >> 12, 0x000F000F, BITS), x.dtype)
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
    # Each code plus 128, by its inverted sign.
    BITS: tl.constexpr = 0x00800080 if x.dtype == tl.bfloat16 else 0x64806480
    even, odd = masked(words, 0x00FF00FF, BITS), masked(words >> 8, 0x00FF00FF, BITS)
    if x.dtype == tl.bfloat16:  # the codes in 2⁻⁶, exactly: u · 2⁻¹³³ · 2¹²⁷ − 2
        even, odd = fma(even, word(0x7F007F00), word(0xC000C000)), fma(odd, word(0x7F007F00), word(0xC000C000))
    codes = tl.join(two(even, x.dtype), two(odd, x.dtype)).reshape(words.shape[0], GROUPS, 4, 2, 2, 2)
    codes = codes.permute(1, 0, 3, 2, 5, 4).reshape(GROUPS, words.shape[0], GROUP)
    if x.dtype == tl.bfloat16:
        return tl.dot(codes, order)
    sums = tl.dot(tl.full((GROUPS, words.shape[0], GROUP), -(1024 + 128), x.dtype), in_groups)
    return tl.dot(codes, order, sums)
