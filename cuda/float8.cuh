// What quantisation is made of: the number formats, a lane's share of a block, a block's scale. All bits are
// those of `reference.quantize`:
//
//   scale = max(rn(amax * rn(1 / max_float8)), 2^-63), amax over the finite elements
//   value = rn_float8(rn(x * rn(1 / scale))), NaN where x is not finite
//
// Half a warp works on a block's 128 columns, a lane on eight of them.
#pragma once

#include "ptx/convert.cuh"
#include "ptx/global.cuh"

namespace fp8gemm {

constexpr int kBlockColumns = 128;  // that share a scale
constexpr int kBlockLanes = 16;     // that work on them
constexpr int kLaneColumns = kBlockColumns / kBlockLanes;
constexpr float kLargestFloat = 0x1.fffffep127f;

// Formats of the input: storage, and the bits of infinity and NaN there.
struct Bf16 {
  using Storage = u16;
  static constexpr u32 kInfinity = 0x7f80, kQuietNaN = 0x7fc0;
  __device__ static float widen(u32 bits) { return __uint_as_float(bits << 16); }
};

struct F16 {
  using Storage = u16;
  static constexpr u32 kInfinity = 0x7c00, kQuietNaN = 0x7e00;
  __device__ static float widen(u32 bits) { return ptx::f16_to_f32(static_cast<u16>(bits)); }
};

struct F32 {
  using Storage = u32;
  static constexpr u32 kInfinity = 0x7f800000, kQuietNaN = 0x7fc00000;
  __device__ static float widen(u32 bits) { return __uint_as_float(bits); }
};

// Formats of the values: the largest number, and two or four of them from f32. A scaled number exceeds the
// largest by its three roundings at most, so that it never saturates.
struct E4M3 {
  static constexpr float kMax = 448;
  __device__ static u32 pack(float a, float b) { return ptx::pack_e4m3(a, b); }
  __device__ static u32 pack(float a, float b, float c, float d) { return pack(a, b) | pack(c, d) << 16; }
};

struct E5M2 {
  static constexpr float kMax = 57344;
  __device__ static u32 pack(float a, float b) { return ptx::pack_e5m2(a, b); }
  __device__ static u32 pack(float a, float b, float c, float d) { return pack(a, b) | pack(c, d) << 16; }
};

// A lane's eight elements of a block, as they are in memory.
template <class Format>
struct Chunk {
  using Storage = typename Format::Storage;
  static constexpr int kBits = 8 * sizeof(Storage), kPerWord = 32 / kBits;
  static constexpr int kWords = kLaneColumns / kPerWord;

  u32 words[kWords] = {};  // zero where nothing was loaded

  __device__ u32 bits(int i) const { return words[i / kPerWord] >> i % kPerWord * kBits & mask(~0u); }
  __device__ float operator[](int i) const { return Format::widen(bits(i)); }
  __device__ void set(int i, u32 bits) { words[i / kPerWord] |= bits << i % kPerWord * kBits; }

  __device__ void load(const Storage* address) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) set_words(i, ptx::load_16(reinterpret_cast<const u32*>(address) + i));
  }
  __device__ void set_words(int i, uint4 v) {
    words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
  }

  // Widens elements anew from here on, lest they take twice the registers until then.
  __device__ void widen_from_here() {
#pragma unroll
    for (u32& word : words) compute_from_here(word);
  }

  // NaN, which fmaxf passes over, does not count.
  __device__ float max_magnitude() const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) largest = fmaxf(largest, fabsf((*this)[i]));
    return largest;
  }

  __device__ void infinities_to_nan() {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if ((bits(i) & mask(~0u >> 1)) == Format::kInfinity) set(i, Format::kQuietNaN);
  }

 private:
  // `ones` in the width of an element.
  __device__ static constexpr u32 mask(u32 ones) { return kBits == 32 ? ones : ones >> 16; }
};

// The largest magnitude of each chunk's finite elements, or 0; infinities become NaN. One branch for all, so
// that nothing waits for another chunk.
template <int kCount, class Format>
__device__ __forceinline__ void finite_maxima(Chunk<Format> (&chunks)[kCount], float (&amax)[kCount]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, amax[i] = chunks[i].max_magnitude());
  if (largest <= kLargestFloat) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    chunks[i].infinities_to_nan();
    amax[i] = chunks[i].max_magnitude();
  }
}

// The largest of each over the 16 lanes of a block, in each of them.
template <int kCount>
__device__ __forceinline__ void max_over_block(float (&x)[kCount]) {
#pragma unroll
  for (int distance = kBlockLanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(0xffffffff, x[i], distance));
}

// The largest of x[lane % kCount] over the 16 lanes. A lane hands half of what it has to another, for the
// other half of that one's: fewer shuffles than for the largest of all in each lane.
template <int kCount, int kHalf = kCount / 2>
__device__ __forceinline__ float max_over_block_of_own(float (&x)[kCount]) {
  static_assert(kCount <= kBlockLanes && kBlockLanes % kCount == 0);
  if constexpr (kHalf > 0) {
    const bool is_upper = threadIdx.x & kHalf;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = is_upper ? x[i] : x[i + kHalf], kept = is_upper ? x[i + kHalf] : x[i];
      x[i] = fmaxf(kept, __shfl_xor_sync(0xffffffff, given, kHalf));
    }
    return max_over_block_of_own<kCount, kHalf / 2>(x);
  } else {
    float largest = x[0];
#pragma unroll
    for (int distance = kCount; distance < kBlockLanes; distance *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    return largest;
  }
}

template <class Float8>
__device__ __forceinline__ float scale_of(float amax) {
  constexpr float kSmallest = 0x1p-63f;
  return fmaxf(__fmul_rn(amax, 1 / Float8::kMax), kSmallest);
}

// A lane's FP8 codes.
template <class Float8, class Format>
__device__ __forceinline__ uint2 quantized(const Chunk<Format>& x, float reciprocal) {
  const auto scaled = [&](int i) { return __fmul_rn(x[i], reciprocal); };
  return {Float8::pack(scaled(0), scaled(1), scaled(2), scaled(3)),
          Float8::pack(scaled(4), scaled(5), scaled(6), scaled(7))};
}

}  // namespace fp8gemm
