// Fills the ring: one thread drives the copy engine for the operands; one warp fetches the scales, whose rows
// are not multiples of 16 bytes for every M and so are out of the copy engine's reach.
#pragma once

#include "pipeline.cuh"
#include "ptx/copy.cuh"
#include "scheduler.cuh"

namespace fp8gemm {

// Loads this CTA's tile of an operand or, where `kCtas` CTAs of the cluster share the tile, its own part of
// it for all.
template <int kRows, int kCtas>
__device__ void load_operand(u8* tile, const TensorMap& map, u64* full, int k, RowCoordinates rows,
                             u32 rank) {
  if constexpr (kCtas == 1) {
    ptx::tma_load(tile, &map, full, k, rows.y, rows.z);
  } else {
    static_assert(kRows % 8 == 0, "a part is a whole number of swizzled groups of eight rows");
    ptx::tma_load_multicast(tile + rank * kRows * kBlockK, &map, full, k, rows.y, rows.z, (1 << kCtas) - 1);
  }
}

template <class Config>
__device__ void produce_operands(SharedStorage<Config>& shared, const TensorMap& lhs_map,
                                 const TensorMap& rhs_map, const Arguments& arguments) {
  using T = Tile<Config>;
  constexpr int kLhsRows = Config::kBlockM / Config::kClusterN,
                kRhsRows = Config::kBlockN / Config::kClusterM;
  Scheduler<Config, true> scheduler(shared, arguments);
  Pipeline<Config> pipeline(shared);
  while (scheduler.next()) {
    const WorkTile& tile = scheduler.tile;
    const int lhs_part = Config::kClusterN > 1 ? scheduler.rank * kLhsRows : 0;
    const int rhs_part = Config::kClusterM > 1 ? scheduler.rank * kRhsRows : 0;
    const RowCoordinates lhs_rows =
        row_coordinates<Config, kLhsRows>(tile, tile.lhs_batch, tile.m_start + lhs_part, arguments.m);
    const RowCoordinates rhs_rows{tile.n_start + rhs_part, tile.rhs_batch};
    for (int k = tile.k_begin; k < tile.k_end; ++k, pipeline.advance()) {
      pipeline.wait_empty();
      u64* full = &shared.full[pipeline.stage];
      ptx::mbarrier_arrive_expect_bytes(full, T::kLhsBytes + T::kRhsBytes);
      load_operand<kRhsRows, Config::kClusterM>(shared.rhs[pipeline.stage], rhs_map, full, k * kBlockK,
                                                rhs_rows, scheduler.rank);
      load_operand<kLhsRows, Config::kClusterN>(shared.lhs[pipeline.stage], lhs_map, full, k * kBlockK,
                                                lhs_rows, scheduler.rank);
    }
  }
}

// Fetches kRows scales that lie next to each other in memory; those from row `valid` on read as zero.
template <int kRows>
__device__ void load_row_scales(float (&destination)[kRows], const float* source, int valid) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < kRows; i += 32)
    if (i + lane < kRows) ptx::cp_async_4(&destination[i + lane], source + i + lane, i + lane < valid);
}

// lhs_scale is [batch][K blocks][M]; rhs_scale [batch][N blocks][K blocks], or per row [batch][K blocks][N].
template <class Config>
__device__ void produce_scales(SharedStorage<Config>& shared, const Arguments& arguments) {
  using T = Tile<Config>;
  constexpr int kN = Config::kN, kNumKBlocks = T::kNumKBlocks, kNumNBlocks = ceil_div(kN, kScaleBlock);
  const int m = arguments.m;
  Scheduler<Config> scheduler(shared, arguments);
  Pipeline<Config> pipeline(shared);
  while (scheduler.next()) {
    const WorkTile& tile = scheduler.tile;
    const i64 lhs_batch = tile.lhs_batch, rhs_batch = tile.rhs_batch;
    const int n_block = tile.n_start / kScaleBlock + lane_index();
    const float* lhs_row = arguments.lhs_scale + (lhs_batch * kNumKBlocks + tile.k_begin) * m + tile.m_start;
    const float* rhs_row = arguments.rhs_scale + (rhs_batch * kNumKBlocks + tile.k_begin) * kN + tile.n_start;
    const float* rhs_block =
        arguments.rhs_scale + (rhs_batch * kNumNBlocks + n_block) * kNumKBlocks + tile.k_begin;
    for (int k = tile.k_begin; k < tile.k_end; ++k, pipeline.advance()) {
      pipeline.wait_empty();
      load_row_scales(shared.lhs_scale[pipeline.stage], lhs_row, tile.m_end - tile.m_start);
      lhs_row += m;
      if constexpr (T::kRhsPerRow) {
        load_row_scales(shared.rhs_scale[pipeline.stage], rhs_row, kN - tile.n_start);
        rhs_row += kN;
      } else if (lane_index() < T::kRhsScales) {
        ptx::cp_async_4(&shared.rhs_scale[pipeline.stage][lane_index()], rhs_block++, n_block < kNumNBlocks);
      }
      ptx::mbarrier_arrive_after_cp_async(&shared.full[pipeline.stage]);
    }
  }
  ptx::cp_async_wait_all();
}

}  // namespace fp8gemm
