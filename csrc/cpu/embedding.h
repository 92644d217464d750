// `embedding`: rows of W(λ).
#pragma once

#include <algorithm>

#include "storage.h"

namespace dami {

// A row of W(λ).
template <class V, class T>
void embedding(const Weight& weight, int64_t n, float lam, void* y, int64_t d) {
  with_rows<V, T>(weight, [&](auto base_kind, auto other_kind) {
    using Base = typename decltype(base_kind)::type;
    using Other = typename decltype(other_kind)::type;
    constexpr int64_t block = 512;
    typename Base::Buffer base_buffer;
    typename Other::Buffer other_buffer;
    for (int64_t k = 0; k < d; k += block) {
      const int64_t count = std::min(block, d - k);
      const Base base(weight.base, n, k);
      const Other other(weight.other, n, k);
      for (int64_t i = 0; i < count; i += group_size) {
        const Base b = base.group(i, count - i, base_buffer);
        const Other o = other.group(i, count - i, other_buffer);
        const auto base_loader = b.loader(0);
        const auto other_loader = o.loader(0);
        for (int64_t j = 0; j < std::min(group_size, count - i); j += V::W) {
          V v;
          if (lam == 1 && has_target(weight)) {
            v = other_loader.load(o.at(j));
          } else {
            v = base_loader.load(b.at(j));
            if (lam != 0) v = blend(weight, lam, v, other_loader.load(o.at(j)));
          }
          store(v, static_cast<T*>(y) + k + i + j, count - i - j);
        }
      }
    }
  });
}

}  // namespace dami
