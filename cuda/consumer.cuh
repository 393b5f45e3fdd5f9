// Takes stages from the ring: wgmma over one block of K into a partial sum, then promotion of the partial sum, with its
// scales, into f32 accumulators on the CUDA cores. The second level is there because the tensor core keeps 13 bits
// below the largest term of a sum.
//
// A thread of a warpgroup holds, of each 64 x Q product, rows 16 w + l / 4 (+ 8) and columns 8 j + 2 (l % 4) (+ 1), for
// its warp w and lane l: fragment[4 j + 0, 1] in the first row, [4 j + 2, 3] in the second.
#pragma once

#include "pipeline.cuh"
#include "ptx/wgmma.cuh"
#include "scheduler.cuh"

namespace fp8gemm {

// Where a thread's fragment lies in the tile.
template <class Config>
struct ThreadPlace {
  using T = Tile<Config>;
  int p, q;  // first row on the P side, first column on the Q side

  __device__ explicit ThreadPlace(int warpgroup) {
    const int warp = threadIdx.x / 32 % 4, lane = lane_index();
    p = T::warpgroup_p(warpgroup) + warp * 16 + lane / 4;
    q = T::warpgroup_q(warpgroup) + lane % 4 * 2;
  }
};

// scale(row, j, column) = rn(lhs scale * rhs scale) for row 0, 1 of a fragment, its j-th group of 8 columns, column 0, 1.
//
// Both sides per row: a product for each element.
template <class Config, bool kRhsPerRow = Tile<Config>::kRhsPerRow, bool kSwapAB = Config::kSwapAB>
struct Scales {
  using T = Tile<Config>;
  float rows[T::kNumMmaP][2];
  float columns[T::kWarpgroupQ / 8][2];

  __device__ void load(const SharedStorage<Config>& shared, u32 stage, ThreadPlace<Config> at, int, int) {
    const float* p_scale = kSwapAB ? shared.rhs_scale[stage] : shared.lhs_scale[stage];
    const float* q_scale = kSwapAB ? shared.lhs_scale[stage] : shared.rhs_scale[stage];
#pragma unroll
    for (int i = 0; i < T::kNumMmaP; ++i)
#pragma unroll
      for (int row = 0; row < 2; ++row) rows[i][row] = p_scale[at.p + i * kMmaP + row * 8];
#pragma unroll
    for (int j = 0; j < T::kWarpgroupQ / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&q_scale[at.q + j * 8]);
      columns[j][0] = pair.x, columns[j][1] = pair.y;
    }
  }

  __device__ float operator()(int mma, int row, int j, int column) const {
    return __fmul_rn(rows[mma][row], columns[j][column]);
  }
};

// Tokens in rows, weights in columns: one product per row and 128-block of columns. Where blocks begin is known at
// compile time only if the tile is aligned to them.
template <class Config>
struct Scales<Config, false, false> {
  using T = Tile<Config>;
  static constexpr int kAlignment = gcd(gcd(Config::kBlockN, T::kWarpgroupQ), kScaleBlock);
  static constexpr int kBlocks = ceil_div(kScaleBlock - kAlignment + T::kWarpgroupQ, kScaleBlock);
  static constexpr bool kAligned = kAlignment == kScaleBlock;
  static_assert(kBlocks <= 3);

  float products[T::kNumMmaP][2][kBlocks];
  int first_columns;  // columns of the warpgroup that belong to its first block

  __device__ void load(const SharedStorage<Config>& shared, u32 stage, ThreadPlace<Config> at, int n_start,
                       int warpgroup) {
    const int n = n_start + T::warpgroup_q(warpgroup);
    const int first_block = n / kScaleBlock - n_start / kScaleBlock;
    first_columns = kScaleBlock - n % kScaleBlock;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float column = shared.rhs_scale[stage][first_block + b];
#pragma unroll
      for (int i = 0; i < T::kNumMmaP; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row)
          products[i][row][b] = __fmul_rn(shared.lhs_scale[stage][at.p + i * kMmaP + row * 8], column);
    }
  }

  __device__ float operator()(int mma, int row, int j, int) const {
    const float(&blocks)[kBlocks] = products[mma][row];
    if constexpr (kBlocks == 1) return blocks[0];
    if constexpr (kAligned) return blocks[j * 8 / kScaleBlock];
    float scale = j * 8 < first_columns ? blocks[0] : blocks[1];
    if constexpr (kBlocks == 3) scale = j * 8 < first_columns + kScaleBlock ? scale : blocks[2];
    return scale;
  }
};

// Weights in rows, tokens in columns: 64 rows lie within one 128-block.
template <class Config>
struct Scales<Config, false, true> {
  using T = Tile<Config>;
  static_assert(Config::kBlockN % kMmaP == 0);
  float rows[T::kNumMmaP];
  float columns[T::kWarpgroupQ / 8][2];

  __device__ void load(const SharedStorage<Config>& shared, u32 stage, ThreadPlace<Config> at, int n_start,
                       int warpgroup) {
#pragma unroll
    for (int i = 0; i < T::kNumMmaP; ++i) {
      const int n = n_start + T::warpgroup_p(warpgroup) + i * kMmaP;
      rows[i] = shared.rhs_scale[stage][n / kScaleBlock - n_start / kScaleBlock];
    }
#pragma unroll
    for (int j = 0; j < T::kWarpgroupQ / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&shared.lhs_scale[stage][at.q + j * 8]);
      columns[j][0] = pair.x, columns[j][1] = pair.y;
    }
  }

  __device__ float operator()(int mma, int, int j, int column) const {
    return __fmul_rn(rows[mma], columns[j][column]);
  }
};

template <class Config>
using Accumulators = float[Tile<Config>::kNumMmaP][Tile<Config>::kFragment];

// Starts the product of 64 rows of P with the warpgroup's columns of Q over one block of K.
template <class Config>
__device__ void multiply(float (&partial)[Tile<Config>::kFragment], u64 p_descriptor, u64 q_descriptor) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBlockK / kMmaK; ++k)
    Config::wgmma(partial, p_descriptor + k * ptx::kWgmmaStepK, q_descriptor + k * ptx::kWgmmaStepK, k > 0);
  ptx::wgmma_commit();
}

template <class Config>
__device__ void promote(float (&accumulator)[Tile<Config>::kFragment],
                        const float (&partial)[Tile<Config>::kFragment], const Scales<Config>& scales, int mma) {
#pragma unroll
  for (int j = 0; j < Tile<Config>::kWarpgroupQ / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      accumulator[4 * j + e] = __fmaf_rn(scales(mma, e / 2, j, e % 2), partial[4 * j + e], accumulator[4 * j + e]);
}

// The sum over this CTA's part of K of one tile.
template <class Config>
__device__ void accumulate_tile(Accumulators<Config>& accumulators, Pipeline<Config>& pipeline,
                                const Scheduler<Config>& scheduler, int warpgroup) {
  using T = Tile<Config>;
  SharedStorage<Config>& shared = pipeline.shared;
  const ThreadPlace<Config> at(warpgroup);
#pragma unroll
  for (int i = 0; i < T::kNumMmaP; ++i)
#pragma unroll
    for (int e = 0; e < T::kFragment; ++e) accumulators[i][e] = 0;

  for (int k = scheduler.k_begin(); k < scheduler.k_end(); ++k, pipeline.advance()) {
    pipeline.wait_full();
    const u32 stage = pipeline.stage;
    Scales<Config> scales;
    scales.load(shared, stage, at, scheduler.n_start, warpgroup);
    const u8* p_tile = Config::kSwapAB ? shared.rhs[stage] : shared.lhs[stage];
    const u8* q_tile = Config::kSwapAB ? shared.lhs[stage] : shared.rhs[stage];
    const u64 p_descriptor = ptx::wgmma_descriptor(p_tile + T::warpgroup_p(warpgroup) * kBlockK);
    const u64 q_descriptor = ptx::wgmma_descriptor(q_tile + T::warpgroup_q(warpgroup) * kBlockK);
    unrolled<T::kNumMmaP>([&](auto i) {
      float partial[T::kFragment];
      multiply<Config>(partial, p_descriptor + i * (kMmaP * kBlockK / 16), q_descriptor);
      ptx::wgmma_wait<0>(partial);
      if constexpr (i == T::kNumMmaP - 1) pipeline.release();
      promote<Config>(accumulators[i], partial, scales, i);
    });
  }
}

}  // namespace fp8gemm
