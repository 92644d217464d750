// NEON: every 64-bit ARM.
#include <arm_neon.h>

#include "kernels.h"

namespace {

using dami::bf16;
using dami::f16;

struct Vec {
  struct Int8;
  struct Int4;
  static constexpr int W = 4;
  static constexpr int tile_m = 6;  // 6 × 4 sums, 6 of x and 1 weight of 32 registers
  static constexpr int64_t few = 4;
  static constexpr bool has_masks = false;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static Vec set1(bf16 x) { return {vreinterpretq_f32_u32(vdupq_n_u32(static_cast<uint32_t>(x.bits) << 16))}; }
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

struct Vec::Int8 {
  Vec scale;
  explicit Int8(Vec scale) : scale(scale) {}
  static int32x4_t words(const int8_t* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p))); }
  Vec load(const int8_t* p) const {
    int32_t four;
    std::memcpy(&four, p, 4);
    const int16x8_t codes = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return Vec{vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes)))} * scale;
  }
  Vec load_even(const int8_t* p) const {
    return Vec{vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(words(p), 16), 16))} * scale;
  }
  Vec load_odd(const int8_t* p) const { return Vec{vcvtq_f32_s32(vshrq_n_s32(words(p), 16))} * scale; }
};

struct Vec::Int4 {
  Vec scale, zero;
  explicit Int4(Vec scale) : scale(scale), zero(scale * set1(-8)) {}
  Vec number(uint32x4_t code) const { return fma(Vec{vcvtq_f32_u32(code)}, scale, zero); }
  Vec load(const uint8_t* p) const {
    uint16_t two;
    std::memcpy(&two, p, 2);
    const int32_t shifts[4] = {0, -4, -8, -12};
    return number(vandq_u32(vshlq_u32(vdupq_n_u32(two), vld1q_s32(shifts)), vdupq_n_u32(15)));
  }
  static uint32x4_t bytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
  }
  Vec load_even(const uint8_t* p) const { return number(vandq_u32(bytes(p), vdupq_n_u32(15))); }
  Vec load_odd(const uint8_t* p) const { return number(vshrq_n_u32(bytes(p), 4)); }
};

bool supported() { return true; }

}  // namespace

namespace dami {
extern const Isa neon;
constexpr Isa neon = make_isa<Vec>("neon", supported, 6, 6);
}  // namespace dami
