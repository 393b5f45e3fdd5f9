"""What a configuration costs: a model of the kernel's time that has to rank configurations, not to predict.

The kernel is a row of waves. In a wave every CTA walks the K blocks of one tile, and several parts of the SM
and of the GPU work on a K block at the same time:

  chain    one consumer, from a full stage to the next: multiply, drain, promote;
  tensor   the tensor cores, which all consumers of an SM share;
  issue    the instructions of all consumers besides the products: promotion, scales, barriers;
  port     the SM's shared memory: both operands' tiles into it, and to the tensor cores;
  fill     zeros for the tile's rows beyond M, which the copy engine writes row by row;
  l2       both operands' tiles out of L2, a multicast tile once per cluster;
  memory   the wave's share of what must come from HBM, as far as the rings keep it in flight.

They hide each other imperfectly: a K block takes their `OVERLAP`-norm, which is the longest where it stands
out, and 1.2 times as long where two are equal. To the waves come the epilogue of each, the start of the
kernel, and split-K's exchange. `benchmarks/score_model.py` compares the choice with measurements.
"""

from __future__ import annotations

import dataclasses

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import Device
from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem, ceil_div
from jax_fp8gemm.jit.tile import MMA_P, expected_tiles, in_rounds, num_tiles, out_chunk, warpgroup_tile

MMA_K = 32  # K of one wgmma

# Measured on an H200: by time stamps in the kernel where it says so, else fitted to the times of 3,520
# kernels of 132 problems (benchmarks/results/2026-11-21-sweep-h200.json.gz). A fitted rate is that of a part
# left alone under the norm above: the whole never reaches it.
# Seconds, bytes, cycles of the SM's clock.
LAUNCH = 0.7e-6  # an empty kernel
START = 2.8e-6  # a CTA: 4,000 cycles until its first stage is full (time stamps), and its last stores
CLUSTER = 0.5e-6  # more for CTAs in clusters: launched together, they end together
OVERLAP = 4  # exponent of the norm
COUPLING_CYCLES = 40  # of a chain: CTAs that share tiles wait for one another
BARRIER_CYCLES = 119  # of a chain: waits for the stage and for the products, which start empty
ISSUE_CYCLES = 105  # of a consumer and K block: barriers, scales, descriptors
ROUND_CYCLES = 44  # of these, saved where each stage has its own copy of the loop
COLUMN_SCALE_CYCLES = 4.6  # to multiply a column's scale, the disturbed row of FMAs included
PORT_BYTES = 150  # per cycle
FILL_CYCLES = 6  # per row of zeros
EXCHANGE_BYTES = 6.3  # per cycle: a CTA's sums to shared memory, to other CTAs, and added up there
STORE_BYTES = 23.6  # per cycle: the output from registers to L2
NARROW_STORES = 2.7  # how much slower boxes of less than 128 bytes a row are, or stores from registers
SHARED_READ_BYTES = 128  # per cycle: what wgmma reads from shared memory
LOAD_LATENCY = 0.8e-6  # from a copy's issue to its data, under load
L2_BYTES = 52e6  # what stays of both operands in L2 from one wave to the next
REREAD = 0.3  # of a group's weights, for each further tile of its rows; 0.2 to 0.4 fit an H200 and an H100

STEP_PARTS = ("chain", "tensor", "issue", "port", "fill", "l2", "memory")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that the model expects, by part.

    Attributes:
      chain, tensor, issue, port, fill, l2, memory: all K blocks of all waves, if only this part took time.
      steps: these together, as they overlap.
      epilogue: stores, which no multiplication hides.
      start: of the kernel, and of split-K's later waves, since there no CTA outlives its tile.
      exchange: split-K's sums from CTA to CTA.
      waves: rounds of tiles that an SM computes.
    """

    chain: float
    tensor: float
    issue: float
    port: float
    fill: float
    l2: float
    memory: float
    steps: float
    epilogue: float
    start: float
    exchange: float
    waves: int

    @property
    def seconds(self) -> float:
        return self.start + self.steps + self.epilogue + self.exchange

    @property
    def bound(self) -> str:
        """The part of a step that takes longest."""
        return max(STEP_PARTS, key=lambda name: getattr(self, name))


def cost(problem: GemmProblem, config: GemmConfig, device: Device) -> Cost:
    """The model's time of a legal `config`."""
    ctas = expected_tiles(problem, config) * config.split_k
    problem = problem.as_dense()
    resident = min(ctas, _resident_ctas(config, device))
    full_waves, rest = divmod(ctas, resident)
    waves = int(full_waves) + (rest > 0)
    steps = ceil_div(problem.num_k_blocks, config.split_k)
    of_sm = _sm_steps(problem, config, device)
    step_bytes = _memory_bytes(problem, config, resident) / (ctas * steps)

    parts, total = [0.0] * len(STEP_PARTS), 0.0
    for count, active in ((full_waves * steps, resident), (steps, rest)):
        if active:
            step = (*of_sm, _l2_step(config, device, active),
                    _memory_step(config, device, active, step_bytes))
            parts = [part + count * seconds for part, seconds in zip(parts, step, strict=True)]
            total += count * sum([seconds**OVERLAP for seconds in step]) ** (1 / OVERLAP)
    epilogue, exchange, starts = waves * _epilogue(problem, config, device), 0.0, 1
    if config.split_k > 1:
        epilogue, exchange, starts = 0.0, _exchange(config, device), waves
    start = LAUNCH + starts * START + (CLUSTER if config.cluster_size > 1 else 0.0)
    return Cost(*parts, total, epilogue, start, exchange, waves)


def _resident_ctas(config: GemmConfig, device: Device) -> int:
    """CTAs that run at once: one per SM, but clusters of 4 and 8 find no neighbours for every eleventh SM.

    (cuOccupancyMaxActiveClusters on an H200: 66 clusters of 2, 30 of 4, 15 of 8.)
    """
    sms = device.num_sms if config.cluster_size <= 2 else device.num_sms * 10 // 11
    return max(1, sms // config.cluster_size) * config.cluster_size


def _sm_steps(problem: GemmProblem, config: GemmConfig, device: Device) -> list[float]:
    """Seconds of a K block in the parts of one SM: chain, tensor, issue, port, fill."""
    p, q = warpgroup_tile(config)
    parts, consumers = p // MMA_P, config.num_consumers
    coupling = COUPLING_CYCLES if config.cluster_m * config.cluster_n > 1 else 0
    multiply = SCALE_BLOCK // MMA_K * max(2 * MMA_P * q * MMA_K / device.flops_per_cycle,
                                          (MMA_P + q) * MMA_K / SHARED_READ_BYTES)
    promote = _promotion(problem, config)
    cycles = (
        parts * _chain(problem, config, multiply, promote) + coupling,
        consumers * parts * multiply,
        consumers * (parts * promote + ISSUE_CYCLES - ROUND_CYCLES * in_rounds(problem, config)),
        (config.block_m + config.block_n + consumers * parts * (MMA_P + q)) * SCALE_BLOCK / PORT_BYTES,
        max(0, config.block_m - problem.m) * FILL_CYCLES,
    )
    return [part / device.clock_hz for part in cycles]


def _chain(problem: GemmProblem, config: GemmConfig, multiply: float, promote: float) -> float:
    """Cycles of a consumer from one product of 64 rows to the next."""
    single = multiply + promote + BARRIER_CYCLES
    if config.partials == 1:
        return single
    # Each product is promoted under the multiplications of the others, but for the last of a batch. Blocks of
    # K that fill no batch go one by one.
    batched = max(multiply, promote) + (promote + BARRIER_CYCLES) / config.partials
    blocks = ceil_div(problem.num_k_blocks, config.split_k)
    rest = blocks % (config.partials * MMA_P // warpgroup_tile(config)[0])
    return batched + rest / blocks * (single - batched)


def _promotion(problem: GemmProblem, config: GemmConfig) -> float:
    """Cycles to promote one product: an FMA for each of a thread's sums, and scales that differ by column."""
    _, q = warpgroup_tile(config)
    sums = q // 2
    if problem.rhs_scale_rows == 1:  # each sum has its own product of scales
        return 2 * sums + q // 4 * COLUMN_SCALE_CYCLES
    return sums + config.swap_ab * (q // 4) * COLUMN_SCALE_CYCLES


def _l2_step(config: GemmConfig, device: Device, active: int) -> float:
    """Seconds until one K block of both operands of `active` CTAs has left L2."""
    leaving = (config.block_m / config.cluster_n + config.block_n / config.cluster_m) * SCALE_BLOCK
    return active * leaving / device.l2_bytes_per_s


def _memory_bytes(problem: GemmProblem, config: GemmConfig, resident: int) -> float:
    """Bytes of the operands that come from HBM: once, or in each wave where L2 cannot keep them.

    Tiles that share the weights of a group get out of step, since groups begin at any place of a wave: some
    of the weights have left L2 when the next of these tiles needs them.
    """
    lhs = (problem.batch if problem.lhs_batched else 1) * problem.m * problem.k
    rhs = (problem.batch if problem.rhs_batched else 1) * problem.n * problem.k
    if lhs + rhs <= L2_BYTES:
        return lhs + rhs
    tiles_m = ceil_div(problem.m, config.block_m)
    band = min(tiles_m, config.raster_group * config.cluster_m)
    columns = max(1, resident // config.split_k // band)
    waves = num_tiles(problem, config) * config.split_k / resident
    wave_bytes = (band * config.block_m + columns * config.block_n) * problem.k
    sharing = ceil_div(band, config.cluster_m) if problem.batch > 1 and problem.rhs_batched else 1
    return max(lhs + rhs, waves * wave_bytes) + REREAD * (sharing - 1) * rhs


def _memory_step(config: GemmConfig, device: Device, active: int, step_bytes: float) -> float:
    """Seconds until `active` CTAs have their share, `step_bytes` each, of the operands from HBM."""
    ring = config.num_stages * (config.block_m + config.block_n) * SCALE_BLOCK
    return active * step_bytes / min(device.hbm_bytes_per_s, active * ring / LOAD_LATENCY)


def _epilogue(problem: GemmProblem, config: GemmConfig, device: Device) -> float:
    """Seconds that a tile's output keeps the consumers from multiplying."""
    size = config.block_m * config.block_n * problem.out_item_bytes
    rate = STORE_BYTES
    if not problem.out_is_tma_aligned or out_chunk(problem, config)[1] < 128:
        rate /= NARROW_STORES
    reads = 2 if problem.accumulate else 1
    return reads * size / (rate * device.clock_hz)


def _exchange(config: GemmConfig, device: Device) -> float:
    """Seconds in which split-K's CTAs send each other their sums and add them up."""
    from_peers = 4 * config.block_m * config.block_n * (config.split_k - 1) / config.split_k
    return from_peers / (EXCHANGE_BYTES * device.clock_hz)
