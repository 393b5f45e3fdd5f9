"""What follows from a configuration: tiles, the warpgroups' parts of them, the shared memory of a CTA.

The host's half of `cuda/tile.cuh` and `cuda/smem.cuh`; the kernel asserts that both count the same shared
memory.
"""

from __future__ import annotations

import math
import statistics

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.problem import RAGGED_K, RAGGED_M, SCALE_BLOCK, GemmProblem, ceil_div, round_up

MMA_P = 64  # rows of a wgmma's M side
WARPS = 4  # of a warpgroup
PARTIAL_PADDING = 8  # floats after each row of split-K's partial tile, against bank conflicts
MAX_ROUND_STAGES = 8  # of which each has its own copy of the kernel's loop
GROUP_SPREADS = (0.7, 0.85, 1.0, 1.15, 1.3)  # sizes of groups, relative to what is expected
_QUEUE_BYTES = 4 * (32 + 2 * 8)  # of tiles, where group sizes are on the device: slots, two barriers each
_STAGE_ALIGNMENT = 1024  # the 128-byte swizzle repeats after as much


def tile_pq(config: GemmConfig) -> tuple[int, int]:
    """The tile along wgmma's M side (P) and its N side (Q)."""
    return (config.block_n, config.block_m) if config.swap_ab else (config.block_m, config.block_n)


def warpgroup_tile(config: GemmConfig) -> tuple[int, int]:
    """A consumer's part of the tile along P and Q: they share P where it has enough rows, Q otherwise."""
    p, q = tile_pq(config)
    if p // MMA_P % config.num_consumers == 0:
        return p // config.num_consumers, q
    return p, q // config.num_consumers


def num_tiles(problem: GemmProblem, config: GemmConfig) -> int:
    """Output tiles that the kernel computes, those that fill up a cluster included; at most so many, where
    they depend on group sizes."""
    tiles_n = round_up(ceil_div(problem.n, config.block_n), config.cluster_n)
    if problem.kind == RAGGED_M:  # each group, and the rest of the rows, may end in a tile of its own
        whole = problem.m // (config.block_m * config.cluster_m)
        return problem.batch * (whole + min(problem.groups + 1, problem.m)) * config.cluster_m * tiles_n
    tiles_m = round_up(ceil_div(problem.m, config.block_m), config.cluster_m)
    return problem.batch * problem.groups * tiles_m * tiles_n


def expected_tiles(problem: GemmProblem, config: GemmConfig) -> float:
    """The same for groups that have 0.7 to 1.3 times the rows that are expected."""
    if not problem.ends_anywhere:
        return num_tiles(problem, config)
    tile_m = config.block_m * config.cluster_m
    tiles_m = statistics.mean(math.ceil(max(spread * problem.rows, 1) / tile_m) for spread in GROUP_SPREADS)
    tiles_n = round_up(ceil_div(problem.n, config.block_n), config.cluster_n)
    return problem.batch * problem.groups * tiles_m * config.cluster_m * tiles_n


def in_rounds(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether the kernel has a copy of its loop for each stage: `kRounds` in cuda/consumer.cuh."""
    p, _ = warpgroup_tile(config)
    one_scale = problem.rhs_scale_rows != 1 and not config.swap_ab and num_places(problem, config) == 1
    rounds, rest = divmod(problem.num_k_blocks, config.num_stages)
    return (problem.kind != RAGGED_K and config.split_k == config.partials == 1 and p == MMA_P and one_scale
            and rounds > 1 and rest == 0 and config.num_stages <= MAX_ROUND_STAGES)


def num_places(problem: GemmProblem, config: GemmConfig) -> int:
    """At how many places the 128-blocks of rhs may begin among the columns of a warpgroup.

    For each, the kernel has a copy of its loop: `with_first_columns` in cuda/consumer.cuh.
    """
    if problem.rhs_scale_rows == 1 or config.swap_ab:
        return 1
    _, q = warpgroup_tile(config)
    return min(q, SCALE_BLOCK) // math.gcd(config.block_n, q, SCALE_BLOCK)


def out_chunk(problem: GemmProblem, config: GemmConfig) -> tuple[int, int]:
    """Rows of the output and bytes of each that one TMA store writes."""
    _, q = warpgroup_tile(config)
    if config.swap_ab:
        return q, 128
    return MMA_P // WARPS, math.gcd(q * problem.out_item_bytes, 128)


def shared_bytes(problem: GemmProblem, config: GemmConfig) -> int:
    """Shared memory of a CTA, in bytes: `SharedStorage` in cuda/smem.cuh."""
    stage = (config.block_m + config.block_n) * SCALE_BLOCK
    out = 1
    if config.split_k > 1:
        share = config.block_m // config.split_k * (config.block_n + PARTIAL_PADDING) * 4
        out = (config.split_k - 1) * share
    elif problem.out_is_tma_aligned:
        rows, row_bytes = out_chunk(problem, config)
        writers = config.num_consumers * (1 if config.swap_ab else WARPS)
        out = writers * config.out_buffers * rows * row_bytes
    rhs_scales = config.block_n if problem.rhs_scale_rows == 1 else 4
    scales = config.num_stages * 4 * (config.block_m + rhs_scales)
    barriers = (config.num_stages * 2 + 1) * 8
    total = round_up(config.num_stages * stage + out, 16) + scales + barriers
    if problem.is_grouped:
        total = round_up(total, 16) + _QUEUE_BYTES
    return round_up(total, _STAGE_ALIGNMENT)
