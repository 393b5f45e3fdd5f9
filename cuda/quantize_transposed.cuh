// Quantisation along the tokens of groups: x [tokens][columns], tokens sorted by group, to FP8 [columns][K],
// in which every group has whole blocks of 128 tokens, filled up with zeros. A CTA takes such a block of 128
// columns: it reads rows, scales columns, turns the block around in shared memory, and writes rows again.
//
//   Config::Input        Bf16, F16 or F32
//   Config::Float8       E4M3 or E5M2
//   Config::kThreads     of a CTA
//   Config::kBlocks      1: 128 columns
//   Config::kThreadRows  8: tokens of a thread
//   Config::kVector      rows begin at multiples of 16 bytes
#pragma once

#include "columns.cuh"
#include "quantize.cuh"
#include "token_blocks.cuh"

namespace fp8gemm {

// x [batch][tokens][columns], group_sizes [batch][num_groups] -> values [batch][columns][K], scales
// [batch][num_blocks][columns], K = num_blocks * 128: a CTA for each block of 128 columns.
template <class Config>
__device__ void quantize_transposed(const void* x, const int* group_sizes, void* values, float* scales,
                                    u32 tokens, u32 columns, u32 num_blocks, u32 num_groups) {
  const Extent extent{tokens, columns};
  const Columns out{values, scales, columns, num_blocks};
  const BlockIndex at(extent.num_blocks(), num_blocks);
  const TokenBlock block = find_token_block(group_sizes + static_cast<i64>(at.batch) * num_groups, num_groups,
                                            tokens, at.row_block);

  Rows<Config> source;
  source.load(x, QuantizeTile<Config>::from_row(at.batch, block.first, at.column_block), extent,
              block.read_end);
  float maxima[kLaneColumns];
  if (column_maxima(source.chunks, maxima) > kLargestFloat) {
#pragma unroll
    for (u32 i = 0; i < Config::kThreadRows; ++i) source.chunks[i].infinities_to_nan();
    column_maxima(source.chunks, maxima);
  }
  quantize_columns<Config>(source.chunks, maxima, out.at(at));
}

}  // namespace fp8gemm
