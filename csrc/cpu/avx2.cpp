// AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#include <immintrin.h>

#include "int_dot.h"
#include "kernels.h"

namespace {

using dami::bf16;
using dami::f16;

struct Vec {
  struct Int8;
  struct Int4;
  static constexpr int W = 8;
  static constexpr int tile_m = 3;  // 3 × 4 sums, 3 of x and 1 weight: the 16 registers
  static constexpr int64_t few = 8;
  static constexpr bool has_masks = false;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec set1(bf16 x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<int16_t>(x.bits)), 16))};
  }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    return {_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
  }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load_even(const bf16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16))};
  }
  static Vec load_odd(const bf16* p) {
    return {_mm256_and_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(p)),
                          _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000)))};
  }
  void keep() { asm("" : "+x"(v)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), _mm256_castps_si256(is_nan));
    rounded = _mm256_srli_epi32(rounded, 16);
    rounded = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(rounded));
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(int16_t* p) const {
    const __m256i whole = _mm256_cvtps_epi32(v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend void sum4(Vec a, Vec b, Vec c, Vec d, float* to) {
    const __m256 ab = _mm256_hadd_ps(a.v, b.v), cd = _mm256_hadd_ps(c.v, d.v), all = _mm256_hadd_ps(ab, cd);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
  }
};

struct Vec::Int8 {
  Vec scale, scale_of_high;
  explicit Int8(Vec scale) : scale(scale), scale_of_high(scale * set1(0x1p-16f)) {}
  static __m256i words(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  Vec load(const int8_t* p) const {
    return Vec{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))} * scale;
  }
  // In the high half of a lane, a code is 2¹⁶ times itself.
  Vec load_even(const int8_t* p) const {
    return Vec{_mm256_cvtepi32_ps(_mm256_slli_epi32(words(p), 16))} * scale_of_high;
  }
  Vec load_odd(const int8_t* p) const { return Vec{_mm256_cvtepi32_ps(_mm256_srai_epi32(words(p), 16))} * scale; }
};

struct Vec::Int4 {
  Vec scale, zero;
  explicit Int4(Vec scale) : scale(scale), zero(scale * set1(-8)) {}
  Vec number(__m256i code) const { return fma(Vec{_mm256_cvtepi32_ps(code)}, scale, zero); }
  static __m256i bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  Vec load(const uint8_t* p) const {
    int four;
    std::memcpy(&four, p, 4);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(four), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return number(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)));
  }
  Vec load_even(const uint8_t* p) const { return number(_mm256_and_si256(bytes(p), _mm256_set1_epi32(15))); }
  Vec load_odd(const uint8_t* p) const { return number(_mm256_srli_epi32(bytes(p), 4)); }
};

// A group at a time: 16 even codes and 16 odd ones.
struct IntDot : dami::IntBlocks<Vec, dami::group_size, 2> {
  static constexpr int tile_m = 2;
  static constexpr bool any_rows = true;  // good for more than few rows, too

  struct Operand {
    __m256i even, odd;
    Vec scale;
  };
  template <class Row>
  static Vec loader(const Row& row, int64_t i, int64_t) {
    return Vec::set1(row.scales[i / dami::group_size]);
  }
  template <class Row>
  static Operand operand(const Row& row, int64_t i, Vec scale) {
    return codes(row.at(i), scale);
  }
  static Operand codes(const int8_t* p, Vec scale) {
    __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("" : "+x"(words));  // or the compiler would read it twice
    return {_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8), _mm256_srai_epi16(words, 8), scale};
  }
  static Operand codes(const uint8_t* p, Vec scale) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_srli_epi16(words, 4), scale};
  }
  static Operand codes(const int16_t* converted, Vec scale) {
    const auto* p = reinterpret_cast<const __m256i*>(converted);
    return {_mm256_load_si256(p), _mm256_load_si256(p + 1), scale};
  }
  static void store(const Operand& w, int16_t* p) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), w.even);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p) + 1, w.odd);
  }
  static Vec multiply_add(const int16_t* x, const Operand& w, Vec sum) {
    const auto* p = reinterpret_cast<const __m256i*>(x);
    const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(w.even, _mm256_load_si256(p)),
                                              _mm256_madd_epi16(w.odd, _mm256_load_si256(p + 1)));
    return fma(Vec{_mm256_cvtepi32_ps(products)}, w.scale, sum);
  }
};

// Whatever has AVX2 and FMA has F16C, which not every compiler can ask for.
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

namespace dami {
using OfBf16 = LinearKernel<Vec, FloatDot<Vec, true>, IntDot, bf16>;
extern const Isa avx2;
constexpr Isa avx2 = make_isa<Vec, OfBf16>("avx2", supported, 6, 6);
}  // namespace dami
