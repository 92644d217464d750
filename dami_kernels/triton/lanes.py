"""Weights in an order along K in which they are read by wide loads, for the `wgmma` of up to 64 rows.

Four lanes share a feature, and hold two of every eight columns each. In the order of memory a lane would read codes two
at a time. But a sum does not depend on the order along K. So of the four groups of a step each of the four lanes takes
one: it reads sixteen bytes of codes at a time, and multiplies them by one scale. x goes to shared memory in the same
order, two columns at a time, which is as little as can be copied asynchronously.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dami_kernels.triton.codes import factors_of, nibbles, scaled_pairs, spread
from dami_kernels.triton.device import BASE, GROUP, STEP, first_tensor, load_float, load_words

LANES: tl.constexpr = tl.constexpr(4)  # that share a feature, of which each takes a group of a step


@triton.jit
def columns_of_half():
    """The columns of a step's first half, in order [STEP / 2]. Those of the second lie half a group further on.

    Of every eight, the two of lane t are the next two of group t.
    """
    place = tl.arange(0, STEP // 2)
    columns = place // 2 % LANES * GROUP + place // 8 * 2 + place % 2
    return tl.max_contiguous(tl.multiple_of(columns, 2), 2)


@triton.jit
def load_halves(
    weight, strides, END: tl.constexpr, rows, k, ahead: tl.constexpr, BASE_BITS: tl.constexpr, SECOND_BITS: tl.constexpr
):
    """Tile [rows, STEP] of the base or of the second matrix, the columns of both halves of a step in their order.

    The step begins at column k + ahead. The other arguments are as in `device.load_end`. All rows exist, and
    `host.in_words` has seen to the codes and scales. The tile is bfloat16, codes times scales in `codes.UNIT`.
    """
    BITS: tl.constexpr = BASE_BITS if END == BASE else SECOND_BITS
    FIRST: tl.constexpr = first_tensor(END, BASE_BITS)
    N: tl.constexpr = rows.shape[0]
    if BITS == 0:
        values = load_float(weight[FIRST], strides[FIRST], rows, None, k + ahead, None, STEP)
        values = values.reshape(N, LANES, GROUP // 2, 2).permute(0, 2, 1, 3)
    else:
        words, scales = load_words(weight, strides, FIRST, rows, k, ahead, BITS)
        words = words.reshape(N, LANES, BITS)
        factors, offset = factors_of(scales.to(tl.int16, bitcast=True).to(tl.int32), BITS, 1)
        # Dimensions: feature, lane, word, in a pair the place, in a word the number of the pair, for 4 bits in two.
        if BITS == 8:
            words ^= -0x7F7F7F80  # each code plus 128, by its inverted sign
            a = scaled_pairs(spread(words, 0x4140), factors, offset)
            b = scaled_pairs(spread(words, 0x4342), factors, offset)
            values = tl.join(a, b).permute(0, 2, 4, 1, 3)
        else:
            low, high = words & 0x0F0F0F0F, words & -0x0F0F0F10
            a = scaled_pairs(nibbles(low, high, 0), factors, offset)
            b = scaled_pairs(nibbles(low, high, 1), factors, offset)
            c = scaled_pairs(nibbles(low, high, 2), factors, offset)
            d = scaled_pairs(nibbles(low, high, 3), factors, offset)
            values = tl.join(tl.join(a, c), tl.join(b, d)).permute(0, 2, 4, 5, 1, 3)
    return values.reshape(N, STEP)
