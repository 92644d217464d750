// All that the kernels say in PTX. A test that runs them on the CPU brings its own version of this file.
#ifndef DAMI_PTX_H
#define DAMI_PTX_H

#include <cstdint>

namespace dami::cuda {

// The block's shared memory, as much as the launch asked for.
__device__ inline char* shared_memory() {
  extern __shared__ uint4 shared[];
  return reinterpret_cast<char*>(shared);
}

// Starts to copy `bytes` ≤ `width` to shared memory, and zeros for the rest of it. With 0 bytes nothing is read. Copies
// of 16 bytes pass the L1 cache by, which is left to what is read again.
template <int width>
__device__ void copy_async(void* to, const void* from, int bytes) {
  const uint32_t shared = __cvta_generic_to_shared(to);
  if constexpr (width == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                 ::"r"(shared), "l"(from), "r"(bytes), "n"(width) : "memory");
}
// Makes a group of the copies this lane has started since the last group.
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `pending` youngest groups of this lane are under way.
template <int pending>
__device__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// (value & mask) | bits and (value & mask) ^ bits in one instruction each, of which the compiler makes two.
template <uint32_t mask, uint32_t bits>
__device__ uint32_t and_or(uint32_t value) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "n"(mask), "n"(bits));
  return result;
}
template <uint32_t mask, uint32_t bits>
__device__ uint32_t and_xor(uint32_t value) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(value), "n"(mask), "n"(bits));
  return result;
}

struct Bf16 {
  // sum [16, 8] += a [16, 16] · b [16, 8]. Lane 4g + t holds rows g (a0, a2) and g + 8 (a1, a3) of a, column g of b,
  // of the sum rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t + 1.
  __device__ static void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  // a · b + c of two numbers at once.
  __device__ static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  __device__ static float to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
  __device__ static uint16_t from_float(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
};

struct F16 {
  __device__ static void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  __device__ static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  __device__ static float to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  __device__ static uint16_t from_float(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
};

}  // namespace dami::cuda

#endif
