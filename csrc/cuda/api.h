// What the launchers ask for: addresses, sizes, strides. Plain C++: no torch, no Python.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dami::cuda {

enum class Type { bf16, f16 };
// How the values of a matrix are stored: as numbers of x's type, or as codes with a scale per group of 32.
enum class Storage { numbers, int8, int4 };

// A matrix [rows, ·] whose rows lie `stride` elements apart.
struct Matrix {
  const void* data;
  int64_t stride;
};

// What is multiplied by x into one of the two sums.
struct Operand {
  Storage storage;
  Matrix values;
  Matrix scales;  // bfloat16; none where the values are numbers
};

struct Linear {
  Matrix x;  // [m, k]
  Operand base, other;  // [n, k]; `other` is the target of a pair, else the delta
  const void* bias[2];  // [n] each; null where there is none
  const float* lam;  // of row r: lam[row_to_lam[r]] if there is a map, else lam[r / rows_per_lam]
  const int32_t* row_to_lam;
  int64_t rows_per_lam;
  void* y;  // [m, n], rows dense
  int m, n, k;
};

constexpr int max_rows = 8;
constexpr int max_warps = 16;  // of a block

// Bytes of shared memory that a warp of the kernel takes; 0 for storages that no kernel reads together.
int shared_per_warp(Storage base, Storage other);

// Launches the kernel for at most max_rows rows; the `warps` of a block share the work along K. Synchronizes nothing.
cudaError_t decode(Type, const Linear&, int warps, cudaStream_t);

}  // namespace dami::cuda
