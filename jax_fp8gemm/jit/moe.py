"""The kernels that take tokens to the rows of experts, and their launch plans.

`cuda/sort.cuh` and `cuda/permute.cuh`.
"""

from __future__ import annotations

import dataclasses

from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.device import H200, Device, current_device
from jax_fp8gemm.jit.kernel import MAX_GRID, Kernel
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar
from jax_fp8gemm.jit.problem import MAX_SIZE, SCALE_BLOCK, ceil_div
from jax_fp8gemm.jit.quantize import BLOCK_LANES, FLOAT8_FORMATS, INPUT_FORMATS, LANE_COLUMNS, THREADS

WARP = 32  # threads
MAX_SORT_THREADS = 1024
MAX_SORT_CTAS = 8  # of a batch: what every GPU with clusters takes
MAX_THREAD_BLOCKS = 4  # 16 bytes each, in registers


@dataclasses.dataclass(frozen=True)
class SortProblem:
    """Expert ids [batch, ids] -> group sizes [batch, experts], positions [batch, ids]; all at least 1."""

    batch: int
    ids: int
    experts: int


@dataclasses.dataclass(frozen=True)
class PermuteProblem:
    """x [batch, tokens, columns] -> FP8 values [batch, tokens * top_k, columns] and their scales.

    Attributes:
      batch, tokens, columns, top_k: all at least 1.
      input_dtype: "bf16", "f16" or "f32".
      float8_dtype: "e4m3" or "e5m2".
    """

    batch: int
    tokens: int
    columns: int
    top_k: int
    input_dtype: str = "bf16"
    float8_dtype: str = "e4m3"


def sort_shared_bytes(threads: int, experts: int) -> int:
    """Counts for each warp and for the CTA, first positions, and the warps' sums: `SortCounts`."""
    warps = threads // WARP
    return 4 * ((warps + 2) * experts + warps)


def sort_kernel(problem: SortProblem, device: Device = H200) -> Kernel:
    """The kernel for `problem`: as many threads as shared memory has room for their counts."""
    threads = MAX_SORT_THREADS
    while sort_shared_bytes(threads, problem.experts) > device.shared_bytes:
        threads //= 2
        if threads < WARP:
            raise NotImplementedError("permute: num_experts: the kernel counts in shared memory, which has "
                                      f"no room for {problem.experts}; use implementation='reference'")
    return Kernel(
        header="sort.cuh",
        function="sort_by_expert",
        constants={"Threads": threads},
        types={},
        parameters=("const int* expert_ids", "int* group_sizes", "int* positions", "int* num_rows",
                    "unsigned num_ids", "unsigned num_experts"),
        threads=threads)


def plan_sort(problem: SortProblem, *, device: Device | None = None) -> LaunchPlan:
    """The compiled kernel for `problem`, and how to launch it: a cluster for each batch.

    Buffers are the ids, group sizes, positions, numbers of rows.

    Args:
      problem: the call.
      device: the GPU to build for; by default the one that JAX runs on, or an H200 where it has none.

    Raises:
      NotImplementedError: a size that does not fit into 31 bits, or counts that do not into shared memory.
      CompileError, RuntimeError: as for `Kernel.plan`.
    """
    kernel = sort_kernel(problem, device or current_device())
    ctas = min(ceil_div(problem.ids, kernel.threads), MAX_SORT_CTAS)
    _check(problem, (problem.batch, problem.ids), problem.batch * ctas)
    arguments = *map(Pointer, range(4)), Scalar(problem.ids), Scalar(problem.experts)
    return kernel.plan(problem.batch * ctas, arguments, cluster=ctas,
                       shared_bytes=sort_shared_bytes(kernel.threads, problem.experts))


def num_ctas(problem: PermuteProblem, thread_blocks: int) -> int:
    """CTAs in which half a warp takes `thread_blocks` 128-blocks of a token; a CTA has one batch."""
    per_token = ceil_div(ceil_div(problem.columns, SCALE_BLOCK), thread_blocks)
    return problem.batch * ceil_div(problem.tokens * per_token, THREADS // BLOCK_LANES)


def choose_thread_blocks(problem: PermuteProblem, device: Device) -> int:
    """The most for which there are two CTAs for each SM, and a token has more than half as many; or 1."""
    if problem.columns % LANE_COLUMNS:
        return 1  # bytes are stored one by one, in code that is long enough
    most = MAX_THREAD_BLOCKS // (2 if problem.input_dtype == "f32" else 1)
    num_blocks = ceil_div(problem.columns, SCALE_BLOCK)
    while most > 1 and (most >= 2 * num_blocks or num_ctas(problem, most) < 2 * device.num_sms):
        most //= 2
    return most


def permute_kernel(problem: PermuteProblem, thread_blocks: int) -> Kernel:
    """The kernel for `problem`; its sizes but top_k stay arguments."""
    return Kernel(
        header="permute.cuh",
        function="permute",
        constants={"Threads": THREADS, "ThreadBlocks": thread_blocks, "TopK": problem.top_k,
                   "Vector": problem.columns % LANE_COLUMNS == 0},
        types={"Input": INPUT_FORMATS[problem.input_dtype], "Float8": FLOAT8_FORMATS[problem.float8_dtype]},
        parameters=("const void* x", "const int* positions", "const int* num_rows", "void* values",
                    "float* scales", "unsigned tokens", "unsigned columns"),
        threads=THREADS)


def plan_permute(problem: PermuteProblem, *, device: Device | None = None) -> LaunchPlan:
    """The compiled kernel for `problem`, and how to launch it.

    Buffers are x, positions, numbers of rows, values, scales.

    Args:
      problem: the call.
      device: the GPU to build for; by default the one that JAX runs on, or an H200 where it has none.

    Raises:
      NotImplementedError: a size that does not fit into 31 bits.
      CompileError, RuntimeError: as for `Kernel.plan`.
    """
    device = (device or current_device()).limited_to(settings.num_sms())
    thread_blocks = choose_thread_blocks(problem, device)
    grid = num_ctas(problem, thread_blocks)
    _check(problem, (problem.batch, problem.tokens * problem.top_k, problem.columns), grid)
    arguments = *map(Pointer, range(5)), Scalar(problem.tokens), Scalar(problem.columns)
    return permute_kernel(problem, thread_blocks).plan(grid, arguments)


def _check(problem, sizes, grid):
    # A kernel numbers what its half warps work on in 32 bits.
    if max(sizes) > MAX_SIZE or grid > MAX_GRID // (THREADS // BLOCK_LANES):
        raise NotImplementedError(f"permute: the kernel takes sizes up to {MAX_SIZE}, got {problem}, "
                                  f"{grid} CTAs; use implementation='reference'")
