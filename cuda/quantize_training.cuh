// Quantisation in both orders in one pass. A CTA takes 128 x 128 elements: it writes their codes by rows from
// its registers, then turns them around in shared memory and writes them by columns.
//
//   Config::Input            Bf16, F16 or F32
//   Config::Float8           E4M3 or E5M2
//   Config::kThreads         of a CTA
//   Config::kBlockRows       rows that share a scale: 1 (both) or 128 (weights)
//   Config::kBlocks          1: 128 columns
//   Config::kThreadRows      8: rows of a thread
//   Config::kVector          rows begin at multiples of 16 bytes, and of 8 in the result
//   Config::kVectorColumns   so do columns in the result, at multiples of 16 (weights)
#pragma once

#include "columns.cuh"
#include "quantize.cuh"
#include "token_blocks.cuh"

namespace fp8gemm {

template <class Config>
__device__ void quantize_both_block(const void* x, const Quantized& rows, const Columns& columns,
                                    const BlockIndex& at, const TokenBlock& block) {
  const auto tile = QuantizeTile<Config>::from_row(at.batch, block.first, at.column_block);
  Rows<Config> source;
  source.load(x, tile, rows, block.read_end);
  quantize_row_blocks<Config>(source, tile, rows, block.written_end);
  float maxima[kLaneColumns];
  column_maxima(source.chunks, maxima);  // infinities became NaN by rows
  quantize_columns<Config>(source.chunks, maxima, columns.at(at));
}

// x [batch][tokens][columns] -> row_values of that shape, row_scales [batch][blocks][tokens]; column_values
// [batch][columns][K], column_scales [batch][K / 128][columns], K being the tokens in whole blocks of 128: a
// CTA for each block of 128 columns.
template <class Config>
__device__ void quantize_both(const void* x, void* row_values, float* row_scales, void* column_values,
                              float* column_scales, u32 tokens, u32 columns) {
  const Quantized by_rows(row_values, row_scales, tokens, columns);
  const Columns by_columns{column_values, column_scales, columns, token_blocks_of(tokens)};
  const BlockIndex at(by_rows.num_blocks(), by_columns.num_blocks);
  quantize_both_block<Config>(x, by_rows, by_columns, at, whole_token_block(tokens, at.row_block));
}

// The same of groups, group_sizes [batch][num_groups]; K = num_blocks * 128 has whole blocks for each. Rows
// of no group come out as zeros; token_blocks are those of groups and of these rows.
template <class Config>
__device__ void quantize_both_ragged(const void* x, const int* group_sizes, void* row_values,
                                     float* row_scales, void* column_values, float* column_scales, u32 tokens,
                                     u32 columns, u32 num_blocks, u32 token_blocks, u32 num_groups) {
  const Quantized by_rows(row_values, row_scales, tokens, columns);
  const Columns by_columns{column_values, column_scales, columns, num_blocks};
  const BlockIndex at(by_rows.num_blocks(), token_blocks);
  const TokenBlock block = find_token_block(group_sizes + static_cast<i64>(at.batch) * num_groups, num_groups,
                                            tokens, at.row_block);
  quantize_both_block<Config>(x, by_rows, by_columns, at, block);
}

// w [batch][rows][columns] -> backward values of that shape, backward scales [batch][row blocks][column
// blocks]; forward values [batch][columns][rows], forward scales [batch][column blocks][row blocks]: a CTA
// for each 128 x 128 elements, which have one scale.
template <class Config>
__device__ void quantize_weights(const void* w, void* forward_values, float* forward_scales,
                                 void* backward_values, float* backward_scales, u32 rows, u32 columns) {
  __shared__ ColumnCodes<Config> codes;
  const Quantized backward(backward_values, backward_scales, rows, columns);
  const u32 row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const BlockIndex at(backward.num_blocks(), row_blocks);
  const QuantizeTile<Config> tile(at.batch, at.row_block, at.column_block);
  Rows<Config> source;
  source.load(w, tile, backward, rows);
  const auto [scale, reciprocal] = quantize_square_block<Config>(source, tile, backward);
  if (threadIdx.x == 0) {
    const i64 column_block = static_cast<i64>(at.batch) * backward.num_blocks() + at.column_block;
    forward_scales[column_block * row_blocks + at.row_block] = scale;
  }
  codes.write(source.chunks, [&](u32) { return reciprocal; });
  __syncthreads();
  const BlockIndex here(backward.num_blocks(), row_blocks, cta_index_here());
  const u32 first_row = here.row_block * kBlockRows, first_column = here.column_block * kBlockColumns;
  const i64 first = (static_cast<i64>(here.batch) * columns + first_column) * rows + first_row;
  const ColumnBlock forward{static_cast<u8*>(forward_values) + first, nullptr, columns - first_column, rows};
  if constexpr (Config::kVectorColumns)
    codes.store(forward, rows - first_row);
  else
    codes.store_bytes(forward, rows - first_row);
}

}  // namespace fp8gemm
