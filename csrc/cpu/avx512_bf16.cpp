// AVX-512 with its dot products of bfloat16 and of integers: AMD since Zen 4, Intel since Cooper Lake.
#include "avx512_bf16.h"

namespace dami {
extern const Isa avx512_bf16;
constexpr Isa avx512_bf16 = make_isa<Vec, OfBf16>("avx512_bf16", has_avx512_bf16, 8, 16);
}  // namespace dami
