// The vector type V of an instruction set: what it must offer, and what is written with nothing else.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "api.h"

namespace dami {

// Whether an expression of type Given is what a contract asks for, a Wanted.
template <class Wanted, class Given>
constexpr bool gives = std::is_same_v<Wanted, Given>;

template <class T>
const T* some_pointer();  // for what is not evaluated

// What turns codes of a group, made from its scale, into numbers: W at p, or every other one of 2 W.
template <class V, class Loader, class Byte>
constexpr bool is_loader() {
  using L = const Loader&;
  static_assert(gives<V, decltype(std::declval<L>().load(some_pointer<Byte>()))>, "load(codes)");
  static_assert(gives<V, decltype(std::declval<L>().load_even(some_pointer<Byte>()))>, "load_even(codes)");
  static_assert(gives<V, decltype(std::declval<L>().load_odd(some_pointer<Byte>()))>, "load_odd(codes)");
  return true;
}

// The vector type of an instruction set.
template <class V>
constexpr bool is_vector() {
  using std::declval;
  static_assert(group_size % (2 * V::W) == 0, "W: float32 lanes, of which two vectors divide a group");
  static_assert(1 <= V::tile_m && V::tile_m <= max_tile_m, "tile_m: rows of x in a register tile");
  static_assert(max_stream_rows <= V::few && V::few <= 2 * max_stream_rows,
                "few: up to so many rows of x wait for memory: a weight is best converted in registers");
  static_assert(gives<V, decltype(V::zero())>, "zero()");
  static_assert(gives<V, decltype(V::set1(float{}))> && gives<V, decltype(V::set1(bf16{}))>, "set1(x): x in every lane");
  static_assert(gives<V, decltype(V::load(some_pointer<float>()))>, "load(float32)");
  static_assert(gives<V, decltype(V::load(some_pointer<bf16>()))>, "load(bfloat16)");
  static_assert(gives<V, decltype(V::load(some_pointer<f16>()))>, "load(float16)");
  static_assert(gives<const bool, decltype(V::has_masks)>, "has_masks: whether there is a load(bfloat16, n) of n < W");
  static_assert(gives<V, decltype(V::load_even(some_pointer<bf16>()))>, "load_even(bfloat16): every other one of 2 W");
  static_assert(gives<V, decltype(V::load_odd(some_pointer<bf16>()))>, "load_odd(bfloat16)");
  static_assert(gives<void, decltype(declval<const V&>().store(static_cast<float*>(nullptr)))>, "store(float32)");
  static_assert(gives<void, decltype(declval<const V&>().store(static_cast<bf16*>(nullptr)))>, "store(bfloat16): rounds");
  static_assert(gives<void, decltype(declval<const V&>().store(static_cast<f16*>(nullptr)))>, "store(float16): rounds");
  static_assert(gives<void, decltype(declval<V&>().keep())>, "keep(): holds it in a register, or it is read again");
  static_assert(gives<V, decltype(declval<V>() + declval<V>())>, "a + b");
  static_assert(gives<V, decltype(declval<V>() - declval<V>())>, "a - b");
  static_assert(gives<V, decltype(declval<V>() * declval<V>())>, "a * b");
  static_assert(gives<V, decltype(fma(declval<V>(), declval<V>(), declval<V>()))>, "fma(a, b, c): a * b + c");
  static_assert(gives<void, decltype(sum4(declval<V>(), declval<V>(), declval<V>(), declval<V>(),
                                          static_cast<float*>(nullptr)))>,
                "sum4(a, b, c, d, to): adds the sum of each one's lanes to to[0], to[1], to[2], to[3]");
  static_assert(std::is_constructible_v<typename V::Int8, V> && std::is_constructible_v<typename V::Int4, V>,
                "Int8, Int4: made from the scale of a group");
  return is_loader<V, typename V::Int8, int8_t>() && is_loader<V, typename V::Int4, uint8_t>();
}

// What a vector has besides where codes are multiplied as integers.
template <class V>
constexpr bool is_vector_for_integers() {
  using std::declval;
  static_assert(gives<V, decltype(max(declval<V>(), declval<V>()))>, "max(a, b)");
  static_assert(gives<void, decltype(declval<const V&>().store(static_cast<int16_t*>(nullptr)))>, "store(int16): rounds");
  return is_vector<V>();
}

// The first n elements at p, zeros behind them.
template <class V, class T>
inline V load(const T* p, int64_t n) {
  if (n >= V::W) return V::load(p);
  if constexpr (V::has_masks && std::is_same_v<T, bf16>) return V::load(p, n);
  T buffer[V::W] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return V::load(buffer);
}

template <class V, class T>
inline void store(V v, T* p, int64_t n) {
  if (n >= V::W) return v.store(p);
  T buffer[V::W];
  v.store(buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// base + λ (target − base), as torch.lerp rounds it: exact at both ends.
template <class V>
inline V lerp(float lam, V base, V target) {
  return lam < 0.5f ? fma(V::set1(lam), target - base, base) : fma(V::set1(lam - 1), target - base, target);
}

// The same of two functions that return a V. At an end the other one is not called, so that its NaN and Inf stay away.
template <class V, class Base, class Target>
inline V lerp_of(float lam, Base base, Target target) {
  if (lam == 0) return base();
  if (lam == 1) return target();
  return lerp<V>(lam, base(), target());
}

template <class V>
struct Two {
  V a, b;
};

template <class V>
inline Two<V> lerp(float lam, Two<V> base, Two<V> target) {
  return {lerp(lam, base.a, target.a), lerp(lam, base.b, target.b)};
}

}  // namespace dami
