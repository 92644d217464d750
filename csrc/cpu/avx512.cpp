#include "avx512.h"

namespace dami {
extern const Isa avx512;
constexpr Isa avx512 = make_isa<Vec, dami::FloatDot<Vec, true>, IntDot>("avx512", has_avx512, 8, 8);
}  // namespace dami
