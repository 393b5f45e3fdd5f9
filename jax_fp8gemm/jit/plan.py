"""Problem, configuration and cubin to a launch plan: the tensor maps, the grid, the order of the arguments."""

from __future__ import annotations

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar, TensorMap
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem, ceil_div
from jax_fp8gemm.jit.source import ENTRY
from jax_fp8gemm.jit.tile import out_chunk, shared_bytes

# Buffers of the custom call: its operands, then its result. An accumulator comes between and is the result's own.
LHS, LHS_SCALE, RHS, RHS_SCALE, OUT = range(5)

WARPGROUP = 128  # threads


def num_clusters(problem: GemmProblem, config: GemmConfig) -> int:
    """Clusters that would give each its own output tiles: the work there is to spread over the multiprocessors."""
    tiles_m = ceil_div(problem.m, config.block_m * config.cluster_m)
    tiles_n = ceil_div(problem.n, config.block_n * config.cluster_n)
    return problem.batch * tiles_m * tiles_n


def plan_gemm(problem: GemmProblem, config: GemmConfig, cubin: bytes, num_sms: int) -> LaunchPlan:
    """How to launch `cubin`, compiled from `gemm_source(problem, config)`, on at most `num_sms` multiprocessors."""
    m, n, k = problem.m, problem.n, problem.k
    out = OUT + problem.accumulate
    operand = lambda buffer, rows, batched, box_rows: TensorMap(
        buffer, "u8", shape=(k, rows, problem.batch if batched else 1), strides=(k, rows * k),
        box=(SCALE_BLOCK, box_rows, 1), swizzle=128)
    chunk_rows, chunk_bytes = out_chunk(problem, config)
    item = problem.out_item_bytes
    # Without TMA stores the kernel never reads this map, but its parameter has to be a valid one.
    out_map = TensorMap(
        out, problem.out_dtype, shape=(n, m, problem.batch), strides=(n * item, m * n * item),
        box=(chunk_bytes // item, chunk_rows, 1), swizzle=chunk_bytes if chunk_bytes > 16 else 0,
    ) if problem.out_is_tma_aligned else operand(LHS, m, problem.lhs_batched, 1)
    size = config.cluster_m * config.cluster_n * config.split_k
    # Split-K's ring becomes the partial sums, so a cluster has one tile; all other kernels are persistent.
    clusters = num_clusters(problem, config)
    if config.split_k == 1:
        clusters = min(clusters, max(num_sms // size, 1))
    return LaunchPlan(
        cubin=cubin,
        entry=ENTRY,
        grid=(clusters * size, 1, 1),
        cluster=(size, 1, 1),
        block=(1 + config.num_consumers) * WARPGROUP,
        shared_bytes=shared_bytes(problem, config),
        arguments=(
            operand(LHS, m, problem.lhs_batched, config.block_m // config.cluster_n),
            operand(RHS, n, problem.rhs_batched, config.block_n // config.cluster_m),
            out_map,
            Pointer(LHS_SCALE),
            Pointer(RHS_SCALE),
            Pointer(out),
            Scalar(m),
            Scalar(problem.batch),
        ),
    )
