// The ring of stages between the loading and the multiplying warps: one owner of stage and phase on each
// side.
//
//   full[s]   completed by the bytes of both operands and the scales of stage s; consumers wait for it
//   empty[s]  completed by every consumer warp, of every CTA that a multicast writes to; producers wait
//   received  completed once, by the partial sums of the cluster's other CTAs (split-K); consumers wait
#pragma once

#include "ptx/mbarrier.cuh"
#include "smem.cuh"

namespace fp8gemm {

template <class Config>
struct Pipeline {
  using T = Tile<Config>;
  static constexpr int kStages = Config::kNumStages;
  static constexpr int kMulticastCtas = Config::kClusterM * Config::kClusterN;

  SharedStorage<Config>& shared;
  u32 stage = 0;
  u32 phase = 0;
  bool ready = false;  // the current stage was seen full

  __device__ explicit Pipeline(SharedStorage<Config>& storage) : shared(storage) {}

  __device__ static void init(SharedStorage<Config>& shared) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.full[s], kOperandLoaderThreads + kScaleLoaderThreads);
      ptx::mbarrier_init(&shared.empty[s], Config::kNumConsumers * 4 * kMulticastCtas);
    }
    ptx::mbarrier_init(&shared.received, 1);
  }

  // The opposite parity: the first round passes at once.
  __device__ void wait_empty() { ptx::mbarrier_wait(&shared.empty[stage], phase ^ 1); }
  __device__ void wait_full() {
    if (!ready) ptx::mbarrier_wait(&shared.full[stage], phase);
    ready = false;
  }
  // Looks at the stage early, so that waiting for it later costs nothing if it is full.
  __device__ void peek_full() { ready = ptx::mbarrier_test(&shared.full[stage], phase); }

  // A warp has read all it needs of this stage.
  __device__ void release() {
    __syncwarp();
    if constexpr (kMulticastCtas > 1) {
      if (lane_index() < kMulticastCtas) ptx::mbarrier_arrive_remote(&shared.empty[stage], lane_index());
    } else {
      if (lane_index() == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
    }
  }

  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

}  // namespace fp8gemm
