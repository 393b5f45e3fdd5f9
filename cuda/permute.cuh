// Tokens to the rows of their experts, quantised on the way. Bound by memory: half a warp works on a token's
// 128 columns, or on several times as many, and loads all of them before it uses any.
//
//   Config::Input          Bf16, F16 or F32
//   Config::Float8         E4M3 or E5M2
//   Config::kThreads       of a CTA
//   Config::kThreadBlocks  neighbouring 128-blocks of a token that half a warp takes
//   Config::kTopK          rows of a token
//   Config::kVector        rows begin at multiples of 16 bytes, and of 8 in FP8
#pragma once

#include "quantize.cuh"

namespace fp8gemm {

constexpr u32 kNoRow = ~0u;

// The blocks of a token that half a warp takes, and this lane's columns there. A CTA has one batch.
template <class Config>
struct TokenBlocks {
  static constexpr u32 kThreadBlocks = Config::kThreadBlocks, kHalfWarps = Config::kThreads / kBlockLanes;

  u32 batch, token, tokens, columns, first_block, lane;

  __device__ TokenBlocks(u32 tokens, u32 columns) : tokens(tokens), columns(columns) {
    const u32 per_token = (num_blocks() + kThreadBlocks - 1) / kThreadBlocks;
    const u32 ctas = (tokens * per_token + kHalfWarps - 1) / kHalfWarps;
    const u32 index = blockIdx.x % ctas * kHalfWarps + threadIdx.x / kBlockLanes;
    batch = blockIdx.x / ctas, token = index / per_token;
    first_block = index % per_token * kThreadBlocks, lane = threadIdx.x % kBlockLanes;
  }

  __device__ bool exists() const { return token < tokens; }
  __device__ u32 num_blocks() const { return (columns + kBlockColumns - 1) / kBlockColumns; }
  __device__ i64 index_of_token() const { return static_cast<i64>(batch) * tokens + token; }

  // The lane's first column of the i-th block; its others follow as in `load_chunk`.
  __device__ u32 column(u32 i) const {
    return (first_block + i) * kBlockColumns + lane * (Config::kVector ? kLaneColumns : 1);
  }

  // What a lane has for slot `first_slot` + lane, from an array [batch][tokens][kTopK].
  template <class T>
  __device__ T load_slot(const T* slots, u32 first_slot, T otherwise) const {
    const u32 slot = first_slot + lane;
    return exists() && slot < Config::kTopK ? slots[index_of_token() * Config::kTopK + slot] : otherwise;
  }
};

// What a token becomes: codes and scales of its blocks, the same in each of its rows.
template <class Config>
struct QuantizedToken {
  static constexpr u32 kThreadBlocks = Config::kThreadBlocks;

  uint2 codes[kThreadBlocks];
  float scales[kThreadBlocks];

  // All of it is zero.
  __device__ QuantizedToken() {
#pragma unroll
    for (u32 i = 0; i < kThreadBlocks; ++i) codes[i] = {}, scales[i] = scale_of<typename Config::Float8>(0);
  }

  __device__ QuantizedToken(const TokenBlocks<Config>& blocks, const void* x) {
    Chunk<typename Config::Input> chunks[kThreadBlocks];
    const auto* row =
        static_cast<const typename Config::Input::Storage*>(x) + blocks.index_of_token() * blocks.columns;
#pragma unroll
    for (u32 i = 0; i < kThreadBlocks; ++i)
      if (blocks.exists() && blocks.column(i) < blocks.columns)
        load_chunk<Config>(chunks[i], row, blocks.column(i), blocks.columns);
    quantize(chunks);
  }

  // Writes up to 16 rows, of which each lane names one: values [batch][rows][columns], scales
  // [batch][rows][blocks].
  __device__ void write(const TokenBlocks<Config>& blocks, u32 row_of_lane, u8* values,
                        float* out_scales) const {
    const u32 rows = blocks.tokens * Config::kTopK, num_blocks = blocks.num_blocks();
    const i64 first_row = static_cast<i64>(blocks.batch) * rows;
    if (row_of_lane < rows)
      store_scales(out_scales + (first_row + row_of_lane) * num_blocks, blocks.first_block, num_blocks);
#pragma unroll
    for (u32 slot = 0; slot < min_of(Config::kTopK, kBlockLanes); ++slot) {
      const u32 row = __shfl_sync(0xffffffff, row_of_lane, slot, kBlockLanes);
      if (row >= rows) continue;
      u8* const out = values + (first_row + row) * blocks.columns;
#pragma unroll
      for (u32 i = 0; i < kThreadBlocks; ++i)
        if (blocks.column(i) < blocks.columns)
          store_codes<Config>(codes[i], out, blocks.column(i), blocks.columns);
    }
  }

 private:
  // To a row [blocks].
  __device__ void store_scales(float* row, u32 first_block, u32 num_blocks) const {
    if constexpr (kThreadBlocks == 4)
      if (num_blocks % 4 == 0) {
        ptx::store_16(row + first_block, {__float_as_uint(scales[0]), __float_as_uint(scales[1]),
                                          __float_as_uint(scales[2]), __float_as_uint(scales[3])});
        return;
      }
#pragma unroll
    for (u32 i = 0; i < kThreadBlocks; ++i)
      if (first_block + i < num_blocks) row[first_block + i] = scales[i];
  }

  __device__ void quantize(Chunk<typename Config::Input> (&chunks)[kThreadBlocks]) {
    using Float8 = typename Config::Float8;
    float amax[kThreadBlocks];
    finite_maxima(chunks, amax);
    max_over_block(amax);
#pragma unroll
    for (u32 i = 0; i < kThreadBlocks; ++i) {
      scales[i] = scale_of<Float8>(amax[i]);
      codes[i] = quantized<Float8>(chunks[i], __frcp_rn(scales[i]));
    }
  }
};

// x [batch][tokens][columns], positions [batch][tokens][kTopK] -> values [batch][rows][columns], scales
// [batch][rows][blocks], rows = tokens * kTopK: row positions[token][slot] is the token, those from
// num_rows [batch] on are zeros with the smallest scale. Neighbouring rows come from tokens far apart, so
// that scales with the rows fastest, as the GEMMs want them, would be a sector each: turning them is left to
// XLA.
template <class Config>
__device__ void permute(const void* x, const int* positions, const int* num_rows, void* values, float* scales,
                        u32 tokens, u32 columns) {
  const TokenBlocks<Config> blocks(tokens, columns);
  constexpr u32 kStrips = ceil_div(Config::kTopK, kBlockLanes);
  u32 rows[kStrips];  // a lane's
#pragma unroll
  for (u32 i = 0; i < kStrips; ++i) rows[i] = blocks.load_slot(positions, i * kBlockLanes, -1);
  const u32 valid_rows = num_rows[blocks.batch];
  const auto write = [&](const QuantizedToken<Config>& token) {
#pragma unroll
    for (u32 i = 0; i < kStrips; ++i) token.write(blocks, rows[i], static_cast<u8*>(values), scales);
  };
  write(QuantizedToken<Config>(blocks, x));
  if (valid_rows == tokens * Config::kTopK) return;
  // As many rows are left over as ids were dropped: each slot looks after the row of its own number.
#pragma unroll
  for (u32 i = 0; i < kStrips; ++i) {
    const u32 slot = i * kBlockLanes + blocks.lane, row = blocks.token * Config::kTopK + slot;
    rows[i] = blocks.exists() && slot < Config::kTopK && row >= valid_rows ? row : kNoRow;
  }
  write(QuantizedToken<Config>());
}

}  // namespace fp8gemm
