// The GEMM kernel: wires scheduler, producer, consumer and epilogue. README.md has the pipeline's figure.
//
// One warpgroup loads (a thread for the operands, a warp for the scales, and a warp that finds the tiles of
// groups) and gives its registers to the Config::kNumConsumers warpgroups that multiply.
#pragma once

#include "epilogue.cuh"
#include "groups.cuh"
#include "producer.cuh"

namespace fp8gemm {

// The 64K registers of a multiprocessor, divided by role; setmaxnreg takes multiples of eight. With one
// consumer the launch bound alone leaves each thread its 255.
template <int kNumConsumers>
struct Registers;
template <>
struct Registers<2> {
  static constexpr int kProducer = 40, kConsumer = 232;
};
template <>
struct Registers<3> {
  static constexpr int kProducer = 56, kConsumer = 152;
};

template <class Config>
__device__ void produce(SharedStorage<Config>& shared, const TensorMap& lhs_map, const TensorMap& rhs_map,
                        const Arguments& arguments) {
  const int warp = warp_index() % 4;
  if (warp == 0) {
    if (elect_one()) produce_operands<Config>(shared, lhs_map, rhs_map, arguments);
  } else if (warp == 1) {
    produce_scales<Config>(shared, arguments);
  } else if (warp == 2) {
    if constexpr (Tile<Config>::kGrouped) schedule_groups<Config>(shared, arguments);
  }
  __syncwarp();
}

template <class Config>
__device__ void consume(SharedStorage<Config>& shared, const TensorMap& out_map, const Arguments& arguments) {
  Scheduler<Config> scheduler(shared, arguments);
  const int warpgroup = warp_index() / 4;
  Pipeline<Config> pipeline(shared);
  Accumulators<Config> accumulators;
  if constexpr (Config::kSplitK > 1) {
    scheduler.next();  // a cluster has one tile: its ring becomes the partial sums
    accumulate_tile<Config>(accumulators, pipeline, scheduler.tile, warpgroup);
    store_tile_split_k<Config>(accumulators, shared, scheduler.tile, scheduler.rank, arguments, warpgroup);
  } else {
    OutRing<Config> ring(shared);
    while (scheduler.next()) {
      accumulate_tile<Config>(accumulators, pipeline, scheduler.tile, warpgroup);
      if constexpr (Config::kTmaStore)
        store_tile_tma<Config>(accumulators, ring, scheduler.tile, out_map, arguments, warpgroup);
      else
        store_tile_direct<Config>(accumulators, scheduler.tile, arguments, warpgroup);
    }
    if constexpr (Config::kTmaStore)  // shared memory lives until it has been read
      if (Writers<Config>::is_leader()) ptx::tma_store_wait_read<0>();
  }
}

template <class Config>
__device__ void gemm(const TensorMap& lhs_map, const TensorMap& rhs_map, const TensorMap& out_map,
                     const Arguments& arguments) {
  using T = Tile<Config>;
  static_assert(sizeof(SharedStorage<Config>) == Config::kSharedBytes,
                "jit/tile.py counts shared memory otherwise");
  extern __shared__ __align__(1024) u8 shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&lhs_map);
    ptx::prefetch_tensor_map(&rhs_map);
    if constexpr (Config::kTmaStore) ptx::prefetch_tensor_map(&out_map);
    Pipeline<Config>::init(shared);
    // Its readers: the thread that loads operands, the warp that loads scales, the warps that multiply.
    if constexpr (T::kGrouped) TileQueue::init(shared.queue, 1 + 1 + 4 * Config::kNumConsumers);
    ptx::fence_mbarrier_init();
  }
  // Relaxed: the barriers' own fence has made them visible to the cluster.
  if constexpr (T::kClusterSize > 1) ptx::cluster_sync_relaxed();
  __syncthreads();

  if (warp_index() >= 4 * Config::kNumConsumers) {
    if constexpr (Config::kNumConsumers > 1)
      ptx::register_limit_lower<Registers<Config::kNumConsumers>::kProducer>();
    produce<Config>(shared, lhs_map, rhs_map, arguments);
  } else {
    if constexpr (Config::kNumConsumers > 1)
      ptx::register_limit_raise<Registers<Config::kNumConsumers>::kConsumer>();
    consume<Config>(shared, out_map, arguments);
  }
  // Other CTAs of the cluster may still write to this one's shared memory, arrive at its barriers or be sent
  // its sums.
  if constexpr (T::kClusterSize > 1) ptx::cluster_sync_relaxed();
}

}  // namespace fp8gemm
