// For any machine: four lanes in the compiler's own vectors, which it maps to what there is.
#include "kernels.h"

namespace {

using dami::bf16;
using dami::f16;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float widen(float value) { return value; }
float widen(bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
float widen(f16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // Inf, NaN
  // The exponents differ by 112. Multiplied in, it makes subnormals right as well.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

void narrow(float value, float* to) { *to = value; }
void narrow(float value, bf16* to) {
  const uint32_t bits = to_bits(value);
  to->bits = static_cast<uint16_t>(value != value ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
void narrow(float value, f16* to) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000u, rest = to_bits(value) & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u)
    half = 0x7e00u;  // NaN
  else if (rest >= 0x477ff000u)
    half = 0x7c00u;  // rounds to Inf
  else if (rest < 0x38800000u)
    half = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);  // subnormal: the addition rounds to its spacing of 2⁻²⁴
  else
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  to->bits = static_cast<uint16_t>(sign | half);
}

struct Vec {
  struct Int8;
  struct Int4;
  static constexpr int W = 4;
  static constexpr int tile_m = 2;
  static constexpr int64_t few = 4;
  static constexpr bool has_masks = false;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes v;

  static Vec zero() { return {Lanes{}}; }
  static Vec set1(float x) { return {Lanes{x, x, x, x}}; }
  static Vec set1(bf16 x) { return set1(widen(x)); }
  template <class T>
  static Vec load(const T* p) {
    return {Lanes{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
  }
  static Vec load_even(const bf16* p) { return {Lanes{widen(p[0]), widen(p[2]), widen(p[4]), widen(p[6])}}; }
  static Vec load_odd(const bf16* p) { return load_even(p + 1); }
  void keep() {}
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < W; i++) narrow(v[i], p + i);
  }
  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  friend void sum4(Vec a, Vec b, Vec c, Vec d, float* to) {
    int i = 0;
    for (const Lanes& x : {a.v, b.v, c.v, d.v}) to[i++] += (x[0] + x[2]) + (x[1] + x[3]);
  }
};

struct Vec::Int8 {
  Vec scale;
  explicit Int8(Vec scale) : scale(scale) {}
  static Vec every(const int8_t* p, int step) {
    return {Lanes{float(p[0]), float(p[step]), float(p[2 * step]), float(p[3 * step])}};
  }
  Vec load(const int8_t* p) const { return every(p, 1) * scale; }
  Vec load_even(const int8_t* p) const { return every(p, 2) * scale; }
  Vec load_odd(const int8_t* p) const { return every(p + 1, 2) * scale; }
};

struct Vec::Int4 {
  Vec scale;
  explicit Int4(Vec scale) : scale(scale) {}
  Vec numbers(int a, int b, int c, int d) const {
    return Vec{Lanes{float(a - 8), float(b - 8), float(c - 8), float(d - 8)}} * scale;
  }
  Vec load(const uint8_t* p) const { return numbers(p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4); }
  Vec load_even(const uint8_t* p) const { return numbers(p[0] & 15, p[1] & 15, p[2] & 15, p[3] & 15); }
  Vec load_odd(const uint8_t* p) const { return numbers(p[0] >> 4, p[1] >> 4, p[2] >> 4, p[3] >> 4); }
};

bool supported() { return true; }

}  // namespace

namespace dami {
extern const Isa scalar;
constexpr Isa scalar = make_isa<Vec>("scalar", supported, 8, 8);
}  // namespace dami
