// Quantisation along the tokens of groups: x [tokens][columns], tokens sorted by group, to FP8 [columns][K],
// in which every group has whole blocks of 128 tokens, filled up with zeros. A CTA takes such a block of 128
// columns: it reads rows, scales columns, turns the block around in shared memory, and writes rows again.
//
//   Config::Input      Bf16, F16 or F32
//   Config::Float8     E4M3 or E5M2
//   Config::kThreads   of a CTA
//   Config::kVector    rows begin at multiples of 16 bytes
#pragma once

#include "quantize.cuh"

namespace fp8gemm {

constexpr u32 kBlockTokens = 128;  // that share a scale

// The tokens of a block of K; none behind the last group.
struct TokenBlock {
  u32 first, count;
};

// The block with the number `block`, found by every warp for itself: each lane has an equal share of
// neighbouring groups.
__device__ __forceinline__ TokenBlock find_token_block(const int* group_sizes, u32 num_groups, u32 tokens,
                                                       u32 block) {
  const u32 share = (num_groups + 31) / 32, begin = min(lane_index() * share, num_groups);
  const u32 end = min(begin + share, num_groups);
  const auto blocks_of = [](u32 size) { return (size + kBlockTokens - 1) / kBlockTokens; };

  u32 of_lane = 0;
  for (u32 group = begin; group < end; ++group)
    of_lane = add_saturating(of_lane, clamped(group_sizes[group], tokens), tokens);
  const u32 first_token = scan_before(scan_saturating(of_lane, tokens));

  // Calls f(first token, tokens) for each of the lane's groups.
  const auto for_each_group = [&](auto&& f) {
    u32 token = first_token;
    for (u32 group = begin; group < end; ++group) {
      const u32 next = add_saturating(token, clamped(group_sizes[group], tokens), tokens);
      f(token, next - token);
      token = next;
    }
  };
  u32 num_blocks = 0;
  for_each_group([&](u32, u32 size) { num_blocks += blocks_of(size); });
  const u32 through = scan_saturating(num_blocks, kNoLimit);

  const u32 owners = __ballot_sync(0xffffffff, block < through);
  if (owners == 0) return {0, 0};
  const u32 owner = __ffs(owners) - 1;
  TokenBlock found{0, 0};
  u32 before = through - num_blocks;
  for_each_group([&](u32 token, u32 size) {
    const u32 in_group = block - before;  // as if negative numbers were large
    if (in_group < blocks_of(size))
      found = {token + in_group * kBlockTokens, min(size - in_group * kBlockTokens, kBlockTokens)};
    before += blocks_of(size);
  });
  return {__shfl_sync(0xffffffff, found.first, owner), __shfl_sync(0xffffffff, found.count, owner)};
}

// 128 tokens of 128 columns. Threads of the same lane (of 16) have the same columns, those of a half warp the
// same eight tokens.
template <class Config>
struct TransposeTile {
  static constexpr u32 kThreadTokens = kBlockTokens / (Config::kThreads / kBlockLanes);
  static constexpr u32 kWarps = Config::kThreads / 32;
  static constexpr u32 kStorePitch = kBlockTokens / 16;  // lanes that write a row, 16 bytes each
  static_assert(kThreadTokens == 8, "eight codes are what is moved at once");

  // Codes are kept by columns, in units of eight tokens. Neighbouring lanes write eight columns apart: the
  // units of a column are permuted, so that these hit different banks, and pairs of them stay together.
  struct Shared {
    alignas(16) uint2 codes[kBlockColumns][kBlockTokens / 8];
    alignas(16) float maxima[kWarps][kBlockColumns];
    alignas(16) float reciprocals[kBlockColumns];
  };

  __device__ static u32 lane() { return threadIdx.x % kBlockLanes; }
  __device__ static u32 half_warp() { return threadIdx.x / kBlockLanes; }

  // The i-th of a thread's columns, as in `load_chunk`.
  __device__ static u32 column(u32 i) {
    return Config::kVector ? lane() * kLaneColumns + i : lane() + i * kBlockLanes;
  }
  __device__ static u32 permutation(u32 column) { return column / kLaneColumns % kBlockLanes; }

  Chunk<typename Config::Input> tokens[kThreadTokens];

  // x is the first row of the block's tokens, of which there are `count`.
  __device__ void load(const typename Config::Input::Storage* x, u32 count, u32 first_column, u32 columns) {
    const u32 first = half_warp() * kThreadTokens, column = first_column + this->column(0);
#pragma unroll
    for (u32 i = 0; i < kThreadTokens; ++i)
      if (first + i < count && column < columns)
        load_chunk<Config>(tokens[i], x + static_cast<i64>(first + i) * columns, column, columns);
  }

  // The largest finite magnitudes of each column, over the tokens of a warp; infinities become NaN.
  __device__ void write_maxima(Shared& shared) {
    float maxima[kLaneColumns];
    if (max_of_columns(maxima) > kLargestFloat) {
#pragma unroll
      for (u32 j = 0; j < kThreadTokens; ++j) tokens[j].infinities_to_nan();
      max_of_columns(maxima);
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const float of_warp = fmaxf(maxima[i], __shfl_xor_sync(0xffffffff, maxima[i], kBlockLanes));
      if (half_warp() % 2 == 0) shared.maxima[half_warp() / 2][column(i)] = of_warp;
    }
  }

  // The scale of column threadIdx.x.
  __device__ static float scale(Shared& shared) {
    float amax = 0;
#pragma unroll
    for (u32 warp = 0; warp < kWarps; ++warp) amax = fmaxf(amax, shared.maxima[warp][threadIdx.x]);
    const float scale = scale_of<typename Config::Float8>(amax);
    shared.reciprocals[threadIdx.x] = __frcp_rn(scale);
    return scale;
  }

  __device__ void write_codes(Shared& shared) const {
    using Float8 = typename Config::Float8;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const u32 column = this->column(i);
      const float reciprocal = shared.reciprocals[column];
      const auto scaled = [&](int j) { return __fmul_rn(tokens[j][i], reciprocal); };
      shared.codes[column][half_warp() ^ permutation(column)] = {
          Float8::pack(scaled(0), scaled(1), scaled(2), scaled(3)),
          Float8::pack(scaled(4), scaled(5), scaled(6), scaled(7))};
    }
  }

  // Writes the block's part of `values` [columns][pitch].
  __device__ static void store(const Shared& shared, u8* values, u32 first_column, u32 columns, i64 pitch) {
    constexpr u32 kRowsAtOnce = Config::kThreads / kStorePitch;
    const u32 pair = threadIdx.x % kStorePitch;  // 16 tokens
#pragma unroll
    for (u32 i = 0; i < kBlockColumns; i += kRowsAtOnce) {
      const u32 column = i + threadIdx.x / kStorePitch, permuted = permutation(column);
      if (first_column + column >= columns) return;
      uint4 codes = reinterpret_cast<const uint4*>(shared.codes[column])[pair ^ permuted / 2];
      if (permuted % 2) codes = {codes.z, codes.w, codes.x, codes.y};
      ptx::store_16(values + (first_column + column) * pitch + pair * 16, codes);
    }
  }

 private:
  // Over this thread's tokens, without NaN. Returns the largest of all.
  __device__ float max_of_columns(float (&maxima)[kLaneColumns]) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      maxima[i] = 0;
#pragma unroll
      for (u32 j = 0; j < kThreadTokens; ++j) maxima[i] = fmaxf(maxima[i], fabsf(tokens[j][i]));
      largest = fmaxf(largest, maxima[i]);
    }
    return largest;
  }
};

// x [batch][tokens][columns], group_sizes [batch][num_groups] -> values [batch][columns][K], scales
// [batch][num_blocks][columns], K = num_blocks * 128: a CTA for each block of 128 columns, those of the same
// columns side by side.
template <class Config>
__device__ void quantize_transposed(const void* x, const int* group_sizes, void* values, float* scales,
                                    u32 tokens, u32 columns, u32 num_blocks, u32 num_groups) {
  __shared__ typename TransposeTile<Config>::Shared shared;
  const u32 block = blockIdx.x % num_blocks, rest = blockIdx.x / num_blocks;
  const u32 column_blocks = (columns + kBlockColumns - 1) / kBlockColumns;
  const u32 batch = rest / column_blocks;
  const u32 first_column = rest % column_blocks * kBlockColumns;
  const TokenBlock of_group =
      find_token_block(group_sizes + static_cast<i64>(batch) * num_groups, num_groups, tokens, block);

  TransposeTile<Config> tile;
  const auto* first_row = static_cast<const typename Config::Input::Storage*>(x) +
                          (static_cast<i64>(batch) * tokens + of_group.first) * columns;
  tile.load(first_row, of_group.count, first_column, columns);
  tile.write_maxima(shared);
  __syncthreads();
  if (threadIdx.x < kBlockColumns) {
    const float scale = tile.scale(shared);
    const u32 column = first_column + threadIdx.x;
    if (column < columns) scales[(static_cast<i64>(batch) * num_blocks + block) * columns + column] = scale;
  }
  __syncthreads();
  tile.write_codes(shared);
  __syncthreads();
  const i64 pitch = static_cast<i64>(num_blocks) * kBlockTokens;
  const i64 first_value = static_cast<i64>(batch) * columns * pitch + block * kBlockTokens;
  tile.store(shared, static_cast<u8*>(values) + first_value, first_column, columns, pitch);
}

}  // namespace fp8gemm
