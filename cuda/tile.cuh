// What follows from a configuration: how a tile is divided among warpgroups, instructions, scales and stores.
//
// wgmma multiplies 64 rows (its M side) by 8 to 256 (its N side). P is the operand on its M side and Q the
// one on its N side: lhs and rhs, or with swap_ab, which suits few tokens, rhs and lhs.
#pragma once

#include "ptx/types.cuh"

namespace fp8gemm {

constexpr int kBlockK = 128;      // K of a stage; one scale per operand row or block
constexpr int kScaleBlock = 128;  // rows of rhs that share a scale, for weights
constexpr int kWarpgroup = 128;   // threads
constexpr int kMmaP = 64;         // rows of a wgmma
constexpr int kMmaK = 32;         // bytes of K of a wgmma
constexpr int kTileSlots = 4;     // of the queue of tiles, where one warp schedules for all

constexpr u32 kOperandLoaderThreads = 1, kScaleLoaderThreads = 32;

// What is multiplied; GemmProblem in jit/problem.py has the shapes.
enum class Kind { kDense, kRaggedM, kMasked, kRaggedK };

// One output tile of a CTA and the parts of the operands that it takes: rows, columns and blocks of K within
// the index along their leading axes that each array has. The rows from m_end on belong to others.
struct alignas(16) WorkTile {
  int m_start, m_end, n_start;
  int k_begin, k_end;
  int lhs_batch, rhs_batch, out_batch;
};

template <class Config>
struct Tile {
  static constexpr bool kGrouped = Config::kKind != Kind::kDense;
  // Groups end at any row: copies of lhs and out stop there.
  static constexpr bool kEndsAnywhere = Config::kKind == Kind::kRaggedM || Config::kKind == Kind::kMasked;

  static constexpr bool kSwapAB = Config::kSwapAB;
  static constexpr int kP = kSwapAB ? Config::kBlockN : Config::kBlockM;
  static constexpr int kQ = kSwapAB ? Config::kBlockM : Config::kBlockN;

  // The warpgroups share P where it has enough rows, Q otherwise.
  static constexpr bool kSplitP = kP / kMmaP % Config::kNumConsumers == 0;
  static constexpr int kWarpgroupP = kSplitP ? kP / Config::kNumConsumers : kP;
  static constexpr int kWarpgroupQ = kSplitP ? kQ : kQ / Config::kNumConsumers;
  static constexpr int kNumMmaP = kWarpgroupP / kMmaP;
  static constexpr int kFragment = kWarpgroupQ / 2;  // accumulator registers of a wgmma
  static_assert(kP % kMmaP == 0 && kWarpgroupQ % 8 == 0 && kWarpgroupQ <= 256);

  __device__ static constexpr int warpgroup_p(int warpgroup) { return kSplitP ? warpgroup * kWarpgroupP : 0; }
  __device__ static constexpr int warpgroup_q(int warpgroup) { return kSplitP ? 0 : warpgroup * kWarpgroupQ; }

  static constexpr int kLhsBytes = Config::kBlockM * kBlockK;
  static constexpr int kRhsBytes = Config::kBlockN * kBlockK;
  static constexpr int kNumKBlocks = ceil_div(Config::kK, kBlockK);
  static constexpr int kClusterSize = Config::kClusterM * Config::kClusterN * Config::kSplitK;
  static constexpr int kNumThreads = (1 + Config::kNumConsumers) * kWarpgroup;
  static constexpr int kNumConsumerThreads = Config::kNumConsumers * kWarpgroup;

  // Scales of rhs that a stage holds: one a row, or those of the at most three 128-blocks that a tile
  // touches.
  static constexpr bool kRhsPerRow = Config::kRhsScaleRows == 1;
  static constexpr int kRhsScales = kRhsPerRow ? Config::kBlockN : 4;

  // Where a 128-block of rhs may begin among a warpgroup's columns, and so how many belong to the first one:
  // multiples of the step.
  static constexpr int kPlaceStep = gcd(gcd(Config::kBlockN, kWarpgroupQ), kScaleBlock);
  static constexpr int kMostFirstColumns = min_of(kScaleBlock, kWarpgroupQ);
  static constexpr bool kOneScale = !kRhsPerRow && !kSwapAB && kPlaceStep == kMostFirstColumns;
  static constexpr bool kOnePlace = kRhsPerRow || kSwapAB || kOneScale;

  // The output travels in chunks of up to 128 bytes a row: 16 rows of a warp, or with swap_ab the tokens of a
  // warpgroup.
  static constexpr int kOutBytes = Config::kOutBytes;
  static constexpr int kChunkRowBytes = kSwapAB ? 128 : min_of(128, gcd(kWarpgroupQ* kOutBytes, 128));
  static constexpr int kChunkColumns = kChunkRowBytes / kOutBytes;
  static constexpr int kChunkRows = kSwapAB ? kWarpgroupQ : kMmaP / 4;
  static constexpr int kChunkBytes = kChunkRows * kChunkRowBytes;
  static constexpr int kNumWriters = Config::kNumConsumers * (kSwapAB ? 1 : 4);
  static constexpr int kChunksPerMma = (kSwapAB ? kMmaP : kWarpgroupQ) / kChunkColumns;
};

}  // namespace fp8gemm
