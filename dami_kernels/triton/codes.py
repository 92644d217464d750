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
    """Codes times scales, in UNIT: bfloat16 [N, GROUPS, W, 4, 2], for scales of a size from 2⁻⁹³ up to 2²⁸.

    Args:
        words: [N, GROUPS, W], an octet each, see `pairs`.
        scales: int32 [N, GROUPS / 2], the bits of two bfloat16 numbers each; of one, with GROUPS = 1.
    """
    # The numbers 2¹⁰⁰ and 2⁹⁶ bring the codes from their places to 2⁻³³; the others are what is too much in each code.
    GROUPS: tl.constexpr = words.shape[1]
    if BITS == 8:
        codes = masked(pairs(words, BITS), 0x00FF00FF, 0x00800080)  # plus 128, by its inverted sign
        factors = _in_both_halves(fma(scales, word(0x71807180), word(0)), GROUPS)
        offset = _in_both_halves(fma(scales, word(0xB280B280), word(0)), GROUPS)
    else:
        codes = pairs(words, BITS) & 0x00F0000F
        factors = fma(_in_both_halves(scales, GROUPS), word(0x6F807180), word(0))
        offset = _in_both_halves(fma(scales, word(0xB080B080), word(0)), GROUPS)
    return two(fma(codes, factors[:, :, None, None], offset[:, :, None, None]), tl.bfloat16)


@triton.jit
def pairs(words, BITS: tl.constexpr):
    """The four pairs of each octet, eight codes that lie together in memory: int32 [..., 4], a code to each half.

    An octet is an int64 of 8 bits a code, or an int32 of 4 bits, where both halves get the byte of the pair. Bits that
    are not the code's are the caller's to clear.
    """
    pair = tl.arange(0, 4)
    words = tl.expand_dims(words, len(words.shape))
    if target_info.is_cuda():
        # A lane of the matrix unit needs the same pair of every octet, so `which` is one number to it. It is made to
        # look loaded, though nothing is: Triton moves conversions of layouts up to loads only, and not to a range.
        low, high = words.to(tl.int32), (words >> 32 if BITS == 8 else words).to(tl.int32)
        which = 0x1100 + 0x2222 * pair if BITS == 8 else 0x1111 * pair
        nowhere = tl.zeros_like(pair).to(tl.int64).to(tl.pointer_type(tl.int32))
        which = tl.load(nowhere, mask=pair < 0, other=which)
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, which], tl.int32, is_pure=True, pack=1
        )
    found = (words >> 2 * BITS * pair).to(tl.int32)
    return found & 0xFF | found << (8 if BITS == 8 else 16)


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
    half = words >> 16 * HALF & 0xFFFF
    return half | half << 16


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
