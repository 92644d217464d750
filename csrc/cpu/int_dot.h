// What the integer dots of all instruction sets share: how x lies in memory, and how sums over it begin and end.
#pragma once

#include <numeric>

#include "kernels.h"

namespace dami {

// Codes are multiplied as integers, which takes a fraction of the instructions of making them floating point numbers. x is
// rounded to 16 bits, relative to the largest of its block; that is a quarter of what the rounding of a bfloat16 weight by
// that element would add, at the very most. A group's sum is exact, and takes its scale as a float32. Codes of `parts` in a
// word are taken apart, so of every `step` elements of x those that are `parts` apart lie together. Nibbles are
// multiplied as they are, 8 above their code, which makes a group's sum too large by 8 times the scale and the sum of x; so
// sums begin below zero.
template <class V, int elements, int parts>
struct IntBlocks {
  using X = int16_t;
  static constexpr int step = elements;
  static constexpr int64_t block = block_bytes / 4, head = 64;  // before a block its scale, and on a line of its own `sums`
  static int64_t at_block(int64_t k) { return k / block * (head + block) + head; }
  static const float* sums(const X* x) { return reinterpret_cast<const float*>(x - head / 2); }  // of x, in each group

  template <class Row>
  static V begin(const Row& row, int64_t i, int64_t count, const X* x) {
    V above = V::zero();
    if constexpr (Row::per_byte == 2)
      for (int64_t g = 0; g < count / group_size; g += V::W)
        above = fma(V::load(sums(x) + g), V::load(row.scales + i / group_size + g), above);
    return above * V::set1(-8);
  }
  static V scaled(V sum, const X* x) {
    float scale;
    std::memcpy(&scale, x - head, sizeof scale);
    return sum * V::set1(scale);
  }

  static void prepare_block(const bf16* x, int64_t count, X* to) {
    alignas(64) bf16 padded[block] = {};
    std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(bf16));
    V most = V::zero(), none = most;  // none is NaN if there is a NaN or Inf
    for (int64_t i = 0; i < block; i += V::W) {
      const V v = V::load(padded + i);
      most = max(most, max(v, V::zero() - v));
      none = fma(v, V::zero(), none);
    }
    float lanes[V::W], poison[V::W], largest = 0;
    most.store(lanes);
    none.store(poison);
    for (float lane : lanes) largest = std::max(largest, lane);
    float scale = largest / 32767;
    for (float lane : poison) scale += lane;
    std::memcpy(to - head, &scale, sizeof scale);
    const V inverse = V::set1(largest > 1e-30f ? 32767 / largest : 0);
    alignas(64) X whole[block];
    for (int64_t i = 0; i < block; i += V::W) (V::load(padded + i) * inverse).store(whole + i);
    for (int64_t i = 0; i < block; i += step)
      for (int part = 0; part < parts; part++)
        for (int j = 0; j < step / parts; j++) to[i + part * (step / parts) + j] = whole[i + j * parts + part];
    for (int64_t i = 0; i < block; i += group_size) {
      const auto sum = static_cast<float>(std::accumulate(whole + i, whole + i + group_size, 0));
      std::memcpy(to - head / 2 + 2 * i / group_size, &sum, sizeof sum);
    }
  }
};

}  // namespace dami
