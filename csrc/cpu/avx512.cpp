#include "avx512.h"

namespace dami {
using OfBf16 = LinearKernel<Vec, FloatDot<Vec, true>, IntDot, bf16>;
extern const Isa avx512;
constexpr Isa avx512 = make_isa<Vec, OfBf16>("avx512", has_avx512, 8, 8);
}  // namespace dami
