// `linear`: which tiles a block of rows of x takes, and what becomes of their sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "prepared.h"
#include "tiles.h"

namespace dami {

// Dot multiplies dense weights and blended ones, CodesDot codes.
template <class V, class Dot, class CodesDot, class T>
struct LinearKernel {
  static_assert(is_dense_dot<V, Dot, T>() && is_codes_dot<V, CodesDot, Dot>());
  using X = typename Dot::X;
  using RowOfX = PreparedRow<V, Dot, CodesDot, T>;
  static constexpr int64_t block_k = Dot::block;
  static constexpr int64_t cached_bytes = 128 * 1024;  // of x, which the rows of a weight pass by
  static constexpr int64_t max_stream_rows = 4;  // so few rows wait for memory: a weight is best converted in registers

  struct alignas(64) Scratch {
    X weight[2][tile_n][block_k];
    float scales[2][tile_n][max_groups];
    // Of the base and the other matrix, or of the blended one; of tile_n outputs those of all rows lie together.
    float sums[2][max_outputs * max_rows];
  };
  static_assert(sizeof(Scratch) == linear_scratch(max_rows));

  // Rows n to n + tile_n of a weight, of which those from `end` on are not there; columns [k, k + count).
  struct Piece {
    int64_t n, end, k, count;
    int64_t row(int i) const { return std::min(n + i, end - 1); }
    int64_t padded() const { return (count + group_size - 1) / group_size * group_size; }
  };

  // Some rows of x against tile_n rows of a weight: where they begin in the block, and what their sums are added to.
  struct Rows {
    const Block& block;
    int64_t begin, end;
    float* sums;
  };

  // Calls f(x, the distance of its rows, their sums, how many) for register tiles of nearly equal height up to `max_height`,
  // over which the prefetch is spread, `steps` of it in each.
  template <class D, class F>
  static void for_tiles(const Rows& rows, int64_t k, int64_t max_height, Prefetch& prefetch, int64_t steps, F f) {
    const int64_t all = rows.end - rows.begin, count = (all + max_height - 1) / max_height;
    prefetch.spread(count * steps);
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = all * i / count, end = all * (i + 1) / count;
      f(RowOfX::template at<D>(rows.block, rows.begin + begin, k), rows.block.x_stride / static_cast<int64_t>(sizeof(typename D::X)),
        rows.sums + begin * tile_n, end - begin);
    }
  }

  static void tiles(const Rows& rows, const X* const* w, const Piece& piece, Prefetch& prefetch) {
    static constexpr decltype(&tile<V, Dot, 1>) of_height[] = {tile<V, Dot, 1>, tile<V, Dot, 2>, tile<V, Dot, 3>,
                                                               tile<V, Dot, 4>, tile<V, Dot, 5>, tile<V, Dot, 6>};
    const int64_t steps = (piece.padded() + tile_step - 1) / tile_step;
    for_tiles<Dot>(rows, piece.k, V::tile_m, prefetch, steps, [&](const X* x, int64_t stride, float* sums, int64_t height) {
      of_height[height - 1](x, stride, w, prefetch, piece.padded(), sums);
    });
  }

  template <class D, class Row>
  static void streams(const Rows& rows, const Row* w, const Piece& piece, Prefetch& prefetch, int64_t max_height) {
    static constexpr decltype(&stream<V, D, 1, Row>) of_height[max_stream_rows] = {stream<V, D, 1, Row>, stream<V, D, 2, Row>,
                                                                       stream<V, D, 3, Row>, stream<V, D, 4, Row>};
    const int64_t steps = stream_steps<D, Row>(std::min(max_height, rows.end - rows.begin), piece.padded());
    for_tiles<D>(rows, piece.k, max_height, prefetch, steps, [&](const typename D::X* x, int64_t stride, float* sums, int64_t height) {
      of_height[height - 1](x, stride, w, prefetch, piece.padded(), sums);
    });
  }

  template <class Row>
  static Row row(const Stored& stored, const Piece& piece, int i, float* scales) {
    return Row(stored, piece.row(i), piece.k, piece.count, scales);
  }

  // Where a piece of a matrix lies. Fetches its scales at once: without them nothing begins.
  static Prefetch prefetch_of(const Stored& stored, const Piece& piece) {
    const bool dense = stored.storage == Storage::dense;
    const int64_t bits = dense ? 8 * static_cast<int64_t>(sizeof(T)) : stored.storage == Storage::int8 ? 8 : 4;
    const int64_t stride = stored.data.stride * (dense ? static_cast<int64_t>(sizeof(T)) : 1);
    for (int i = 0; i < tile_n && !dense; i++) {
      const auto* scales = static_cast<const bf16*>(stored.scale.data) + piece.row(i) * stored.scale.stride;
      for (int64_t k = piece.k; k < piece.k + piece.count; k += group_size * 64 / static_cast<int64_t>(sizeof(bf16)))
        __builtin_prefetch(scales + k / group_size, 0, 2);
    }
    const char* const data = static_cast<const char*>(stored.data.data);
    return {data + piece.n * stride + piece.k * bits / 8, stride, piece.count * bits / 8};
  }

  // A matrix of the weight, for one piece: as it is stored, or converted once for all groups of rows.
  struct Operand {
    const Stored& stored;
    X (*const to)[block_k];
    float (*const scales)[max_groups];
    bool converted = false;
    const X* w[tile_n];

    void multiply(const Rows& rows, const Piece& piece, Prefetch& prefetch) {
      const bool in_registers = static_cast<int64_t>(rows.block.rows.size()) <= max_stream_rows;
      with_rows<V, T>(stored.storage, [&](auto kind) {
        using Row = typename decltype(kind)::type;
        if constexpr (Row::padded && RowOfX::two_dots)
          if (CodesDot::any_rows || (in_registers && !rows.block.invariant))
            return multiply_by<CodesDot, Row>(rows, piece, prefetch, in_registers);
        multiply_by<Dot, Row>(rows, piece, prefetch, in_registers);
      });
    }

    template <class D, class Row>
    void multiply_by(const Rows& rows, const Piece& piece, Prefetch& prefetch, bool in_registers) {
      if (in_registers && (Row::padded || piece.count % group_size == 0)) {
        const Row w[tile_n] = {row<Row>(stored, piece, 0, scales[0]), row<Row>(stored, piece, 1, scales[1]),
                               row<Row>(stored, piece, 2, scales[2]), row<Row>(stored, piece, 3, scales[3])};
        return streams<D>(rows, w, piece, prefetch, max_stream_rows);
      }
      if constexpr (D::any_rows) {
        if (!converted)
          for (int i = 0; i < tile_n; i++) {
            const Row from = row<Row>(stored, piece, i, scales[i]);
            w[i] = to[i];
            if constexpr (std::is_same_v<Row, Numbers<V, X>>)
              if (piece.count % group_size == 0) {
                w[i] = from.p;
                continue;
              }
            fill<V, D>(from, piece.count, reinterpret_cast<typename D::X*>(to[i]));
          }
        converted = true;
        if constexpr (std::is_same_v<D, Dot>) {
          tiles(rows, w, piece, prefetch);
        } else {
          using CodesX = typename D::X;
          const auto codes = [&](int i) {
            return Converted<V, CodesX, Row>{reinterpret_cast<const CodesX*>(to[i]), scales[i]};
          };
          const Converted<V, CodesX, Row> w[tile_n] = {codes(0), codes(1), codes(2), codes(3)};
          streams<D>(rows, w, piece, prefetch, D::tile_m);
        }
      }
    }
  };

  static void blend_rows(const Weight& weight, float lam, const Piece& piece, X (*to)[block_k], Scratch& scratch) {
    with_rows<V, T>(weight, [&](auto base_kind, auto other_kind) {
      using Base = typename decltype(base_kind)::type;
      using Other = typename decltype(other_kind)::type;
      typename Base::Buffer base_buffer;
      typename Other::Buffer other_buffer;
      for (int n = 0; n < tile_n; n++) {
        const Base base = row<Base>(weight.base, piece, n, scratch.scales[0][n]);
        const Other other = row<Other>(weight.other, piece, n, scratch.scales[1][n]);
        for (int64_t i = 0; i < piece.count; i += group_size) {
          const Base b = base.group(i, piece.count - i, base_buffer);
          const Other o = other.group(i, piece.count - i, other_buffer);
          const auto base_loader = b.loader(0);
          const auto other_loader = o.loader(0);
          for (int64_t j = 0; j < group_size; j += Dot::step) {
            const Two<V> x = Dot::widen(b, j, base_loader), y = Dot::widen(o, j, other_loader);
            Dot::store(Two<V>{blend(weight, lam, x.a, y.a), blend(weight, lam, x.b, y.b)}, to[n] + i + j);
          }
        }
      }
    });
  }

  // All that a piece adds to the sums, while the next one is fetched.
  static void multiply(const Linear& p, const Block& block, const Piece& piece, const Piece& next, int64_t n0,
                       Scratch& scratch) {
    const int64_t all = static_cast<int64_t>(block.rows.size());
    Prefetch prefetch[2] = {prefetch_of(p.weight.base, next), prefetch_of(p.weight.other, next)};
    Operand base{p.weight.base, scratch.weight[0], scratch.scales[0], false, {}};
    Operand other{p.weight.other, scratch.weight[1], scratch.scales[1], false, {}};
    const auto rows = [&](const Group& group, int which) {
      return Rows{block, group.begin, group.end, &scratch.sums[which][(piece.n - n0) * all + group.begin * tile_n]};
    };
    for (const Group& group : block.groups) switch (group.mode) {
        case Mode::base: base.multiply(rows(group, 0), piece, prefetch[0]); break;
        case Mode::other: other.multiply(rows(group, 0), piece, prefetch[1]); break;
        case Mode::both:
          base.multiply(rows(group, 0), piece, prefetch[0]);
          other.multiply(rows(group, 1), piece, prefetch[1]);
          break;
        case Mode::blend:
          blend_rows(p.weight, block.lam[group.begin], piece, scratch.weight[0], scratch);
          const X* const w[tile_n] = {scratch.weight[0][0], scratch.weight[0][1], scratch.weight[0][2], scratch.weight[0][3]};
          tiles(rows(group, 0), w, piece, prefetch[0]);
          base.converted = other.converted = false;
      }
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int64_t rows = static_cast<int64_t>(block.rows.size());
    const size_t sums = static_cast<size_t>((n1 - n0 + tile_n - 1) / tile_n * tile_n * rows);
    for (float* of_matrix : {scratch.sums[0], scratch.sums[1]}) std::memset(of_matrix, 0, sums * sizeof(float));
    // As many columns of x as the cache holds stay there while rows of the weight pass by.
    const int64_t cached = std::max(block_k, cached_bytes / static_cast<int64_t>(sizeof(X)) / rows / block_k * block_k);
    const int64_t columns = rows <= max_stream_rows ? block.k : cached;
    // Pieces of a few rows are of nearly equal length, for while one is multiplied as much is fetched of the next.
    const int64_t blocks = (block.k + block_k - 1) / block_k, pieces = (blocks + max_stream_blocks - 1) / max_stream_blocks;
    const int64_t max_columns = rows <= max_stream_rows && pieces ? (blocks + pieces - 1) / pieces * block_k : block_k;
    const auto at = [&](int64_t n, int64_t k) {
      const int64_t count = std::min(max_columns, block.k - k);
      // What ends within a group is converted, which has room for a block.
      return Piece{n, n1, k, count > block_k && count % group_size ? count / block_k * block_k : count};
    };
    for (int64_t begin = 0; begin < block.k; begin += columns) {
      const int64_t end = std::min(block.k, begin + columns);
      for (int64_t n = n0; n < n1; n += tile_n)
        for (Piece piece = at(n, begin), next; piece.n == n; piece = next) {
          const int64_t k = piece.k + piece.count;
          next = k < end             ? at(n, k)
                 : n + tile_n < n1   ? at(n + tile_n, begin)
                 : end < block.k     ? at(n0, end)
                                     : at(n, begin);
          multiply(p, block, piece, next, n0, scratch);
          if (k >= end) break;
        }
    }
    for (const Group& group : block.groups)
      for (int i = group.begin; i < group.end; i++) finish(p, block, group.mode, i, n0, n1, scratch);
  }

  // λ, the bias and the one rounding.
  static void finish(const Linear& p, const Block& block, Mode mode, int i, int64_t n0, int64_t n1,
                     const Scratch& scratch) {
    float sums[2][max_outputs + V::W];
    for (int which = 0; which < (mode == Mode::both ? 2 : 1); which++)
      for (int64_t n = 0; n < n1 - n0; n += tile_n)
        std::memcpy(&sums[which][n], &scratch.sums[which][n * static_cast<int64_t>(block.rows.size()) + i * tile_n],
                    tile_n * sizeof(float));
    const T *bias_base = static_cast<const T*>(p.bias.base.data), *bias_target = static_cast<const T*>(p.bias.target.data);
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + block.rows[i] * p.y.stride;
    const float lam = block.lam[i];
    for (int64_t n = n0; n < n1; n += V::W) {
      const int64_t at = n - n0, left = n1 - n;
      V sum = V::load(sums[0] + at);
      if (mode == Mode::both && lam != 0) {
        const V other = V::load(sums[1] + at);
        sum = lam == 1 && has_target(p.weight) ? other : blend(p.weight, lam, sum, other);
      }
      if (bias_base)
        sum = sum + lerp_of<V>(
                        lam, [&] { return load<V>(bias_base + n, left); }, [&] { return load<V>(bias_target + n, left); });
      store(sum, y + n, left);
    }
  }
};

}  // namespace dami
