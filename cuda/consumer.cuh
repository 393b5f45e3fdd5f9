// Takes stages from the ring: wgmma over one block of K into a partial sum, then promotion of the partial
// sum, with its scales, into f32 accumulators on the CUDA cores. The second level is there because the tensor
// core keeps 13 bits below the largest term of a sum.
//
// A thread of a warpgroup holds, of each 64 x Q product, rows 16 w + l / 4 (+ 8) and columns 8 j + 2 (l % 4)
// (+ 1), for its warp w and lane l: fragment[4 j + 0, 1] in the first row, [4 j + 2, 3] in the second.
#pragma once

#include "pipeline.cuh"
#include "ptx/wgmma.cuh"
#include "scheduler.cuh"

namespace fp8gemm {

// Where a thread's fragment lies in the tile.
template <class Config>
struct ThreadPlace {
  using T = Tile<Config>;
  int p, q;  // first row on the P side, first column on the Q side

  __device__ explicit ThreadPlace(int warpgroup) {
    const int warp = warp_index() % 4, lane = lane_index();
    p = T::warpgroup_p(warpgroup) + warp * 16 + lane / 4;
    q = T::warpgroup_q(warpgroup) + lane % 4 * 2;
  }
};

// Keeps what is computed from `value` behind this point.
__device__ __forceinline__ void compute_from_here(float& value) { asm volatile("" : "+f"(value)); }

// rn(a * b) by an FMA with -0, which changes no product: ptxas lets every other FFMA yield to the warps that
// feed the tensor core, but no FMUL.
struct FmaProduct {
  float minus_zero;  // in a register: ptxas would make an FMUL of a constant

  __device__ FmaProduct() { asm volatile("mov.f32 %0, 0f80000000;" : "=f"(minus_zero)); }
  __device__ float operator()(float a, float b) const {
    float product;
    asm volatile("fma.rn.f32 %0, %1, %2, %3;" : "=f"(product) : "f"(a), "f"(b), "f"(minus_zero));
    return product;
  }
};

// scale(row, j, column) = rn(lhs scale * rhs scale) for row 0, 1 of a fragment, its j-th group of 8 columns,
// column 0, 1. kFirstColumns of a warpgroup's columns belong to the first 128-block of rhs that it touches.
//
// Scales are read before the products are issued (`load`), as issuing blocks while the tensor core is busy,
// and multiplied after (`prepare`), lest the products wait for them.
//
// Both sides per row: a product for each element. A thread would need a register for each of its columns, and
// so reads them where they are multiplied (`kReadLate`), and gives its stage back only then.
template <class Config, int kFirstColumns, bool kRhsPerRow = Tile<Config>::kRhsPerRow,
          bool kSwapAB = Config::kSwapAB>
struct Scales {
  using T = Tile<Config>;
  static constexpr bool kReadLate = true;
  float rows[2];
  const float* columns;
  FmaProduct product;

  __device__ void load(const SharedStorage<Config>& shared, u32 stage, ThreadPlace<Config> at, int, int,
                       int mma) {
    const float* p_scale = kSwapAB ? shared.rhs_scale[stage] : shared.lhs_scale[stage];
    const float* q_scale = kSwapAB ? shared.lhs_scale[stage] : shared.rhs_scale[stage];
#pragma unroll
    for (int row = 0; row < 2; ++row) rows[row] = p_scale[at.p + mma * kMmaP + row * 8];
    columns = &q_scale[at.q];
  }

  __device__ void prepare() {
    compute_from_here(rows[0]);
    compute_from_here(rows[1]);
  }

  __device__ float operator()(int row, int j, int column) const {
    const float2 pair = *reinterpret_cast<const float2*>(&columns[j * 8]);
    return product(rows[row], column == 0 ? pair.x : pair.y);
  }
};

// Tokens in rows, weights in columns: one product per row and 128-block of columns.
template <class Config, int kFirstColumns>
struct Scales<Config, kFirstColumns, false, false> {
  using T = Tile<Config>;
  static constexpr int kBlocks = 1 + ceil_div(max_of(T::kWarpgroupQ - kFirstColumns, 0), kScaleBlock);
  static constexpr bool kReadLate = false;
  static_assert(kBlocks <= 3);

  float rows[2], blocks[kBlocks];
  float products[2][kBlocks];

  __device__ void load(const SharedStorage<Config>& shared, u32 stage, ThreadPlace<Config> at, int n_start,
                       int warpgroup, int mma) {
    const int first_block = (n_start + T::warpgroup_q(warpgroup)) / kScaleBlock - n_start / kScaleBlock;
#pragma unroll
    for (int row = 0; row < 2; ++row) rows[row] = shared.lhs_scale[stage][at.p + mma * kMmaP + row * 8];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) blocks[b] = shared.rhs_scale[stage][first_block + b];
  }

  __device__ void prepare() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      compute_from_here(rows[row]);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) products[row][b] = __fmul_rn(rows[row], blocks[b]);
    }
  }

  __device__ float operator()(int row, int j, int) const {
    return products[row][j * 8 < kFirstColumns ? 0 : 1 + (j * 8 - kFirstColumns) / kScaleBlock];
  }
};

// Weights in rows, tokens in columns: 64 rows lie within one 128-block.
template <class Config, int kFirstColumns>
struct Scales<Config, kFirstColumns, false, true> {
  using T = Tile<Config>;
  static constexpr bool kReadLate = false;
  static_assert(Config::kBlockN % kMmaP == 0);
  float weight;
  float columns[T::kWarpgroupQ / 8][2];

  __device__ void load(const SharedStorage<Config>& shared, u32 stage, ThreadPlace<Config> at, int n_start,
                       int warpgroup, int mma) {
    const int n = n_start + T::warpgroup_p(warpgroup) + mma * kMmaP;
    weight = shared.rhs_scale[stage][n / kScaleBlock - n_start / kScaleBlock];
#pragma unroll
    for (int j = 0; j < T::kWarpgroupQ / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&shared.lhs_scale[stage][at.q + j * 8]);
      columns[j][0] = pair.x, columns[j][1] = pair.y;
    }
  }

  __device__ void prepare() { compute_from_here(weight); }

  __device__ float operator()(int, int j, int column) const { return __fmul_rn(weight, columns[j][column]); }
};

template <class Config>
using Fragment = float[Tile<Config>::kFragment];
template <class Config>
using Accumulators = Fragment<Config>[Tile<Config>::kNumMmaP];

// The product of 64 rows of P with a warpgroup's columns of Q over one block of K, and its scales.
template <class Config, int kFirstColumns>
struct Partial {
  Fragment<Config> fragment;
  Scales<Config, kFirstColumns> scales;
};

// The sum over this CTA's part of K of one tile, for one warpgroup.
//
// A step is one 64-row product over one block of K. kPartials steps are started together, and each is
// promoted while the tensor core works on those after it. (Products in flight from one iteration of the loop
// to the next would fill the gap between batches too, but then ptxas no longer sees which have finished and
// waits after every instruction.)
template <class Config, int kFirstColumns>
struct Mainloop {
  using T = Tile<Config>;
  using Partial = Partial<Config, kFirstColumns>;
  static constexpr int kPartials = Config::kPartials;
  static constexpr bool kPipelined = kPartials > 1;
  static constexpr int kBatch = kPipelined ? kPartials / T::kNumMmaP : 1;  // blocks of K in flight
  static_assert(!kPipelined || kPartials % T::kNumMmaP == 0);
  static_assert(kBatch <= Config::kNumStages, "a consumer would wait for a stage that it has not released");

  Accumulators<Config>& accumulators;
  Pipeline<Config> ahead;    // where products are started
  Pipeline<Config>& behind;  // where they are promoted
  const int warpgroup, n_start;
  const ThreadPlace<Config> at;
  const ptx::Descriptor p, q;  // the warpgroup's parts of the first stage

  // From a stage to the next, and from one 64-row product to the next, in the descriptors' units of 16 bytes.
  static constexpr u32 kStageP = (Config::kSwapAB ? T::kRhsBytes : T::kLhsBytes) / 16;
  static constexpr u32 kStageQ = (Config::kSwapAB ? T::kLhsBytes : T::kRhsBytes) / 16;
  static constexpr u32 kNextMma = kMmaP * kBlockK / 16;

  __device__ static const u8* p_tile(const SharedStorage<Config>& shared) {
    return Config::kSwapAB ? shared.rhs[0] : shared.lhs[0];
  }
  __device__ static const u8* q_tile(const SharedStorage<Config>& shared) {
    return Config::kSwapAB ? shared.lhs[0] : shared.rhs[0];
  }

  __device__ Mainloop(Accumulators<Config>& accumulators, Pipeline<Config>& pipeline, int warpgroup,
                      int n_start)
      : accumulators(accumulators),
        ahead(pipeline),
        behind(pipeline),
        warpgroup(warpgroup),
        n_start(n_start),
        at(warpgroup),
        p(p_tile(pipeline.shared) + T::warpgroup_p(warpgroup) * kBlockK),
        q(q_tile(pipeline.shared) + T::warpgroup_q(warpgroup) * kBlockK) {}

  // Starts the product of the i-th 64 rows of P.
  __device__ void start(Partial& partial, int i) {
    if (i == 0) ahead.wait_full();
    partial.scales.load(ahead.shared, ahead.stage, at, n_start, warpgroup, i);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < kBlockK / kMmaK; ++k)
      Config::wgmma(partial.fragment, p.at(ahead.stage * kStageP + i * kNextMma + k * (kMmaK / 16)),
                    q.at(ahead.stage * kStageQ + k * (kMmaK / 16)), k > 0);
    ptx::wgmma_commit();
    if (i == T::kNumMmaP - 1) {
      ahead.advance();
      ahead.peek_full();
    }
    partial.scales.prepare();
  }

  // Waits for a product, all but the `kPending` started after it, and adds it with its scales.
  template <int kPending>
  __device__ void finish(Partial& partial, int i) {
    constexpr bool kReadLate = Scales<Config, kFirstColumns>::kReadLate;
    const bool is_last = i == T::kNumMmaP - 1;
    ptx::wgmma_wait<kPending>(partial.fragment);
    if (is_last && !kReadLate) behind.release();
#pragma unroll
    for (int j = 0; j < T::kWarpgroupQ / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& sum = accumulators[i][4 * j + e];
        sum = __fmaf_rn(partial.scales(e / 2, j, e % 2), partial.fragment[4 * j + e], sum);
      }
    if (is_last && kReadLate) behind.release();
    if (is_last) behind.advance();
  }

  __device__ void run(int num_k_blocks) {
#pragma unroll
    for (int i = 0; i < T::kNumMmaP; ++i)
#pragma unroll
      for (int e = 0; e < T::kFragment; ++e) accumulators[i][e] = 0;

    if constexpr (kRounds) {
      for (int k = 0; k < num_k_blocks; k += kStages)
        unrolled<kStages>([&](auto stage) { one_by_one(stage); });
      return;
    }
    int k = 0;
    // Everything, or the blocks that are no whole batch.
    for (; k < (kPipelined ? num_k_blocks % kBatch : num_k_blocks); ++k) one_by_one(ahead.stage);
    if constexpr (kPipelined)
      for (; k < num_k_blocks; k += kBatch) {
        Partial partials[kPartials];
        unrolled<kPartials>([&](auto s) { start(partials[s], s % T::kNumMmaP); });
        unrolled<kPartials>([&](auto s) { finish<kPartials - 1 - s>(partials[s], s % T::kNumMmaP); });
      }
  }

 private:
  // A copy of the loop's body for each stage of the ring, where K is a number of rounds: it knows its
  // addresses and has a fifth fewer instructions. Not where addresses that the compiler then keeps at hand
  // take registers that it does not have, and not for a single round, which would be no loop: products and
  // epilogue would mix.
  static constexpr int kStages = Config::kNumStages, kMaxRoundStages = 8;
  static constexpr bool kRounds = Config::kKind != Kind::kRaggedK && Config::kSplitK == 1 && !kPipelined &&
                                  T::kNumMmaP == 1 && T::kOneScale && T::kNumKBlocks % kStages == 0 &&
                                  (T::kNumKBlocks > kStages) && (kStages <= kMaxRoundStages);

  // One block of K, product by product. Its one Partial keeps the compiler from starting the next product
  // before this one is promoted.
  __device__ __forceinline__ void one_by_one(u32 stage) {
    ahead.stage = behind.stage = stage;
    Partial partial;
    unrolled<T::kNumMmaP>([&](auto i) {
      start(partial, i);
      finish<0>(partial, i);
    });
  }
};

// A warpgroup whose rows are all beyond the group's end only lets the others have their stages.
template <class Config>
__device__ void pass_tile(Pipeline<Config>& pipeline, int num_k_blocks) {
  for (int k = 0; k < num_k_blocks; ++k, pipeline.advance()) {
    pipeline.wait_full();
    pipeline.release();
  }
}

// Calls f(Index<kFirstColumns>) for where the warpgroup's columns, from n on, lie among the 128-blocks of
// rhs: a loop for each place, as choosing a scale for each column in one that fits all would take as long as
// the promotion itself.
template <class Config, class Function>
__device__ void with_first_columns(int n, Function&& f) {
  using T = Tile<Config>;
  constexpr int kStep = T::kPlaceStep, kMost = T::kMostFirstColumns;
  if constexpr (T::kOnePlace) {
    f(Index<kMost>{});
  } else {
    // Broadcast, so that the compiler takes all lanes to go the same way.
    const int first_columns = __shfl_sync(0xffffffff, min(kScaleBlock - n % kScaleBlock, kMost), 0);
    unrolled<kMost / kStep>([&](auto i) {
      constexpr int kFirstColumns = (i + 1) * kStep;
      if (first_columns == kFirstColumns) f(Index<kFirstColumns>{});
    });
  }
}

template <class Config>
__device__ void accumulate_tile(Accumulators<Config>& accumulators, Pipeline<Config>& pipeline,
                                const WorkTile& tile, int warpgroup) {
  using T = Tile<Config>;
  const int num_k_blocks = max(tile.k_end - tile.k_begin, 0);
  if constexpr (T::kEndsAnywhere && !T::kSwapAB && T::kSplitP && Config::kNumConsumers > 1)
    if (tile.m_start + T::warpgroup_p(warpgroup) >= tile.m_end) return pass_tile(pipeline, num_k_blocks);
  with_first_columns<Config>(tile.n_start + T::warpgroup_q(warpgroup), [&](auto first_columns) {
    Mainloop<Config, first_columns>(accumulators, pipeline, warpgroup, tile.n_start).run(num_k_blocks);
  });
}

}  // namespace fp8gemm
