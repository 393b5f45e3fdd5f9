// silu(gate) * up and its gradient, in f32. Every step rounds to nearest but 2^x and 1 / x, which are the
// slow unit's alone: with `expf` arithmetic, not memory, was the limit.
#pragma once

#include "ptx/convert.cuh"

namespace fp8gemm {

// 1 / (1 + exp(-x)); zero where exp(-x) exceeds 2^126.
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 0x1.715476p0f;
  return ptx::reciprocal_approx(1 + ptx::exp2_approx(x * -kLog2E));
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

struct SwigluGradients {
  float gate, up;  // of d_hidden times hidden
  float hidden;
};

// The same bits wherever it stands: the compiler must not be allowed to contract.
__device__ __forceinline__ SwigluGradients swiglu_gradients(float gate, float up, float d_hidden) {
  const float s = sigmoid(gate), silu = __fmul_rn(gate, s);
  const float derivative = __fmaf_rn(silu, __fsub_rn(1, s), s);  // of silu
  return {__fmul_rn(__fmul_rn(d_hidden, up), derivative), __fmul_rn(d_hidden, silu), __fmul_rn(silu, up)};
}

}  // namespace fp8gemm
