// How rows of a stored matrix become vectors: numbers as they are, or codes and the scales of their groups.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace dami {

// What `loader` gives where there is nothing to scale.
template <class V>
struct Unscaled {
  template <class T>
  V load(const T* p) const {
    return V::load(p);
  }
  V load_even(const bf16* p) const { return V::load_even(p); }
  V load_odd(const bf16* p) const { return V::load_odd(p); }
};

// Rows of a stored matrix, from some column on, as a tile reads them.
template <class Row>
constexpr bool is_tile_row() {
  static_assert(std::is_pointer_v<decltype(std::declval<const Row&>().at(int64_t{}))>, "at(i): where column i lies");
  static_assert(gives<int64_t, decltype(Row::bytes(int64_t{}))>, "bytes(i): how far that is from column 0, as stored");
  static_assert(gives<const bool, decltype(Row::streamed)>, "streamed: whether it comes from memory while it is multiplied");
  static_assert(!gives<void, decltype(std::declval<const Row&>().loader(int64_t{}))>,
                "loader(i): what makes vectors of the numbers of i's group");
  return true;
}

// A row of a matrix as it is stored.
template <class Row>
constexpr bool is_stored_row() {
  static_assert(gives<const bool, decltype(Row::padded)>, "padded: whether it may be read up to a whole number of groups");
  static_assert(std::is_constructible_v<Row, const Stored&, int64_t, int64_t>,
                "Row(matrix, n, k): row n from column k on");
  static_assert(gives<Row, decltype(std::declval<const Row&>().group(int64_t{}, int64_t{},
                                                                     std::declval<typename Row::Buffer&>()))>,
                "group(i, left, buffer): the row from i on, good for a whole group; a copy where fewer are left");
  return is_tile_row<Row>();
}

// The row of a matrix of numbers of type T.
template <class V, class T>
struct Numbers {
  static constexpr bool padded = false, streamed = true;
  using Buffer = T[group_size];
  const T* p;

  Numbers(const T* p) : p(p) {}
  Numbers(const Stored& m, int64_t n, int64_t k)
      : p(static_cast<const T*>(m.data.data) + n * m.data.stride + k) {}
  const T* at(int64_t i) const { return p + i; }
  static constexpr int64_t bytes(int64_t i) { return i * static_cast<int64_t>(sizeof(T)); }
  Unscaled<V> loader(int64_t) const { return {}; }
  Numbers group(int64_t i, int64_t left, Buffer& buffer) const {
    if (left >= group_size) return p + i;
    std::memset(buffer, 0, sizeof buffer);
    std::memcpy(buffer, p + i, static_cast<size_t>(left) * sizeof(T));
    return buffer;
  }
};

// The row of a matrix of codes, `per_byte` to a byte; Loader, one of V's, makes numbers of them.
template <class V, class Loader, class Byte, int codes>
struct Codes {
  static constexpr bool padded = true, streamed = true;
  static constexpr int per_byte = codes;
  struct Buffer {};
  const Byte* p;
  const bf16* scales;

  Codes(const Byte* p, const bf16* scales) : p(p), scales(scales) {}
  Codes(const Stored& m, int64_t n, int64_t k)
      : p(static_cast<const Byte*>(m.data.data) + n * m.data.stride + k / per_byte),
        scales(static_cast<const bf16*>(m.scale.data) + n * m.scale.stride + k / group_size) {}
  const Byte* at(int64_t i) const { return p + i / per_byte; }
  static constexpr int64_t bytes(int64_t i) { return i / per_byte; }
  Loader loader(int64_t i) const { return Loader(V::set1(scales[i / group_size])); }
  V first_scales(int64_t g, int64_t n) const { return load<V>(scales + g, n); }  // of n groups, or of W, from g on
  Codes group(int64_t i, int64_t, Buffer&) const { return {at(i), scales + i / group_size}; }
};

template <class V>
using Int8Codes = Codes<V, typename V::Int8, int8_t, 1>;
template <class V>
using Int4Codes = Codes<V, typename V::Int4, uint8_t, 2>;

// Codes with their scales as float32, padded with zeros: as Row stores them, or as a Dot has stored them as X, in its order.
template <class V, class X, class Row>
struct Scaled {
  static constexpr bool streamed = std::is_same_v<const X*, decltype(Row::p)>;
  static constexpr int per_byte = Row::per_byte;
  const X* p;
  const float* scales;

  const X* at(int64_t i) const { return p + (streamed ? Row::bytes(i) : i); }
  static constexpr int64_t bytes(int64_t i) { return Row::bytes(i); }
  V loader(int64_t i) const { return V::set1(scales[i / group_size]); }
  V first_scales(int64_t g, int64_t) const { return V::load(scales + g); }
};

// The type of a stored row, as a value.
template <class Row>
struct Kind {
  static_assert(is_stored_row<Row>());
  using type = Row;
};

// Calls f with the kind of a matrix' rows, or with those of both matrices of a weight.
template <class V, class T, class F>
inline void with_rows(Storage storage, F f) {
  switch (storage) {
    case Storage::dense: return f(Kind<Numbers<V, T>>{});
    case Storage::int8: return f(Kind<Int8Codes<V>>{});
    case Storage::int4: return f(Kind<Int4Codes<V>>{});
  }
}

template <class V, class T, class F>
inline void with_rows(const Weight& weight, F f) {
  if (weight.base.storage == Storage::dense)
    with_rows<V, T>(weight.other.storage, [&](auto other) { f(Kind<Numbers<V, T>>{}, other); });
  else  // codes all over: there is one such format
    f(Kind<Int8Codes<V>>{}, Kind<Int4Codes<V>>{});
}

// Of internal linkage, as everything must be here.
static inline bool has_target(const Weight& weight) { return weight.other.storage == Storage::dense; }

// W(λ) of what the two matrices of a weight hold.
template <class V>
inline V blend(const Weight& weight, float lam, V base, V other) {
  return has_target(weight) ? lerp(lam, base, other) : fma(V::set1(lam), other, base);
}

}  // namespace dami
