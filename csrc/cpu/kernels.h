// All kernels of one instruction set, which instantiates them in a file of its own. Its vector type and Dots must lie in an
// anonymous namespace: then so does everything made of them, and the linker cannot put AVX-512 code where AVX2 code belongs.
#pragma once

#include "attention.h"
#include "embedding.h"
#include "linear.h"
#include "norms.h"
#include "rates.h"

namespace dami {

// DotOfBf16 is what bfloat16 weights are multiplied with, CodesDot codes where x is bfloat16; the rest takes FloatDot.
template <class V, class DotOfBf16 = FloatDot<V, true>, class CodesDot = DotOfBf16>
constexpr Isa make_isa(const char* name, bool (*supported)(), int blend_rows, int blend_rows_of_bf16) {
  static_assert(is_vector<V>());
  using Dot = FloatDot<V, false>;
  using OfF32 = LinearKernel<V, Dot, Dot, float>;
  using OfBf16 = LinearKernel<V, DotOfBf16, CodesDot, bf16>;
  using OfF16 = LinearKernel<V, Dot, Dot, f16>;
  return Isa{
      name,
      supported,
      V::tile_m,
      {blend_rows, blend_rows_of_bf16, blend_rows},
      {OfF32::RowOfX::bytes, OfBf16::RowOfX::bytes, OfF16::RowOfX::bytes},
      {OfF32::RowOfX::write, OfBf16::RowOfX::write, OfF16::RowOfX::write},
      {OfF32::run, OfBf16::run, OfF16::run},
      {embedding<V, float>, embedding<V, bf16>, embedding<V, f16>},
      {rms_norm<V, float>, rms_norm<V, bf16>, rms_norm<V, f16>},
      {layer_norm<V, float>, layer_norm<V, bf16>, layer_norm<V, f16>},
      {attention<V, float>, attention<V, bf16>, attention<V, f16>},
      {multiply_add<V, Dot>, multiply_add<V, DotOfBf16>, multiply_add<V, Dot>},
      read<V>,
  };
}

}  // namespace dami
