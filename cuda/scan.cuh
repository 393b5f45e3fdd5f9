// Sums over the lanes of a warp that stop at a limit, so that nothing overflows.
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm {

constexpr u32 kNoLimit = 0x7fffffff;  // for sums that are known to be below

// A group's size, no less than none and no more than there is.
__device__ __forceinline__ u32 clamped(int size, u32 limit) {
  return min(static_cast<u32>(max(size, 0)), limit);
}

// a + b, but no more than limit, for a, b <= limit < 2^31.
__device__ __forceinline__ u32 add_saturating(u32 a, u32 b, u32 limit) { return min(a + b, limit); }

// The sums over the warp's lanes up to each one.
__device__ __forceinline__ u32 scan_saturating(u32 value, u32 limit) {
#pragma unroll
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const u32 before = __shfl_up_sync(0xffffffff, value, distance);
    if (lane_index() >= distance) value = add_saturating(value, before, limit);
  }
  return value;
}

// What was summed up before each lane, given the sums up to each one.
__device__ __forceinline__ u32 scan_before(u32 through) {
  const u32 before = __shfl_up_sync(0xffffffff, through, 1);
  return lane_index() == 0 ? 0 : before;
}

}  // namespace fp8gemm
