// mbarrier: arrivals and transferred bytes are counted in shared memory; waiting is by the parity of a phase.
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm::ptx {

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of another CTA of the cluster. Relaxed: a release at cluster scope would
// compile to a fence of all memory, and what a consumer has to say, that its reads are done, needs none.
__device__ __forceinline__ void mbarrier_arrive_remote(u64* barrier, u32 cta_rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(cta_rank)
      : "memory");
}

// Arrives once all cp.async that this thread has issued are complete; counts among the expected arrivals.
__device__ __forceinline__ void mbarrier_arrive_after_cp_async(u64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) {
  u32 complete;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(complete)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return complete;
}

// Whether a phase is complete, without waiting for it.
__device__ __forceinline__ bool mbarrier_test(u64* barrier, u32 parity) {
  u32 complete;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete;
}

__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace fp8gemm::ptx
