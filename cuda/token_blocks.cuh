// Tokens in blocks of 128, as the operands of weight gradients have them along K: tokens are sorted by group,
// and every group begins with a block.
#pragma once

#include "scan.cuh"

namespace fp8gemm {

constexpr u32 kBlockTokens = 128;  // that share a scale

__device__ __forceinline__ u32 token_blocks_of(u32 tokens) {
  return (tokens + kBlockTokens - 1) / kBlockTokens;
}

// The tokens of a block: those from `first` on in front of read_end are a group's. Behind the blocks of all
// groups come those of the other tokens: they are not read, but have rows of a result, up to written_end.
struct TokenBlock {
  u32 first, read_end, written_end;
};

// The block with the number `block` where all tokens are one group.
__device__ __forceinline__ TokenBlock whole_token_block(u32 tokens, u32 block) {
  const u32 first = block * kBlockTokens, end = min(first + kBlockTokens, tokens);
  return {first, end, end};
}

// The block with the number `block`, found by every warp for itself: each lane has an equal share of
// neighbouring groups.
__device__ __forceinline__ TokenBlock find_token_block(const int* group_sizes, u32 num_groups, u32 tokens,
                                                       u32 block) {
  const u32 share = (num_groups + 31) / 32, begin = min(lane_index() * share, num_groups);
  const u32 end = min(begin + share, num_groups);

  u32 of_lane = 0;
  for (u32 group = begin; group < end; ++group)
    of_lane = add_saturating(of_lane, clamped(group_sizes[group], tokens), tokens);
  const u32 through_lane = scan_saturating(of_lane, tokens), first_token = scan_before(through_lane);

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
  for_each_group([&](u32, u32 size) { num_blocks += token_blocks_of(size); });
  const u32 through = scan_saturating(num_blocks, kNoLimit);

  const u32 owners = __ballot_sync(0xffffffff, block < through);
  if (owners == 0) {
    const u32 blocks_of_groups = __shfl_sync(0xffffffff, through, 31);
    const u32 in_groups = __shfl_sync(0xffffffff, through_lane, 31);
    const u32 first = min(in_groups + (block - blocks_of_groups) * kBlockTokens, tokens);
    return {first, first, min(first + kBlockTokens, tokens)};
  }
  const u32 owner = __ffs(owners) - 1;
  u32 first = 0, count = 0, before = through - num_blocks;
  for_each_group([&](u32 token, u32 size) {
    const u32 in_group = block - before;  // as if negative numbers were large
    if (in_group < token_blocks_of(size))
      first = token + in_group * kBlockTokens, count = min(size - in_group * kBlockTokens, kBlockTokens);
    before += token_blocks_of(size);
  });
  first = __shfl_sync(0xffffffff, first, owner);
  const u32 last = first + __shfl_sync(0xffffffff, count, owner);
  return {first, last, last};
}

}  // namespace fp8gemm
