// NEON: every 64-bit ARM.
#include <arm_neon.h>

#include "kernels.h"

namespace {

using dami::bf16;
using dami::f16;

struct Vec {
  static constexpr int W = 4;
  static constexpr int tile_m = 6;  // 6 × 4 sums, 6 of x and 1 weight of 32 registers
  static constexpr int stream_m = 6;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const bf16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  static Vec load(const f16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  static uint32x4_t load_pairs(const bf16* p) {
    return vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  }
  static Vec load_even(const bf16* p) { return {vreinterpretq_f32_u32(vshlq_n_u32(load_pairs(p), 16))}; }
  static Vec load_odd(const bf16* p) {
    return {vreinterpretq_f32_u32(vandq_u32(load_pairs(p), vdupq_n_u32(0xffff0000)))};
  }
  void keep() { asm("" : "+w"(v)); }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(bf16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }
  void store(f16* p) const { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  friend void sum4(Vec a, Vec b, Vec c, Vec d, float* to) {
    const float32x4_t sums = vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v));
    vst1q_f32(to, vaddq_f32(vld1q_f32(to), sums));
  }
};

bool supported() { return true; }

}  // namespace

namespace dami {
extern const Isa neon;
constexpr Isa neon = make_isa<Vec>("neon", supported, 6, 6);
}  // namespace dami
