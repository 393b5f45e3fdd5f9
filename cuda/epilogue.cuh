// Accumulators to global memory, three ways:
//   store_tile_tma      through shared memory and the copy engine, while the next tile is being computed
//   store_tile_direct   from registers, where the output's rows are no whole 16 bytes
//   store_tile_split_k  summed over the CTAs of a cluster, which hold parts of K
#pragma once

#include "consumer.cuh"
#include "ptx/copy.cuh"

namespace fp8gemm {

// Byte offset of (row, byte) in a chunk as the copy engine lays it out: 16-byte units permuted within 128, 64
// or 32.
template <int kRowBytes>
__device__ __forceinline__ u32 swizzled(u32 row, u32 byte) {
  constexpr u32 kMask = kRowBytes / 16 - 1;
  const u32 offset = row * kRowBytes + byte;
  return offset ^ (offset >> 7 & kMask) << 4;
}

// Writes the c-th chunk of a 64-row product: a warp its own 16 rows, or with swap_ab a warpgroup all of it,
// tokens as rows.
template <class Config, bool kSwapAB = Config::kSwapAB, int kOutBytes = Config::kOutBytes>
struct ChunkWriter;

template <class Config>
struct ChunkWriter<Config, false, 2> {
  using T = Tile<Config>;
  __device__ static void write(u32 chunk, const float (&fragment)[T::kFragment], int c, u32 lane) {
    constexpr int kGroups = T::kChunkColumns / 8;  // of eight columns: an 8x8 matrix in each half of the rows
    const u32 row = lane % 16, group = lane / 16;
#pragma unroll
    for (int g = 0; g < kGroups; g += 2) {
      const float* f = &fragment[(c * kGroups + g) * 4];
      const u32 address = chunk + swizzled<T::kChunkRowBytes>(row, (g + (kGroups > 1 ? group : 0)) * 16);
      const u32 top = ptx::pack_bf16(f[0], f[1]), bottom = ptx::pack_bf16(f[2], f[3]);
      if constexpr (kGroups == 1)
        ptx::store_matrix_x2<false>(address, top, bottom);
      else
        ptx::store_matrix_x4<false>(address, top, bottom, ptx::pack_bf16(f[4], f[5]),
                                    ptx::pack_bf16(f[6], f[7]));
    }
  }
};

template <class Config>
struct ChunkWriter<Config, false, 4> {
  using T = Tile<Config>;
  __device__ static void write(u32 chunk, const float (&fragment)[T::kFragment], int c, u32 lane) {
    constexpr int kGroups = T::kChunkColumns / 8;
    const u32 row = lane / 4, byte = lane % 4 * 8;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float* f = &fragment[(c * kGroups + g) * 4];
      ptx::store_shared(chunk + swizzled<T::kChunkRowBytes>(row, g * 32 + byte), f[0], f[1]);
      ptx::store_shared(chunk + swizzled<T::kChunkRowBytes>(row + 8, g * 32 + byte), f[2], f[3]);
    }
  }
};

template <class Config>
struct ChunkWriter<Config, true, 2> {
  using T = Tile<Config>;
  __device__ static void write(u32 chunk, const float (&fragment)[T::kFragment], int, u32 lane) {
    constexpr int kGroups = T::kWarpgroupQ / 8;  // of eight tokens
    const u32 warp = warp_index() % 4;
    const u32 token = lane / 16 * 8 + lane % 8, byte = warp * 32 + lane / 8 % 2 * 16;
#pragma unroll
    for (int g = 0; g + 1 < kGroups; g += 2) {
      const float* f = &fragment[g * 4];
      ptx::store_matrix_x4<true>(chunk + swizzled<128>(g * 8 + token, byte), ptx::pack_bf16(f[0], f[1]),
                                 ptx::pack_bf16(f[2], f[3]), ptx::pack_bf16(f[4], f[5]),
                                 ptx::pack_bf16(f[6], f[7]));
    }
    if constexpr (kGroups % 2) {
      const float* f = &fragment[(kGroups - 1) * 4];
      ptx::store_matrix_x2<true>(chunk + swizzled<128>((kGroups - 1) * 8 + lane % 8, byte),
                                 ptx::pack_bf16(f[0], f[1]), ptx::pack_bf16(f[2], f[3]));
    }
  }
};

template <class Config>
struct ChunkWriter<Config, true, 4> {
  using T = Tile<Config>;
  __device__ static void write(u32 chunk, const float (&fragment)[T::kFragment], int c, u32 lane) {
    const u32 warp = warp_index() % 4;
    const u32 byte = (warp % 2 * 16 + lane / 4) * 4, token = lane % 4 * 2;
    if (warp / 2 != c) return;  // a chunk holds 32 of the 64 columns: two warps' worth
#pragma unroll
    for (int j = 0; j < T::kWarpgroupQ / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        ptx::store_shared(chunk + swizzled<128>(j * 8 + token + e % 2, byte + e / 2 * 32),
                          fragment[4 * j + e]);
  }
};

// Those who write a chunk together: a warp, or with swap_ab a warpgroup.
template <class Config>
struct Writers {
  static constexpr bool kWarpgroups = Config::kSwapAB;

  __device__ static int index() { return kWarpgroups ? warp_index() / 4 : warp_index(); }
  __device__ static bool is_leader() { return threadIdx.x % (kWarpgroups ? kWarpgroup : 32) == 0; }
  __device__ static void sync() {
    if constexpr (kWarpgroups)
      ptx::named_barrier(1 + index(), kWarpgroup);
    else
      __syncwarp();
  }
};

// The writers' buffers, taken in turn from tile to tile. When a tile's chunks are no multiple of the buffers,
// a tile that began with the first one again would overwrite what the copy engine still reads.
template <class Config>
struct OutRing {
  u8* buffers;
  u32 next = 0;

  __device__ explicit OutRing(SharedStorage<Config>& shared)
      : buffers(shared.out + Writers<Config>::index() * Config::kOutBuffers * Tile<Config>::kChunkBytes) {}

  __device__ u8* take() {
    u8* buffer = buffers + next * Tile<Config>::kChunkBytes;
    if (++next == Config::kOutBuffers) next = 0;
    return buffer;
  }
};

template <class Config>
__device__ void store_tile_tma(const Accumulators<Config>& accumulators, OutRing<Config>& ring,
                               const WorkTile& tile, const TensorMap& map, const Arguments& arguments,
                               int warpgroup) {
  using T = Tile<Config>;
  using W = Writers<Config>;
  const u32 lane = lane_index_here();
  const int p = T::warpgroup_p(warpgroup) + (T::kSwapAB ? 0 : warp_index() % 4 * 16),
            q = T::warpgroup_q(warpgroup);
  const int first_row = tile.m_start + (T::kSwapAB ? q : p),
            first_column = tile.n_start + (T::kSwapAB ? p : q);
  unrolled<T::kNumMmaP * T::kChunksPerMma>([&](auto index) {
    constexpr int i = index / T::kChunksPerMma, c = index % T::kChunksPerMma;
    const int row = first_row + (T::kSwapAB ? 0 : i * kMmaP);
    const int column = first_column + (T::kSwapAB ? i * kMmaP : 0) + c * T::kChunkColumns;
    // Nothing of this chunk exists: a box that is wholly outside would touch where the map begins.
    if (T::kEndsAnywhere && (row >= tile.m_end || column >= Config::kN)) return;
    u8* chunk = ring.take();
    // The store that last used this buffer has read it.
    if (W::is_leader()) ptx::tma_store_wait_read<Config::kOutBuffers - 1>();
    W::sync();
    ChunkWriter<Config>::write(shared_address(chunk), accumulators[i], c, lane);
    ptx::fence_proxy_async();
    W::sync();
    if (W::is_leader()) {
      const RowCoordinates rows =
          row_coordinates<Config, T::kChunkRows>(tile, tile.out_batch, row, arguments.m);
      if constexpr (Config::kAccumulate)
        ptx::tma_reduce_add(&map, chunk, column, rows.y, rows.z);
      else
        ptx::tma_store(&map, chunk, column, rows.y, rows.z);
      ptx::tma_store_commit();
    }
  });
}

// Output elements are f32, or bf16 handled as its bits.
template <class Config>
__device__ void store_element(void* out, i64 index, float value) {
  if constexpr (Config::kOutBytes == 4) {
    float* element = static_cast<float*>(out) + index;
    *element = Config::kAccumulate ? __fadd_rn(*element, value) : value;
  } else {
    static_cast<u16*>(out)[index] = static_cast<u16>(ptx::pack_bf16(value, 0));
  }
}

template <class Config>
__device__ void store_tile_direct(const Accumulators<Config>& accumulators, const WorkTile& tile,
                                  const Arguments& arguments, int warpgroup) {
  using T = Tile<Config>;
  const ThreadPlace<Config> at(warpgroup);
  const i64 first = static_cast<i64>(tile.out_batch) * arguments.m;
#pragma unroll
  for (int i = 0; i < T::kNumMmaP; ++i)
#pragma unroll
    for (int e = 0; e < T::kFragment; ++e) {
      const int p = at.p + i * kMmaP + e / 2 % 2 * 8, q = at.q + e / 4 * 8 + e % 2;
      const int row = tile.m_start + (T::kSwapAB ? q : p), column = tile.n_start + (T::kSwapAB ? p : q);
      if (row < tile.m_end && column < Config::kN)
        store_element<Config>(arguments.out, (first + row) * Config::kN + column, accumulators[i][e]);
    }
}

template <class Config>
__device__ void write_partial(const Accumulators<Config>& accumulators, SharedStorage<Config>& shared,
                              int warpgroup) {
  using T = Tile<Config>;
  constexpr int kPitch = SharedStorage<Config>::kPartialPitch;
  const ThreadPlace<Config> at(warpgroup);
#pragma unroll
  for (int i = 0; i < T::kNumMmaP; ++i)
#pragma unroll
    for (int e = 0; e < T::kFragment; e += 2) {
      const int p = at.p + i * kMmaP + e / 2 % 2 * 8, q = at.q + e / 4 * 8;
      const float a = accumulators[i][e], b = accumulators[i][e + 1];
      if constexpr (T::kSwapAB) {
        shared.partial()[q * kPitch + p] = a;
        shared.partial()[(q + 1) * kPitch + p] = b;
      } else {
        ptx::store_shared(shared_address(&shared.partial()[p * kPitch + q]), a, b);
      }
    }
}

// Four neighbouring columns, of which `columns` exist.
template <class Config>
__device__ void store_four(void* out, i64 index, int columns, float4 v) {
  constexpr bool kWhole = Config::kN % 4 == 0 && !Config::kAccumulate;
  if constexpr (kWhole && Config::kOutBytes == 4) {
    *reinterpret_cast<float4*>(static_cast<float*>(out) + index) = v;
  } else if constexpr (kWhole) {
    *reinterpret_cast<uint2*>(static_cast<u16*>(out) + index) =
        make_uint2(ptx::pack_bf16(v.x, v.y), ptx::pack_bf16(v.z, v.w));
  } else {
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < columns) store_element<Config>(out, index + i, values[i]);
  }
}

// Each CTA of the cluster sums its share of the tile's rows over all of them, in the order of their parts of
// K. The others' shares of its own partial tile it sends to them; their barriers count what has come.
template <class Config>
__device__ void store_tile_split_k(const Accumulators<Config>& accumulators, SharedStorage<Config>& shared,
                                   const WorkTile& tile, int rank, const Arguments& arguments,
                                   int warpgroup) {
  using T = Tile<Config>;
  using Shared = SharedStorage<Config>;
  constexpr int kFours = Config::kBlockN / 4, kRows = Config::kBlockM / Config::kSplitK;
  ptx::named_barrier(1, T::kNumConsumerThreads);  // the other warpgroups still read the operands
  write_partial<Config>(accumulators, shared, warpgroup);
  ptx::fence_proxy_async();
  ptx::named_barrier(1, T::kNumConsumerThreads);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_bytes(&shared.received, Shared::kReceived);
    for (int cta = 0; cta < Config::kSplitK; ++cta)
      if (cta != rank)
        ptx::copy_to_cta(shared.received_from(rank - (rank > cta)),
                         shared.partial() + cta * Shared::kSharePitch, Shared::kSharePitch * 4,
                         &shared.received, cta);
  }
  ptx::mbarrier_wait(&shared.received, 0);
  const float* own = shared.partial() + rank * Shared::kSharePitch;
  const i64 first = static_cast<i64>(tile.out_batch) * arguments.m;
  for (int index = threadIdx.x; index < kRows * kFours; index += T::kNumConsumerThreads) {
    const int share_row = index / kFours, tile_column = index % kFours * 4;
    const int row = tile.m_start + rank * kRows + share_row, column = tile.n_start + tile_column;
    if (row >= tile.m_end || column >= Config::kN) continue;
    const int place = share_row * Shared::kPartialPitch + tile_column;
    float4 sum = *reinterpret_cast<const float4*>(&(rank == 0 ? own : shared.received_from(0))[place]);
#pragma unroll
    for (int part = 1; part < Config::kSplitK; ++part) {
      const float* source = part == rank ? own : shared.received_from(part - (part > rank));
      const float4 term = *reinterpret_cast<const float4*>(&source[place]);
      sum.x = __fadd_rn(sum.x, term.x), sum.y = __fadd_rn(sum.y, term.y);
      sum.z = __fadd_rn(sum.z, term.z), sum.w = __fadd_rn(sum.w, term.w);
    }
    store_four<Config>(arguments.out, (first + row) * Config::kN + column, Config::kN - column, sum);
  }
}

}  // namespace fp8gemm
