// wgmma: what surrounds the instruction. The instruction itself, for the one width that a kernel uses, is
// generated with its configuration (jit/source.py).
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm::ptx {

// Describes a K-major operand in shared memory, 128 bytes a row, in the copy engine's 128-byte swizzle:
// groups of eight rows follow each other at 1024 bytes (the stride, in units of 16). The tile starts at a
// multiple of 1024. The upper half is the same for all tiles; the lower half moves with the address, in units
// of 16 bytes.
struct Descriptor {
  static constexpr u32 kStride = 1024 / 16, kSwizzle128 = 1;
  static constexpr u32 kUpper = kStride | kSwizzle128 << 30;
  u32 lower;

  __device__ explicit Descriptor(const void* tile) : lower((shared_address(tile) & 0x3ffff) >> 4 | 1 << 16) {}
  // The tile that begins `units` of 16 bytes further.
  __device__ u64 at(u32 units) const { return static_cast<u64>(kUpper) << 32 | (lower + units); }
};

// Registers and shared memory written before are in place for the instructions that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` groups are in flight. `accumulator` is what the finished ones wrote: naming
// it, after the wait alone, keeps the compiler from reading it earlier.
template <int kPending, int kSize>
__device__ __forceinline__ void wgmma_wait(float (&accumulator)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}

}  // namespace fp8gemm::ptx
