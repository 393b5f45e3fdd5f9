// Tiles of groups whose sizes are known on the device only: one warp of a CTA walks the groups, 32 at a time,
// and hands the CTA's tiles to the other warps through a queue in shared memory.
//
// Sizes may hold anything: a negative one counts as zero, and a group ends where the rows (or blocks of K)
// that exist end. Running sums saturate there, so that nothing overflows.
#pragma once

#include "scan.cuh"
#include "scheduler.cuh"

namespace fp8gemm {

// 32 groups of one batch, a lane each: what they own of the axis that is divided among them, and their tiles.
template <class Config>
struct GroupWindow {
  static constexpr Kind kKind = Config::kKind;
  // Ragged M has one group more: the rows past the sum, which come out as zero.
  static constexpr u32 kExtraGroups = kKind == Kind::kRaggedM;

  const Arguments& arguments;
  u32 batch = 0, first_group = 0;
  u32 start_before = 0;                   // where the first group's share begins
  u32 tiles_before = 0;                   // tiles of all groups before
  u32 start, end;                         // of this lane's group: rows, or blocks of K
  u32 tiles_m, num_tiles, tiles_through;  // its tiles; those of all groups up to it

  __device__ explicit GroupWindow(const Arguments& arguments) : arguments(arguments) { load(); }

  // The end of what is shared out: rows, or blocks of K.
  __device__ u32 limit() const {
    return kKind == Kind::kRaggedK ? static_cast<u32>(Tile<Config>::kNumKBlocks) : arguments.m;
  }

  // What the group asks for.
  __device__ u32 share(u32 group) const {
    if (group > arguments.num_groups || (group == arguments.num_groups && kExtraGroups == 0)) return 0;
    if (group == arguments.num_groups) return limit();
    const int size = max(arguments.group_sizes[static_cast<i64>(batch) * arguments.num_groups + group], 0);
    return min(kKind == Kind::kRaggedK ? (size + 127u) / kBlockK : size, limit());
  }

  __device__ void load() {
    const u32 group = first_group + lane_index(), size = share(group);
    end =
        kKind == Kind::kMasked ? size : add_saturating(start_before, scan_saturating(size, limit()), limit());
    const u32 end_before = __shfl_up_sync(0xffffffff, end, 1);
    start = kKind == Kind::kMasked ? 0 : lane_index() == 0 ? start_before : end_before;
    count_tiles(group);
    tiles_through = tiles_before + scan_saturating(num_tiles, kMaxTiles);
  }

  __device__ void count_tiles(u32 group) {
    // Ragged K multiplies nothing for an empty group, but its output is to be written, unless it is added to.
    const bool has_output =
        kKind != Kind::kRaggedK || (group < arguments.num_groups && (!Config::kAccumulate || start < end));
    tiles_m = Raster<Config>::tiles_m(kKind == Kind::kRaggedK ? arguments.m : end - start);
    num_tiles = has_output ? tiles_m * Raster<Config>::kTilesN : 0;
  }

  // Goes on to the window that has the tile `index`; false where there is none.
  __device__ bool seek(u32 index) {
    while (index >= __shfl_sync(0xffffffff, tiles_through, 31)) {
      tiles_before = __shfl_sync(0xffffffff, tiles_through, 31);
      start_before = __shfl_sync(0xffffffff, end, 31);
      first_group += 32;
      if (first_group >= arguments.num_groups + kExtraGroups) {
        first_group = start_before = 0;
        if (++batch == arguments.num_batches) return false;
      }
      load();
    }
    return true;
  }

  // The index-th tile of all, which lies in this window.
  __device__ WorkTile find(u32 index, u32 rank) const {
    const u32 owner = __ffs(__ballot_sync(0xffffffff, index < tiles_through)) - 1;
    const auto of_owner = [&](u32 value) { return __shfl_sync(0xffffffff, value, owner); };
    const u32 owner_start = of_owner(start), owner_end = of_owner(end), group = first_group + owner;
    const Raster<Config> raster(index - (of_owner(tiles_through) - of_owner(num_tiles)), of_owner(tiles_m),
                                rank);
    return tile_of(group, owner_start, owner_end, raster);
  }

 private:
  static constexpr u32 kMaxTiles = 0x7fffffff;

  __device__ WorkTile tile_of(u32 group, u32 start, u32 end, const Raster<Config>& raster) const {
    const int lhs_batch = Config::kLhsBatched ? batch : 0, rhs_batch = Config::kRhsBatched ? batch : 0;
    const int num_groups = arguments.num_groups, g = group;
    WorkTile tile;
    tile.m_start = raster.m_start, tile.n_start = raster.n_start;
    if constexpr (kKind == Kind::kRaggedK) {
      tile.m_end = arguments.m;
      tile.k_begin = start, tile.k_end = end;
      tile.lhs_batch = lhs_batch, tile.rhs_batch = rhs_batch, tile.out_batch = batch * num_groups + g;
    } else {
      const bool is_rest = kExtraGroups && g == num_groups;
      tile.m_start += start, tile.m_end = end;
      tile.k_begin = 0, tile.k_end = is_rest ? 0 : Tile<Config>::kNumKBlocks;
      tile.rhs_batch = is_rest ? 0 : rhs_batch * num_groups + g;
      tile.lhs_batch = kKind == Kind::kMasked ? lhs_batch * num_groups + g : lhs_batch;
      tile.out_batch = kKind == Kind::kMasked ? batch * num_groups + g : batch;
    }
    return tile;
  }
};

// The warp that walks the groups: pushes all of this CTA's tiles.
template <class Config>
__device__ void schedule_groups(SharedStorage<Config>& shared, const Arguments& arguments) {
  TileQueue queue{shared.queue};
  GroupWindow<Config> window(arguments);
  const u32 rank = rank_in_cluster<Config>();
  for (u32 index = blockIdx.x / Tile<Config>::kClusterSize; window.seek(index);
       index += gridDim.x / Tile<Config>::kClusterSize) {
    const WorkTile tile = window.find(index, rank);
    // A cluster tile may reach beyond its group: then a CTA has no rows of its own, yet loads for the others.
    if (lane_index() == 0) queue.push(tile);
  }
  if (lane_index() == 0) queue.push(WorkTile{});
}

}  // namespace fp8gemm
