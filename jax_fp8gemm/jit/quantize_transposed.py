"""The kernel that quantises along tokens, and its launch plan (`cuda/quantize_transposed.cuh`)."""

from __future__ import annotations

import dataclasses

from jax_fp8gemm.jit.kernel import MAX_GRID, Kernel
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar
from jax_fp8gemm.jit.problem import MAX_SIZE, SCALE_BLOCK, ceil_div
from jax_fp8gemm.jit.quantize import FLOAT8_FORMATS, INPUT_FORMATS, LANE_COLUMNS, SQUARE, THREADS
from jax_fp8gemm.scaling import ragged_k_size


@dataclasses.dataclass(frozen=True)
class TransposeProblem:
    """x [batch, tokens, columns], sizes [batch, groups] -> FP8 values [batch, columns, K] and their scales.

    Attributes:
      batch, tokens, columns, groups: all at least 1; K = ragged_k_size(tokens, groups).
      input_dtype: "bf16", "f16" or "f32".
      float8_dtype: "e4m3" or "e5m2".
    """

    batch: int
    tokens: int
    columns: int
    groups: int
    input_dtype: str = "bf16"
    float8_dtype: str = "e4m3"

    @property
    def num_blocks(self) -> int:
        return ragged_k_size(self.tokens, self.groups) // SCALE_BLOCK


def transpose_kernel(problem: TransposeProblem) -> Kernel:
    """The kernel for `problem`; its sizes stay arguments, so that few kernels serve all shapes."""
    return Kernel(
        header="quantize_transposed.cuh",
        function="quantize_transposed",
        constants={"Threads": THREADS, "Blocks": SQUARE.blocks, "ThreadRows": SQUARE.thread_rows,
                   "Vector": problem.columns % LANE_COLUMNS == 0},
        types={"Input": INPUT_FORMATS[problem.input_dtype], "Float8": FLOAT8_FORMATS[problem.float8_dtype]},
        parameters=("const void* x", "const int* group_sizes", "void* values", "float* scales",
                    "unsigned tokens", "unsigned columns", "unsigned num_blocks", "unsigned num_groups"),
        threads=THREADS)


def plan_quantize_transposed(problem: TransposeProblem) -> LaunchPlan:
    """The compiled kernel for `problem`, and how to launch it: a CTA for each 128 x 128 of the result.

    Buffers are x, the group sizes, values, scales.

    Raises:
      NotImplementedError: a size that does not fit into 31 bits, or more blocks than a grid can have.
      CompileError, RuntimeError: as for `Kernel.plan`.
    """
    num_blocks = problem.num_blocks
    grid = problem.batch * ceil_div(problem.columns, SCALE_BLOCK) * num_blocks
    sizes = problem.batch, problem.tokens, problem.columns, problem.groups, num_blocks * SCALE_BLOCK
    if max(sizes) > MAX_SIZE or grid > MAX_GRID:
        raise NotImplementedError(f"quantize_transposed: the kernel takes sizes up to {MAX_SIZE} and "
                                  f"{MAX_GRID} blocks, got {problem}, K = {num_blocks * SCALE_BLOCK}, {grid} "
                                  "blocks; use implementation='reference'")
    scalars = map(Scalar, (problem.tokens, problem.columns, num_blocks, problem.groups))
    return transpose_kernel(problem).plan(grid, (*map(Pointer, range(4)), *scalars))
