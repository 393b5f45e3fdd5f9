"""What makes a configuration legal: registers, shared memory, and what the kernel can divide.

P is the side of the tile on wgmma's 64 rows and Q the side on its steps of 8: M and N, or N and M with
`swap_ab`.
"""

from __future__ import annotations

import math

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import Device
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem, ceil_div
from jax_fp8gemm.jit.tile import (
    MMA_P,
    PARTIAL_PADDING,
    num_places,
    num_tiles,
    shared_bytes,
    tile_pq,
    warpgroup_tile,
)

MMA_Q = 8  # a wgmma's N side comes in steps of this
MAX_BLOCK = 256  # rows that one copy into shared memory moves, and columns of a wgmma
MULTICAST_ROWS = 16  # two CTAs load half a tile each, in whole groups of 8 rows

MAX_TILES = 2**31 - 2**12  # their indices are 31-bit, and go beyond the last by a grid

LEAST = {"num_stages": 2, "raster_group": 1, "out_buffers": 1, "partials": 1}

# Registers of a consumer thread that hold no accumulator (addresses, scales, loop state), and what setmaxnreg
# leaves a consumer thread for a given number of consumer warpgroups.
OTHER_REGISTERS = {1: 40, 2: 40, 3: 24}  # three leave the compiler less to hoist
MAX_LOOP_FMAS = 1536  # in longer code, ptxas loses track of what is uniform, and spills
LATE_SCALES_REGISTERS = 24  # instead, where scales are read as they are multiplied
MAX_REGISTERS = {1: 240, 2: 232, 3: 152}


def least_stages(config: GemmConfig) -> int:
    """Stages without which there is no pipeline, a consumer waits for one that it holds itself, or split-K's
    partial tile has no room."""
    num_products = warpgroup_tile(config)[0] // MMA_P
    in_flight = max(LEAST["num_stages"], ceil_div(config.partials, num_products))
    if config.split_k == 1:
        return in_flight
    partial = 4 * config.block_m * (config.block_n + PARTIAL_PADDING)
    return max(in_flight, ceil_div(partial, (config.block_m + config.block_n) * SCALE_BLOCK))


def consumer_registers(problem: GemmProblem, config: GemmConfig) -> int:
    """Registers of a consumer thread: the tile's sums, the tensor core's own of each product in flight, the
    rest.

    A thread also holds the scales of its columns where these are tokens, or four for each further block of
    rhs that the warpgroup touches. Where both sides have scales of single rows, it reads them as it goes.
    """
    p, q = warpgroup_tile(config)
    sums, others = (p // MMA_P + config.partials) * (q // 2), OTHER_REGISTERS[config.num_consumers]
    if problem.rhs_scale_rows == 1:
        return sums + min(others, LATE_SCALES_REGISTERS)
    scales = q // 4 if config.swap_ab else 4 * ceil_div(q - math.gcd(q, SCALE_BLOCK), SCALE_BLOCK)
    return sums + scales + others


def loop_fmas(problem: GemmProblem, config: GemmConfig) -> int:
    """FMAs of the promotion in all copies of the loop, one for each place among the 128-blocks of rhs; with
    several partials, a loop of single blocks comes before that of batches."""
    p, q = warpgroup_tile(config)
    products = config.partials + p // MMA_P if config.partials > 1 else p // MMA_P
    return num_places(problem, config) * products * (q // 2)


def rejection(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """Why `config` cannot run `problem` on `device`, or None if it can."""
    return (_tile_rejection(config) or _cluster_rejection(config) or _split_rejection(problem, config, device)
            or _resource_rejection(problem, config, device))


def _tile_rejection(config: GemmConfig) -> str | None:
    for name in ("block_m", "block_n"):
        if not 0 < getattr(config, name) <= MAX_BLOCK:
            return f"{name} {getattr(config, name)} is not in 1..{MAX_BLOCK}"
    if config.num_consumers not in MAX_REGISTERS:
        return f"num_consumers {config.num_consumers} is not in {tuple(MAX_REGISTERS)}"
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            return f"{name} {getattr(config, name)} is below {least}"
    p_name, q_name = ("block_n", "block_m") if config.swap_ab else ("block_m", "block_n")
    p, q = tile_pq(config)
    if p % MMA_P:
        return f"{p_name} {p} is no multiple of wgmma's {MMA_P} rows"
    splits_q = p // MMA_P % config.num_consumers != 0
    parts = config.num_consumers if splits_q else 1
    if q % (MMA_Q * parts):
        return f"{q_name} {q} is no multiple of {parts} consumers x {MMA_Q}" if splits_q else (
            f"{q_name} {q} is no multiple of {MMA_Q}")
    return _order_rejection(config)


def _order_rejection(config: GemmConfig) -> str | None:
    num_products = warpgroup_tile(config)[0] // MMA_P
    if config.partials > 1 and config.partials % num_products:
        return (f"partials {config.partials} is no multiple of a consumer's {num_products} products for a "
                "block of K")
    blocks = config.partials // num_products
    if config.num_stages < blocks:
        return f"partials {config.partials} hold {blocks} stages, of {config.num_stages}"
    return None


def _cluster_rejection(config: GemmConfig) -> str | None:
    if (config.cluster_m, config.cluster_n) not in ((1, 1), (2, 1), (1, 2)):
        return f"cluster {config.cluster_m}x{config.cluster_n} is none of 1x1, 2x1, 1x2"
    if config.cluster_m == 2 and config.block_n % MULTICAST_ROWS:
        return f"cluster_m 2 needs block_n in steps of {MULTICAST_ROWS}"
    if config.cluster_n == 2 and config.block_m % MULTICAST_ROWS:
        return f"cluster_n 2 needs block_m in steps of {MULTICAST_ROWS}"
    return None


def _split_rejection(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    if config.split_k == 1:
        return None
    if problem.is_grouped:
        return f"split-K is for dense problems, not for {problem.kind}"
    if config.split_k not in (2, 4, 8):
        return f"split_k {config.split_k} is none of 1, 2, 4, 8"
    if problem.batch_invariant:
        return "batch_invariant forbids split-K"
    if config.split_k > problem.num_k_blocks:
        return f"split_k {config.split_k} is more than the {problem.num_k_blocks} blocks of K"
    if config.cluster_m * config.cluster_n > 1:
        return "split-K and multicast both need the cluster"
    if config.num_stages < least_stages(config):
        return (f"the partial tile does not fit into {config.num_stages} stages: it takes "
                f"{least_stages(config)}")
    ctas = num_tiles(problem, config) * config.split_k
    if device.is_limited and ctas > device.num_sms:
        return f"split-K takes {ctas} CTAs at once, more than the limit of {device.num_sms} SMs"
    return None


def _resource_rejection(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    if config.cluster_size > device.num_sms:
        return f"a cluster of {config.cluster_size} is more than {device.num_sms} SMs"
    registers, limit = consumer_registers(problem, config), MAX_REGISTERS[config.num_consumers]
    if registers > limit:
        return f"about {registers} registers a thread, above {limit}"
    fmas = loop_fmas(problem, config)
    if fmas > MAX_LOOP_FMAS:
        return f"{fmas} FMAs in loops for {num_places(problem, config)} places of rhs, above {MAX_LOOP_FMAS}"
    size = shared_bytes(problem, config)
    if size > device.shared_bytes:
        return f"{size} bytes of shared memory, above {device.shared_bytes}"
    tiles = num_tiles(problem, config)
    if tiles > MAX_TILES:
        return f"up to {tiles} tiles, above {MAX_TILES}"
    return None
