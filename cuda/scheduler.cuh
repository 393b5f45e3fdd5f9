// Which tile next. A cluster walks the tiles at its own index, then one grid of clusters further, and so on;
// every role runs the same loop. Tiles are ordered in bands of kRasterGroup cluster tiles along M, M first
// within a band: the band's lhs and the rhs tiles in flight stay in L2.
#pragma once

#include "ptx/sync.cuh"
#include "tile.cuh"

namespace fp8gemm {

template <class Config>
struct Scheduler {
  static constexpr int kClusterTileM = Config::kBlockM * Config::kClusterM;
  static constexpr int kClusterTileN = Config::kBlockN * Config::kClusterN;
  static constexpr u32 kTilesN = ceil_div(Config::kN, kClusterTileN);
  static constexpr u32 kClusterSize = Tile<Config>::kClusterSize;

  u32 m, tiles_m, num_tiles;
  u32 next_tile;
  u32 rank;  // of this CTA in its cluster

  int batch, m_start, n_start;  // the current tile, in elements

  __device__ Scheduler(u32 m, u32 num_batches) : m(m) {
    tiles_m = (m + kClusterTileM - 1) / kClusterTileM;
    num_tiles = tiles_m * kTilesN * num_batches;
    next_tile = blockIdx.x / kClusterSize;
    rank = kClusterSize > 1 ? ptx::cluster_cta_rank() : 0;
  }

  // Divisions by numbers that the compiler does not know take hundreds of cycles, in which nobody computes:
  // there are none but for a batch and for the last, narrower band.
  __device__ bool next() {
    if (next_tile >= num_tiles) return false;
    const u32 tiles_per_batch = tiles_m * kTilesN;
    batch = next_tile < tiles_per_batch ? 0 : next_tile / tiles_per_batch;
    const u32 tile = next_tile - batch * tiles_per_batch;
    constexpr u32 kTilesPerBand = Config::kRasterGroup * kTilesN;
    const u32 band_start = tile / kTilesPerBand * Config::kRasterGroup, index = tile % kTilesPerBand;
    const u32 band_size = tiles_m - band_start;
    u32 tile_m = index % Config::kRasterGroup, tile_n = index / Config::kRasterGroup;
    if (band_size < Config::kRasterGroup) {
      tile_n = band_size == 1 ? index : index / band_size;
      tile_m = index - tile_n * band_size;
    }
    m_start = (band_start + tile_m) * kClusterTileM;
    n_start = tile_n * kClusterTileN;
    if constexpr (Config::kClusterM > 1) m_start += rank * Config::kBlockM;
    if constexpr (Config::kClusterN > 1) n_start += rank * Config::kBlockN;
    next_tile += gridDim.x / kClusterSize;
    return true;
  }

  // The part of K, in blocks, that this CTA sums.
  static constexpr int kKBlocksPerCta = ceil_div(Tile<Config>::kNumKBlocks, Config::kSplitK);
  __device__ int k_begin() const { return Config::kSplitK > 1 ? rank * kKBlocksPerCta : 0; }
  __device__ int k_end() const { return min(k_begin() + kKBlocksPerCta, Tile<Config>::kNumKBlocks); }
};

}  // namespace fp8gemm
