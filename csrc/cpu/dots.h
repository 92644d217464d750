// How x and a weight are multiplied: what a Dot must offer, and the one that any vector type allows.
#pragma once

#include <type_traits>
#include <utility>

#include "pieces.h"
#include "storage.h"

namespace dami {

// How products are summed along K, `step` elements at a time: what every Dot offers for rows of type Row.
template <class V, class Dot, class Row>
constexpr bool is_dot_of() {
  using std::declval;
  using X = typename Dot::X;
  using Loader = decltype(Dot::loader(declval<const Row&>(), int64_t{}, int64_t{}));
  static_assert(is_tile_row<Row>());
  static_assert(Dot::step % group_size == 0 || group_size % Dot::step == 0, "step: whole groups, or a part of one");
  static_assert(Dot::blocks.block % group_size == 0 && Dot::blocks.tail % group_size == 0,
                "blocks: how much of k is summed in vectors, whole groups");
  static_assert(1 <= Dot::tile_m && Dot::tile_m <= max_tile_m, "tile_m: rows of x in a register tile");
  static_assert(gives<const bool, decltype(Dot::any_rows)>, "any_rows: whether it is good for more than few rows");
  static_assert(gives<int64_t, decltype(Dot::at_block(int64_t{}))>, "at_block(k): where the block of x from k on begins");
  using Operand = decltype(Dot::operand(declval<const Row&>(), int64_t{}, declval<const Loader&>()));
  static_assert(gives<V, decltype(Dot::multiply_add(some_pointer<X>(), declval<const Operand&>(), declval<V>()))>,
                "multiply_add(x, operand(row, i, loader), sum): a step");
  static_assert(gives<V, decltype(Dot::begin(declval<const Row&>(), int64_t{}, int64_t{}, some_pointer<X>()))>,
                "begin(row, i, count, x): what a sum over a block begins with");
  static_assert(gives<V, decltype(Dot::scaled(declval<V>(), some_pointer<X>()))>, "scaled(sum, x): what it ends as");
  static_assert(gives<const X*, decltype(Dot::second(some_pointer<X>(), int64_t{}, int{}))>,
                "second(x, stride, rows): what else the block is to be multiplied by, or null");
  if constexpr (Dot::step > group_size)
    static_assert(gives<Operand, decltype(Dot::partial_operand(declval<const Row&>(), int64_t{}, int64_t{},
                                                               declval<const Loader&>()))>,
                  "partial_operand(row, i, count, loader): fewer groups than a step has");
  if constexpr (Dot::any_rows)
    static_assert(gives<void, decltype(Dot::store(declval<Operand>(), static_cast<X*>(nullptr)))>, "store(operand, to)");
  return true;
}

// One that multiplies dense weights, as they are and blended, and rows of every storage.
template <class V, class Dot, class T>
constexpr bool is_dense_dot() {
  using std::declval;
  using X = typename Dot::X;
  using Row = Numbers<V, T>;
  static_assert(Dot::any_rows, "any_rows: as tiles of blended weights have any number of them");
  static_assert(Dot::blocks.block * static_cast<int64_t>(sizeof(X)) == block_bytes, "blocks: of block_bytes");
  static_assert(Dot::parts == 1 || Dot::parts == 2, "parts: in which a step is loaded");
  static_assert(1 <= Dot::short_m && Dot::short_m <= Dot::tile_m, "short_m: rows of x in a tile that finds the weight in L1");
  static_assert(Dot::parts * static_cast<int>(sizeof(V)) == Dot::step * static_cast<int>(sizeof(X)), "step: in bytes");
  static_assert(gives<V, decltype(Dot::multiply_add(Dot::template load<0>(some_pointer<X>()),
                                                    Dot::template load<Dot::parts - 1>(some_pointer<X>()), declval<V>()))>,
                "multiply_add(load<part>(x), load<part>(w), sum)");
  using Loader = decltype(Dot::loader(declval<const Row&>(), int64_t{}, int64_t{}));
  static_assert(gives<Two<V>, decltype(Dot::widen(declval<const Row&>(), int64_t{}, declval<const Loader&>()))>,
                "widen(row, i, loader): a step in float32");
  static_assert(gives<void, decltype(Dot::store(declval<Two<V>>(), static_cast<X*>(nullptr)))>, "store(widened, to)");
  return is_dot_of<V, Dot, Row>() && is_dot_of<V, Dot, Int8Codes<V>>() && is_dot_of<V, Dot, Int4Codes<V>>();
}

// One that multiplies codes, where Dot multiplies dense weights: the same, or one that lays out x for itself.
template <class V, class CodesDot, class Dot>
constexpr bool is_codes_dot() {
  using X = typename CodesDot::X;
  if constexpr (!std::is_same_v<CodesDot, Dot>) {
    static_assert(Dot::blocks.block % CodesDot::blocks.block == 0 && CodesDot::blocks.tail <= Dot::blocks.tail,
                  "blocks: they divide those of dense weights");
    static_assert(gives<void, decltype(CodesDot::prepare_block(some_pointer<bf16>(), int64_t{}, static_cast<X*>(nullptr)))>,
                  "prepare_block(x, count, to)");
    if constexpr (CodesDot::any_rows)
      static_assert(is_dot_of<V, CodesDot, Scaled<V, X, Int8Codes<V>>>() && is_dot_of<V, CodesDot, Scaled<V, X, Int4Codes<V>>>());
  }
  return is_dot_of<V, CodesDot, Int8Codes<V>>() && is_dot_of<V, CodesDot, Int4Codes<V>>();
}

// Multiplies in float32. bfloat16 becomes float32 cheapest as the even and the odd elements of a vector, a shift and a mask;
// so where `split`, weights are read in that order, and x lies in it.
template <class V, bool split>
struct FloatDot {
  using X = float;
  static constexpr int step = 2 * V::W, parts = 2, tile_m = V::tile_m, short_m = tile_m;
  static constexpr bool any_rows = true;
  static constexpr Blocking blocks{block_bytes / sizeof(X), block_bytes / sizeof(X) / 4};
  static int64_t at_block(int64_t k) { return k; }
  template <int part>
  static V load(const float* x) {
    return V::load(x + part * V::W);
  }
  static V multiply_add(V x, V w, V sum) { return fma(x, w, sum); }
  template <class Row, class Loader>
  static Two<V> operand(const Row& row, int64_t i, const Loader& loader) {
    if constexpr (split) return {loader.load_even(row.at(i)), loader.load_odd(row.at(i))};
    return {loader.load(row.at(i)), loader.load(row.at(i + V::W))};
  }
  template <class Row, class Loader>
  static Two<V> widen(const Row& row, int64_t i, const Loader& loader) {
    return operand(row, i, loader);
  }
  static void store(Two<V> v, float* to) {
    v.a.store(to);
    v.b.store(to + V::W);
  }
  static V multiply_add(const float* x, Two<V> w, V sum) { return fma(load<1>(x), w.b, fma(load<0>(x), w.a, sum)); }
  template <class Row>
  static auto loader(const Row& row, int64_t i, int64_t) {
    return row.loader(i);
  }
  template <class Row>
  static V begin(const Row&, int64_t, int64_t, const float*) {
    return V::zero();
  }
  static V scaled(V sum, const float*) { return sum; }
  static const float* second(const float*, int64_t, int) { return nullptr; }
};

// Writes a row as Dot multiplies it, in whole groups, which begin `stride` apart.
template <class V, class Dot, class Row>
inline void fill(const Row& row, int64_t count, typename Dot::X* to, int64_t stride = group_size) {
  typename Row::Buffer buffer;
  for (int64_t i = 0; i < count; i += group_size) {
    const Row group = row.group(i, count - i, buffer);
    const auto loader = Dot::loader(group, 0, group_size);
    for (int64_t j = 0; j < group_size; j += Dot::step)
      Dot::store(Dot::operand(group, j, loader), to + i / group_size * stride + j);
  }
}

// The same of W(λ), of whose matrices these are rows; calls before(i) for every group.
template <class V, class Dot, class Base, class Other, class F>
inline void fill_blended(const Weight& weight, float lam, const Base& base, const Other& other, int64_t count,
                         typename Dot::X* to, int64_t stride, F before) {
  typename Base::Buffer base_buffer;
  typename Other::Buffer other_buffer;
  for (int64_t i = 0; i < count; i += group_size) {
    before(i);
    const Base b = base.group(i, count - i, base_buffer);
    const Other o = other.group(i, count - i, other_buffer);
    const auto base_loader = b.loader(0);
    const auto other_loader = o.loader(0);
    for (int64_t j = 0; j < group_size; j += Dot::step) {
      const Two<V> x = Dot::widen(b, j, base_loader), y = Dot::widen(o, j, other_loader);
      Dot::store(Two<V>{blend(weight, lam, x.a, y.a), blend(weight, lam, x.b, y.b)}, to + i / group_size * stride + j);
    }
  }
}

}  // namespace dami
