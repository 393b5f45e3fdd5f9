"""What a configuration costs: a model of the kernel's time that has to rank configurations, not to predict.

The kernel is a row of waves. In a wave every CTA walks the K blocks of one tile, and a K block takes as long
as the slowest of the three that work on it at the same time:

  math    the tensor cores, which all consumers of an SM share, or one consumer's own chain of multiplying and
          promoting;
  l2      both operands' tiles from L2 through the SM's port (a multicast tile leaves L2 once per cluster);
  memory  the wave's share of what must come from HBM, limited by HBM, by what one SM takes, and by the bytes
          that the rings keep in flight.

To the waves come the epilogue of each, the start of the kernel, and split-K's reduction; and the whole can be
no faster than the power limit lets the tensor cores run.
"""

from __future__ import annotations

import dataclasses

from jax_fp8gemm.jit.config import GemmConfig, num_tiles
from jax_fp8gemm.jit.device import Device
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem, ceil_div
from jax_fp8gemm.jit.tile import out_chunk, warpgroup_tile

# Measured on an H200, or fitted to what was measured there. Seconds, bytes, cycles of the SM's clock.
LAUNCH = 3.0e-6  # a kernel's start and end: first bytes from memory, last bytes to it
FIRST_LOAD = 0.8e-6  # from a copy's issue to its data, under load: exposed where a CTA starts
CLUSTER_EXCHANGE = 1.0e-6  # split-K: two cluster barriers and the start of the exchange
SM_MEMORY_RATE = 50e9  # bytes per second: what one SM takes from memory
PORT_BYTES = 64  # per cycle: what an SM takes from L2
PEER_BYTES = 24  # per cycle: what an SM takes from other SMs' shared memory
STORE_BYTES = 48  # per cycle: registers to shared memory to L2
SHARED_READ_BYTES = 128  # per cycle: what wgmma reads from shared memory
STEP_LATENCY = 90  # cycles: wait for a stage, drain wgmma, release the stage
TILE_LATENCY = 400  # cycles: start the pipeline on a tile, end its epilogue
FULL_BOX = 8192  # bytes: smaller copies do not reach HBM's full rate
L2_BYTES = 30e6  # what stays of both operands in L2 from one wave to the next
OVERLAP_LOSS = 0.1  # of each hidden part of a step that shows anyway


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that the model expects, by part; `math`, `l2` and `memory` overlap, the longest of them counts.

    Attributes:
      math, l2, memory: all K blocks of all waves, if only this part took time.
      steps: these three together, as they overlap in each wave.
      power: all multiplications at the rate that the power limit allows.
      epilogue: stores that no multiplication hides.
      reduction: split-K's exchange.
      waves: rounds of tiles that an SM computes.
    """

    math: float
    l2: float
    memory: float
    steps: float
    power: float
    epilogue: float
    reduction: float
    waves: int

    @property
    def seconds(self) -> float:
        return LAUNCH + max(self.steps + self.epilogue, self.power) + self.reduction

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(("math", "l2", "memory", "power"), key=lambda name: getattr(self, name))


def cost(problem: GemmProblem, config: GemmConfig, device: Device) -> Cost:
    """The model's time of a legal `config`."""
    tiles = num_tiles(problem, config)
    ctas = tiles * config.split_k
    resident = min(ctas, device.num_sms // config.cluster_size * config.cluster_size)
    full_waves, rest = divmod(ctas, resident)
    steps = ceil_div(problem.num_k_blocks, config.split_k)
    step_bytes = _memory_bytes(problem, config, resident) / (ctas * steps)

    parts, total = [0.0, 0.0, 0.0], 0.0
    math = _math_step(problem, config, device)
    for waves, active in ((full_waves, resident), (min(rest, 1), rest)):
        if waves == 0:
            continue
        step = (math, _l2_step(config, device, active), _memory_step(config, device, active, step_bytes))
        parts = [part + waves * steps * seconds for part, seconds in zip(parts, step)]
        total += waves * steps * ((1 - OVERLAP_LOSS) * max(step) + OVERLAP_LOSS * sum(step))
    num_waves = full_waves + (rest > 0)
    return Cost(
        *parts, steps=total,
        power=2 * tiles * config.block_m * config.block_n * problem.num_k_blocks * SCALE_BLOCK
        / device.flops_per_s,
        epilogue=num_waves * _epilogue(problem, config, device),
        reduction=_reduction(config, device, num_waves),
        waves=num_waves)


def _math_step(problem: GemmProblem, config: GemmConfig, device: Device) -> float:
    """Seconds of one K block's multiplications and promotions, of all consumers of a CTA."""
    p, q = warpgroup_tile(config)
    instructions = SCALE_BLOCK // 32
    tensor = 2 * 64 * q * 32 / device.flops_per_cycle
    shared = (64 + q) * 32 / SHARED_READ_BYTES
    multiply = instructions * max(tensor, shared)
    # Promotion: an FMA for each of a thread's q / 2 sums, and a product of scales where they differ from sum
    # to sum.
    sums = q // 2
    if problem.rhs_scale_rows == 1:
        promote = 2 * sums + q // 4
    elif config.swap_ab:
        promote = sums + q // 4 + q // 8
    else:
        promote = sums + 4
    parts = p // 64
    if config.partials == 1:
        chain = parts * (multiply + promote) + STEP_LATENCY
    else:  # promotes one product under the multiplications of the others
        chain = parts * max(multiply, promote) + STEP_LATENCY / config.partials
    shared_by_all = config.num_consumers * parts * multiply
    return max(chain, shared_by_all) / device.clock_hz


def _l2_step(config: GemmConfig, device: Device, active: int) -> float:
    """Seconds until `active` CTAs have one K block of both operands from L2."""
    arriving = (config.block_m + config.block_n) * SCALE_BLOCK
    leaving_l2 = (config.block_m / config.cluster_n + config.block_n / config.cluster_m) * SCALE_BLOCK
    return max(arriving / (PORT_BYTES * device.clock_hz), active * leaving_l2 / device.l2_bytes_per_s)


def _memory_bytes(problem: GemmProblem, config: GemmConfig, resident: int) -> float:
    """Bytes of the operands that come from HBM: once, or in each wave where L2 cannot keep them."""
    lhs = (problem.batch if problem.lhs_batched else 1) * problem.m * problem.k
    rhs = (problem.batch if problem.rhs_batched else 1) * problem.n * problem.k
    if lhs + rhs <= L2_BYTES:
        return lhs + rhs
    tiles_m = ceil_div(problem.m, config.block_m)
    band = min(tiles_m, config.raster_group * config.cluster_m)
    columns = max(1, resident // config.split_k // band)
    waves = num_tiles(problem, config) * config.split_k / resident
    wave_bytes = (band * config.block_m + columns * config.block_n) * problem.k
    return max(lhs + rhs, waves * wave_bytes)


def _memory_step(config: GemmConfig, device: Device, active: int, step_bytes: float) -> float:
    """Seconds until `active` CTAs have their share, `step_bytes` each, of the operands from HBM."""
    box = SCALE_BLOCK * max(config.block_m / config.cluster_n, config.block_n / config.cluster_m)
    rate = device.hbm_bytes_per_s * min(1.0, (box / FULL_BOX) ** 0.5)
    ring = config.num_stages * (config.block_m + config.block_n) * SCALE_BLOCK
    return active * step_bytes / min(rate, active * min(ring / FIRST_LOAD, SM_MEMORY_RATE))


def _epilogue(problem: GemmProblem, config: GemmConfig, device: Device) -> float:
    """Seconds that a tile's output keeps the consumers from multiplying."""
    size = config.block_m * config.block_n * problem.out_item_bytes
    rate = STORE_BYTES
    if not problem.out_is_tma_aligned or out_chunk(problem, config)[1] < 64:
        rate /= 2
    reads = 2 if problem.accumulate else 1
    return (TILE_LATENCY + reads * size / rate) / device.clock_hz


def _reduction(config: GemmConfig, device: Device, waves: int) -> float:
    """Seconds of split-K's exchange; a wave's CTAs start with empty rings, since none outlives its tile."""
    if config.split_k == 1:
        return 0.0
    from_peers = 4 * config.block_m * config.block_n * (config.split_k - 1) / config.split_k
    return CLUSTER_EXCHANGE + from_peers / (PEER_BYTES * device.clock_hz) + (waves - 1) * FIRST_LOAD * 2
