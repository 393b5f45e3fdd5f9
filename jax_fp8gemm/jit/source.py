"""The translation unit of a kernel: its configuration as named constants, its one wgmma, its entry point."""

from __future__ import annotations

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.problem import DENSE, MASKED, RAGGED_K, RAGGED_M, GemmProblem
from jax_fp8gemm.jit.tile import shared_bytes, warpgroup_tile

ENTRY = "fp8_gemm"

_KINDS = {DENSE: "kDense", RAGGED_M: "kRaggedM", MASKED: "kMasked", RAGGED_K: "kRaggedK"}

_DENSE_ENTRY = (
    "    void* out, unsigned m, unsigned num_batches) {",
    "  const fp8gemm::Arguments arguments{lhs_scale, rhs_scale, out, m, num_batches};",
)
_GROUPED_ENTRY = (
    "    void* out, unsigned m, unsigned num_batches, const int* group_sizes, unsigned num_groups) {",
    "  const fp8gemm::Arguments arguments{lhs_scale, rhs_scale, out, m, num_batches, group_sizes,",
    "                                     num_groups};",
)


def constant(name: str, value: bool | int) -> str:
    """A line of `struct Config`."""
    if isinstance(value, bool):
        return f"  static constexpr bool k{name} = {str(value).lower()};"
    return f"  static constexpr int k{name} = {value};"


def _wgmma(columns: int, p_dtype: str, q_dtype: str) -> str:
    """The wrapper of wgmma m64n`columns`k32; without `accumulate` the registers' old values do not count."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""\
  __device__ static void wgmma(float (&d)[{count}], unsigned long long p, unsigned long long q,
                               int accumulate) {{
    asm volatile(
        "{{ .reg .pred a; setp.ne.b32 a, %{count + 2}, 0;"
        " wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.{p_dtype}.{q_dtype}"
        " {{{registers}}}, %{count}, %{count + 1}, a, 1, 1; }}"
        : {operands}
        : "l"(p), "l"(q), "r"(accumulate));
  }}"""


def gemm_source(problem: GemmProblem, config: GemmConfig) -> str:
    """CUDA C++ of the kernel for `problem` under `config`; M, batch and groups stay its arguments."""
    constants = {
        "N": problem.n,
        "K": problem.k,
        "BlockM": config.block_m,
        "BlockN": config.block_n,
        "NumStages": config.num_stages,
        "NumConsumers": config.num_consumers,
        "SwapAB": config.swap_ab,
        "ClusterM": config.cluster_m,
        "ClusterN": config.cluster_n,
        "SplitK": config.split_k,
        "RasterGroup": config.raster_group,
        "OutBuffers": config.out_buffers,
        "Partials": config.partials,
        "OutBytes": problem.out_item_bytes,
        "TmaStore": problem.out_is_tma_aligned,
        "Accumulate": problem.accumulate,
        "RhsScaleRows": problem.rhs_scale_rows,
        "LhsBatched": problem.lhs_batched,
        "RhsBatched": problem.rhs_batched,
        "SharedBytes": shared_bytes(problem, config),
    }
    dtypes = problem.lhs_dtype, problem.rhs_dtype
    p_dtype, q_dtype = reversed(dtypes) if config.swap_ab else dtypes
    _, q = warpgroup_tile(config)
    lines = [constant(name, value) for name, value in constants.items()]
    return "\n".join([
        '#include "gemm.cuh"',
        "",
        "struct Config {",
        f"  static constexpr auto kKind = fp8gemm::Kind::{_KINDS[problem.kind]};",
        *lines,
        _wgmma(q, p_dtype, q_dtype),
        "};",
        "",
        "using fp8gemm::TensorMap;",
        "",
        f'extern "C" __global__ void __launch_bounds__(fp8gemm::Tile<Config>::kNumThreads, 1) {ENTRY}(',
        "    const __grid_constant__ TensorMap lhs_map, const __grid_constant__ TensorMap rhs_map,",
        "    const __grid_constant__ TensorMap out_map, const float* lhs_scale, const float* rhs_scale,",
        *(_GROUPED_ENTRY if problem.is_grouped else _DENSE_ENTRY),
        "  fp8gemm::gemm<Config>(lhs_map, rhs_map, out_map, arguments);",
        "}",
        "",
    ])
