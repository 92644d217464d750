// How a row of x lies in memory for `linear`, which reads it again for every output.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dots.h"

namespace dami {

// The row as Dot reads it, in whole groups; and behind that, for `codes`, as CodesDot does, if that is another one.
template <class V, class Dot, class CodesDot, class T>
struct PreparedRow {
  using X = typename Dot::X;
  static constexpr bool two_dots = !std::is_same_v<Dot, CodesDot>;

  static int64_t bytes(int64_t k, bool codes) {
    const int64_t padded = (k + group_size - 1) / group_size * group_size;
    const int64_t blocks = CodesDot::blocks.last(k) / CodesDot::blocks.block + 1;
    const int64_t codes_x = two_dots && codes ? CodesDot::at_block(blocks * CodesDot::blocks.block) * sizeof(typename CodesDot::X) : 0;
    return padded * sizeof(X) + codes_x;
  }

  static void write(const T* numbers, int64_t k, bool codes, void* to) {
    X* const x = static_cast<X*>(to);
    fill<V, Dot>(Numbers<V, T>(numbers), k, x);
    if constexpr (two_dots)
      for (int64_t i = 0, end; codes && i < k; i = end) {
        end = CodesDot::blocks.end(i, CodesDot::blocks.block, k);
        CodesDot::prepare_block(numbers + i, end - i, codes_x(x, k) + CodesDot::at_block(i));
      }
  }

  // Where D, one of the two, reads the row of a block from column k on.
  template <class D>
  static const typename D::X* at(const Block& block, int64_t row, int64_t k) {
    const X* const x = reinterpret_cast<const X*>(block.x + row * block.x_stride);
    if constexpr (std::is_same_v<D, Dot>) return x + k;
    else return codes_x(const_cast<X*>(x), block.k) + D::at_block(k);
  }

 private:
  static typename CodesDot::X* codes_x(X* x, int64_t k) {
    return reinterpret_cast<typename CodesDot::X*>(x + (k + group_size - 1) / group_size * group_size);
  }
};

}  // namespace dami
