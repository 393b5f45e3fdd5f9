// The shared memory of a CTA, as a struct; README.md draws it. Its size is checked against what Python allocates.
#pragma once

#include "tile.cuh"

namespace fp8gemm {

template <class Config>
struct alignas(1024) SharedStorage {
  using T = Tile<Config>;
  static constexpr bool kStaged = Config::kTmaStore && Config::kSplitK == 1;
  static constexpr int kOutStaging = kStaged ? Config::kNumConsumers * Config::kOutBuffers * T::kChunkBytes : 0;
  static constexpr int kStages = Config::kNumStages;

  // Tiles in the 128-byte swizzle repeat every 1024 bytes, so each starts at a multiple of that.
  alignas(1024) u8 lhs[kStages][T::kLhsBytes];
  alignas(1024) u8 rhs[kStages][T::kRhsBytes];
  alignas(1024) u8 out[kOutStaging > 0 ? kOutStaging : 1];
  alignas(16) float lhs_scale[kStages][Config::kBlockM];
  alignas(16) float rhs_scale[kStages][T::kRhsScales];
  alignas(16) u64 full[kStages];
  u64 empty[kStages];

  // Split-K's partial tile takes the place of the operands, once those are consumed. Its rows are eight floats apart
  // modulo 32, so that a warp's fragment of eight rows falls into different banks.
  static constexpr int kPartialPitch = Config::kBlockN + 8;
  static_assert(Config::kSplitK == 1 ||
                Config::kBlockM * kPartialPitch * 4 <= kStages * (T::kLhsBytes + T::kRhsBytes));
  __device__ float* partial() { return reinterpret_cast<float*>(lhs); }
};

}  // namespace fp8gemm
