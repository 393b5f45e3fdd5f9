"""Which configuration a problem gets: candidates -> legal -> cost -> best, or a measured winner."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

from jax_fp8gemm.jit import tuned
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.cost import Cost, cost
from jax_fp8gemm.jit.device import Device
from jax_fp8gemm.jit.legal import MAX_REGISTERS, consumer_registers, least_stages, rejection
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem, ceil_div
from jax_fp8gemm.jit.tile import MMA_P, expected_tiles, in_rounds, num_tiles, shared_bytes, warpgroup_tile

MAX_STAGES = 14
P_BLOCKS = {64: (1, 2), 128: (2,), 192: (3,), 256: (2,)}  # rows of P: numbers of consumers that suit them
Q_BLOCKS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
MAX_SWAPPED_TOKENS = 128  # beyond, the tokens fill wgmma's 64 rows well enough
SPREADS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 4), (1, 1, 8))  # cluster_m, cluster_n, split_k
RASTER_GROUPS = (4, 8, 16, 32)
PARTIALS = {1: (1, 2, 4), 2: (1, 2), 3: (1,)}  # by consumers: more of them hide each other's promotion
FEW_STAGES = 3  # where a further stage is worth more than output buffers, unless K is short
SHORT_K = 12  # blocks
MAX_SPREAD = 2  # of a group's rows, relative to what is expected, for which a tile is worth a look
MAX_SPLIT_WAVES = 2  # beyond, whole tiles keep the SMs busy
NUM_REFINED = 16  # candidates whose variants are looked into


def candidates(problem: GemmProblem, device: Device) -> Iterator[GemmConfig]:
    """The configurations worth a look, legal or not; `ranked` varies raster group and partials."""
    rows = min(problem.m, MAX_SPREAD * problem.rows) if problem.ends_anywhere else problem.m
    for swap_ab in (False, True):
        p_size, q_size = (problem.n, rows) if swap_ab else (rows, problem.n)
        if swap_ab and problem.rows > MAX_SWAPPED_TOKENS:
            continue
        for p, q in itertools.product(_covering(P_BLOCKS, p_size), _covering(Q_BLOCKS, q_size)):
            block_m, block_n = (q, p) if swap_ab else (p, q)
            whole_tiles = expected_tiles(problem, GemmConfig(block_m, block_n, 2))
            for num_consumers, (cluster_m, cluster_n, split_k) in itertools.product(P_BLOCKS[p], SPREADS):
                if split_k > 1 and (problem.is_grouped or
                                    whole_tiles * split_k > MAX_SPLIT_WAVES * device.num_sms):
                    continue
                raster_group = 8 if rows > block_m * cluster_m else 1
                config = GemmConfig(
                    block_m, block_n, 2, num_consumers, swap_ab, cluster_m, cluster_n, split_k, raster_group)
                yield _with_ring(problem, config, device)


def _covering(blocks: Iterable[int], size: int) -> Iterator[int]:
    """The blocks up to the first one that covers `size` by itself."""
    for block in blocks:
        yield block
        if block >= size:
            return


def num_stages(problem: GemmProblem, config: GemmConfig, device: Device) -> int:
    """As many stages as fit, but no more than a CTA ever fills."""
    filled = MAX_STAGES
    if num_tiles(problem, config) * config.split_k <= device.num_sms:
        filled = min(filled, ceil_div(problem.num_k_blocks, config.split_k))
    tiles = (config.block_m + config.block_n) * SCALE_BLOCK
    rest = shared_bytes(problem, config) - config.num_stages * tiles
    least = least_stages(config)
    stages = max(least, min(filled, (device.shared_bytes - rest) // tiles))
    while stages > least and shared_bytes(problem, _with(config, num_stages=stages)) > device.shared_bytes:
        stages -= 1  # the rest grows with the stages too, a little
    return stages


def _with_ring(problem: GemmProblem, config: GemmConfig, device: Device) -> GemmConfig:
    """`config` with its stages, with output buffers in balance with them, and a second product in flight.

    That one only where a consumer has 64 rows and registers allow it.
    """
    stages = num_stages(problem, config, device)
    if stages <= FEW_STAGES and config.split_k == 1:
        config = _with(config, out_buffers=4 if problem.num_k_blocks <= SHORT_K else 1)
        stages = num_stages(problem, config, device)
    if warpgroup_tile(config)[0] == MMA_P and 2 in PARTIALS[config.num_consumers]:
        two = _with(config, num_stages=stages, partials=2)
        if consumer_registers(problem, two) <= MAX_REGISTERS[config.num_consumers]:
            return two
    return _with(config, num_stages=stages)


def _with(config: GemmConfig, **changes: int) -> GemmConfig:
    """`dataclasses.replace`, which is slow enough to show here."""
    return GemmConfig(**(vars(config) | changes))


def ranked(problem: GemmProblem, device: Device) -> list[tuple[GemmConfig, Cost]]:
    """The legal candidates with their costs, the best first; the first few in their best variant."""
    legal = [config for config in candidates(problem, device) if rejection(problem, config, device) is None]
    if not legal:
        raise NotImplementedError(f"no configuration of the kernel can run {problem} on {device}; use "
                                  "implementation='reference'")
    by_seconds = lambda pair: pair[1].seconds
    order = sorted(((config, cost(problem, config, device)) for config in legal), key=by_seconds)
    refined = [min(_variants(problem, *pair, device), key=by_seconds) for pair in order[:NUM_REFINED]]
    return sorted(refined, key=by_seconds) + order[NUM_REFINED:]


def _variants(problem: GemmProblem, config: GemmConfig, base: Cost,
              device: Device) -> Iterator[tuple[GemmConfig, Cost]]:
    """`config` with other raster groups, where tiles come in waves, other partials, and as many stages as go
    into K without a rest."""
    yield config, base
    raster_groups = RASTER_GROUPS if base.waves > 1 and config.split_k == 1 else (config.raster_group,)
    whole = max(n for n in range(1, config.num_stages + 1) if problem.num_k_blocks % n == 0)
    for raster_group, partials, stages in itertools.product(
            raster_groups, PARTIALS[config.num_consumers], {config.num_stages, whole}):
        variant = _with(config, raster_group=raster_group, partials=partials, num_stages=stages)
        if rejection(problem, variant, device) is None and (
                stages == config.num_stages or in_rounds(problem, variant)):
            yield variant, cost(problem, variant, device)


@functools.lru_cache(maxsize=1024)
def best(problem: GemmProblem, device: Device) -> GemmConfig:
    """The legal configuration to which the model gives the least time."""
    return ranked(problem, device)[0][0]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A configuration, and who chose it: a table of measured winners, the model, or the caller."""

    config: GemmConfig
    source: str


def choose(problem: GemmProblem, device: Device) -> Choice:
    """The measured winner for `problem` where a table has one, else the model's."""
    measured = tuned.find(problem, device)
    return Choice(*measured) if measured else Choice(best(problem, device), "model")
