"""The quantisation kernels: which tiles a call gets, and its launch plan (`cuda/quantize.cuh`)."""

from __future__ import annotations

import dataclasses

from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.device import Device, current_device
from jax_fp8gemm.jit.kernel import MAX_GRID, Kernel
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar
from jax_fp8gemm.jit.problem import MASKED, MAX_SIZE, RAGGED_M, SCALE_BLOCK, ceil_div

INPUT_FORMATS = {"bf16": "Bf16", "f16": "F16", "f32": "F32"}
FLOAT8_FORMATS = {"e4m3": "E4M3", "e5m2": "E5M2"}

THREADS = 256
BLOCK_LANES = 16  # threads that work on the 128 columns of a block
LANE_COLUMNS = SCALE_BLOCK // BLOCK_LANES
CTAS_PER_SM = 4  # of a kernel whose CTAs walk the tiles


@dataclasses.dataclass(frozen=True)
class QuantizeProblem:
    """x [batch, rows, columns] -> FP8 values of that shape and their scales.

    Attributes:
      batch, rows, columns: of the result, all at least 1.
      input_dtype: "bf16", "f16" or "f32".
      float8_dtype: "e4m3" or "e5m2".
      block_rows: rows that share a scale, 1 or 128.
      swiglu: x is [batch, rows, 2 * columns], gate | up, and silu(gate) * up is quantised, with block_rows 1.
      kind: None, or with swiglu RAGGED_M (group sizes [batch, groups]) or MASKED (group sizes [batch]).
      groups: for RAGGED_M.
    """

    batch: int
    rows: int
    columns: int
    input_dtype: str = "bf16"
    float8_dtype: str = "e4m3"
    block_rows: int = 1
    swiglu: bool = False
    kind: str | None = None
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a CTA works on: 128-blocks side by side, and rows of each thread, one below the other."""

    blocks: int
    thread_rows: int

    @property
    def rows(self) -> int:
        return THREADS // BLOCK_LANES // self.blocks * self.thread_rows

    def count(self, problem: QuantizeProblem) -> int:
        across = ceil_div(ceil_div(problem.columns, SCALE_BLOCK), self.blocks)
        return problem.batch * ceil_div(problem.rows, self.rows) * across


SQUARE = Tile(blocks=1, thread_rows=SCALE_BLOCK * BLOCK_LANES // THREADS)  # 128 x 128


def choose_tile(problem: QuantizeProblem, device: Device) -> Tile:
    """The largest tile of which there are two for each SM, or the smallest.

    Registers hold a thread's rows: eight of 16 bytes, or four of more.
    """
    most = 8 if problem.input_dtype != "f32" and not problem.swiglu else 4
    if problem.block_rows == SCALE_BLOCK:
        return SQUARE
    num_blocks = ceil_div(problem.columns, SCALE_BLOCK)
    tiles = [Tile(blocks=4 if num_blocks > 2 else num_blocks, thread_rows=most >> i)
             for i in range(most.bit_length())]
    return next((tile for tile in tiles if tile.count(problem) >= 2 * device.num_sms), tiles[-1])


def quantize_kernel(problem: QuantizeProblem, tile: Tile) -> Kernel:
    """The kernel for `problem`; its sizes stay arguments, so that few kernels serve all shapes."""
    groups = ("const int* group_sizes",) if problem.kind else ()
    num_groups = ("unsigned num_groups",) if problem.kind else ()
    suffix = {None: "", RAGGED_M: "_ragged", MASKED: "_masked"}[problem.kind]
    return Kernel(
        header="quantize.cuh",
        function=("quantize_swiglu" if problem.swiglu else "quantize") + suffix,
        constants={"Threads": THREADS, "BlockRows": problem.block_rows, "Blocks": tile.blocks,
                   "ThreadRows": tile.thread_rows, "Vector": problem.columns % LANE_COLUMNS == 0},
        types={"Input": INPUT_FORMATS[problem.input_dtype], "Float8": FLOAT8_FORMATS[problem.float8_dtype]},
        parameters=("const void* x", *groups, "void* values", "float* scales", "unsigned rows",
                    "unsigned columns", *num_groups),
        threads=THREADS)


def plan_quantize(problem: QuantizeProblem, *, device: Device | None = None) -> LaunchPlan:
    """The compiled kernel for `problem`, and how to launch it.

    Buffers are x, the group sizes where there are any, values, scales.

    Args:
      problem: the call.
      device: the GPU to build for; by default the one that JAX runs on, or an H200 where it has none.

    Raises:
      NotImplementedError: a size that does not fit into 31 bits, or more tiles than a grid can have.
      CompileError, RuntimeError: as for `Kernel.plan`.
    """
    device = (device or current_device()).limited_to(settings.num_sms())
    tile = choose_tile(problem, device)
    grid = tile.count(problem)
    if max(problem.batch, problem.rows, problem.columns) > MAX_SIZE or grid > MAX_GRID:
        raise NotImplementedError(f"quantize: the kernel takes sizes up to {MAX_SIZE} and {MAX_GRID} tiles, "
                                  f"got {problem}, {grid} tiles; use implementation='reference'")
    x, *group_sizes, values, scales = map(Pointer, range(4 if problem.kind else 3))
    num_groups = {None: [], RAGGED_M: [Scalar(problem.groups)], MASKED: [Scalar(problem.batch)]}[problem.kind]
    arguments = [x, *group_sizes, values, scales, Scalar(problem.rows), Scalar(problem.columns), *num_groups]
    if problem.kind == MASKED:
        grid = min(grid, CTAS_PER_SM * device.num_sms)
    return quantize_kernel(problem, tile).plan(grid, arguments)
