// AMX, whose unit multiplies tiles of bfloat16 up to sixteen times as fast as AVX-512: Intel since Sapphire Rapids.
#if defined(__AMX_BF16__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include "avx512_bf16.h"

namespace {

using dami::Block, dami::Group, dami::Linear, dami::Mode, dami::Piece, dami::Storage, dami::Stored;

// The tile registers, which belong to this thread while it lives.
struct TileRegisters {
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static constexpr Shapes shapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  TileRegisters() { _tile_loadconfig(&shapes); }
  ~TileRegisters() { _tile_release(); }
};

// Sixteen vectors of sixteen words, rows for columns.
void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// The tile unit adds a · bᵀ to float32 sums, a [16, 32] as it lies in memory, and b [16, 32] with its pairs by column. The
// weight is a: its rows are read where they lie, or converted. x is b, and is laid out once. The sums are features by rows of x.
struct AmxKernel {
  using X = bf16;
  using RowOfX = OfBf16::RowOfX;
  static constexpr int max_rows = 256, max_outputs = 256, panel = 16, tile_rows = panel;
  static constexpr int64_t tile_k = 32, tile = 16 * tile_k;  // numbers
  static constexpr int64_t tiles = 2;  // of features, in a piece
  static constexpr int64_t block_k = 512;  // of a piece: it stays in L1 while the panels of x pass by
  // Up to two panels pass by but once, and memory sends long rows sooner.
  static constexpr int64_t few_rows = 2 * panel, long_k = 1024;
  static constexpr int blend_rows = 64;
  static_assert(blend_rows > few_rows, "a piece of whole rows has no room for a blend");
  static constexpr int64_t cached_bytes = 512 * 1024;  // of x, which the pieces of a weight pass by

  struct alignas(64) Scratch {
    X weight[long_k / tile_k][tiles][tile];
    float rows[2][panel][max_outputs];
  };
  // Of a tile of features and a panel of x: [features, rows]. Those of both matrices lie behind Scratch.
  using Sums = float[16][16];
  static int64_t sums_of(int64_t rows, int64_t outputs) { return (rows + 15) / 16 * ((outputs + 15) / 16); }
  static int64_t scratch_bytes(int64_t rows, int64_t outputs) {
    return std::max<int64_t>(sizeof(OfBf16::Scratch), sizeof(Scratch) + 2 * sums_of(rows, outputs) * sizeof(Sums));
  }
  using Prefetch = dami::Prefetch<tiles * 16>;

  // Where the tiles of a piece begin: those of its first features, each `step` numbers after the one before, and those of
  // its second features as far behind them. The rows of a tile lie `row_bytes` apart.
  struct Tiles {
    const X* first;
    int64_t step, second, row_bytes;
  };

  // Adds a piece of so many tiles of features, `steps` tiles of k, times `panels` panels of x to sums `stride` apart. x comes
  // from L2, by loads that leave L1 to the piece.
  template <int features, int panels>
  static void multiply(const Tiles& w, const X* x, int64_t x_stride, int64_t steps, Sums* sums, int64_t stride,
                       Prefetch& prefetch) {
    constexpr bool two_features = features == 2, two_panels = panels == 2;
    _tile_loadd(0, sums[0], 64);
    if constexpr (two_panels) _tile_loadd(1, sums[1], 64);
    if constexpr (two_features) _tile_loadd(2, sums[stride], 64);
    if constexpr (two_features && two_panels) _tile_loadd(3, sums[stride + 1], 64);
    for (int64_t i = 0; i < steps; i++) {
      _tile_loadd(4, w.first + i * w.step, w.row_bytes);
      _tile_stream_loadd(6, x + i * tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (two_panels) {
        _tile_stream_loadd(7, x + x_stride + i * tile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (two_features) {
        _tile_loadd(5, w.first + w.second + i * w.step, w.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (two_panels) _tile_dpbf16ps(3, 5, 7);
      }
      prefetch.step();
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (two_panels) _tile_stored(1, sums[1], 64);
    if constexpr (two_features) _tile_stored(2, sums[stride], 64);
    if constexpr (two_features && two_panels) _tile_stored(3, sums[stride + 1], 64);
  }

  static int64_t features_of(const Piece& piece) { return std::min(tiles * 16, (piece.end - piece.n + 15) / 16 * 16); }

  // Whether a piece is made of whole tiles, which can be read where they are.
  static bool lies_as_tiles(const Stored& stored, const Piece& piece) {
    return stored.storage == Storage::dense && piece.count % tile_k == 0 && piece.n + features_of(piece) <= piece.end;
  }
  static Tiles tiles_of(const Stored& stored, const Piece& piece) {
    const int64_t stride = stored.data.stride;
    return {static_cast<const X*>(stored.data.data) + piece.n * stride + piece.k, tile_k, 16 * stride,
            stride * static_cast<int64_t>(sizeof(X))};
  }

  // Writes a piece of a matrix as tiles, each of which lies in one piece.
  static Tiles lay_out(const Stored& stored, const Piece& piece, Scratch& scratch, Prefetch& prefetch) {
    dami::with_rows<Vec, bf16>(stored.storage, [&](auto kind) {
      for (int64_t i = 0; i < features_of(piece); i++) {
        const typename decltype(kind)::type row(stored, piece.row(i), piece.k);
        dami::fill<Vec, Bf16Dot>(row, piece.count, scratch.weight[0][i / 16] + i % 16 * tile_k, tiles * tile);
        prefetch.step();
      }
    });
    return {scratch.weight[0][0], tiles * tile, tile, 64};
  }

  // The same of W(λ).
  static Tiles lay_out(const dami::Weight& weight, float lam, const Piece& piece, Scratch& scratch, Prefetch& prefetch) {
    dami::with_rows<Vec, bf16>(weight, [&](auto base, auto other) {
      for (int64_t i = 0; i < features_of(piece); i++) {
        const typename decltype(base)::type base_row(weight.base, piece.row(i), piece.k);
        const typename decltype(other)::type other_row(weight.other, piece.row(i), piece.k);
        dami::fill_blended<Vec, Bf16Dot>(weight, lam, base_row, other_row, piece.count,
                                         scratch.weight[0][i / 16] + i % 16 * tile_k, tiles * tile, [](int64_t) {});
        prefetch.step();
      }
    });
    return {scratch.weight[0][0], tiles * tile, tile, 64};
  }

  // Multiplies a piece with the rows of a group.
  static void multiply(const Block& block, const Group& group, const Piece& piece, const Tiles& w, Sums* sums,
                       Prefetch& prefetch) {
    const auto all = static_cast<int64_t>(block.rows.size()) / panel;
    const int64_t stride = panel * block.x_stride / static_cast<int64_t>(sizeof(X));
    const X* const x = reinterpret_cast<const X*>(block.x) + piece.k / tile_k * tile;
    const bool two_features = piece.end - piece.n > 16;
    for (int64_t i = group.begin / panel, end = (group.end + panel - 1) / panel; i < end; i += 2) {
      constexpr decltype(&multiply<1, 1>) of[2][2] = {{multiply<1, 1>, multiply<1, 2>}, {multiply<2, 1>, multiply<2, 2>}};
      of[two_features][i + 1 < end](w, x + i * stride, stride, piece.padded() / tile_k, sums + i, all, prefetch);
    }
  }

  // All that a piece adds to the sums, while the next one is fetched.
  static void multiply(const Linear& p, const Block& block, const Piece& piece, const Piece& next, Sums* const (&sums)[2],
                       Scratch& scratch) {
    const auto steps = [&](const Group& group) {
      return (group.end - group.begin + 2 * panel - 1) / (2 * panel) * piece.padded() / tile_k;
    };
    const auto matrix = [&](const Stored& stored, Mode alone, Sums* sums_of_both) {
      int64_t all = 0;
      for (const Group& group : block.groups)
        if (group.mode == alone || group.mode == Mode::both) all += steps(group);
      if (all == 0) return;
      // Tiles that are read where they lie follow each other fast enough: to fetch them ahead as well would delay them.
      const bool in_place = lies_as_tiles(stored, piece);
      Prefetch prefetch = in_place ? Prefetch(nullptr, 0, 0) : dami::prefetch_of<tiles * 16>(stored, next, sizeof(X));
      prefetch.spread(features_of(piece) + all);
      const Tiles w = in_place ? tiles_of(stored, piece) : lay_out(stored, piece, scratch, prefetch);
      for (const Group& group : block.groups)
        if (group.mode == alone || group.mode == Mode::both)
          multiply(block, group, piece, w, group.mode == alone ? sums[0] : sums_of_both, prefetch);
    };
    matrix(p.weight.base, Mode::base, sums[0]);
    matrix(p.weight.other, Mode::other, sums[1]);
    for (const Group& group : block.groups)
      if (group.mode == Mode::blend) {
        Prefetch base = dami::prefetch_of<tiles * 16>(p.weight.base, next, sizeof(X));
        Prefetch other = dami::prefetch_of<tiles * 16>(p.weight.other, next, sizeof(X));
        base.spread(features_of(piece)), other.spread(steps(group));
        const Tiles w = lay_out(p.weight, block.lam[group.begin], piece, scratch, base);
        multiply(block, group, piece, w, sums[0], other);
      }
  }

  static int64_t longest_piece(const Linear& p, int64_t rows, int64_t k) {
    if (rows > few_rows) return block_k;
    const bool dense = p.weight.base.storage == Storage::dense && p.weight.other.storage == Storage::dense;
    return dense && p.n % 16 == 0 ? k : long_k;
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    if (block.panel == 1) {
      for (int64_t n = n0; n < n1; n += OfBf16::max_outputs)
        OfBf16::run(p, block, n, std::min(n1, n + OfBf16::max_outputs), memory);
      return;
    }
    const TileRegisters registers;
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const auto rows = static_cast<int64_t>(block.rows.size()), panels = rows / panel, count = sums_of(rows, n1 - n0);
    Sums* const sums = reinterpret_cast<Sums*>(&scratch + 1);
    std::memset(sums, 0, static_cast<size_t>(2 * count) * sizeof(Sums));
    // Pieces of nearly equal length, for while one is multiplied as much is fetched of the next; or whole rows, if few rows
    // of x pass by and nothing has to be laid out.
    const int64_t all = std::max(block.k, tile_k), longest = longest_piece(p, rows, all), pieces = (all + longest - 1) / longest;
    const int64_t most = (all + pieces * tile_k - 1) / (pieces * tile_k) * tile_k;
    const int64_t columns = std::max<int64_t>(1, cached_bytes / (rows * static_cast<int64_t>(sizeof(X))) / most) * most;
    dami::for_pieces({{tile_k, 0}, tiles * 16, most, columns}, n0, n1, p.n, block.k, [&](const Piece& piece, const Piece& next) {
      Sums* const of_piece = sums + (piece.n - n0) / 16 * panels;
      multiply(p, block, piece, next, {of_piece, of_piece + count}, scratch);
    });
    for (const Group& group : block.groups)
      for (int64_t first = group.begin; first < group.end; first += panel) {
        for (int which = 0; which < (group.mode == Mode::both ? 2 : 1); which++)
          for (int64_t n = 0; n < n1 - n0; n += 16) {
            __m512i v[16];
            std::memcpy(v, sums[which * count + n / 16 * panels + first / panel], sizeof v);
            transpose(v);
            for (int row = 0; row < panel; row++) std::memcpy(&scratch.rows[which][row][n], &v[row], sizeof v[row]);
          }
        for (int64_t i = first; i < std::min<int64_t>(first + panel, group.end); i++)
          OfBf16::finish(p, block, group.mode, i, n0, n1, scratch.rows[0][i - first], scratch.rows[1][i - first]);
      }
  }

  // A panel lies as the tiles of its columns, each of which has pairs of all rows side by side.
  static void prepare(const dami::Matrix& x, bool codes, const Block& block, int64_t first) {
    if (block.panel == 1) return OfBf16::prepare(x, codes, block, first);
    X* to = reinterpret_cast<X*>(block.x + first * block.x_stride);
    for (int64_t k = 0; k < block.k; k += tile_k, to += tile) {
      const int64_t left = block.k - k;
      const __mmask32 there = left >= tile_k ? -1u : (1u << left) - 1;
      __m512i v[16];
      for (int row = 0; row < panel; row++) {
        const int64_t at = block.rows[first + row];
        v[row] = at < 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(there, static_cast<const X*>(x.data) + at * x.stride + k);
      }
      transpose(v);
      std::memcpy(to, v, sizeof v);
    }
  }

  static double multiply_add(int64_t steps) {
    const TileRegisters registers;
    for (int64_t i = 0; i < steps; i++) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    return 4.0 * 2 * 16 * 16 * tile_k;
  }
};

// The system asks to be told before a process uses tiles, since they make its threads' state large.
bool supported() {
  if (!has_avx512_bf16()) return false;
  unsigned a, b, c, d;
  asm("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool has_tiles = d >> 22 & d >> 24 & 1;  // AMX-BF16, AMX-TILE
  constexpr long request_permission = 0x1023, tile_data = 18;
  return has_tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

namespace dami {
extern const Isa amx;
constexpr Isa amx = make_isa<Vec, AmxKernel>("amx", supported, 8, AmxKernel::blend_rows);
}  // namespace dami

#else  // what the compiler or the system does not know

#include "api.h"

namespace dami {
extern const Isa amx;
constexpr Isa amx = [] {
  Isa isa{};
  isa.name = "amx", isa.supported = [] { return false; };
  return isa;
}();
}  // namespace dami

#endif
