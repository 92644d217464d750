// What the integer dots of all instruction sets share: how x lies in memory, and how sums over it begin and end.
#pragma once

#include <numeric>

#include "dots.h"

namespace dami {

// Codes are multiplied as integers, which takes a fraction of the instructions of making them floating point numbers. Of a
// block of x each element becomes a number of 16 bits times one power of two, which is exact from 1/128 of the largest on, as
// bfloat16 has 8 bits. Where what the smaller ones lose could be told beside the rounding of a bfloat16 weight, as beside an
// outlier, it is kept as a second digit of 16 bits, and the block is multiplied twice: that is exact from 2⁻²² of the largest
// on. A block's own numbers decide it, so a row has the same bits in any company. A group's sum is exact, and takes its
// scale as a float32. Codes of `parts` in a word are taken apart, so of every `step` elements of x those that are `parts`
// apart lie together. Nibbles are multiplied as they are, 8 above their code, which makes a group's sum too large by 8
// times the scale and the sum of x; so sums begin below zero.
template <class V, int elements, int parts>
struct IntBlocks {
  static_assert(is_vector_for_integers<V>());
  using X = int16_t;
  static constexpr int step = elements;
  static constexpr Blocking blocks{block_bytes / 4, block_bytes / 16};
  // A block lies there as two digits, each behind its scale, that of the digit after it or 0, and on lines of their own `sums`.
  static constexpr int64_t room = blocks.block + blocks.tail, head = 96, digit = head + room;
  static_assert((room / group_size + V::W - 1) / V::W * V::W * 2 <= head - 32, "room for whole vectors of sums");
  static int64_t at_block(int64_t k) { return k / blocks.block * 2 * digit + head; }
  static const float* sums(const X* x) { return reinterpret_cast<const float*>(x - head + 32); }  // of x, in each group
  static const float* scales(const X* x) { return reinterpret_cast<const float*>(x - head); }

  template <class Row>
  static V begin(const Row& row, int64_t i, int64_t count, const X* x) {
    V above = V::zero();
    if constexpr (Row::per_byte == 2)
      for (int64_t g = 0; g < count / group_size; g += V::W)
        above = fma(V::load(sums(x) + g), row.first_scales(i / group_size + g, count / group_size - g), above);
    return above * V::set1(-8);
  }
  static V scaled(V sum, const X* x) { return sum * V::set1(scales(x)[0]); }

  // The second digit of rows of x, `stride` apart, if any of them needs it; it is 0 in the others.
  static const X* second(const X* x, int64_t stride, int rows) {
    for (int m = 0; m < rows; m++)
      if (scales(x + m * stride)[1] != 0) return x + digit;
    return nullptr;
  }

  static void prepare_block(const bf16* x, int64_t count, X* to) {
    alignas(64) bf16 padded[room] = {};
    std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(bf16));
    V magnitude = V::zero(), poison = magnitude;  // poison is NaN if there is a NaN or Inf
    for (int64_t i = 0; i < room; i += V::W) {
      const V v = V::load(padded + i);
      magnitude = max(magnitude, max(v, V::zero() - v));
      poison = fma(v, V::zero(), poison);
    }
    float magnitudes[V::W], poisons[V::W], largest = 0x1p-97f;  // below it the second scale would be subnormal
    magnitude.store(magnitudes);
    poison.store(poisons);
    for (float lane : magnitudes) largest = std::max(largest, lane);
    uint32_t bits;
    std::memcpy(&bits, &largest, sizeof bits);
    bits &= 0x7f800000;  // the power of two in it
    float power, zero_or_nan = 0;
    std::memcpy(&power, &bits, sizeof power);
    for (float lane : poisons) zero_or_nan += lane;

    // In units of the scale. To add and take off 1.5 · 2²³ is to round to a whole number.
    const V inverse = V::set1(0x1p14f / power), to_whole = V::set1(0x1.8p23f), max_counted = V::set1(-0x1p11f);
    alignas(64) float remainder[room];
    alignas(64) X whole[room];
    V energy_lost = V::zero(), energy_kept = V::zero();
    for (int64_t i = 0; i < room; i += V::W) {
      const V v = V::load(padded + i) * inverse, rounded = v + to_whole - to_whole, lost = v - rounded;
      rounded.store(whole + i);
      lost.store(remainder + i);
      energy_lost = fma(lost, lost, energy_lost);
      const V counted = max(V::zero() - max(v, V::zero() - v), max_counted);
      energy_kept = fma(counted, counted, energy_kept);
    }
    float energy[2][V::W], sum_lost = 0, sum_kept = 0;
    energy_lost.store(energy[0]);
    energy_kept.store(energy[1]);
    for (float lane : energy[0]) sum_lost += lane;
    for (float lane : energy[1]) sum_kept += lane;
    // At most 2⁻¹², a third of the root mean square that rounding a weight or a result to bfloat16 has, of what remains where
    // an outlier, whose weights may all be 0, counts as an eighth of the largest; and 2⁻⁹ of what remains without outliers.
    uint32_t of_small = 0;
    for (const X number : whole) of_small += number * number < 1 << 22 ? static_cast<uint32_t>(number * number) : 0;
    const bool one_digit = !(sum_lost > 0x1p-24f * sum_kept || sum_lost > 0x1p-18f * static_cast<float>(of_small));
    store_digit(whole, power * 0x1p-14f + zero_or_nan, one_digit ? 0 : power * 0x1p-29f, to);
    if (one_digit) {
      std::memset(to + digit - head, 0, digit * sizeof(X));
    } else {
      for (int64_t i = 0; i < room; i += V::W) (V::load(remainder + i) * V::set1(0x1p15f)).store(whole + i);
      store_digit(whole, power * 0x1p-29f, 0, to + digit);
    }
  }

  static void store_digit(const X* whole, float scale, float next, X* to) {
    std::memset(to - head, 0, head * sizeof(X));
    std::memcpy(to - head, &scale, sizeof scale);
    std::memcpy(to - head + 2, &next, sizeof next);
    for (int64_t i = 0; i < room; i += step)
      for (int part = 0; part < parts; part++)
        for (int j = 0; j < step / parts; j++) to[i + part * (step / parts) + j] = whole[i + j * parts + part];
    for (int64_t i = 0; i < room; i += group_size) {
      const auto sum = static_cast<float>(std::accumulate(whole + i, whole + i + group_size, 0));
      std::memcpy(to - head + 32 + 2 * i / group_size, &sum, sizeof sum);
    }
  }
};

}  // namespace dami
