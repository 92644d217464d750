// AVX-512 with its bfloat16 dot product: AMD since Zen 4, Intel since Cooper Lake.
#include "avx512.h"

namespace {

// Multiplies pairs of bfloat16 as they lie in memory; nothing is converted.
struct Bf16Dot {
  using X = bf16;
  static constexpr int step = 32, parts = 1;
  template <int>
  static __m512bh load(const bf16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    __m512bh pairs;
    std::memcpy(&pairs, &bits, 64);
    return pairs;
  }
  static Vec multiply_add(__m512bh x, __m512bh w, Vec sum) { return {_mm512_dpbf16_ps(sum.v, x, w)}; }
  static dami::Two<Vec> widen(const bf16* p) { return {Vec::load(p), Vec::load(p + Vec::W)}; }
  static void store(dami::Two<Vec> v, bf16* p) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(v.b.v, v.a.v);
    std::memcpy(p, &rounded, 64);
  }
};

bool supported() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

namespace dami {
extern const Isa avx512_bf16;
constexpr Isa avx512_bf16 = make_isa<Vec, Bf16Dot>("avx512_bf16", supported, 8, 32);
}  // namespace dami
