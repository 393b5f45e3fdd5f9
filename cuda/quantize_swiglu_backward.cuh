// The gradient of hidden = silu(gate) * up, quantised by rows and by columns, and hidden by columns, in one
// pass. A CTA takes 128 tokens x 128 features. Their f32 results would not fit into registers: the operands
// are kept in shared memory as they came, and results are computed twice, first for the scales, then for the
// codes.
//
//   Config::Input          Bf16, F16 or F32
//   Config::Float8         E4M3 or E5M2
//   Config::kThreads       of a CTA
//   Config::kVector        true: the number of features is a multiple of 128
//   Config::kSharedBytes   of a CTA, dynamic
#pragma once

#include "columns.cuh"
#include "ptx/copy.cuh"
#include "quantize.cuh"
#include "swiglu.cuh"
#include "token_blocks.cuh"

namespace fp8gemm {

// x + 0, but NaN where x is infinite.
__device__ __forceinline__ float infinity_to_nan(float x) { return __fmaf_rn(x, 0, x); }

// Where the results go: rows [batch][tokens][gate | up], columns [batch][gate | up][K].
struct SwigluBackwardResults {
  Quantized rows;
  Columns columns, hidden_columns;

  __device__ u32 feature_blocks() const { return hidden_columns.columns / kBlockColumns; }

  // Of d_gate, d_up, hidden.
  __device__ ColumnBlock columns_of(u32 result, BlockIndex at) const {
    if (result == 2) return hidden_columns.at(at);
    at.column_block += result * feature_blocks();
    return columns.at(at);
  }
};

template <class Config>
struct SwigluBackward {
  using Input = typename Config::Input;
  using Float8 = typename Config::Float8;
  using Storage = typename Input::Storage;
  static constexpr u32 kResults = 3;  // d_gate, d_up, hidden
  static constexpr u32 kVectors = Chunk<Input>::kWords / 4;

  struct Shared {
    // Each thread reads what it fetched itself: no other waits for it, and no bank is hit twice.
    union {
      uint4 operands[3][kUnitRows][kVectors][Config::kThreads];  // gate, up, d_hidden
      ColumnCodes<Config> codes[kResults];
    };
    ColumnScales<Config> scales[kResults];
  };
  static_assert(sizeof(Shared) == Config::kSharedBytes);

  Shared& shared;
  const u32 lane = threadIdx.x % kBlockLanes, first_row = half_warp_index() * kUnitRows;  // in the block

  // Begins to fetch this thread's rows, two by two; zeros from row `count` on. Operands are those of the
  // block's first row and feature.
  __device__ void fetch(const Storage* gate_up, const Storage* d_hidden, u32 features, u32 count) {
    gate_up += static_cast<i64>(first_row) * 2 * features + lane * kLaneColumns;
    d_hidden += static_cast<i64>(first_row) * features + lane * kLaneColumns;
#pragma unroll
    for (u32 row = 0; row < kUnitRows; ++row, gate_up += 2 * features, d_hidden += features) {
      const Storage* const rows[3] = {gate_up, gate_up + features, d_hidden};
#pragma unroll
      for (u32 i = 0; i < 3; ++i)
#pragma unroll
        for (u32 vector = 0; vector < kVectors; ++vector)
          ptx::cp_async_16(&shared.operands[i][row][vector][threadIdx.x],
                           rows[i] + vector * (16 / sizeof(Storage)), first_row + row < count);
      if (row % 2) ptx::cp_async_commit();
    }
  }

  // Gate, up and d_hidden of a row.
  struct Operands {
    Chunk<Input> chunks[3];

    // The results of a column; with kCareful infinities are NaN.
    template <bool kCareful>
    __device__ __forceinline__ void compute(int column, float (&results)[kResults]) const {
      const SwigluGradients of = swiglu_gradients(chunks[0][column], chunks[1][column], chunks[2][column]);
      results[0] = of.gate, results[1] = of.up, results[2] = of.hidden;
      if constexpr (kCareful)
#pragma unroll
        for (float& result : results) result = infinity_to_nan(result);
    }
  };

  __device__ __forceinline__ Operands operands(u32 row) const {
    Operands of_row;
#pragma unroll
    for (u32 i = 0; i < 3; ++i)
#pragma unroll
      for (u32 vector = 0; vector < kVectors; ++vector)
        of_row.chunks[i].set_words(4 * vector, shared.operands[i][row][vector][threadIdx.x]);
    return of_row;
  }

  // Largest magnitudes of this thread's rows of d_gate and of d_up, and of its columns. Returns the largest.
  template <bool kCareful>
  __device__ __forceinline__ float maxima(float (&of_rows)[2 * kUnitRows],
                                          float (&of_columns)[kResults][kLaneColumns]) const {
#pragma unroll
    for (u32 i = 0; i < 2 * kUnitRows; ++i) of_rows[i] = 0;
#pragma unroll
    for (u32 i = 0; i < kResults * kLaneColumns; ++i) of_columns[i / kLaneColumns][i % kLaneColumns] = 0;
    unrolled<kUnitRows>([&](auto row) {
      if constexpr (row % 2 == 0) ptx::cp_async_wait<kUnitRows / 2 - 1 - row / 2>();
      const Operands of_row = operands(row);
#pragma unroll
      for (int column = 0; column < kLaneColumns; ++column) {
        float results[kResults];
        of_row.template compute<kCareful>(column, results);
#pragma unroll
        for (u32 i = 0; i < kResults; ++i) {
          const float magnitude = fabsf(results[i]);
          of_columns[i][column] = fmaxf(of_columns[i][column], magnitude);
          if (i < 2) of_rows[i * kUnitRows + row] = fmaxf(of_rows[i * kUnitRows + row], magnitude);
        }
      }
    });
    float largest = 0;
#pragma unroll
    for (u32 i = 0; i < kResults * kLaneColumns; ++i)
      largest = fmaxf(largest, of_columns[i / kLaneColumns][i % kLaneColumns]);
    return largest;
  }

  // Writes this thread's codes by rows, at `rows` [tokens][2 * features] for its first row and column, and
  // returns those by columns. `row_reciprocal` is that of d_gate's row lane, or of d_up's row lane - 8.
  template <bool kCareful>
  __device__ __forceinline__ void quantize_results(float row_reciprocal, u8* rows, u32 features, u32 count,
                                                   uint2 (&codes)[kResults][kLaneColumns]) const {
    u32 words[kResults][kLaneColumns];
    quantize_four_rows<kCareful, 0>(row_reciprocal, rows, features, count, words);
    // With these in registers the others would not fit. They wait in the place of operands that are done
    // with.
#pragma unroll
    for (u32 i = 0; i < kResults; ++i)
#pragma unroll
      for (u32 half = 0; half < 2; ++half)
        shared.operands[i][half][0][threadIdx.x] = {words[i][4 * half], words[i][4 * half + 1],
                                                    words[i][4 * half + 2], words[i][4 * half + 3]};
    quantize_four_rows<kCareful, 4>(row_reciprocal, rows + static_cast<i64>(8) * features, features, count,
                                    words);
#pragma unroll
    for (u32 i = 0; i < kResults; ++i)
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const uint4 parked = shared.operands[i][half][0][threadIdx.x];
        codes[i][4 * half] = {parked.x, words[i][4 * half]};
        codes[i][4 * half + 1] = {parked.y, words[i][4 * half + 1]};
        codes[i][4 * half + 2] = {parked.z, words[i][4 * half + 2]};
        codes[i][4 * half + 3] = {parked.w, words[i][4 * half + 3]};
      }
  }

 private:
  template <bool kCareful, u32 kFirst>
  __device__ __forceinline__ void quantize_four_rows(float row_reciprocal, u8* rows, u32 features, u32 count,
                                                     u32 (&words)[kResults][kLaneColumns]) const {
#pragma unroll
    for (u32 row = kFirst; row < kFirst + 4; row += 2) {
      const Operands operands_of[2] = {operands(row), operands(row + 1)};
      Chunk<F32> of_rows[2][2];
#pragma unroll
      for (int column = 0; column < kLaneColumns; ++column) {
        float results[2][kResults];
        operands_of[0].template compute<kCareful>(column, results[0]);
        operands_of[1].template compute<kCareful>(column, results[1]);
#pragma unroll
        for (u32 i = 0; i < kResults; ++i) {
          const float reciprocal = shared.scales[i].reciprocals[thread_column<Config>(column)];
          const u32 pair =
              Float8::pack(__fmul_rn(results[0][i], reciprocal), __fmul_rn(results[1][i], reciprocal));
          words[i][column] = row == kFirst ? pair : words[i][column] | pair << 16;
          if (i < 2) {
            of_rows[0][i].words[column] = __float_as_uint(results[0][i]);
            of_rows[1][i].words[column] = __float_as_uint(results[1][i]);
          }
        }
      }
#pragma unroll
      for (u32 j = 0; j < 2; ++j, rows += 2 * features)
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          const float reciprocal =
              __shfl_sync(0xffffffff, row_reciprocal, i * kUnitRows + row + j, kBlockLanes);
          const uint2 of = quantized<Float8>(of_rows[j][i], reciprocal);
          if (first_row + row + j < count) ptx::store_8(rows + i * features, of.x, of.y);
        }
    }
  }
};

template <class Config>
__device__ void quantize_swiglu_backward_block(const void* gate_up, const void* d_hidden,
                                               const SwigluBackwardResults& out, const BlockIndex& at,
                                               u32 row_blocks, const TokenBlock& block) {
  using Storage = typename Config::Input::Storage;
  using Kernel = SwigluBackward<Config>;
  constexpr u32 kResults = Kernel::kResults;
  extern __shared__ __align__(16) u8 shared_bytes[];
  Kernel kernel{*reinterpret_cast<typename Kernel::Shared*>(shared_bytes)};
  auto& shared = kernel.shared;

  const u32 features = out.hidden_columns.columns, first_feature = at.column_block * kBlockColumns;
  const i64 first_token = static_cast<i64>(at.batch) * out.rows.rows + block.first;
  kernel.fetch(static_cast<const Storage*>(gate_up) + first_token * 2 * features + first_feature,
               static_cast<const Storage*>(d_hidden) + first_token * features + first_feature, features,
               block.read_end - block.first);
  float row_maxima[2 * kUnitRows], column_maxima[kResults][kLaneColumns];
  const float largest = kernel.template maxima<false>(row_maxima, column_maxima);
  const bool has_infinities = __any_sync(0xffffffff, largest > kLargestFloat);
  if (has_infinities) kernel.template maxima<true>(row_maxima, column_maxima);

#pragma unroll
  for (u32 i = 0; i < kResults; ++i) shared.scales[i].write(column_maxima[i]);
  const float scale = scale_of<typename Config::Float8>(max_over_block_of_own(row_maxima));
  const u32 row = block.first + kernel.first_row + kernel.lane % kUnitRows;
  if (row < block.written_end) {
    const u32 row_block = at.column_block + (kernel.lane < kUnitRows ? 0 : out.feature_blocks());
    out.rows.scales[(static_cast<i64>(at.batch) * out.rows.num_blocks() + row_block) * out.rows.rows + row] =
        scale;
  }
  __syncthreads();
#pragma unroll
  for (u32 i = threadIdx.x; i < kResults * kBlockColumns; i += Config::kThreads)
    shared.scales[i / kBlockColumns].finish(i % kBlockColumns, out.columns_of(i / kBlockColumns, at));
  __syncthreads();

  uint2 codes[kResults][kLaneColumns];
  u8* const rows = out.rows.values + (first_token + kernel.first_row) * 2 * features + first_feature +
                   kernel.lane * kLaneColumns;
  const u32 written = block.written_end - block.first;
  if (has_infinities)
    kernel.template quantize_results<true>(__frcp_rn(scale), rows, features, written, codes);
  else
    kernel.template quantize_results<false>(__frcp_rn(scale), rows, features, written, codes);
  __syncthreads();  // nobody needs the operands any more
  const BlockIndex here(out.feature_blocks(), row_blocks, cta_index_here());
#pragma unroll
  for (u32 i = 0; i < kResults; ++i)
#pragma unroll
    for (int column = 0; column < kLaneColumns; ++column)
      shared.codes[i].write(thread_column<Config>(column), codes[i][column]);
  __syncthreads();
#pragma unroll
  for (u32 i = 0; i < kResults; ++i) shared.codes[i].store(out.columns_of(i, here));
}

// gate_up [batch][tokens][2 * features], d_hidden [batch][tokens][features] -> row_values of gate_up's shape,
// row_scales [batch][2 * features / 128][tokens]; column_values [batch][2 * features][K], hidden_values
// [batch][features][K], with scales [batch][K / 128][columns], K being the tokens in whole blocks of 128: a
// CTA for each block of 128 features.
template <class Config>
__device__ void quantize_swiglu_backward(const void* gate_up, const void* d_hidden, void* row_values,
                                         float* row_scales, void* column_values, float* column_scales,
                                         void* hidden_values, float* hidden_scales, u32 tokens,
                                         u32 features) {
  const u32 num_blocks = token_blocks_of(tokens);
  const SwigluBackwardResults out{{row_values, row_scales, tokens, 2 * features},
                                  {column_values, column_scales, 2 * features, num_blocks},
                                  {hidden_values, hidden_scales, features, num_blocks}};
  const BlockIndex at(out.feature_blocks(), num_blocks);
  quantize_swiglu_backward_block<Config>(gate_up, d_hidden, out, at, num_blocks,
                                         whole_token_block(tokens, at.row_block));
}

// The same of groups, as in `quantize_both_ragged`.
template <class Config>
__device__ void quantize_swiglu_backward_ragged(const void* gate_up, const void* d_hidden,
                                                const int* group_sizes, void* row_values, float* row_scales,
                                                void* column_values, float* column_scales,
                                                void* hidden_values, float* hidden_scales, u32 tokens,
                                                u32 features, u32 num_blocks, u32 token_blocks,
                                                u32 num_groups) {
  const SwigluBackwardResults out{{row_values, row_scales, tokens, 2 * features},
                                  {column_values, column_scales, 2 * features, num_blocks},
                                  {hidden_values, hidden_scales, features, num_blocks}};
  const BlockIndex at(out.feature_blocks(), token_blocks);
  const TokenBlock block = find_token_block(group_sizes + static_cast<i64>(at.batch) * num_groups, num_groups,
                                            tokens, at.row_block);
  quantize_swiglu_backward_block<Config>(gate_up, d_hidden, out, at, token_blocks, block);
}

}  // namespace fp8gemm
