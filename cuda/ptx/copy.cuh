// Copies between global and shared memory: the copy engine (TMA) for tiles, cp.async for what it can't fetch.
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Fetches the box at (x, y, z), x innermost, and counts its bytes at `barrier`; out of bounds reads as zero.
__device__ __forceinline__ void tma_load(void* destination, const TensorMap* map, u64* barrier, int x, int y,
                                         int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same into every CTA of the cluster that `cta_mask` names, at the same address and barrier in each.
__device__ __forceinline__ void tma_load_multicast(void* destination, const TensorMap* map, u64* barrier,
                                                   int x, int y, int z, u16 cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(cta_mask)
      : "memory");
}

// Writes a box; out of bounds is left alone.
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* source, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(source)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Adds a box to what is there, rounding each sum to nearest.
__device__ __forceinline__ void tma_reduce_add(const TensorMap* map, const void* source, int x, int y,
                                               int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          map),
      "r"(shared_address(source)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `kPending` groups of stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Copies to another CTA of the cluster, where `destination` means the same place, and counts the bytes at its
// `barrier`.
__device__ __forceinline__ void copy_to_cta(void* destination, const void* source, u32 bytes, u64* barrier,
                                            u32 cta_rank) {
  asm volatile(
      "{ .reg .b32 remote, remote_barrier;"
      " mapa.shared::cluster.u32 remote, %0, %4; mapa.shared::cluster.u32 remote_barrier, %3, %4;"
      " cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [remote], [%1], %2, "
      "[remote_barrier]; }" ::"r"(shared_address(destination)),
      "r"(shared_address(source)), "r"(bytes), "r"(shared_address(barrier)), "r"(cta_rank)
      : "memory");
}

// Four bytes, or zero where `valid` is false.
__device__ __forceinline__ void cp_async_4(void* destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(valid ? 4 : 0)
               : "memory");
}

// The same of 16 bytes, which are read once.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread's copies are on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements from registers to the rows that the lanes name, eight lanes a matrix.
template <bool kTransposed>
__device__ __forceinline__ void store_matrix_x4(u32 row_address, u32 a, u32 b, u32 c, u32 d) {
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

template <bool kTransposed>
__device__ __forceinline__ void store_matrix_x2(u32 row_address, u32 a, u32 b) {
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row_address), "r"(a),
                 "r"(b)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row_address), "r"(a), "r"(b)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float a) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(a) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace fp8gemm::ptx
