// What the instruction sets offer and what the operators ask of them. Plain C++: no torch, no Python, no intrinsics.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dami {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Type { f32, bf16, f16 };

// A matrix whose rows lie `stride` elements apart, or a vector; a null pointer where there is none.
struct Matrix {
  const void* data;
  int64_t stride;
};

// How the numbers of a stored matrix lie in memory: as they are, of x's type; or as codes, each a multiple of the bfloat16
// scale of its group: signed bytes, or nibbles holding code + 8, the first of two in the low half of their byte. Rows of
// codes are filled up to whole groups with codes that mean 0.
enum class Storage { dense, int8, int4 };

constexpr int64_t group_size = 32;

struct Stored {
  Storage storage;
  Matrix data;   // [rows, ·] numbers or codes; the stride counts numbers, or bytes of codes
  Matrix scale;  // [rows, groups] of the codes
};

// W(λ) = base + λ · other if the other matrix is a delta, which is stored as codes; base + λ (other − base) if it is the
// target, which is stored like the base.
struct Weight {
  Stored base, other;
};

// The two ends of a norm's weight, or of a bias.
struct Pair {
  Matrix base, target;
};

// λ of a row is lam[row_to_lam[row]] if there is a map, else lam[row / rows_per_lam].
struct Lams {
  const float* lam;
  int64_t count;
  const int32_t* row_to_lam;
  int64_t rows_per_lam;
};

// What the rows of x take of a weight: both matrices, by λ; or the base alone, as it is, or added to what y holds, or times λ.
enum class Part { both, base, base_added, base_times_lam };

// y = x · W(λ)ᵀ + b(λ) for the rows [begin, end) of x.
struct Linear {
  Weight weight;  // [n, k]
  Pair bias;  // [n]
  Matrix y;  // [rows of x, n]
  int64_t n;
  int64_t begin, end;
  Part part = Part::both;
};

struct Input {
  Type type;
  Matrix x;  // [rows, k]
  int64_t rows, k;
};

struct Norm {
  Type type;
  Matrix x;  // [rows, d]
  Pair weight;  // [d]
  Pair bias;  // [d]
  void* y;  // [rows, d]
  int64_t d;
  float eps, offset;
};

// Vectors of the heads of tokens; strides count elements.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
};

// The same of all sequences, in pages of so many tokens.
struct Pages {
  void* data;
  int64_t count, page_stride, token_stride, head_stride;
};

// Causal attention of concatenated sequences, whose keys and values lie in pages. Those of the queries' own tokens are
// written there first, unless they are null.
struct Attention {
  Type type;
  Heads query, key, value;
  Pages keys, values;
  const int32_t* table;  // [sequences, ·], the pages of each
  int64_t table_stride, table_columns;
  const int32_t *begins, *key_begins;  // [sequences + 1], where the queries and the keys of each begin, and the end
  int64_t sequences, tokens, heads, key_heads, size, value_size, page_size;
  float scale, softcap;  // of the scores; no soft cap if it is 0
  const float* sinks;  // [tokens, heads], or null
  const bool* mask;  // [tokens, ·], which of the keys up to its own a query sees, or null: all
  int64_t mask_stride;
  void* y;  // [tokens, heads, value_size]
};

// How many keys of its sequence a query sees.
static inline int64_t seen(const Attention& p, int64_t sequence, int64_t query) {
  return p.key_begins[sequence + 1] - p.key_begins[sequence] - (p.begins[sequence + 1] - 1 - query);
}

// Queries that follow each other in a sequence, of the heads that share a key head.
struct Queries {
  int64_t sequence, first, count, key_head;
};

// How a group of rows of x uses a weight.
enum class Mode {
  base,   // λ = 0 in every row: the other matrix is never read
  other,  // λ = 1 in every row and the other matrix is the target: the base is never read
  blend,  // one λ, and rows enough to pay for blending the weight first
  both,   // any λ: two sums per output, λ applied to the sums
};

// Rows [begin, end) of a block, in the block's order.
struct Group {
  Mode mode;
  int begin, end;
};

// Rows of x, sorted so that those which use a weight alike lie together.
struct Block {
  char* x;  // the first row, prepared; the others follow
  int64_t x_stride;  // bytes
  int64_t k;
  bool invariant;  // whether the bits of a row must not depend on the number of rows
  int panel;  // rows that are prepared together: groups are filled up to whole panels
  std::vector<int64_t> rows;  // where they were in x, and will be in y; -1 where a panel has no more
  std::vector<float> lam;
  std::vector<Group> groups;
};

// Along K, products are summed in blocks of so many bytes of a row: a register tile's operands then fit L1. The order of
// summation depends on this and on nothing else.
constexpr int64_t block_bytes = 2048;
// Rows of a weight in a register tile.
constexpr int64_t tile_n = 4;
// Rows of x in a register tile, at most: as many as the instruction set's registers hold.
constexpr int64_t max_tile_m = 6;

// Rows of x in a register tile whose weight is converted in registers, at most.
constexpr int64_t max_stream_rows = 4;

// An `attention` kernel's memory, in floats: queries, scores, sums and the sum of weights of every row; padded for any vector.
static constexpr int64_t padded_query(int64_t size) { return (size + 15) / 16 * 16; }
static constexpr int64_t padded_sums(int64_t size) { return (size + 63) / 64 * 64; }
static constexpr int64_t attention_scratch(int64_t rows, int64_t keys, int64_t size, int64_t value_size) {
  return rows * (padded_query(size) + keys + padded_sums(value_size) + 1);
}

// The kernels of one instruction set; arrays are indexed by Type.
struct Isa {
  const char* name;
  bool (*supported)();
  int max_rows[3], max_outputs[3];  // that a call of `linear` takes
  int panel[3];       // rows of x that are prepared together, unless they are few
  int tile_rows[3];   // rows of x that fill a register tile well enough: fewer at one end are not worth a group of their own
  int blend_rows[3];  // rows of one λ that pay for blending

  // x as `linear` reads it, 64-byte aligned: how many bytes a row of k elements takes, and what writes those of a block from
  // `first` on, a panel of them. `codes`: whether any matrix is stored as codes.
  int64_t (*x_bytes[3])(int64_t k, bool codes);
  void (*prepare[3])(const Matrix& x, bool codes, const Block&, int64_t first);
  // Outputs [n0, n1) of one block; `scratch` is 64-byte aligned and has as many bytes as the block's rows and outputs need.
  int64_t (*linear_scratch[3])(int64_t rows, int64_t outputs);
  void (*linear[3])(const Linear&, const Block&, int64_t n0, int64_t n1, void* scratch);
  void (*embedding[3])(const Weight&, int64_t row, float lam, void* y, int64_t d);
  void (*rms_norm[3])(const Norm&, int64_t row, float lam);
  void (*layer_norm[3])(const Norm&, int64_t row, float lam);
  void (*attention[3])(const Attention&, const Queries&, float* memory);

  // For benchmarks: the rates no kernel can exceed.
  double (*multiply_add[3])(int64_t steps);  // runs `steps` · the returned number of floating point operations
  float (*read)(const void* data, int64_t bytes);  // streams through memory
};

// The instruction set in use: the best this machine has, or the one DAMI_CPU_ISA names, until use_isa.
const Isa& isa();
std::vector<std::string> supported_isas();
void use_isa(const std::string& name);  // std::invalid_argument if this machine or this build lacks it

// The operators. `threads` is the most they use. std::out_of_range for an index that points nowhere.

// Several weights of one x. Each takes all rows, or each takes the rows that follow those of the one before it. If
// `invariant`, the bits of a row of y depend on nothing but that row of x and its λ.
void linear(const Input&, const std::vector<Linear>&, const Lams&, bool invariant, int threads);
// The same of weights that each take the rows up to their offset; they set begin and end. Zeros for rows after the last one.
void experts(const Input&, std::vector<Linear>, const int32_t* offsets, const Lams&, bool invariant, int threads);
void rms_norm(const Norm&, int64_t rows, const Lams&, int threads);
void layer_norm(const Norm&, int64_t rows, const Lams&, int threads);
void embedding(Type, const void* ids, bool ids_are_64_bit, int64_t count, const Weight& weight, int64_t vocabulary,
               int64_t d, void* y, const Lams&, int threads);
void attention(const Attention&, int threads);

// Measured rates: floating point operations a second, and bytes a second read from `data`.
double peak_flops(Type, int threads);
double read_bandwidth(const void* data, int64_t bytes, int threads);

}  // namespace dami
