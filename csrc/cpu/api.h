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

// How a group of rows of x uses the two weights.
enum class Mode {
  base,    // λ = 0 in every row: the target is never read
  target,  // λ = 1 in every row: the base is never read
  blend,   // one λ, and rows enough to pay for blending the weights first
  both,    // any λ: two sums per output, λ applied to the sums
};

// Rows [begin, end) of a block, in the block's order.
struct Group {
  Mode mode;
  int begin, end;
};

// Rows of x, sorted so that those which use the weights alike lie together.
struct Block {
  std::vector<const void*> x;  // a pointer to each row
  std::vector<void*> y;
  std::vector<float> lam;
  std::vector<Group> groups;
};

// An [rows, ·] matrix whose rows lie `stride` elements apart, or a vector; a null pointer where there is none.
struct Matrix {
  const void* data;
  int64_t stride;
};

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

struct Linear {
  Type type;
  Matrix x;  // [m, k]
  Pair weight;  // [n, k]
  Pair bias;  // [n]
  void* y;  // [m, n]
  int64_t m, n, k;
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

// A call of a `linear` kernel takes at most so many rows of x and of the weights.
constexpr int64_t max_rows = 256;
constexpr int64_t max_outputs = 64;
// Along K, many rows are multiplied in blocks of so many bytes of each: a register tile's operands then fit L1, the
// max_outputs rows of a weight L2.
constexpr int64_t block_bytes = 2048;
// Fewer rows than this are bound by memory: each row of the weights is read in one go, and never blended. The order of
// summation depends on this, so this must not depend on λ.
constexpr int64_t stream_rows = 13;
// x lies in memory filled up with zeros to a multiple of so many elements, which every kernel's step divides.
constexpr int64_t x_multiple = 32;

constexpr int64_t linear_scratch(int64_t rows) { return max_outputs * block_bytes + rows * 2 * max_outputs * 4; }

// The kernels of one instruction set; arrays are indexed by Type.
struct Isa {
  const char* name;
  bool (*supported)();
  int tile_rows;    // rows of x in a register tile: fewer at one end are not worth a group of their own
  int blend_rows[3];  // rows of one λ that pay for blending
  int64_t x_size[3];  // bytes of an element of x as `linear` reads it

  // Outputs [n0, n1) of one block; `scratch` has linear_scratch(rows) bytes, 64-byte aligned.
  void (*linear[3])(const Linear&, const Block&, int64_t n0, int64_t n1, void* scratch);
  void (*prepare_x[3])(const void* from, int64_t k, void* to);  // a row of x, as `linear` reads it
  void (*embedding[3])(const void* base, const void* target, float lam, void* y, int64_t d);
  void (*rms_norm[3])(const Norm&, int64_t row, float lam);
  void (*layer_norm[3])(const Norm&, int64_t row, float lam);

  // For benchmarks: the rates no kernel can exceed.
  double (*multiply_add[3])(int64_t steps);  // runs `steps` · the returned number of floating point operations
  float (*read)(const void* data, int64_t bytes);  // streams through memory
};

// The instruction set in use: the best this machine has, or the one DAMI_CPU_ISA names, until use_isa.
const Isa& isa();
std::vector<std::string> supported_isas();
void use_isa(const std::string& name);  // std::invalid_argument if this machine or this build lacks it

// The operators. `threads` is the most they use. std::out_of_range for an index that points nowhere.
void linear(const Linear&, const Lams&, int threads);
void rms_norm(const Norm&, int64_t rows, const Lams&, int threads);
void layer_norm(const Norm&, int64_t rows, const Lams&, int threads);
void embedding(Type, const void* ids, bool ids_are_64_bit, int64_t count, const Pair& weight, int64_t vocabulary,
               int64_t d, void* y, const Lams&, int threads);

// Measured rates: floating point operations a second, and bytes a second read from `data`.
double peak_flops(Type, int threads);
double read_bandwidth(const void* data, int64_t bytes, int threads);

}  // namespace dami
