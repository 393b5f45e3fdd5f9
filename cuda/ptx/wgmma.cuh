// wgmma: what surrounds the instruction. The instruction itself, for the one width that a kernel uses, is generated
// with its configuration (jit/source.py).
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm::ptx {

// Describes a K-major operand in shared memory, 128 bytes a row, in the copy engine's 128-byte swizzle: groups of
// eight rows follow each other at 1024 bytes (the stride, in units of 16). The tile starts at a multiple of 1024.
__device__ __forceinline__ u64 wgmma_descriptor(const void* tile) {
  constexpr u64 kStride = 1024 / 16, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | u64(1) << 16 | kStride << 32 | kSwizzle128 << 62;
}

// One instruction's step along K, 32 bytes, in the descriptor's units of 16.
constexpr u64 kWgmmaStepK = 32 / 16;

// Registers and shared memory written before are in place for the instructions that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` groups are in flight. `accumulator` is what the finished ones wrote: naming it, after
// the wait alone, keeps the compiler from reading it earlier.
template <int kPending, int kSize>
__device__ __forceinline__ void wgmma_wait(float (&accumulator)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}

}  // namespace fp8gemm::ptx
