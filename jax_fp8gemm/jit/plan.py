"""Problem, configuration and cubin to a launch plan: tensor maps, grid, the order of the arguments."""

from __future__ import annotations

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar, TensorMap
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem
from jax_fp8gemm.jit.source import ENTRY
from jax_fp8gemm.jit.tile import num_tiles, out_chunk, shared_bytes

# Buffers of the custom call: its operands, then its result. An accumulator comes between and is the result's
# own memory.
LHS, LHS_SCALE, RHS, RHS_SCALE, OUT = range(5)

WARPGROUP = 128  # threads


def plan_gemm(problem: GemmProblem, config: GemmConfig, cubin: bytes, num_sms: int) -> LaunchPlan:
    """How to launch `cubin`, compiled from `gemm_source(problem, config)`, on at most `num_sms` SMs."""
    out = OUT + problem.accumulate
    lhs_batch = problem.batch if problem.lhs_batched else 1
    rhs_batch = problem.batch if problem.rhs_batched else 1
    lhs_map = _operand_map(LHS, lhs_batch, problem.m, problem.k, config.block_m // config.cluster_n)
    rhs_map = _operand_map(RHS, rhs_batch, problem.n, problem.k, config.block_n // config.cluster_m)
    # Without TMA stores the kernel never reads the output's map, but its parameter has to be a valid one.
    out_map = _out_map(problem, config, out) if problem.out_is_tma_aligned else lhs_map
    return LaunchPlan(
        cubin=cubin,
        entry=ENTRY,
        grid=(_num_ctas(problem, config, num_sms), 1, 1),
        cluster=(config.cluster_size, 1, 1),
        block=(1 + config.num_consumers) * WARPGROUP,
        shared_bytes=shared_bytes(problem, config),
        arguments=(lhs_map, rhs_map, out_map, Pointer(LHS_SCALE), Pointer(RHS_SCALE), Pointer(out),
                   Scalar(problem.m), Scalar(problem.batch)),
    )


def _operand_map(buffer: int, batch: int, rows: int, k: int, box_rows: int) -> TensorMap:
    return TensorMap(buffer, "u8", shape=(k, rows, batch), strides=(k, rows * k),
                     box=(SCALE_BLOCK, box_rows, 1), swizzle=128)


def _out_map(problem: GemmProblem, config: GemmConfig, buffer: int) -> TensorMap:
    m, n, item = problem.m, problem.n, problem.out_item_bytes
    rows, row_bytes = out_chunk(problem, config)
    return TensorMap(buffer, problem.out_dtype, shape=(n, m, problem.batch), strides=(n * item, m * n * item),
                     box=(row_bytes // item, rows, 1), swizzle=row_bytes if row_bytes > 16 else 0)


def _num_ctas(problem: GemmProblem, config: GemmConfig, num_sms: int) -> int:
    """CTAs of the grid, in whole clusters.

    Kernels are persistent, but for split-K's, whose ring becomes the partial sums: there a cluster has one
    tile.
    """
    clusters = num_tiles(problem, config) * config.split_k // config.cluster_size
    if config.split_k == 1:
        clusters = min(clusters, max(num_sms // config.cluster_size, 1))
    return clusters * config.cluster_size
