// The shared memory of a CTA, as a struct; README.md has its map. Its size is checked against what Python
// allocates.
#pragma once

#include "tile.cuh"

namespace fp8gemm {

// The queue of tiles, where group sizes are on the device.
template <bool kGrouped>
struct QueueStorage {};
template <>
struct QueueStorage<true> {
  WorkTile tiles[kTileSlots];
  u64 full[kTileSlots], empty[kTileSlots];
};

template <class Config>
struct alignas(1024) SharedStorage {
  using T = Tile<Config>;
  static constexpr int kStages = Config::kNumStages;
  static constexpr bool kStaged = Config::kTmaStore && Config::kSplitK == 1;

  // Split-K's partial sums: this CTA's, a tile in the place of the operands once those are consumed, and what
  // the others of its cluster send of the rows that this CTA adds up. Rows are eight floats apart modulo 32,
  // so that a warp's fragment of eight rows falls into different banks.
  static constexpr int kPartialPitch = Config::kBlockN + 8;
  static constexpr int kSharePitch = Config::kBlockM / Config::kSplitK * kPartialPitch;  // floats
  static constexpr int kReceived = (Config::kSplitK - 1) * kSharePitch * 4;
  static_assert(Config::kSplitK == 1 ||
                Config::kBlockM * kPartialPitch * 4 <= kStages * (T::kLhsBytes + T::kRhsBytes));

  static constexpr int kOutStaging = kStaged ? T::kNumWriters * Config::kOutBuffers * T::kChunkBytes : 0;
  static constexpr int kOut = kOutStaging + kReceived;

  // Tiles in the 128-byte swizzle repeat every 1024 bytes, so each starts at a multiple of that.
  alignas(1024) u8 lhs[kStages][T::kLhsBytes];
  alignas(1024) u8 rhs[kStages][T::kRhsBytes];
  // Chunks on their way to global memory, or received partial sums.
  alignas(1024) u8 out[kOut > 0 ? kOut : 1];
  alignas(16) float lhs_scale[kStages][Config::kBlockM];
  alignas(16) float rhs_scale[kStages][T::kRhsScales];
  alignas(16) u64 full[kStages];
  u64 empty[kStages];
  u64 received;
  [[no_unique_address]] QueueStorage<T::kGrouped> queue;

  __device__ float* partial() { return reinterpret_cast<float*>(lhs); }
  __device__ float* received_from(int index) { return reinterpret_cast<float*>(out) + index * kSharePitch; }
};

}  // namespace fp8gemm
