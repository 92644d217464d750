// The vector of AVX-512 (F, BW, VL, DQ).
#pragma once

#include <immintrin.h>

#include "int_dot.h"
#include "kernels.h"

namespace {

using dami::bf16;
using dami::f16;

struct Vec {
  struct Int8;
  struct Int4;
  static constexpr int W = 16;
  static constexpr int tile_m = 6;  // 6 × 4 sums, 6 of x and 1 weight of 32 registers
  static constexpr int64_t few = 4;
  static constexpr bool has_masks = true;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec set1(bf16 x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(static_cast<int16_t>(x.bits)), 16))};
  }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
  }
  static Vec load(const bf16* p, int64_t n) {
    const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
  }
  static Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load_even(const bf16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
  static Vec load_odd(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-0x10000)))};
  }
  void keep() { asm("" : "+v"(v)); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(int16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend void sum4(Vec a, Vec b, Vec c, Vec d, float* to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
  }
};

struct Vec::Int8 {
  Vec scale, scale_of_high;
  explicit Int8(Vec scale) : scale(scale), scale_of_high(scale * set1(0x1p-16f)) {}
  static __m512i words(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  Vec load(const int8_t* p) const {
    return Vec{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))} * scale;
  }
  // In the high half of a lane, a code is 2¹⁶ times itself.
  Vec load_even(const int8_t* p) const {
    return Vec{_mm512_cvtepi32_ps(_mm512_slli_epi32(words(p), 16))} * scale_of_high;
  }
  Vec load_odd(const int8_t* p) const { return Vec{_mm512_cvtepi32_ps(_mm512_srai_epi32(words(p), 16))} * scale; }
};

// The sixteen numbers that codes can mean, looked up by the low four bits of a lane.
struct Vec::Int4 {
  Vec numbers;
  explicit Int4(Vec scale)
      : numbers(scale * Vec{_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)}) {}
  Vec number(__m512i code) const { return {_mm512_permutexvar_ps(code, numbers.v)}; }
  static __m512i bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  Vec load(const uint8_t* p) const {
    const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return number(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)));
  }
  Vec load_even(const uint8_t* p) const { return number(bytes(p)); }
  Vec load_odd(const uint8_t* p) const { return number(_mm512_srli_epi32(bytes(p), 4)); }
};

// Four groups at a time, each in a quarter of the lanes.
struct IntDot : dami::IntBlocks<Vec, 4 * dami::group_size, 4> {
  static constexpr int tile_m = 4;
  static constexpr bool any_rows = false;  // with more than few rows it is cheaper to convert codes once

  struct Operand {
    __m512i codes[4];
    Vec scale;
  };
  // The scales of four groups, or of as many as `count` elements are, each in the high halves of its lanes.
  template <class Row>
  static Vec loader(const Row& row, int64_t i, int64_t count) {
    const bf16* const p = row.scales + i / dami::group_size;
    const __mmask8 there = static_cast<__mmask8>((1u << count / dami::group_size) - 1);
    const __m128i scales = count == step ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi16(there, p);
    const __m512i of_lane = _mm512_setr_epi32(0, 0, 0, 0, 0x10000, 0x10000, 0x10000, 0x10000, 0x20000, 0x20000, 0x20000,
                                              0x20000, 0x30000, 0x30000, 0x30000, 0x30000);
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, of_lane, _mm512_castsi128_si512(scales)))};
  }
  template <class Row>
  static Operand operand(const Row& row, int64_t i, Vec scale) {
    return codes<true>(row.at(i), step, scale);
  }
  template <class Row>
  static Operand partial_operand(const Row& row, int64_t i, int64_t count, Vec scale) {
    return codes<false>(row.at(i), count, scale);
  }
  // 64 bytes, of which only the first `count` are there unless `whole`.
  template <bool whole>
  static __m512i bytes(const void* p, int64_t count) {
    if (!whole && count < 64) return _mm512_maskz_loadu_epi8((uint64_t{1} << std::max<int64_t>(count, 0)) - 1, p);
    __m512i all = _mm512_loadu_si512(p);
    asm("" : "+v"(all));  // or the compiler would read it again for every part
    return all;
  }
  template <bool whole>
  static Operand codes(const int8_t* p, int64_t count, Vec scale) {
    const __m512i low = bytes<whole>(p, count), high = bytes<whole>(p + 64, count - 64);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i twice = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x40004));  // and with the next line 0, 2, 4, …, 62
    const __m512i which = _mm512_add_epi32(twice, _mm512_set1_epi32(0x20000));
    const __m512i even = _mm512_permutex2var_epi16(low, which, high);  // words
    const __m512i odd = _mm512_permutex2var_epi16(low, _mm512_add_epi32(which, _mm512_set1_epi32(0x10001)), high);
    return {{_mm512_srai_epi16(_mm512_slli_epi16(even, 8), 8), _mm512_srai_epi16(even, 8),
             _mm512_srai_epi16(_mm512_slli_epi16(odd, 8), 8), _mm512_srai_epi16(odd, 8)},
            scale};
  }
  template <bool whole>
  static Operand codes(const uint8_t* p, int64_t count, Vec scale) {
    const __m512i words = bytes<whole>(p, count / 2), low = _mm512_set1_epi16(15);
    return {{_mm512_and_si512(words, low), _mm512_and_si512(_mm512_srli_epi16(words, 4), low),
             _mm512_and_si512(_mm512_srli_epi16(words, 8), low), _mm512_srli_epi16(words, 12)},
            scale};
  }
  static Vec multiply_add(const int16_t* x, const Operand& w, Vec sum) {
    const auto add = [&](__m512i sum, int part) {
      const __m512i of_x = _mm512_loadu_si512(x + part * (step / 4));
#ifdef __AVX512VNNI__
      return _mm512_dpwssd_epi32(sum, w.codes[part], of_x);
#else
      return _mm512_add_epi32(sum, _mm512_madd_epi16(w.codes[part], of_x));
#endif
    };
    const __m512i sums = add(add(add(add(_mm512_setzero_si512(), 0), 1), 2), 3);
    return fma(Vec{_mm512_cvtepi32_ps(sums)}, w.scale, sum);
  }
};

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace
