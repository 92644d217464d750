// What the benchmarks measure a machine by: multiply-adds and reads with nothing between them.
#pragma once

#include "dots.h"

namespace dami {

template <class V, class Dot>
double multiply_add(int64_t steps) {
  constexpr int chains = 12;  // enough to hide the latency, few enough for 16 registers
  alignas(64) typename Dot::X ones[Dot::step] = {};
  asm volatile("" : : "r"(ones) : "memory");  // or the compiler would see what is multiplied
  V sums[chains];
  for (V& sum : sums) sum = V::zero();
  const auto x = Dot::template load<0>(static_cast<const typename Dot::X*>(ones));
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < chains; j++) sums[j] = Dot::multiply_add(x, x, sums[j]);
  }
  float result[4] = {};
  for (int j = 0; j < chains; j += 4) sum4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3], result);
  asm volatile("" : : "r"(result) : "memory");
  return 2.0 * chains * Dot::step / Dot::parts;
}

template <class V>
float read(const void* data, int64_t bytes) {
  const auto* p = static_cast<const float*>(data);
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t i = 0; i + 64 <= bytes / 4; i += 64) {  // four lines; and asks for those 1 KiB on
    for (int64_t line = 0; line < 64; line += 16) __builtin_prefetch(p + i + line + 256, 0, 2);
    for (int64_t j = 0; j < 64; j += 4 * V::W)
      for (int64_t l = 0; l < 4; l++) sums[l] = sums[l] + V::load(p + i + j + l * V::W);
  }
  float parts[4] = {};
  sum4(sums[0], sums[1], sums[2], sums[3], parts);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace dami
