// Which tile next. A cluster walks the tiles at its own index, then one grid of clusters further, and so on;
// every role runs the same loop:
//
//   Scheduler<Config> scheduler(shared, arguments);
//   while (scheduler.next()) ... scheduler.tile ...
//
// With static sizes each warp computes its tiles by itself (StaticScheduler). Where group sizes are on the
// device, one warp does it for the CTA (schedule_groups, in groups.cuh) and the others read from its queue
// (QueueScheduler).
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "smem.cuh"

namespace fp8gemm {

// What a kernel is given besides its tensor maps.
struct Arguments {
  const float* lhs_scale;
  const float* rhs_scale;
  void* out;
  u32 m, num_batches;
  const int* group_sizes;  // [batch][group]; none where the kind has no groups
  u32 num_groups;
};

// The tiles of [tiles_m, tiles_n] in order: bands of kRasterGroup cluster tiles along M, M first within a
// band, so that the band's lhs and the rhs tiles in flight stay in L2. Divisions by numbers that the compiler
// does not know take hundreds of cycles: there are none but in the last, narrower band.
template <class Config>
struct Raster {
  static constexpr int kClusterTileM = Config::kBlockM * Config::kClusterM;
  static constexpr int kClusterTileN = Config::kBlockN * Config::kClusterN;
  static constexpr u32 kTilesN = ceil_div(Config::kN, kClusterTileN);

  __device__ static u32 tiles_m(u32 rows) { return (rows + kClusterTileM - 1) / kClusterTileM; }

  int m_start, n_start;  // of this CTA's part of the cluster tile, in elements

  __device__ Raster(u32 index, u32 tiles_m, u32 rank) {
    constexpr u32 kTilesPerBand = Config::kRasterGroup * kTilesN;
    const u32 band_start = index / kTilesPerBand * Config::kRasterGroup, in_band = index % kTilesPerBand;
    const u32 band_size = tiles_m - band_start;
    u32 tile_m = in_band % Config::kRasterGroup, tile_n = in_band / Config::kRasterGroup;
    if (band_size < Config::kRasterGroup) {
      tile_n = band_size == 1 ? in_band : in_band / band_size;
      tile_m = in_band - tile_n * band_size;
    }
    m_start = (band_start + tile_m) * kClusterTileM;
    n_start = tile_n * kClusterTileN;
    if constexpr (Config::kClusterM > 1) m_start += rank * Config::kBlockM;
    if constexpr (Config::kClusterN > 1) n_start += rank * Config::kBlockN;
  }
};

// The last two coordinates, x being innermost, of a box of rows in a tensor map of lhs or out.
struct RowCoordinates {
  int y, z;
};

// The box of kBox rows from `row` on. Where groups end at any row, the copy engine has to leave alone what
// follows. It clips at the ends of dimensions, so there the map has two dimensions that both step by a row
// (`_row_map` in jit/plan.py): a window of kBox, which the last of the box's own rows ends, and the place
// of that end in the array. A box without a row of its own gets the one in front: the copy engine touches
// where the map begins, which is no memory, for a box that is outside of it altogether.
template <class Config, int kBox>
__device__ RowCoordinates row_coordinates(const WorkTile& tile, int batch, int row, u32 m) {
  if constexpr (Tile<Config>::kEndsAnywhere) {
    const int end = min(row + kBox, tile.m_end);
    return {kBox - max(end - row, 1), batch * static_cast<int>(m) + end};
  } else {
    return {row, batch};
  }
}

template <class Config>
__device__ u32 rank_in_cluster() {
  return Tile<Config>::kClusterSize > 1 ? ptx::cluster_cta_rank() : 0;
}

template <class Config>
class StaticScheduler {
 public:
  WorkTile tile;
  u32 rank;  // of this CTA in its cluster

  __device__ StaticScheduler(SharedStorage<Config>&, const Arguments& arguments)
      : rank(rank_in_cluster<Config>()),
        m_(arguments.m),
        tiles_m_(Raster<Config>::tiles_m(arguments.m)),
        num_tiles_(tiles_m_ * Raster<Config>::kTilesN * arguments.num_batches),
        next_(blockIdx.x / Tile<Config>::kClusterSize) {}

  __device__ bool next() {
    if (next_ >= num_tiles_) return false;
    const u32 tiles_per_batch = tiles_m_ * Raster<Config>::kTilesN;
    const u32 batch = next_ < tiles_per_batch ? 0 : next_ / tiles_per_batch;
    const Raster<Config> raster(next_ - batch * tiles_per_batch, tiles_m_, rank);
    // The part of K that this CTA sums.
    constexpr int kKBlocks = Tile<Config>::kNumKBlocks, kKBlocksPerCta = ceil_div(kKBlocks, Config::kSplitK);
    const int k_begin = Config::kSplitK > 1 ? rank * kKBlocksPerCta : 0;
    tile.m_start = raster.m_start, tile.m_end = m_;
    tile.n_start = raster.n_start;
    tile.k_begin = k_begin, tile.k_end = min(k_begin + kKBlocksPerCta, kKBlocks);
    tile.lhs_batch = Config::kLhsBatched ? batch : 0;
    tile.rhs_batch = Config::kRhsBatched ? batch : 0;
    tile.out_batch = batch;
    next_ += gridDim.x / Tile<Config>::kClusterSize;
    return true;
  }

 private:
  u32 m_, tiles_m_, num_tiles_, next_;
};

// The slots of the queue in turn, on its writer's side and on its readers'.
struct TileQueue {
  QueueStorage<true>& storage;
  u32 slot = 0, phase = 0;

  __device__ static void init(QueueStorage<true>& storage, u32 num_readers) {
    for (int s = 0; s < kTileSlots; ++s) {
      ptx::mbarrier_init(&storage.full[s], 1);
      ptx::mbarrier_init(&storage.empty[s], num_readers);
    }
  }

  // One thread writes. A tile that ends at row 0 ends the queue.
  __device__ void push(const WorkTile& tile) {
    ptx::mbarrier_wait(&storage.empty[slot], phase ^ 1);
    storage.tiles[slot] = tile;
    ptx::mbarrier_arrive(&storage.full[slot]);
    advance();
  }

  // For a reader that is one thread, or a warp whose lanes all get the tile.
  template <bool kOneThread>
  __device__ WorkTile pop() {
    ptx::mbarrier_wait(&storage.full[slot], phase);
    const WorkTile tile = storage.tiles[slot];
    if constexpr (!kOneThread) __syncwarp();
    if (kOneThread || lane_index() == 0) ptx::mbarrier_arrive(&storage.empty[slot]);
    advance();
    return tile;
  }

  __device__ void advance() {
    if (++slot == kTileSlots) slot = 0, phase ^= 1;
  }
};

template <class Config, bool kOneThread>
class QueueScheduler {
 public:
  WorkTile tile;
  u32 rank;

  __device__ QueueScheduler(SharedStorage<Config>& shared, const Arguments&)
      : rank(rank_in_cluster<Config>()), queue_{shared.queue} {}

  __device__ bool next() {
    tile = queue_.pop<kOneThread>();
    // A vote, and so the same in all lanes for the compiler too: it takes the loop over tiles to be divergent
    // otherwise, keeps no stage and no descriptor in uniform registers, and moves them there at each wgmma.
    return kOneThread ? tile.m_end > 0 : __any_sync(0xffffffff, tile.m_end > 0);
  }

 private:
  TileQueue queue_;
};

// For a role that is a warp, or one thread.
template <class Config, bool kOneThread, bool kGrouped = Tile<Config>::kGrouped>
struct SchedulerOf {
  using type = StaticScheduler<Config>;
};
template <class Config, bool kOneThread>
struct SchedulerOf<Config, kOneThread, true> {
  using type = QueueScheduler<Config, kOneThread>;
};
template <class Config, bool kOneThread = false>
using Scheduler = typename SchedulerOf<Config, kOneThread>::type;

}  // namespace fp8gemm
