// Dot products of bfloat16 by AVX-512.
#pragma once

#include "avx512.h"

namespace {

// Multiplies pairs of bfloat16 as they lie in memory; nothing is converted.
struct Bf16Dot {
  using X = bf16;
  static constexpr int step = 32, parts = 1, tile_m = Vec::tile_m;
  static constexpr int short_m = 3;  // on Zen 4 a tile of 4 or more takes some 50 cycles to begin, one of 3 none
  static constexpr bool any_rows = true;
  static constexpr dami::Blocking blocks{dami::block_bytes / sizeof(X), dami::block_bytes / sizeof(X) / 4};
  static int64_t at_block(int64_t k) { return k; }
  template <int>
  static __m512bh load(const bf16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    __m512bh pairs;
    std::memcpy(&pairs, &bits, 64);
    return pairs;
  }
  static Vec multiply_add(__m512bh x, __m512bh w, Vec sum) { return {_mm512_dpbf16_ps(sum.v, x, w)}; }
  static Vec multiply_add(const bf16* x, __m512bh w, Vec sum) { return multiply_add(load<0>(x), w, sum); }
  template <class Row, class Loader>
  static dami::Two<Vec> widen(const Row& row, int64_t i, const Loader& loader) {
    return {loader.load(row.at(i)), loader.load(row.at(i + Vec::W))};
  }
  template <class Row>
  static auto loader(const Row& row, int64_t i, int64_t) {
    return row.loader(i);
  }
  template <class Row>
  static Vec begin(const Row&, int64_t, int64_t, const bf16*) {
    return Vec::zero();
  }
  static Vec scaled(Vec sum, const bf16*) { return sum; }
  static const bf16* second(const bf16*, int64_t, int) { return nullptr; }
  static __m512bh round(dami::Two<Vec> v) { return _mm512_cvtne2ps_pbh(v.b.v, v.a.v); }
  template <class Row>
  static __m512bh operand(const Row& row, int64_t i, const dami::Unscaled<Vec>&) {
    return load<0>(row.at(i));
  }
  template <class Row>
  static __m512bh operand(const Row& row, int64_t i, const Vec::Int8& loader) {
    return round(widen(row, i, loader));
  }
  template <class Row>
  static __m512bh operand(const Row& row, int64_t i, const Vec::Int4& loader) {
    const __m256bh numbers = _mm512_cvtneps_pbh(loader.numbers.v);
    __m256i table;
    std::memcpy(&table, &numbers, 32);
    const __m512i bytes = Vec::Int4::bytes(row.at(i));
    const __m512i codes = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), _mm512_set1_epi32(0xf000f));
    const __m512i pairs = _mm512_permutexvar_epi16(codes, _mm512_castsi256_si512(table));
    __m512bh result;
    std::memcpy(&result, &pairs, 64);
    return result;
  }
  static void store(__m512bh v, bf16* p) { std::memcpy(p, &v, 64); }
  static void store(dami::Two<Vec> v, bf16* p) { store(round(v), p); }
};

using OfBf16 = dami::LinearKernel<Vec, Bf16Dot, IntDot, bf16>;

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
