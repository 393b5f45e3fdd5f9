// CUTLASS's own FP8 GEMM with block scales for Hopper, one tile configuration per build, behind a C interface.
//
// Built by cutlass.py with -DTILE_M, -DTILE_N, -DCLUSTER_M, -DCLUSTER_N and -DPINGPONG (0 or 1).
#include <memory>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/blockwise_scale_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

using namespace cute;

using Fp8 = cutlass::float_e4m3_t;
using Bf16 = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

using TileShape = Shape<Int<TILE_M>, Int<TILE_N>, _128>;
using ClusterShape = Shape<Int<CLUSTER_M>, Int<CLUSTER_N>, _1>;

// Scales of lhs: one per row and 128 of K, M fastest. Scales of rhs: one per 128 x 128, K fastest.
using ScaleConfig =
    cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128, cute::GMMA::Major::MN, cute::GMMA::Major::K>;
using LayoutSFA = decltype(ScaleConfig::deduce_layoutSFA());
using LayoutSFB = decltype(ScaleConfig::deduce_layoutSFB());

#if PINGPONG
using KernelSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8Blockwise;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
#else
using KernelSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8Blockwise;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#endif

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Bf16, RowMajor, 8,
    EpilogueSchedule>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, cute::tuple<RowMajor, LayoutSFA>, 16, Fp8,
    cute::tuple<ColumnMajor, LayoutSFB>, 16, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    KernelSchedule>::CollectiveOp;

using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>>;

struct Handle {
  Gemm gemm;
  void* workspace = nullptr;
  ~Handle() { cudaFree(workspace); }
};

// Prepares out[M, N] = lhs[M, K] @ rhs[N, K].T on device addresses; returns CUTLASS's status, 0 for success.
extern "C" int cutlass_gemm_create(int m, int n, int k, const void* lhs, const float* lhs_scale, const void* rhs,
                                   const float* rhs_scale, void* out, Handle** handle) {
  auto shape = make_shape(m, n, k, 1);
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {static_cast<const Fp8*>(lhs),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideA{}, make_shape(m, k, 1)),
       static_cast<const Fp8*>(rhs),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideB{}, make_shape(n, k, 1)),
       lhs_scale, ScaleConfig::tile_atom_to_shape_SFA(shape), rhs_scale, ScaleConfig::tile_atom_to_shape_SFB(shape)},
      {{},
       nullptr,
       {},
       static_cast<Bf16*>(out),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideD{}, make_shape(m, n, 1))}};
  auto result = std::make_unique<Handle>();
  if (auto status = result->gemm.can_implement(arguments); status != cutlass::Status::kSuccess)
    return static_cast<int>(status);
  if (size_t size = Gemm::get_workspace_size(arguments); size && cudaMalloc(&result->workspace, size) != cudaSuccess)
    return static_cast<int>(cutlass::Status::kErrorMemoryAllocation);
  auto status = result->gemm.initialize(arguments, result->workspace);
  if (status == cutlass::Status::kSuccess) *handle = result.release();
  return static_cast<int>(status);
}

// Launches on a stream; returns CUTLASS's status.
extern "C" int cutlass_gemm_run(Handle* handle, cudaStream_t stream) {
  return static_cast<int>(handle->gemm.run(stream));
}

extern "C" void cutlass_gemm_destroy(Handle* handle) { delete handle; }

extern "C" const char* cutlass_gemm_status(int status) {
  return cutlassGetStatusString(static_cast<cutlass::Status>(status));
}
