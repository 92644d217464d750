"""Codes as 16-bit numbers, without a conversion: two in a 32-bit word, whose halves are numbers as they stand.

With exponent bits of zero and of one, bfloat16 counts up in the same steps of 2⁻¹³³. So the bits of any byte u are the
number u · 2⁻¹³³, subnormal up to 127, and one fused multiply-add of both numbers in a word makes scaled codes of them,
rounded once. PTX promises that `fma` of bfloat16 takes subnormal numbers for what they are.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

UNIT: tl.constexpr = tl.constexpr(2.0**33)  # what the numbers of `scaled` are to be multiplied by


@triton.jit
def scaled(words, scales, BITS: tl.constexpr):
    """Codes times scales, in UNIT: bfloat16 [N, GROUPS, W, 2], for scales of a size from 2⁻⁹³ up to 2²⁸.

    Args:
        words: int32 [N, GROUPS, W], two codes each, stored as their format does: 8 bits are two bytes of which the sign
            is inverted here, 4 bits are the two nibbles of one byte.
        scales: int32 [N, GROUPS / 2], the bits of two bfloat16 numbers each; of one, with GROUPS = 1.
    """
    words = spread(words, 0x4140) ^ 0x00800080 if BITS == 8 else spread(words, 0x4040) & 0x00F0000F
    factors, offset = factors_of(scales, BITS, words.shape[1])
    return scaled_pairs(words, factors, offset)


@triton.jit
def scaled_pairs(pairs, factors, offset):
    """Codes times scales, in UNIT: bfloat16 [N, GROUPS, W, 2].

    Args:
        pairs: int32 [N, GROUPS, W], of two codes each, with what is too much in them: bytes in both halves, or a low
            nibble and, four bits higher in its half, a high one.
        factors, offset: int32 [N, GROUPS], of `factors_of`.
    """
    return two(fma(pairs, factors[:, :, None], offset[:, :, None]), tl.bfloat16)


@triton.jit
def factors_of(scales, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """What `scaled_pairs` multiplies by, and adds, of scales as `scaled` takes them."""
    # The numbers 2¹⁰⁰ and 2⁹⁶ bring the codes from their places to 2⁻³³; the others are what is too much in each code.
    if BITS == 8:
        factors = _in_both_halves(fma(scales, word(0x71807180), word(0)), GROUPS)
        offset = _in_both_halves(fma(scales, word(0xB280B280), word(0)), GROUPS)
    else:
        factors = fma(_in_both_halves(scales, GROUPS), word(0x6F807180), word(0))
        offset = _in_both_halves(fma(scales, word(0xB080B080), word(0)), GROUPS)
    return factors, offset


@triton.jit
def _in_both_halves(numbers, GROUPS: tl.constexpr):
    """Of each word both numbers, each in both halves of one: int32 [N, GROUPS]. With GROUPS = 1 the low one only."""
    low = _half_twice(numbers, 0)
    if GROUPS > 1:
        low = tl.join(low, _half_twice(numbers, 1)).reshape(numbers.shape[0], GROUPS)
    return low


@triton.jit
def _half_twice(words, HALF: tl.constexpr):
    """The low or the high half of each word, twice."""
    if target_info.is_cuda():
        # Said like this, no instruction is left of it: `fma` can read one half of a word twice. With prmt it would be.
        return tl.inline_asm_elementwise(
            f"{{ .reg .b16 half<2>; mov.b32 {{half0, half1}}, $1; mov.b32 $0, {{half{HALF}, half{HALF}}}; }}",
            "=r,r", [words], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return spread(words, 0x3232 if HALF else 0x1010)


@triton.jit
def masked(words, MASK: tl.constexpr, BITS: tl.constexpr):
    """words & MASK ^ BITS."""
    if target_info.is_cuda():
        # ptxas would make two instructions of it, as one cannot hold both constants.
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASK}, {BITS}, 0x6a;", "=r,r", [words], tl.int32, is_pure=True, pack=1
        )
    return words & MASK ^ BITS


@triton.jit
def two(words, DTYPE: tl.constexpr):
    """The numbers in the low and in the high half of each word, as another dimension; no instruction is left of it."""
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@triton.jit
def spread(words, BYTES: tl.constexpr):
    """Of each word the bytes that the hexadecimal digits of BYTES name, the lowest first; digit 4 is a zero."""
    if target_info.is_cuda():
        return tl.inline_asm_elementwise(
            f"prmt.b32 $0, $1, 0, {BYTES};", "=r,r", [words], tl.int32, is_pure=True, pack=1
        )
    low = _byte(words, BYTES & 15) | _byte(words, BYTES >> 4 & 15) << 8
    return low | _byte(words, BYTES >> 8 & 15) << 16 | _byte(words, BYTES >> 12) << 24


@triton.jit
def nibbles(low, high, BYTE: tl.constexpr):
    """Of words with low nibbles and of words with high ones those of a byte, each in a half of its own, as they lie."""
    if target_info.is_cuda():
        # One instruction, if the zeros are the repeated sign of the low nibble's byte, as digits from 8 on ask for.
        return tl.inline_asm_elementwise(
            f"prmt.b32 $0, $1, $2, {0x8480 + 0x1111 * BYTE};", "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1
        )
    return _byte(low, BYTE) | _byte(high, BYTE) << 16


@triton.jit
def _byte(words, NUMBER: tl.constexpr):
    return tl.zeros_like(words) if NUMBER == 4 else words >> 8 * NUMBER & 255


@triton.jit
def fma(a, b, c):
    """a · b + c, of both bfloat16 numbers in each word, rounded once."""
    if target_info.is_cuda():
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
        )
    exact = two(a, tl.bfloat16).to(tl.float32) * two(b, tl.bfloat16).to(tl.float32) + two(c, tl.bfloat16)
    low, high = tl.split(exact.to(tl.bfloat16).to(tl.int16, bitcast=True))
    return low.to(tl.int32) & 0xFFFF | high.to(tl.int32) << 16


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """float32 numbers in DTYPE, where no NaN among them has bits that bfloat16 lacks: such as came from 16 bits.

    gfx942 has no instruction that makes bfloat16 numbers, and Triton asks every number whether it is a NaN.
    """
    if tl.bfloat16 == DTYPE and target_info.is_hip():
        bits = values.to(tl.int32, bitcast=True)
        bits += (bits >> 16 & 1) + 0x7FFF
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def word(BITS: tl.constexpr):
    """int32 [1, 1] of these bits."""
    return tl.full((1, 1), BITS - (1 << 32) if BITS >= 1 << 31 else BITS, tl.int32)
