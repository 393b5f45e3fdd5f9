"""Problem, configuration and cubin to a launch plan: tensor maps, grid, the order of the arguments."""

from __future__ import annotations

import math

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar, TensorMap
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem
from jax_fp8gemm.jit.source import ENTRY
from jax_fp8gemm.jit.tile import num_tiles, out_chunk, shared_bytes

# Buffers of the custom call: its operands, then its result. Group sizes and an accumulator, whose memory is
# the result's own, come between where there are any.
LHS, LHS_SCALE, RHS, RHS_SCALE, GROUP_SIZES = range(5)

WARPGROUP = 128  # threads


def plan_gemm(problem: GemmProblem, config: GemmConfig, cubin: bytes, num_sms: int) -> LaunchPlan:
    """How to launch `cubin`, compiled from `gemm_source(problem, config)`, on at most `num_sms` SMs."""
    out = RHS_SCALE + 1 + problem.is_grouped + problem.accumulate
    lhs_map = _operand_map(LHS, problem.lhs_shape, config.block_m // config.cluster_n, problem.ends_anywhere)
    rhs_map = _operand_map(RHS, problem.rhs_shape, config.block_n // config.cluster_m, False)
    # Without TMA stores the kernel never reads the output's map, but its parameter has to be a valid one.
    out_map = _out_map(problem, config, out) if problem.out_is_tma_aligned else lhs_map
    groups = (Pointer(GROUP_SIZES), Scalar(problem.groups)) if problem.is_grouped else ()
    return LaunchPlan(
        cubin=cubin,
        entry=ENTRY,
        grid=(_num_ctas(problem, config, num_sms), 1, 1),
        cluster=(config.cluster_size, 1, 1),
        block=(1 + config.num_consumers) * WARPGROUP,
        shared_bytes=shared_bytes(problem, config),
        arguments=(lhs_map, rhs_map, out_map, Pointer(LHS_SCALE), Pointer(RHS_SCALE), Pointer(out),
                   Scalar(problem.m), Scalar(problem.batch), *groups),
    )


def _operand_map(buffer: int, shape: tuple[int, ...], box_rows: int, ends_anywhere: bool) -> TensorMap:
    return _row_map(buffer, "u8", shape, 1, (SCALE_BLOCK, box_rows), 128, ends_anywhere)


def _out_map(problem: GemmProblem, config: GemmConfig, buffer: int) -> TensorMap:
    item = problem.out_item_bytes
    rows, row_bytes = out_chunk(problem, config)
    return _row_map(buffer, problem.out_dtype, problem.out_shape, item, (row_bytes // item, rows),
                    row_bytes if row_bytes > 16 else 0, problem.ends_anywhere)


def _row_map(buffer: int, dtype: str, shape: tuple[int, ...], item: int, box: tuple[int, int], swizzle: int,
             ends_anywhere: bool) -> TensorMap:
    """The map of an array [*, rows, columns] for boxes of (columns, rows).

    Its dimensions are columns, rows, and all that is leading. For boxes that have to end at any row they are
    columns, a window of as many rows as a box has, and the row in all of the array that a box's own rows end
    in front of: both step by a row, and the copy engine clips what reaches beyond the window
    (`row_coordinates` in cuda/scheduler.cuh).
    """
    *leading, rows, columns = shape
    pitch, count = columns * item, math.prod(leading)
    if ends_anywhere:
        return TensorMap(buffer, dtype, shape=(columns, box[1], count * rows + 1),
                         strides=(pitch, pitch), box=(*box, 1), swizzle=swizzle, lead=box[1] * pitch)
    return TensorMap(buffer, dtype, shape=(columns, rows, count), strides=(pitch, rows * pitch),
                     box=(*box, 1), swizzle=swizzle)


def _num_ctas(problem: GemmProblem, config: GemmConfig, num_sms: int) -> int:
    """CTAs of the grid, in whole clusters.

    Kernels are persistent, but for split-K's, whose ring becomes the partial sums: there a cluster has one
    tile.
    """
    clusters = num_tiles(problem, config) * config.split_k // config.cluster_size
    if config.split_k == 1:
        clusters = min(clusters, max(num_sms // config.cluster_size, 1))
    return clusters * config.cluster_size
