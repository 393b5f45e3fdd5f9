// Quantisation: bf16, f16 or f32 to FP8 with a scale for 1 x 128 or 128 x 128 elements, and SwiGLU with
// quantisation in one pass. Bound by memory: a thread loads all that it works on before it uses any.
//
//   Config::Input        Bf16, F16 or F32
//   Config::Float8       E4M3 or E5M2
//   Config::kThreads     of a CTA
//   Config::kBlockRows   rows that share a scale: 1 or 128
//   Config::kBlocks      128-blocks of a row that a CTA takes side by side
//   Config::kThreadRows  rows that a thread takes, one below the other
//   Config::kVector      rows begin at multiples of 16 bytes, and of 8 in the result
#pragma once

#include "float8.cuh"
#include "scan.cuh"
#include "swiglu.cuh"

namespace fp8gemm {

struct Extent {
  u32 rows, columns;

  __device__ u32 num_blocks() const { return (columns + kBlockColumns - 1) / kBlockColumns; }
};

// Where the results go; [batch][rows][columns], and scales [batch][blocks][rows] or [batch][row
// blocks][blocks].
struct Quantized : Extent {
  u8* values;
  float* scales;

  __device__ Quantized(void* values, float* scales, u32 rows, u32 columns)
      : Extent{rows, columns}, values(static_cast<u8*>(values)), scales(scales) {}
};

// The rows of a batch that are read, and those that are written; what is not read counts as zero.
struct RowLimits {
  u32 read, written;
};

// The rows and columns of a CTA, and of this thread among them.
template <class Config>
struct QuantizeTile {
  static constexpr u32 kColumnBlocks = Config::kBlocks, kThreadRows = Config::kThreadRows;
  static constexpr u32 kRows = Config::kThreads / kBlockLanes / kColumnBlocks * kThreadRows;
  // Neighbouring lanes take neighbouring 16 bytes, or single elements where rows begin anywhere.
  static constexpr u32 kStride = Config::kVector ? 1 : kBlockLanes;

  u32 batch, tile_row;
  u32 lane;       // among the 16 of a block
  u32 first_row;  // of this thread's rows
  u32 block;      // of this thread's columns
  u32 column;     // the first of them; the others follow kStride apart

  __device__ static u32 tiles_per_row(u32 num_blocks) {
    return (num_blocks + kColumnBlocks - 1) / kColumnBlocks;
  }
  __device__ static u32 tiles_per_column(u32 rows) { return (rows + kRows - 1) / kRows; }

  __device__ QuantizeTile(u32 batch, u32 tile_row, u32 tile_column) : batch(batch), tile_row(tile_row) {
    const u32 half_warp = threadIdx.x / kBlockLanes;
    lane = threadIdx.x % kBlockLanes;
    first_row = tile_row * kRows + half_warp / kColumnBlocks * kThreadRows;
    block = tile_column * kColumnBlocks + half_warp % kColumnBlocks;
    column = block * kBlockColumns + lane * (Config::kVector ? kLaneColumns : 1);
  }

  // Where this thread's rows end: at once if its columns are beyond the last.
  __device__ u32 end(u32 limit, u32 columns) const { return column < columns ? limit : 0; }

  // The one whose rows begin at `row`.
  __device__ static QuantizeTile from_row(u32 batch, u32 row, u32 tile_column) {
    QuantizeTile tile(batch, 0, tile_column);
    tile.first_row += row;
    return tile;
  }

  // The index-th of all tiles; those of the same rows follow each other.
  __device__ static QuantizeTile at(u32 index, const Extent& out) {
    const u32 across = tiles_per_row(out.num_blocks()), down = tiles_per_column(out.rows);
    const u32 row_index = index / across;
    return {row_index / down, row_index % down, index % across};
  }
};

template <class Config>
__device__ __forceinline__ void load_chunk(Chunk<typename Config::Input>& chunk,
                                           const typename Config::Input::Storage* row, u32 column,
                                           u32 columns) {
  if constexpr (Config::kVector) {
    chunk.load(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (column + i * kBlockLanes < columns) chunk.set(i, row[column + i * kBlockLanes]);
  }
}

template <class Config>
__device__ __forceinline__ void store_codes(uint2 codes, u8* row, u32 column, u32 columns) {
  if constexpr (Config::kVector) {
    ptx::store_8(row + column, codes.x, codes.y);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (column + i * kBlockLanes < columns)
        row[column + i * kBlockLanes] = (i < 4 ? codes.x : codes.y) >> i % 4 * 8;
  }
}

// A thread's rows of x [batch][rows][columns].
template <class Config>
struct Rows {
  using Tile = QuantizeTile<Config>;
  using Format = typename Config::Input;

  Chunk<Format> chunks[Tile::kThreadRows];

  __device__ void load(const void* x, const Tile& tile, const Extent& extent, u32 limit) {
    const auto* const elements = static_cast<const typename Format::Storage*>(x);
    const i64 first = static_cast<i64>(tile.batch) * extent.rows + tile.first_row;
    const u32 end = tile.end(limit, extent.columns);
#pragma unroll
    for (u32 i = 0; i < Tile::kThreadRows; ++i)
      if (tile.first_row + i < end)
        load_chunk<Config>(chunks[i], elements + (first + i) * extent.columns, tile.column, extent.columns);
  }
};

// The same of silu(gate) * up, x [batch][rows][2 * columns] being gate | up.
template <class Config>
struct SwigluRows {
  using Tile = QuantizeTile<Config>;
  using Format = F32;

  Chunk<F32> chunks[Tile::kThreadRows];

  __device__ void load(const void* x, const Tile& tile, const Extent& extent, u32 limit) {
    const auto* const elements = static_cast<const typename Config::Input::Storage*>(x);
    Chunk<typename Config::Input> gates[Tile::kThreadRows], ups[Tile::kThreadRows];
    const i64 first = static_cast<i64>(tile.batch) * extent.rows + tile.first_row;
    const u32 end = tile.end(limit, extent.columns);
#pragma unroll
    for (u32 i = 0; i < Tile::kThreadRows; ++i)
      if (tile.first_row + i < end) {
        const auto* row = elements + (first + i) * 2 * extent.columns;
        load_chunk<Config>(gates[i], row, tile.column, extent.columns);
        load_chunk<Config>(ups[i], row + extent.columns, tile.column, extent.columns);
      }
#pragma unroll
    for (u32 i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j)
        chunks[i].words[j] = __float_as_uint(swiglu(gates[i][j], ups[i][j]));
  }
};

// A scale for each row and 128 columns.
template <class Config, class Source>
__device__ void quantize_row_blocks(Source& source, const QuantizeTile<Config>& tile, const Quantized& out,
                                    u32 limit) {
  using Float8 = typename Config::Float8;
  constexpr u32 kThreadRows = Config::kThreadRows;
  static_assert(kThreadRows <= kBlockLanes);
  float maxima[kThreadRows];
  finite_maxima(source.chunks, maxima);
  const float amax = max_over_block_of_own(maxima);  // of the row that has the lane's number
  const float scale = scale_of<Float8>(amax), reciprocal = __frcp_rn(scale);
  // Eight rows of a block are a sector of 32 bytes.
  const u32 scale_row = tile.first_row + tile.lane, num_blocks = out.num_blocks();
  if (tile.lane < kThreadRows && scale_row < limit && tile.block < num_blocks)
    out.scales[(static_cast<i64>(tile.batch) * num_blocks + tile.block) * out.rows + scale_row] = scale;

  const i64 first = static_cast<i64>(tile.batch) * out.rows + tile.first_row;
  const u32 end = tile.end(limit, out.columns);
#pragma unroll
  for (u32 i = 0; i < kThreadRows; ++i) {
    const float of_row = __shfl_sync(0xffffffff, reciprocal, i, kBlockLanes);
    if (tile.first_row + i < end)
      store_codes<Config>(quantized<Float8>(source.chunks[i], of_row), out.values + (first + i) * out.columns,
                          tile.column, out.columns);
  }
}

// The largest over the CTA, in each thread.
template <int kThreads>
__device__ __forceinline__ float max_over_cta(float x) {
  __shared__ float of_warps[kThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
  of_warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, of_warps[i]);
  return x;
}

struct Scale {
  float scale, reciprocal;
};

// A scale for 128 rows and 128 columns, which are a CTA's.
template <class Config, class Source>
__device__ Scale quantize_square_block(Source& source, const QuantizeTile<Config>& tile,
                                       const Quantized& out) {
  using Tile = QuantizeTile<Config>;
  using Float8 = typename Config::Float8;
  static_assert(Tile::kRows == kBlockColumns && Tile::kColumnBlocks == 1);
  float maxima[Tile::kThreadRows], amax = 0;
  finite_maxima(source.chunks, maxima);
#pragma unroll
  for (u32 i = 0; i < Tile::kThreadRows; ++i) amax = fmaxf(amax, maxima[i]);
  const float scale = scale_of<Float8>(max_over_cta<Config::kThreads>(amax)), reciprocal = __frcp_rn(scale);
  if (threadIdx.x == 0) {
    const i64 row_block = static_cast<i64>(tile.batch) * Tile::tiles_per_column(out.rows) + tile.tile_row;
    out.scales[row_block * out.num_blocks() + tile.block] = scale;
  }
  const i64 first = static_cast<i64>(tile.batch) * out.rows + tile.first_row;
  const u32 end = tile.end(out.rows, out.columns);
#pragma unroll
  for (u32 i = 0; i < Tile::kThreadRows; ++i)
    if (tile.first_row + i < end)
      store_codes<Config>(quantized<Float8>(source.chunks[i], reciprocal),
                          out.values + (first + i) * out.columns, tile.column, out.columns);
  return {scale, reciprocal};
}

// x [batch][rows][columns] with the granularity of Config::kBlockRows x 128: a CTA for each tile.
template <class Config>
__device__ void quantize(const void* x, void* values, float* scales, u32 rows, u32 columns) {
  const Quantized out(values, scales, rows, columns);
  const auto tile = QuantizeTile<Config>::at(blockIdx.x, out);
  Rows<Config> source;
  source.load(x, tile, out, rows);
  if constexpr (Config::kBlockRows == 1)
    quantize_row_blocks<Config>(source, tile, out, rows);
  else
    quantize_square_block<Config>(source, tile, out);
}

template <class Config>
__device__ void quantize_swiglu_tile(const void* x, const QuantizeTile<Config>& tile, const Quantized& out,
                                     RowLimits limits) {
  SwigluRows<Config> source;
  source.load(x, tile, out, limits.read);
  quantize_row_blocks<Config>(source, tile, out, limits.written);
}

// The sum of a batch's group sizes, no more than `rows` (< 2^31); every warp adds them up for itself.
__device__ __forceinline__ u32 sum_of_groups(const int* group_sizes, u32 num_groups, u32 rows) {
  u32 sum = 0;
  for (u32 group = lane_index(); group < num_groups; group += 32)
    sum = add_saturating(sum, clamped(group_sizes[group], rows), rows);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum = add_saturating(sum, __shfl_xor_sync(0xffffffff, sum, distance), rows);
  return sum;
}

// SwiGLU of x [batch][rows][2 * columns] with a scale for 1 x 128: a CTA for each tile.
template <class Config>
__device__ void quantize_swiglu(const void* x, void* values, float* scales, u32 rows, u32 columns) {
  const Quantized out(values, scales, rows, columns);
  quantize_swiglu_tile<Config>(x, QuantizeTile<Config>::at(blockIdx.x, out), out, {rows, rows});
}

// The same of the first rows of each batch, as many as its group sizes [batch][num_groups] add up to; the
// others come out as zeros with the smallest scale.
template <class Config>
__device__ void quantize_swiglu_ragged(const void* x, const int* group_sizes, void* values, float* scales,
                                       u32 rows, u32 columns, u32 num_groups) {
  const Quantized out(values, scales, rows, columns);
  const auto tile = QuantizeTile<Config>::at(blockIdx.x, out);
  const i64 first_group = static_cast<i64>(tile.batch) * num_groups;
  const u32 valid = sum_of_groups(group_sizes + first_group, num_groups, rows);
  quantize_swiglu_tile<Config>(x, tile, out, {valid, rows});
}

// The tiles that have valid rows, group after group. A warp keeps 32 groups, a lane each.
template <class Config>
struct MaskedTiles {
  using Tile = QuantizeTile<Config>;

  const int* group_sizes;
  const u32 num_groups, rows, tiles_per_row;
  u32 first_group = 0, tiles_before = 0;
  u32 valid, num_tiles, tiles_through;  // the lane's group: rows, tiles, tiles of all groups up to it

  __device__ MaskedTiles(const int* group_sizes, u32 num_groups, const Quantized& out)
      : group_sizes(group_sizes),
        num_groups(num_groups),
        rows(out.rows),
        tiles_per_row(Tile::tiles_per_row(out.num_blocks())) {
    load();
  }

  // Goes on to the groups among which the tile `index` is; false where there is none.
  __device__ bool seek(u32 index) {
    while (index >= __shfl_sync(0xffffffff, tiles_through, 31)) {
      tiles_before = __shfl_sync(0xffffffff, tiles_through, 31);
      first_group += 32;
      if (first_group >= num_groups) return false;
      load();
    }
    return true;
  }

  // The tile `index`, which is among these groups, and how many rows its group has.
  __device__ Tile find(u32 index, u32& valid_rows) const {
    const u32 owner = __ffs(__ballot_sync(0xffffffff, index < tiles_through)) - 1;
    const u32 in_group = index - __shfl_sync(0xffffffff, tiles_through - num_tiles, owner);
    valid_rows = __shfl_sync(0xffffffff, valid, owner);
    return {first_group + owner, in_group / tiles_per_row, in_group % tiles_per_row};
  }

 private:
  __device__ void load() {
    const u32 group = first_group + lane_index();
    valid = group < num_groups ? clamped(group_sizes[group], rows) : 0;
    num_tiles = Tile::tiles_per_column(valid) * tiles_per_row;
    tiles_through = tiles_before + scan_saturating(num_tiles, kNoLimit);
  }
};

// The same of the first group_sizes[group] rows of x [num_groups][rows][2 * columns]; the others are left
// alone. CTAs walk the tiles, so that time follows the valid rows.
template <class Config>
__device__ void quantize_swiglu_masked(const void* x, const int* group_sizes, void* values, float* scales,
                                       u32 rows, u32 columns, u32 num_groups) {
  const Quantized out(values, scales, rows, columns);
  MaskedTiles<Config> tiles(group_sizes, num_groups, out);
  for (u32 index = blockIdx.x; tiles.seek(index); index += gridDim.x) {
    u32 valid;
    const auto tile = tiles.find(index, valid);
    quantize_swiglu_tile<Config>(x, tile, out, {valid, valid});
  }
}

}  // namespace fp8gemm
