// Order and agreement among threads, warpgroups and the CTAs of a cluster; registers moved between
// warpgroups.
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm::ptx {

// Ordinary writes to shared memory become visible to the copy engine. Every writing thread calls it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier among `threads` threads of the CTA; `id` 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ u32 cluster_cta_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ u32 cluster_num_ctas() {
  u32 count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// What another CTA of the cluster has where `address` points to in this one's shared memory.
__device__ __forceinline__ u32 load_shared_of(const u32* address, u32 cta_rank) {
  u32 value;
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %1, %2; ld.shared::cluster.u32 %0, [remote]; }"
      : "=r"(value)
      : "r"(shared_address(address)), "r"(cta_rank)
      : "memory");
  return value;
}

// All threads of all CTAs of the cluster; what they wrote before is visible to all of them behind it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// The same without a promise about memory: a release at cluster scope would compile to a fence of all of it.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
}

template <int kRegisters>
__device__ __forceinline__ void register_limit_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void register_limit_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fp8gemm::ptx
