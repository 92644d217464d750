// `linear`: which tiles a block of rows of x takes, and what becomes of their sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "prepared.h"
#include "rates.h"
#include "tiles.h"

namespace dami {

// Dot multiplies dense weights and blended ones, CodesDot codes.
template <class V, class Dot, class CodesDot, class T>
struct LinearKernel {
  static_assert(is_dense_dot<V, Dot, T>() && is_codes_dot<V, CodesDot, Dot>());
  using X = typename Dot::X;
  using RowOfX = PreparedRow<V, Dot, CodesDot, T>;
  static constexpr int max_rows = 96, max_outputs = sums_stride, panel = 1;
  static constexpr int tile_rows = std::min<int>(V::tile_m, max_stream_rows);
  static constexpr int64_t block_k = Dot::blocks.block, room_k = block_k + Dot::blocks.tail;
  static constexpr int64_t stream_blocks = 8;  // of a weight, which few rows, bound by memory, take at a time
  static constexpr int64_t max_groups = ((stream_blocks * block_k + Dot::blocks.tail) / group_size + V::W - 1) / V::W * V::W;
  static constexpr int64_t cached_bytes = 128 * 1024;  // of x, which the rows of a weight pass by

  struct alignas(64) Scratch {
    X weight[2][tile_n][room_k];
    float scales[2][tile_n][max_groups];  // whole vectors
    float sums[2][max_rows][max_outputs];  // of the base and the other matrix, or of the blended one
  };
  static int64_t scratch_bytes(int64_t, int64_t) { return sizeof(Scratch); }

  // Whether the rows of x are so few that they wait for memory: then a weight is multiplied as it is stored.
  static bool streams(const Block& block) {
    const auto blends = [](const Group& group) { return group.mode == Mode::blend; };
    return static_cast<int64_t>(block.rows.size()) <= V::few && std::none_of(block.groups.begin(), block.groups.end(), blends);
  }

  // Whether codes are multiplied by CodesDot, which reads x as it lays it out.
  static bool takes_codes_dot(const Block& block) { return CodesDot::any_rows || (streams(block) && !block.invariant); }

  // Some rows of x against tile_n rows of a weight: where they begin in the block, what their sums are added to, and how many
  // rows are still to be multiplied by these, they included.
  struct Rows {
    const Block& block;
    int64_t begin, end;
    float* sums;
    int64_t left;
  };

  // Calls f(x, the distance of its rows, their sums, how many) for register tiles of nearly equal height up to `max_height`,
  // over which the prefetch is spread, `steps` of it in each.
  template <class D, class F>
  static void for_tiles(const Rows& rows, int64_t k, int64_t max_height, Prefetch<tile_n>& prefetch, int64_t steps, F f) {
    const int64_t all = rows.end - rows.begin, count = (all + max_height - 1) / max_height;
    prefetch.spread(count * steps * rows.left / all);
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = all * i / count, end = all * (i + 1) / count;
      f(RowOfX::template at<D>(rows.block, rows.begin + begin, k), rows.block.x_stride / static_cast<int64_t>(sizeof(typename D::X)),
        rows.sums + begin * sums_stride, end - begin);
    }
  }

  // How many of some rows go first, in tiles of up to tile_m: all of them; or, if tiles of short_m are better where they find
  // the rows of the weight in L1, one tile, which leaves whole ones of those.
  static int64_t first_rows(int64_t all) {
    constexpr int64_t tall = Dot::tile_m, low = Dot::short_m;
    return low == tall || all <= tall ? all : tall - (low - (all - tall) % low) % low;
  }

  static void tiles(const Rows& rows, const X* const* w, const Piece& piece, Prefetch<tile_n>& prefetch) {
    static constexpr decltype(&tile<V, Dot, 1>) of_height[] = {tile<V, Dot, 1>, tile<V, Dot, 2>, tile<V, Dot, 3>,
                                                               tile<V, Dot, 4>, tile<V, Dot, 5>, tile<V, Dot, 6>};
    const int64_t steps = (piece.padded() + tile_step - 1) / tile_step, count = first_rows(rows.end - rows.begin);
    const auto multiply = [&](const X* x, int64_t stride, float* sums, int64_t height) {
      of_height[height - 1](x, stride, w, prefetch, piece.padded(), sums);
    };
    const int64_t others = rows.begin + count;
    for_tiles<Dot>({rows.block, rows.begin, others, rows.sums, rows.left}, piece.k, Dot::tile_m, prefetch, steps, multiply);
    if (others < rows.end)
      for_tiles<Dot>({rows.block, others, rows.end, rows.sums + count * sums_stride, rows.left - count}, piece.k, Dot::short_m,
                     prefetch, steps, multiply);
  }

  template <class D, class Row>
  static constexpr decltype(&stream<V, D, 1, Row>) stream_of_height[max_stream_rows] = {stream<V, D, 1, Row>, stream<V, D, 2, Row>,
                                                                                       stream<V, D, 3, Row>, stream<V, D, 4, Row>};

  // Calls f with the kind of a matrix' rows and with the Dot, as a value, that multiplies them if codes are multiplied as such.
  template <class F>
  static void with_kind(const Stored& stored, bool as_codes, F f) {
    with_rows<V, T>(stored.storage, [&](auto kind) {
      if constexpr (decltype(kind)::type::padded && RowOfX::two_dots)
        if (as_codes) return f(kind, CodesDot{});
      f(kind, Dot{});
    });
  }

  template <class Row>
  static inline __attribute__((always_inline)) Row row(const Stored& stored, const Piece& piece, int i) {
    return Row(stored, piece.row(i), piece.k);
  }

  // Multiplies a group of few rows by a piece of a matrix as it is stored, while another is fetched: where the next one follows
  // in the same columns, the one after it, as memory may take longer to answer than a piece takes.
  static void stream_piece(const Block& block, const Group& group, const Stored& stored, bool as_codes, const Piece& piece,
                           const Piece& next, float* sums, float (*scales)[max_groups]) {
    with_kind(stored, as_codes, [&](auto kind, auto dot) {
      using Row = typename decltype(kind)::type;
      using D = decltype(dot);
      const Row w[tile_n] = {row<Row>(stored, piece, 0), row<Row>(stored, piece, 1), row<Row>(stored, piece, 2),
                             row<Row>(stored, piece, 3)};
      const Row after = row<Row>(stored, next, 0);
      const int64_t pieces = next.k == piece.k ? 2 : 1;
      const int64_t ahead = pieces * (reinterpret_cast<const char*>(after.at(0)) - reinterpret_cast<const char*>(w[0].at(0)));
      if constexpr (Row::padded)
        for (const Row& each : w)
          for (int64_t g = 0; g < next.count / group_size; g += 64 / static_cast<int64_t>(sizeof(bf16)))
            __builtin_prefetch(each.scales + pieces * (after.scales - w[0].scales) + g, 0, 2);
      if constexpr (!std::is_same_v<D, Dot> && D::any_rows)
        if (group.end - group.begin > D::tile_m) {  // for that many it pays to convert the scales once
          using Codes = Scaled<V, std::remove_const_t<std::remove_pointer_t<decltype(Row::p)>>, Row>;
          for (int i = 0; i < tile_n; i++) write_scales(w[i], piece.count, scales[i]);
          const Codes scaled[tile_n] = {{w[0].p, scales[0]}, {w[1].p, scales[1]}, {w[2].p, scales[2]}, {w[3].p, scales[3]}};
          return stream_rows<D>(block, group, scaled, ahead, piece, sums);
        }
      stream_rows<D>(block, group, w, ahead, piece, sums);
    });
  }

  template <class D, class Row>
  static void stream_rows(const Block& block, const Group& group, const Row* w, int64_t ahead, const Piece& piece, float* sums) {
    for (int64_t begin = group.begin, height; begin < group.end; begin += height) {
      const int64_t left = group.end - begin;
      height = left > max_stream_rows ? left / 2 : left;
      stream_of_height<D, Row>[height - 1](RowOfX::template at<D>(block, begin, piece.k),
                                           block.x_stride / static_cast<int64_t>(sizeof(typename D::X)), w, ahead, piece.padded(),
                                           sums + (begin - group.begin) * sums_stride);
    }
  }

  template <class Row>
  static void write_scales(const Row& row, int64_t count, float* to) {
    for (int64_t g = 0, groups = (count + group_size - 1) / group_size; g < groups; g += V::W)
      row.first_scales(g, groups - g).store(to + g);
  }

  // A matrix of the weight, for one piece, converted once for all groups of rows.
  struct Operand {
    const Stored& stored;
    X (*const to)[room_k];
    float (*const scales)[max_groups];
    bool converted = false;
    const X* w[tile_n];

    void multiply(const Rows& rows, const Piece& piece, Prefetch<tile_n>& prefetch) {
      with_kind(stored, CodesDot::any_rows, [&](auto kind, auto dot) {
        using Row = typename decltype(kind)::type;
        using D = decltype(dot);
        if constexpr (D::any_rows) {
          if (!std::exchange(converted, true))
            for (int i = 0; i < tile_n; i++) convert<D>(row<Row>(stored, piece, i), piece.count, i);
          if constexpr (std::is_same_v<D, Dot>) tiles(rows, w, piece, prefetch);
          else stream_codes<Row>(rows, piece, prefetch);
        }
      });
    }

    template <class D, class Row>
    void convert(const Row& from, int64_t count, int i) {
      w[i] = to[i];
      if constexpr (std::is_same_v<Row, Numbers<V, X>>)
        if (count % group_size == 0) {
          w[i] = from.p;
          return;
        }
      fill<V, D>(from, count, reinterpret_cast<typename D::X*>(to[i]));
      if constexpr (!std::is_same_v<D, Dot>) write_scales(from, count, scales[i]);
    }

    template <class Row>
    void stream_codes(const Rows& rows, const Piece& piece, Prefetch<tile_n>& prefetch) {
      using CodesX = typename CodesDot::X;
      using Codes = Scaled<V, CodesX, Row>;
      const auto codes = [&](int i) { return Codes{reinterpret_cast<const CodesX*>(to[i]), scales[i]}; };
      const Codes codes_of[tile_n] = {codes(0), codes(1), codes(2), codes(3)};
      for_tiles<CodesDot>(rows, piece.k, CodesDot::tile_m, prefetch, 1, [&](const CodesX* x, int64_t stride, float* sums, int64_t height) {
        prefetch.step();
        stream_of_height<CodesDot, Codes>[height - 1](x, stride, codes_of, 0, piece.padded(), sums);
      });
    }
  };

  static void blend_rows(const Weight& weight, float lam, const Piece& piece, X (*to)[room_k], Prefetch<tile_n>& prefetch) {
    prefetch.spread(tile_n * ((piece.count + tile_step - 1) / tile_step));
    with_rows<V, T>(weight, [&](auto base_kind, auto other_kind) {
      using Base = typename decltype(base_kind)::type;
      using Other = typename decltype(other_kind)::type;
      for (int n = 0; n < tile_n; n++)
        fill_blended<V, Dot>(weight, lam, row<Base>(weight.base, piece, n), row<Other>(weight.other, piece, n), piece.count, to[n],
                             group_size, [&](int64_t i) {
                               if (i % tile_step == 0) prefetch.step();
                             });
    });
  }

  // All that a piece adds to the sums, while the next one is fetched.
  static void multiply(const Linear& p, const Block& block, const Piece& piece, const Piece& next, int64_t n0,
                       Scratch& scratch) {
    Prefetch<tile_n> prefetch[2] = {prefetch_of<tile_n>(p.weight.base, next, sizeof(T)),
                                    prefetch_of<tile_n>(p.weight.other, next, sizeof(T))};
    Operand base{p.weight.base, scratch.weight[0], scratch.scales[0], false, {}};
    Operand other{p.weight.other, scratch.weight[1], scratch.scales[1], false, {}};
    int64_t left[2] = {0, 0};  // rows that are still to be multiplied by each
    for (const Group& group : block.groups) {
      if (group.mode != Mode::other) left[0] += group.end - group.begin;
      if (group.mode == Mode::other || group.mode == Mode::both) left[1] += group.end - group.begin;
    }
    const auto rows = [&](const Group& group, int sums, int matrix) {
      const int64_t now = std::exchange(left[matrix], left[matrix] - (group.end - group.begin));
      return Rows{block, group.begin, group.end, &scratch.sums[sums][group.begin][piece.n - n0], now};
    };
    // The last group first: it mostly has the most rows, and a tall tile has the most to do while it waits for the weight.
    for (auto group = block.groups.rbegin(); group != block.groups.rend(); ++group) switch (group->mode) {
        case Mode::base: base.multiply(rows(*group, 0, 0), piece, prefetch[0]); break;
        case Mode::other: other.multiply(rows(*group, 0, 1), piece, prefetch[1]); break;
        case Mode::both:
          base.multiply(rows(*group, 0, 0), piece, prefetch[0]);
          other.multiply(rows(*group, 1, 1), piece, prefetch[1]);
          break;
        case Mode::blend:
          blend_rows(p.weight, block.lam[group->begin], piece, scratch.weight[0], prefetch[1]);
          const X* const w[tile_n] = {scratch.weight[0][0], scratch.weight[0][1], scratch.weight[0][2], scratch.weight[0][3]};
          tiles(rows(*group, 0, 0), w, piece, prefetch[0]);
          base.converted = other.converted = false;
      }
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int64_t rows = static_cast<int64_t>(block.rows.size());
    const size_t bytes = static_cast<size_t>((n1 - n0 + tile_n - 1) / tile_n * tile_n) * sizeof(float);
    for (auto& sums : scratch.sums)
      for (int64_t i = 0; i < rows; i++) std::memset(sums[i], 0, bytes);
    // As many columns of x as the cache holds stay there while rows of the weight pass by.
    const int64_t cached = std::max(block_k, cached_bytes / static_cast<int64_t>(sizeof(X)) / rows / block_k * block_k);
    const bool streamed = streams(block), as_codes = takes_codes_dot(block);
    const int64_t columns = streamed ? block.k : cached;
    // Pieces of a few rows are of nearly equal length, for while one is multiplied as much is fetched of the next.
    const int64_t blocks = (block.k + block_k - 1) / block_k, pieces = (blocks + stream_blocks - 1) / stream_blocks;
    const int64_t most = streamed && pieces ? (blocks + pieces - 1) / pieces * block_k : block_k;
    for_pieces({Dot::blocks, tile_n, most, columns}, n0, n1, p.n, block.k, [&](const Piece& piece, const Piece& next) {
      const bool whole_groups = p.weight.base.storage != Storage::dense || piece.count % group_size == 0;
      if (!streamed || !whole_groups) return multiply(p, block, piece, next, n0, scratch);
      for (const Group& group : block.groups) {
        const auto stream = [&](const Stored& stored, int sums) {
          stream_piece(block, group, stored, as_codes, piece, next, &scratch.sums[sums][group.begin][piece.n - n0], scratch.scales[0]);
        };
        if (group.mode != Mode::other) stream(p.weight.base, 0);
        if (group.mode != Mode::base) stream(p.weight.other, group.mode == Mode::both);
      }
    });
    for (const Group& group : block.groups)
      for (int i = group.begin; i < group.end; i++)
        finish(p, block, group.mode, i, n0, n1, scratch.sums[0][i], scratch.sums[1][i]);
  }

  // λ, the bias and the one rounding, for the sums of a row: those of `other` only if there are two.
  static void finish(const Linear& p, const Block& block, Mode mode, int64_t i, int64_t n0, int64_t n1, const float* sums,
                     const float* other) {
    const T *bias_base = static_cast<const T*>(p.bias.base.data), *bias_target = static_cast<const T*>(p.bias.target.data);
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + block.rows[i] * p.y.stride;
    const float lam = block.lam[i];
    for (int64_t n = n0; n < n1; n += V::W) {
      const int64_t at = n - n0, left = n1 - n;
      V sum = V::load(sums + at);
      if (mode == Mode::both && lam != 0) {
        const V target = V::load(other + at);
        sum = lam == 1 && has_target(p.weight) ? target : blend(p.weight, lam, sum, target);
      }
      if (bias_base)
        sum = sum + lerp_of<V>(
                        lam, [&] { return load<V>(bias_base + n, left); }, [&] { return load<V>(bias_target + n, left); });
      if (p.part == Part::base_times_lam) sum = lam == 0 ? V::zero() : V::set1(lam) * sum;
      if (p.part == Part::base_added) sum = sum + load<V>(y + n, left);
      store(sum, y + n, left);
    }
  }

  static double multiply_add(int64_t steps) { return dami::multiply_add<V, Dot>(steps); }

  static void prepare(const Matrix& x, bool codes, const Block& block, int64_t first) {
    RowOfX::write(static_cast<const T*>(x.data) + block.rows[first] * x.stride, block.k, codes && takes_codes_dot(block),
                  block.x + first * block.x_stride);
  }
};

}  // namespace dami
