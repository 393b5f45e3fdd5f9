// The few names that the headers share. They include nothing, so that NVRTC compiles a kernel in
// milliseconds.
#pragma once

namespace fp8gemm {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// What the driver encodes (CUtensorMap): opaque, passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr __host__ __device__ int min_of(int a, int b) { return a < b ? a : b; }
constexpr __host__ __device__ int max_of(int a, int b) { return a > b ? a : b; }
constexpr __host__ __device__ int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }

template <int kValue>
struct Index {
  __device__ constexpr operator int() const { return kValue; }
};

// f(Index<0>), f(Index<1>), ...: a loop that is unrolled whatever the compiler thinks of its size. A rolled
// one that indexes accumulators would move them to local memory.
template <int kCount, int kBegin = 0, class Function>
__device__ __forceinline__ void unrolled(Function&& f) {
  if constexpr (kBegin < kCount) {
    f(Index<kBegin>{});
    unrolled<kCount, kBegin + 1>(f);
  }
}

// The 32-bit address by which PTX names shared memory.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// The warp's index in its CTA. Broadcast, so that the compiler knows it is the same in all lanes and keeps
// what follows from it in uniform registers.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
}

__device__ __forceinline__ u32 lane_index() { return threadIdx.x % 32; }

// The same, read where it stands: what follows from it is computed here, and not ahead of time in a loop that
// has no registers and no issue slots to spare.
__device__ __forceinline__ u32 lane_index_here() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// blockIdx.x, likewise.
__device__ __forceinline__ u32 cta_index_here() {
  u32 cta;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
  return cta;
}

// Keeps what is computed from `value` behind this point.
__device__ __forceinline__ void compute_from_here(u32& value) { asm volatile("" : "+r"(value)); }

// True in one lane of a converged warp; the compiler knows that the branch is uniform.
__device__ __forceinline__ bool elect_one() {
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected;
}

}  // namespace fp8gemm
