// The columns of 128 x 128 elements that a CTA holds by rows: a scale for each, and FP8 codes that are turned
// around in shared memory. A thread has eight rows of eight columns; half a warp has the same rows, and lanes
// of the same number (of 16) have the same columns.
//
//   Config::Input      Bf16, F16 or F32
//   Config::Float8     E4M3 or E5M2
//   Config::kThreads   of a CTA
//   Config::kVector    a lane's columns are neighbours; else they are 16 apart, as in `load_chunk`
#pragma once

#include "float8.cuh"

namespace fp8gemm {

constexpr u32 kBlockRows = 128;
constexpr u32 kUnitRows = 8;  // of a thread: their codes are what is moved at once

// A CTA's part of [batch][column blocks][row blocks]: those of the same columns lie side by side.
struct BlockIndex {
  u32 batch, column_block, row_block;

  __device__ BlockIndex(u32 column_blocks, u32 row_blocks, u32 cta = blockIdx.x) {
    const u32 rest = cta / row_blocks;
    batch = rest / column_blocks, column_block = rest % column_blocks, row_block = cta % row_blocks;
  }
};

// Where the results of a CTA's columns go, the addresses being those of the first one.
struct ColumnBlock {
  u8* values;  // [columns][pitch]
  float* scales;
  u32 columns;  // that there are
  i64 pitch;
};

// Results by columns: values [batch][columns][num_blocks * 128], scales [batch][num_blocks][columns].
struct Columns {
  void* values;
  float* scales;
  u32 columns, num_blocks;

  // No columns where there is no such block.
  __device__ ColumnBlock at(const BlockIndex& index) const {
    const i64 pitch = static_cast<i64>(num_blocks) * kBlockRows;
    const u32 first = index.column_block * kBlockColumns;
    const i64 first_value = (static_cast<i64>(index.batch) * columns + first) * pitch;
    const i64 first_scale = (static_cast<i64>(index.batch) * num_blocks + index.row_block) * columns + first;
    return {static_cast<u8*>(values) + first_value + index.row_block * kBlockRows, scales + first_scale,
            index.row_block < num_blocks ? columns - first : 0, pitch};
  }
};

__device__ __forceinline__ u32 half_warp_index() { return threadIdx.x / kBlockLanes; }

// The i-th of this thread's columns.
template <class Config>
__device__ __forceinline__ u32 thread_column(u32 i) {
  const u32 lane = threadIdx.x % kBlockLanes;
  return Config::kVector ? lane * kLaneColumns + i : lane + i * kBlockLanes;
}

// Largest magnitudes of this thread's columns, NaN not counted. Returns the largest of all.
template <class Format>
__device__ __forceinline__ float column_maxima(const Chunk<Format> (&rows)[kUnitRows],
                                               float (&maxima)[kLaneColumns]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    maxima[i] = 0;
#pragma unroll
    for (u32 j = 0; j < kUnitRows; ++j) maxima[i] = fmaxf(maxima[i], fabsf(rows[j][i]));
    largest = fmaxf(largest, maxima[i]);
  }
  return largest;
}

// The largest magnitudes of columns in shared memory, and what follows from them.
template <class Config>
struct ColumnScales {
  static constexpr u32 kWarps = Config::kThreads / 32;

  alignas(16) float of_warps[kWarps][kBlockColumns];
  alignas(16) float reciprocals[kBlockColumns];

  // Those of this thread's columns, over its rows.
  __device__ void write(const float (&maxima)[kLaneColumns]) {
    float of_warp[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      of_warp[i] = fmaxf(maxima[i], __shfl_xor_sync(0xffffffff, maxima[i], kBlockLanes));
    if (half_warp_index() % 2) return;
    float (&row)[kBlockColumns] = of_warps[half_warp_index() / 2];
    if constexpr (Config::kVector) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; i += 4)
        *reinterpret_cast<float4*>(&row[thread_column<Config>(i)]) = {of_warp[i], of_warp[i + 1],
                                                                      of_warp[i + 2], of_warp[i + 3]};
    } else {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) row[thread_column<Config>(i)] = of_warp[i];
    }
  }

  // Once all threads have written.
  __device__ void finish(u32 column, const ColumnBlock& out) {
    float amax = 0;
#pragma unroll
    for (u32 warp = 0; warp < kWarps; ++warp) amax = fmaxf(amax, of_warps[warp][column]);
    const float scale = scale_of<typename Config::Float8>(amax);
    reciprocals[column] = __frcp_rn(scale);
    if (column < out.columns) out.scales[column] = scale;
  }
};

// Codes by columns, in shared memory, in units of eight rows. Neighbouring lanes write eight columns apart:
// the units of a column are permuted, so that these hit different banks. Pairs of units stay together, and
// are swapped in the upper half of the columns.
template <class Config>
struct ColumnCodes {
  static_assert(Config::kThreads / kBlockLanes * kUnitRows == kBlockRows);

  alignas(16) uint2 units[kBlockColumns][kBlockRows / kUnitRows];

  __device__ static u32 permutation(u32 column) {
    const u32 lane = column / kLaneColumns % kBlockLanes;
    return lane % 8 * 2 + lane / 8;
  }

  // Those of this thread's rows.
  __device__ void write(u32 column, uint2 codes) {
    units[column][half_warp_index() ^ permutation(column)] = codes;
  }

  // The same of its elements, reciprocal(column) being that of the scale.
  template <class Reciprocal>
  __device__ void write(Chunk<typename Config::Input> (&rows)[kUnitRows], Reciprocal&& reciprocal) {
    using Float8 = typename Config::Float8;
#pragma unroll
    for (auto& row : rows) row.widen_from_here();
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const u32 column = thread_column<Config>(i);
      const float of_column = reciprocal(column);
      const auto scaled = [&](int j) { return __fmul_rn(rows[j][i], of_column); };
      write(column, {Float8::pack(scaled(0), scaled(1), scaled(2), scaled(3)),
                     Float8::pack(scaled(4), scaled(5), scaled(6), scaled(7))});
    }
  }

  // To global memory, 16 rows at once: values and pitch are multiples of 16, and so is the number of rows.
  __device__ void store(const ColumnBlock& out, u32 rows = kBlockRows) const {
    constexpr u32 kLanes = kBlockRows / 16, kColumnsAtOnce = Config::kThreads / kLanes;
    const u32 pair = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
    if (pair * 16 >= rows) return;
    u8* address = out.values + first * out.pitch + pair * 16;
#pragma unroll
    for (u32 i = 0; i < kBlockColumns; i += kColumnsAtOnce, address += kColumnsAtOnce * out.pitch) {
      if (i + first >= out.columns) return;
      uint4 codes = reinterpret_cast<const uint4*>(units[i + first])[pair ^ permutation(i + first) / 2];
      if (i >= kBlockColumns / 2) codes = {codes.z, codes.w, codes.x, codes.y};
      ptx::store_16(address, codes);
    }
  }

  // The same one by one, for any addresses.
  __device__ void store_bytes(const ColumnBlock& out, u32 rows) const {
    const u32 row = threadIdx.x % kBlockRows;
    if (row >= rows) return;
#pragma unroll 4
    for (u32 column = threadIdx.x / kBlockRows; column < kBlockColumns;
         column += Config::kThreads / kBlockRows) {
      if (column >= out.columns) return;
      const u8* codes = reinterpret_cast<const u8*>(&units[column][row / kUnitRows ^ permutation(column)]);
      out.values[column * out.pitch + row] = codes[row % kUnitRows];
    }
  }
};

// Scales and codes of elements without infinities, whose column_maxima are known.
template <class Config>
__device__ __forceinline__ void quantize_columns(Chunk<typename Config::Input> (&rows)[kUnitRows],
                                                 const float (&maxima)[kLaneColumns],
                                                 const ColumnBlock& out) {
  __shared__ ColumnScales<Config> scales;
  __shared__ ColumnCodes<Config> codes;
  scales.write(maxima);
  __syncthreads();
  if (threadIdx.x < kBlockColumns) scales.finish(threadIdx.x, out);
  __syncthreads();
  codes.write(rows, [&](u32 column) { return scales.reciprocals[column]; });
  __syncthreads();
  codes.store(out);
}

}  // namespace fp8gemm
