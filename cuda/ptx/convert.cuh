// Conversions and approximations of numbers, one instruction each. Conversions round to nearest even.
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm::ptx {

__device__ __forceinline__ float f16_to_f32(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// Two FP8 numbers, `low` in the low byte. NaN becomes 0x7f, what is too large the largest number.
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
  u16 packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ u16 pack_e5m2(float low, float high) {
  u16 packed;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x, off by at most two units in the last place; zero where that is subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, off by at most one unit in the last place; zero where that is subnormal.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fp8gemm::ptx
