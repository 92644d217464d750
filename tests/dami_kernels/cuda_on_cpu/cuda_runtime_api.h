// As much of CUDA as csrc/cuda/decode.cu asks for, on the CPU, under the name of the header that it includes. A block runs
// at a time, its threads one after the other, as fibers: a thread runs until it has to wait for others. Aborts if the
// lanes of a warp do not come to the same collective operation.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define DAMI_PTX_H
#define __device__
#define __global__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx, blockDim;

namespace on_cpu {

inline void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes, width;
  void run() const {
    std::memset(to, 0, width);
    if (bytes) std::memcpy(to, from, bytes);
  }
};

struct Slot {  // what a lane shows to its warp
  int turn;
  alignas(16) unsigned char bytes[32];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int turn = 0;
  std::vector<Copy> copies;  // since the last group
  std::deque<std::vector<Copy>> groups;
};

inline bool copies_are_late;  // whether a copy happens when it is waited for, or at once: both are allowed
inline std::vector<Thread> threads;
inline std::vector<Slot> slots;
inline ucontext_t scheduler;
inline int current, arrived, generation;
inline char* shared;
inline std::function<void()> body;

inline Thread& self() { return threads[current]; }
inline void yield() { swapcontext(&self().context, &scheduler); }
inline void start() {
  body();
  self().done = true;
}

// Shows `mine` to the warp and returns what its lanes showed. All lanes run once between two turns of a lane, so when
// this one is back all have shown theirs; and none shows anything in the same place before all have seen it.
template <class V>
std::array<V, 32> gather(V mine) {
  static_assert(sizeof(V) <= sizeof(Slot::bytes));
  const int turn = ++self().turn, first = 2 * (current / 32 * 32) + turn % 2 * 32;
  Slot& slot = slots[first + current % 32];
  slot.turn = turn;
  std::memcpy(slot.bytes, &mine, sizeof(V));
  yield();
  std::array<V, 32> all;
  for (int lane = 0; lane < 32; lane++) {
    check(slots[first + lane].turn == turn, "the lanes of a warp have diverged");
    std::memcpy(&all[lane], slots[first + lane].bytes, sizeof(V));
  }
  return all;
}

inline void run_block(size_t shared_bytes) {
  const int count = blockDim.x;
  std::vector<uint4> memory(shared_bytes / 16, {~0u, ~0u, ~0u, ~0u});  // NaN, but nothing where nothing was asked for
  shared = reinterpret_cast<char*>(memory.data());
  threads = std::vector<Thread>(count);
  slots.assign(2 * count, {});
  arrived = generation = 0;
  for (Thread& thread : threads) {
    constexpr size_t stack_bytes = 1 << 17;
    thread.stack.reset(new char[stack_bytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = stack_bytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
  for (int left = count; left > 0;)
    for (current = 0; current < count; current++) {
      if (self().done) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &self().context);
      left -= self().done;
    }
}

}  // namespace on_cpu

inline void __syncwarp() { on_cpu::gather(0); }
inline void __syncthreads() {
  const int before = on_cpu::generation;
  if (++on_cpu::arrived == static_cast<int>(blockDim.x)) on_cpu::arrived = 0, on_cpu::generation++;
  while (on_cpu::generation == before) on_cpu::yield();
}
inline bool __all_sync(uint32_t, bool mine) {
  const auto all = on_cpu::gather(mine);
  return std::all_of(all.begin(), all.end(), [](bool value) { return value; });
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, size_t) {
  return cudaSuccess;
}
template <class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...), Arguments... arguments) {
  blockDim = config->blockDim;
  on_cpu::body = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; blockIdx.x++) on_cpu::run_block(config->dynamicSmemBytes);
  return cudaSuccess;
}

// In place of csrc/cuda/ptx.h.
namespace dami::cuda {

inline char* shared_memory() { return on_cpu::shared; }

template <int width>
void copy_async(void* to, const void* from, int bytes) {
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % width == 0; };
  on_cpu::check(aligned(to) && (aligned(from) || bytes == 0) && 0 <= bytes && bytes <= width, "a copy is not aligned");
  const on_cpu::Copy copy{to, from, bytes, width};
  on_cpu::copies_are_late ? on_cpu::self().copies.push_back(copy) : copy.run();
}
inline void end_group() {
  on_cpu::self().groups.push_back(std::move(on_cpu::self().copies));
  on_cpu::self().copies.clear();
}
template <int pending>
void wait_for_groups() {
  auto& groups = on_cpu::self().groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const on_cpu::Copy& copy : groups.front()) copy.run();
}

template <uint32_t mask, uint32_t bits>
uint32_t and_or(uint32_t value) {
  return (value & mask) | bits;
}
template <uint32_t mask, uint32_t bits>
uint32_t and_xor(uint32_t value) {
  return (value & mask) ^ bits;
}

// A number of `fraction` bits of fraction and exponents from `least` on, which is what a short type holds.
inline double rounded(double value, int fraction, int least) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::ldexp(1, max(std::ilogb(value), least) - fraction);
  return std::nearbyint(value / unit) * unit;
}

template <class T>
struct Arithmetic {
  static void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct Operands {
      uint32_t a[4], b[2];
    };
    const auto all = on_cpu::gather(Operands{{a0, a1, a2, a3}, {b0, b1}});
    const int g = on_cpu::current % 32 / 4, t = on_cpu::current % 4;
    const auto half = [](uint32_t word, int i) { return T::to_float(static_cast<uint16_t>(word >> 16 * i)); };
    for (int i = 0; i < 4; i++) {
      double total = sum[i];
      for (int k = 0; k < 16; k++)
        total += double{half(all[4 * g + k % 8 / 2].a[k / 8 * 2 + i / 2], k % 2)} *
                 half(all[4 * (2 * t + i % 2) + k % 8 / 2].b[k / 8], k % 2);
      sum[i] = static_cast<float>(total);
    }
  }
  static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 32; i += 16) {
      const auto part = [i](uint32_t word) { return double{T::to_float(static_cast<uint16_t>(word >> i))}; };
      result |= uint32_t{T::from_float(static_cast<float>(part(a) * part(b) + part(c)))} << i;
    }
    return result;
  }
};

struct Bf16 : Arithmetic<Bf16> {
  static float to_float(uint16_t bits) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static uint16_t from_float(float value) {
    value = static_cast<float>(rounded(value, 7, -126));
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return static_cast<uint16_t>(word >> 16) | (std::isnan(value) ? 0x40 : 0);
  }
};

struct F16 : Arithmetic<F16> {
  static float to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction), max(exponent, 1) - 25);
    return bits & 0x8000 ? -size : size;
  }
  static uint16_t from_float(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return sign | 0x7e00;
    const double size = std::fabs(rounded(value, 10, -14));
    if (size > 65504) return sign | 0x7c00;
    if (size < 0x1p-14) return sign | static_cast<uint16_t>(size * 0x1p24);
    const int exponent = std::ilogb(size);
    return sign | static_cast<uint16_t>((exponent + 15) << 10 | (static_cast<int>(std::ldexp(size, 10 - exponent)) & 1023));
  }
};

}  // namespace dami::cuda
