// lerp_linear for at most eight rows: bound by reading the weights, whatever the λ.
//
// A block computes 16 features. Each of its warps takes its share of K, 128 weights of every feature at a time, through a
// ring of shared memory of its own: while it multiplies one step, the next ones are on their way, without registers to
// wait for them. The weights are the left operand [16, 16] of mma.sync and x, with zeros for rows that are not there, the
// right one [16, 8], so the cost does not depend on the number of rows.
//
// A sum over K does not care about its order, as long as weights and x agree on it. So lanes feed mma with what lies
// together in memory, *octets* of 8 weights, and nothing has to be moved between lanes.
#include "api.h"
#include "ptx.h"

namespace dami::cuda {
namespace {

constexpr int tile = 16;  // features
constexpr int group = 32;
constexpr int groups = 4;
constexpr int step = groups * group;
constexpr int stages = 2;
constexpr int carveout = 85;  // percent for shared memory; the L1 cache, where x stays, has the rest

// Lane 4g + t of a warp multiplies rows g and g + 8 of the tile by row g of x, of each group octet t.
struct Lane {
  int g, t;
  __device__ Lane() : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

// Starts to copy elements [k, k_end) of the tile's rows of a matrix, at most `row_bytes` of each, to shared memory, its
// rows `pitch` bytes apart, with zeros where there is nothing: in pieces of `width` bytes, or one element after the other
// if rows are not aligned.
template <class E, int row_bytes, int pitch, int width>
__device__ void copy_rows(char* to, const Matrix& matrix, int first, int n, int k, int k_end) {
  constexpr int pieces = row_bytes / width, elements = width / sizeof(E), rows = 32 / pieces;  // rows at a time
  const int row = threadIdx.x % 32 / pieces, column = threadIdx.x % 32 % pieces, at = k + column * elements;
  const int left = max(0, min(elements, k_end - at));
  const E* from = static_cast<const E*>(matrix.data) + (first + row) * matrix.stride + at;
  to += row * pitch + column * width;
  if ((reinterpret_cast<uintptr_t>(matrix.data) | matrix.stride * sizeof(E)) % width == 0) {
#pragma unroll
    for (int r = 0; r < tile; r += rows)
      copy_async<width>(to + r * pitch, from + r * matrix.stride,
                        first + row + r < n ? left * sizeof(E) : 0);
  } else {
#pragma unroll 1
    for (int r = 0; r < tile; r += rows)
      for (int e = 0; e < elements; e++)
        reinterpret_cast<E*>(to + r * pitch)[e] =
            first + row + r < n && e < left ? from[r * matrix.stride + e] : 0;
  }
}

// A lane's octets of a row of x from element k on, one of each group; zeros beyond the end.
__device__ void load_octets(uint4 (&to)[groups], const uint16_t* row, int k, int k_end, bool aligned) {
  if (aligned) {  // then no octet lies across the end
#pragma unroll
    for (int j = 0; j < groups; j++) {
      const int at = k + group * j;
      to[j] = at < k_end ? *reinterpret_cast<const uint4*>(row + at) : make_uint4(0, 0, 0, 0);
    }
  } else {
#pragma unroll
    for (int j = 0; j < groups; j++) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int at = k + group * j + i;
        if (at < k_end) words[i / 2] |= uint32_t{row[at]} << i % 2 * 16;
      }
      to[j] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// An octet in the order in which codes come out of their words: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
__device__ uint4 interleaved(uint4 x) {
  return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                    __byte_perm(x.y, x.w, 0x7632));
}

// Two codes, in the low bits of each half of a word, become numbers without a conversion: put below the one bit of a
// power of two, which is then subtracted. All of it is exact.
template <class T>
struct Decode;

template <>
struct Decode<Bf16> {
  static constexpr uint32_t one = 0x3f803f80;
  __device__ static uint32_t from_4_bits(uint32_t two) {
    return Bf16::fma2(and_or<0x000f000f, 0x43004300>(two), one, 0xc308c308);  // (128 + code + 8) - 136
  }
  __device__ static uint32_t from_8_bits(uint32_t two) {
    // There are seven bits below 128 = 0x4300. The eighth, the sign, makes what is subtracted 256 = 0x4380.
    return Bf16::fma2(and_or<0x007f007f, 0x43004300>(two), one, and_or<0x00800080, 0xc300c300>(two));
  }
};

template <>
struct Decode<F16> {
  static constexpr uint32_t one = 0x3c003c00;
  __device__ static uint32_t from_4_bits(uint32_t two) {
    return F16::fma2(and_or<0x000f000f, 0x64006400>(two), one, 0xe408e408);  // (1024 + code + 8) - 1032
  }
  __device__ static uint32_t from_8_bits(uint32_t two) {
    return F16::fma2(and_xor<0x00ff00ff, 0x64806480>(two), one, 0xe480e480);  // (1024 + code + 128) - 1152
  }
};

// How the values of a step lie in shared memory, and how a lane gets octet `i` of a row out of it. Rows lie a quarter more
// than their bytes apart: lanes of different g then read from different banks.

template <class T>
struct Numbers {
  static constexpr bool coded = false;
  static constexpr int row_bytes = step * 2, pitch = row_bytes * 5 / 4, bytes = tile * pitch;

  __device__ static void copy(char* to, const Operand& w, int first, int n, int k, int k_end) {
    copy_rows<uint16_t, row_bytes, pitch, 16>(to, w.values, first, n, k, k_end);
  }
  __device__ static uint4 octet(const char* row, int i) { return reinterpret_cast<const uint4*>(row)[i]; }
};

// Codes, whose rows in memory are filled up with zeros to whole groups; behind them bfloat16 scales, four of each row.
template <int bits>
struct Codes {
  static constexpr bool coded = true;
  static constexpr int row_bytes = step * bits / 8, pitch = row_bytes * 5 / 4, scales = tile * pitch;
  static constexpr int bytes = scales + tile * sizeof(uint2);

  __device__ static void copy(char* to, const Operand& w, int first, int n, int k, int k_end) {
    const int groups_end = (k_end + group - 1) / group;
    copy_rows<uint8_t, row_bytes, pitch, 16>(to, w.values, first, n, k / 8 * bits, groups_end * (group / 8 * bits));
    copy_rows<uint16_t, sizeof(uint2), sizeof(uint2), 4>(to + scales, w.scales, first, n, k / group, groups_end);
  }
};

template <class T>
struct Codes8 : Codes<8> {
  __device__ static uint4 octet(const char* row, int i) {
    const uint2 v = reinterpret_cast<const uint2*>(row)[i];
    const auto two = [&](int b) { return Decode<T>::from_8_bits(__byte_perm(v.x, v.y, 0x4400 + 0x1111 * b)); };
    return make_uint4(two(0), two(1), two(2), two(3));
  }
};

template <class T>
struct Codes4 : Codes<4> {
  __device__ static uint4 octet(const char* row, int i) {
    const uint32_t v = reinterpret_cast<const uint32_t*>(row)[i];
    const auto two = [&](int b) { return Decode<T>::from_4_bits(v >> 4 * b); };
    return make_uint4(two(0), two(1), two(2), two(3));
  }
};

template <class T>
__device__ void multiply_octets(float (&sum)[4], uint4 upper, uint4 lower, uint4 x) {
  T::mma(sum, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
  T::mma(sum, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
}

// sum += w · xᵀ over a step. A scale is applied to the sum over its group, so no weight is ever rounded.
template <class T, class Values>
__device__ void multiply(float (&sum)[4], const char* w, const uint4 (&x)[groups], Lane lane) {
  const char* rows[2] = {w + lane.g * Values::pitch, w + (lane.g + 8) * Values::pitch};
  uint2 scales[2];
  if constexpr (Values::coded)
    for (int i = 0; i < 2; i++) scales[i] = reinterpret_cast<const uint2*>(w + Values::scales)[lane.g + 8 * i];
#pragma unroll
  for (int j = 0; j < groups; j++) {
    const uint4 upper = Values::octet(rows[0], 4 * j + lane.t), lower = Values::octet(rows[1], 4 * j + lane.t);
    if constexpr (Values::coded) {
      float part[4] = {};
      multiply_octets<T>(part, upper, lower, interleaved(x[j]));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t two = j < 2 ? scales[i / 2].x : scales[i / 2].y;
        sum[i] += Bf16::to_float(j % 2 ? two >> 16 : two & 0xffff) * part[i];
      }
    } else {
      multiply_octets<T>(sum, upper, lower, x[j]);
    }
  }
}

// The warp's share of W · Xᵀ for the features from `first` on, of either operand or of both.
template <class T, class Base, class Other, bool use_base, bool use_other>
__device__ void multiply_tile(const Linear& linear, int first, char* ring, float (&base)[4], float (&other)[4]) {
  const Lane lane;
  const int stride = step * (blockDim.x / 32);
  const auto copy_step = [&](char* to, int k) {
    if (k < linear.k) {
      if constexpr (use_base) Base::copy(to, linear.base, first, linear.n, k, linear.k);
      if constexpr (use_other) Other::copy(to + Base::bytes, linear.other, first, linear.n, k, linear.k);
    }
    end_group();
  };
  const uint16_t* x_row = static_cast<const uint16_t*>(linear.x.data) + lane.g * linear.x.stride;
  const int x_end = lane.g < linear.m ? linear.k : 0;
  const bool x_aligned = (reinterpret_cast<uintptr_t>(linear.x.data) / 2 | linear.x.stride | linear.k) % 8 == 0;

  int k = step * (threadIdx.x / 32);
  for (int s = 0; s < stages; s++) copy_step(ring + s * (Base::bytes + Other::bytes), k + s * stride);
  for (int s = 0; k < linear.k; k += stride, s = (s + 1) % stages) {
    char* stage = ring + s * (Base::bytes + Other::bytes);
    uint4 x[groups];
    load_octets(x, x_row, k + 8 * lane.t, x_end, x_aligned);
    wait_for_groups<stages - 1>();
    __syncwarp();
    if constexpr (use_base) multiply<T, Base>(base, stage, x, lane);
    if constexpr (use_other) multiply<T, Other>(other, stage + Base::bytes, x, lane);
    __syncwarp();
    copy_step(stage, k + stages * stride);
  }
}

__device__ float lam_of(const Linear& linear, int row) {
  return linear.lam[linear.row_to_lam ? linear.row_to_lam[row] : row / linear.rows_per_lam];
}

// From the nearer end, as torch.lerp does; at λ = 0 and λ = 1 exactly one end, even where the other is not finite.
__device__ float lerp(float base, float target, float lam) {
  if (lam == 0) return base;
  if (lam == 1) return target;
  const float delta = target - base;
  return lam < 0.5f ? base + lam * delta : target + (lam - 1) * delta;
}

template <class Base, class Other>
constexpr int ring_bytes = stages * (Base::bytes + Other::bytes);

template <class T, class Base, class Other>
__global__ void __launch_bounds__(32 * max_warps, 1) decode_kernel(const Linear linear) {
  constexpr bool is_pair = !Other::coded;
  using Sums = float[2][max_rows][tile];  // of a warp, in its ring when that has served
  static_assert(sizeof(Sums) <= ring_bytes<Base, Other>);
  const auto sums = [](int warp) -> Sums& {
    return *reinterpret_cast<Sums*>(shared_memory() + warp * ring_bytes<Base, Other>);
  };
  const Lane lane;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, first = tile * blockIdx.x;
  char* ring = shared_memory() + warp * ring_bytes<Base, Other>;

  // λ is data: a graph replays with any. Where all rows are at one end, the other is not read.
  const bool is_row = lane.g < linear.m;
  const float lam = is_row ? lam_of(linear, lane.g) : 0;
  float base[4] = {}, other[4] = {};
  if (__all_sync(~0u, !is_row || lam == 0)) {
    multiply_tile<T, Base, Other, true, false>(linear, first, ring, base, other);
  } else if (is_pair && __all_sync(~0u, !is_row || lam == 1)) {
    multiply_tile<T, Base, Other, false, true>(linear, first, ring, base, other);
  } else {
    multiply_tile<T, Base, Other, true, true>(linear, first, ring, base, other);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 2 * lane.t + i % 2, feature = lane.g + 8 * (i / 2);
    sums(warp)[0][row][feature] = base[i];
    sums(warp)[1][row][feature] = other[i];
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tile * linear.m; i += blockDim.x) {
    const int row = i / tile, feature = i % tile;
    if (first + feature >= linear.n) continue;
    float total[2] = {};
    for (int w = 0; w < warps; w++)  // always in this order
      for (int end = 0; end < 2; end++) total[end] += sums(w)[end][row][feature];
    float bias[2] = {};
    for (int end = 0; end < 2; end++)
      if (linear.bias[end]) bias[end] = T::to_float(static_cast<const uint16_t*>(linear.bias[end])[first + feature]);
    const float row_lam = lam_of(linear, row);
    float y = lerp(bias[0], bias[1], row_lam);
    if (is_pair)
      y += lerp(total[0], total[1], row_lam);
    else
      y += row_lam == 0 ? total[0] : total[0] + row_lam * total[1];
    static_cast<uint16_t*>(linear.y)[int64_t{row} * linear.n + first + feature] = T::from_float(y);
  }
}

template <class T, class Base, class Other>
cudaError_t launch(const Linear& linear, int warps, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, Base, Other>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((linear.n + tile - 1) / tile);
  config.blockDim = dim3(32 * warps);
  config.dynamicSmemBytes = warps * ring_bytes<Base, Other>;
  config.stream = stream;
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes);
  return cudaLaunchKernelEx(&config, kernel, linear);  // reports what went wrong above, too
}

// Calls f with the types of two operands that are stored so. False if no kernel reads them together.
template <class T, class F>
bool with_operands(Storage base, Storage other, F f) {
  if (base == Storage::numbers && other == Storage::numbers) return f(Numbers<T>{}, Numbers<T>{}), true;
  if (base == Storage::numbers && other == Storage::int8) return f(Numbers<T>{}, Codes8<T>{}), true;
  if (base == Storage::numbers && other == Storage::int4) return f(Numbers<T>{}, Codes4<T>{}), true;
  if (base == Storage::int8 && other == Storage::int4) return f(Codes8<T>{}, Codes4<T>{}), true;
  return false;
}

template <class T>
cudaError_t launch(const Linear& linear, int warps, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_operands<T>(linear.base.storage, linear.other.storage, [&](auto base, auto other) {
    error = launch<T, decltype(base), decltype(other)>(linear, warps, stream);
  });
  return error;
}

}  // namespace

int shared_per_warp(Storage base, Storage other) {
  int bytes = 0;  // of F16 as of Bf16
  with_operands<Bf16>(base, other, [&](auto base, auto other) { bytes = ring_bytes<decltype(base), decltype(other)>; });
  return bytes;
}

cudaError_t decode(Type type, const Linear& linear, int warps, cudaStream_t stream) {
  if (linear.m < 0 || linear.m > max_rows || warps < 1 || warps > max_warps) return cudaErrorInvalidValue;
  if (linear.m == 0 || linear.n == 0) return cudaSuccess;
  return type == Type::bf16 ? launch<Bf16>(linear, warps, stream) : launch<F16>(linear, warps, stream);
}

}  // namespace dami::cuda
