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
  static_assert(gives<Row, decltype(Row::in_tile(some_pointer<Row>(), int{}))>, "in_tile(rows, n): rows[n] of a tile");
  static_assert(!gives<void, decltype(std::declval<const Row&>().loader(int64_t{}))>,
                "loader(i): what makes vectors of the numbers of i's group");
  return true;
}

// A row of a matrix as it is stored.
template <class Row>
constexpr bool is_stored_row() {
  static_assert(gives<const bool, decltype(Row::padded)>, "padded: whether it may be read up to a whole number of groups");
  static_assert(std::is_constructible_v<Row, const Stored&, int64_t, int64_t, int64_t, float*>,
                "Row(matrix, n, k, count, scales): row n from column k on, with room for the scales of `count` columns");
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
  Numbers(const Stored& m, int64_t n, int64_t k, int64_t, float*)
      : p(static_cast<const T*>(m.data.data) + n * m.data.stride + k) {}
  static Numbers in_tile(const Numbers* rows, int n) { return rows[n]; }
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

// Rows that are bound by memory take so many blocks of a weight at a time; and so many groups those have at most, with a
// short block that the last of them may take in.
constexpr int64_t max_stream_blocks = 8, max_groups = (max_stream_blocks + 1) * block_bytes / 2 / group_size;

// The row of a matrix of codes, `per_byte` to a byte; Loader, one of V's, makes numbers of them. The scales are laid out as float32 first, those of the rows
// of a tile `max_groups` apart.
template <class V, class Loader, class Byte, int codes>
struct Codes {
  static constexpr bool padded = true, streamed = true;
  static constexpr int per_byte = codes;
  struct Buffer {};
  const Byte* p;
  const float* scales;

  Codes(const Byte* p, const float* scales) : p(p), scales(scales) {}
  Codes(const Stored& m, int64_t n, int64_t k, int64_t count, float* scales)
      : p(static_cast<const Byte*>(m.data.data) + n * m.data.stride + k / per_byte), scales(scales) {
    const bf16* from = static_cast<const bf16*>(m.scale.data) + n * m.scale.stride + k / group_size;
    const int64_t groups = (count + group_size - 1) / group_size;
    if (groups % V::W) V::zero().store(scales + groups / V::W * V::W);  // sums over groups take whole vectors
    for (int64_t i = 0; i < groups; i += V::W) {
      const int64_t at = std::max<int64_t>(0, std::min<int64_t>(i, groups - V::W));  // a whole vector, if there is one
      load<V>(from + at, groups - at).store(scales + at);
    }
  }
  // rows[n], in such a way that the compiler knows how far its scales are from those of rows[0], and spares a register.
  static Codes in_tile(const Codes* rows, int n) { return {rows[n].p, rows->scales + n * max_groups}; }
  const Byte* at(int64_t i) const { return p + i / per_byte; }
  static constexpr int64_t bytes(int64_t i) { return i / per_byte; }
  Loader loader(int64_t i) const { return Loader(V::set1(scales[i / group_size])); }
  Codes group(int64_t i, int64_t, Buffer&) const { return {at(i), scales + i / group_size}; }
};

template <class V>
using Int8Codes = Codes<V, typename V::Int8, int8_t, 1>;
template <class V>
using Int4Codes = Codes<V, typename V::Int4, uint8_t, 2>;

// Codes, stored as Row is, that a Dot has stored as X, in its order.
template <class V, class X, class Row>
struct Converted {
  static constexpr bool streamed = false;
  static constexpr int per_byte = Row::per_byte;
  const X* p;
  const float* scales;

  static Converted in_tile(const Converted* rows, int n) { return {rows[n].p, rows->scales + n * max_groups}; }
  const X* at(int64_t i) const { return p + i; }
  static constexpr int64_t bytes(int64_t i) { return Row::bytes(i); }
  V loader(int64_t i) const { return V::set1(scales[i / group_size]); }
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
