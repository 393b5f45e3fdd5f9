// A counting sort of expert ids. A cluster sorts a batch: each warp has a run of neighbouring ids, counts its
// experts, and later hands out positions in order. Counts become first positions by sums over warps, CTAs
// (through distributed shared memory) and experts in that order, so that the sort is stable, and its result
// the same in every run.
//
//   Config::kThreads   of a CTA
#pragma once

#include "ptx/sync.cuh"
#include "scan.cuh"

namespace fp8gemm {

// The shared memory of a CTA; `sort_shared_bytes` in jit/moe.py has its size.
template <class Config>
struct SortCounts {
  static constexpr u32 kWarps = Config::kThreads / 32;

  u32* of_cta;     // [num_experts] ids of this CTA; other CTAs read them
  u32* first;      // [num_experts] position of this CTA's first one
  u32* of_warps;   // [kWarps][num_experts] ids of each warp, then those of the warps before
  u32* warp_sums;  // [kWarps]
  u32 num_experts;

  __device__ SortCounts(u32* shared, u32 num_experts)
      : of_cta(shared),
        first(of_cta + num_experts),
        of_warps(first + num_experts),
        warp_sums(of_warps + kWarps * num_experts),
        num_experts(num_experts) {}

  __device__ u32* of_warp() const { return of_warps + threadIdx.x / 32 * num_experts; }

  // Sums over the warps: of_warps and of_cta.
  __device__ void sum_warps() {
    constexpr u32 kStrip = min_of(kWarps, 8);  // warps whose counts are read at once
    for (u32 expert = threadIdx.x; expert < num_experts; expert += Config::kThreads) {
      u32 sum = 0;
      for (u32 warp = 0; warp < kWarps; warp += kStrip) {
        u32 counts[kStrip];
#pragma unroll
        for (u32 i = 0; i < kStrip; ++i) counts[i] = of_warps[(warp + i) * num_experts + expert];
#pragma unroll
        for (u32 i = 0; i < kStrip; ++i) {
          of_warps[(warp + i) * num_experts + expert] = sum;
          sum += counts[i];
        }
      }
      of_cta[expert] = sum;
    }
  }

  // Sums over the CTAs and experts: `first`. Writes the group sizes, and returns their sum.
  __device__ u32 sum_ctas(int* group_sizes) {
    const u32 num_ctas = ptx::cluster_num_ctas(), rank = ptx::cluster_cta_rank();
    u32 sum = 0;
    for (u32 start = 0; start < num_experts; start += Config::kThreads) {
      const u32 expert = start + threadIdx.x;
      u32 before = 0, all = 0;
      if (expert < num_experts) {
        for (u32 cta = 0; cta < num_ctas; ++cta) {
          const u32 count = ptx::load_shared_of(&of_cta[expert], cta);
          before += cta < rank ? count : 0;
          all += count;
        }
        if (rank == 0) group_sizes[expert] = all;
      }
      const u32 through = sum + sum_through(all);
      if (expert < num_experts) first[expert] = through - all + before;
      sum += sum_of_warps();
    }
    return sum;
  }

 private:
  // The sum over the CTA's threads up to this one.
  __device__ u32 sum_through(u32 value) {
    const u32 through = scan_saturating(value, kNoLimit);
    __syncthreads();  // the sums of the last time have been read
    if (lane_index() == 31) warp_sums[threadIdx.x / 32] = through;
    __syncthreads();
    u32 before = 0;
    for (u32 warp = 0; warp < threadIdx.x / 32; ++warp) before += warp_sums[warp];
    return before + through;
  }

  __device__ u32 sum_of_warps() const {
    u32 sum = 0;
    for (u32 warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
    return sum;
  }
};

// The ids of a warp, kStrips times 32 of them at once, so that their loads overlap.
struct IdRun {
  static constexpr u32 kStrips = 4;

  const int* ids;  // of the batch
  u32 begin, end;

  // Calls f(index of id, id) in each lane of the warp for each id, in order; behind the end with id ~0.
  template <class Function>
  __device__ void for_each(Function&& f) const {
    for (u32 start = begin; start < end; start += 32 * kStrips) {
      u32 strips[kStrips];
#pragma unroll
      for (u32 i = 0; i < kStrips; ++i) {
        const u32 index = start + i * 32 + lane_index();
        strips[i] = index < end ? ids[index] : ~0u;
      }
#pragma unroll
      for (u32 i = 0; i < kStrips; ++i) f(start + i * 32 + lane_index(), strips[i]);
    }
  }
};

// expert_ids [batch][num_ids] -> group_sizes [batch][num_experts], positions [batch][num_ids] (num_ids for an
// id that is no expert), num_rows [batch], the sum of the group sizes.
template <class Config>
__device__ void sort_by_expert(const int* expert_ids, int* group_sizes, int* positions, int* num_rows,
                               u32 num_ids, u32 num_experts) {
  extern __shared__ u32 shared[];
  SortCounts<Config> counts(shared, num_experts);
  const u32 num_ctas = ptx::cluster_num_ctas(), rank = ptx::cluster_cta_rank();
  const u32 batch = blockIdx.x / num_ctas, num_warps = num_ctas * counts.kWarps;
  const u32 run_length = (num_ids + num_warps - 1) / num_warps;
  const u32 begin = min((rank * counts.kWarps + threadIdx.x / 32) * run_length, num_ids);
  const IdRun run{expert_ids + static_cast<i64>(batch) * num_ids, begin, min(begin + run_length, num_ids)};

  u32* const of_warp = counts.of_warp();
  for (u32 expert = lane_index(); expert < num_experts; expert += 32) of_warp[expert] = 0;
  __syncwarp();
  run.for_each([&](u32, u32 id) {
    if (id < num_experts) atomicAdd(&of_warp[id], 1);
  });
  __syncthreads();
  counts.sum_warps();
  ptx::cluster_sync();
  const u32 sum = counts.sum_ctas(group_sizes + static_cast<i64>(batch) * num_experts);
  if (rank == 0 && threadIdx.x == 0) num_rows[batch] = sum;
  ptx::cluster_sync();  // a CTA's counts stay until all have read them

  int* const of_batch = positions + static_cast<i64>(batch) * num_ids;
  run.for_each([&](u32 index, u32 id) {
    // Lanes with the same id take places one after the other, the last one leaves the next place behind.
    const u32 equal = __match_any_sync(0xffffffff, id), lanes_below = (1u << lane_index()) - 1;
    const u32 place = __popc(equal & lanes_below);
    u32 before = 0;
    if (id < num_experts) before = of_warp[id];
    __syncwarp();
    if (id < num_experts && place == 0) of_warp[id] = before + __popc(equal);
    __syncwarp();
    if (index < run.end) of_batch[index] = id < num_experts ? counts.first[id] + before + place : num_ids;
  });
}

}  // namespace fp8gemm
