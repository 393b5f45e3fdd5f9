"""The kernels that quantise by rows and by columns in one pass, and their launch plans.

`cuda/quantize_training.cuh` and `cuda/quantize_swiglu_backward.cuh`. A CTA takes 128 x 128 elements of each
operand.
"""

from __future__ import annotations

import dataclasses

from jax_fp8gemm.jit.kernel import MAX_GRID, Kernel
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar
from jax_fp8gemm.jit.problem import ITEM_BYTES, MAX_SIZE, SCALE_BLOCK, ceil_div
from jax_fp8gemm.jit.quantize import FLOAT8_FORMATS, INPUT_FORMATS, LANE_COLUMNS, SQUARE, THREADS
from jax_fp8gemm.scaling import ragged_k_size

INPUT_BYTES = {**ITEM_BYTES, "f16": 2}
STORE_BYTES = 16  # of a thread, by columns
WARPS = THREADS // 32


@dataclasses.dataclass(frozen=True)
class TokensProblem:
    """What is quantised by rows and, along the tokens of groups, by columns.

    Attributes:
      batch, tokens: at least 1.
      columns: at least 1: of x [batch, tokens, columns], or of d_hidden, and then a multiple of 128.
      groups: G of the group sizes [batch, G], at least 1; or None, which is one group of all tokens.
      input_dtype: "bf16", "f16" or "f32".
      float8_dtype: "e4m3" or "e5m2".
    """

    batch: int
    tokens: int
    columns: int
    groups: int | None = None
    input_dtype: str = "bf16"
    float8_dtype: str = "e4m3"

    @property
    def num_blocks(self) -> int:
        """128-blocks of K, the tokens of a result by columns."""
        return self._blocks_of(1 if self.groups is None else self.groups)

    @property
    def token_blocks(self) -> int:
        """The same, and those of the rows of no group, which are one group more."""
        return self.num_blocks if self.groups is None else self._blocks_of(self.groups + 1)

    def _blocks_of(self, groups):
        return ragged_k_size(self.tokens, groups) // SCALE_BLOCK


@dataclasses.dataclass(frozen=True)
class WeightsProblem:
    """w [batch, rows, columns], quantised as it is and transposed.

    Attributes:
      batch, rows, columns: all at least 1.
      input_dtype: "bf16", "f16" or "f32".
      float8_dtype: "e4m3" or "e5m2".
    """

    batch: int
    rows: int
    columns: int
    input_dtype: str = "bf16"
    float8_dtype: str = "e4m3"


def both_kernel(problem: TokensProblem) -> Kernel:
    """The kernel of `quantize_both`; sizes stay arguments, so that few kernels serve all shapes."""
    return _kernel_of_tokens("quantize_training.cuh", "quantize_both", problem, ["x"], ["row", "column"],
                             {"BlockRows": 1, **_tile(problem)}, _ctas(problem))


def swiglu_backward_kernel(problem: TokensProblem) -> Kernel:
    """The kernel of `quantize_swiglu_backward`."""
    return _kernel_of_tokens(
        "quantize_swiglu_backward.cuh", "quantize_swiglu_backward", problem, ["gate_up", "d_hidden"],
        ["row", "column", "hidden"], {"Vector": True, "SharedBytes": swiglu_backward_shared_bytes(problem)},
        ctas=2)


def swiglu_backward_shared_bytes(problem: TokensProblem) -> int:
    """`SwigluBackward::Shared`: the operands, later the codes; largest magnitudes and reciprocals."""
    operands = 3 * SCALE_BLOCK * SCALE_BLOCK * INPUT_BYTES[problem.input_dtype]
    return operands + 3 * (WARPS + 1) * SCALE_BLOCK * ITEM_BYTES["f32"]


def weights_kernel(problem: WeightsProblem) -> Kernel:
    """The kernel of `quantize_weights`."""
    return Kernel(
        header="quantize_training.cuh",
        function="quantize_weights",
        constants={"Threads": THREADS, "BlockRows": SCALE_BLOCK, **_tile(problem),
                   "VectorColumns": problem.rows % STORE_BYTES == 0},
        types=_types(problem),
        parameters=("const void* w", *_result_parameters("forward", "backward"), "unsigned rows",
                    "unsigned columns"),
        threads=THREADS, ctas=_ctas(problem))


def plan_quantize_both(problem: TokensProblem) -> LaunchPlan:
    """The compiled kernel, and how to launch it.

    Buffers are x, the group sizes where there are any; values and scales by rows, then by columns.

    Raises:
      NotImplementedError: a size that does not fit into 31 bits, or more blocks than a grid can have.
      CompileError, RuntimeError: as for `Kernel.plan`.
    """
    return _plan_of_tokens(both_kernel(problem), problem)


def plan_quantize_swiglu_backward(problem: TokensProblem) -> LaunchPlan:
    """The compiled kernel, and how to launch it.

    Buffers are gate_up, d_hidden, the group sizes where there are any; values and scales by rows, by columns,
    and of hidden by columns.

    Raises:
      NotImplementedError, CompileError, RuntimeError: as for `plan_quantize_both`.
    """
    return _plan_of_tokens(swiglu_backward_kernel(problem), problem,
                           shared_bytes=swiglu_backward_shared_bytes(problem))


def plan_quantize_weights(problem: WeightsProblem) -> LaunchPlan:
    """The compiled kernel, and how to launch it.

    Buffers are w; values and scales of its transpose, then of itself.

    Raises:
      NotImplementedError, CompileError, RuntimeError: as for `plan_quantize_both`.
    """
    row_blocks = ceil_div(problem.rows, SCALE_BLOCK)
    return _plan(weights_kernel(problem), problem, row_blocks, [problem.rows, problem.columns])


def _tile(problem):
    return {"Blocks": SQUARE.blocks, "ThreadRows": SQUARE.thread_rows,
            "Vector": problem.columns % LANE_COLUMNS == 0}


def _ctas(problem):
    """As many as have enough in flight, or as registers suffice for."""
    return 4 if problem.input_dtype != "f32" and problem.columns % LANE_COLUMNS == 0 else 2


def _types(problem):
    return {"Input": INPUT_FORMATS[problem.input_dtype], "Float8": FLOAT8_FORMATS[problem.float8_dtype]}


def _result_parameters(*names):
    return [parameter for name in names for parameter in (f"void* {name}_values", f"float* {name}_scales")]


def _kernel_of_tokens(header, function, problem, inputs, results, constants, ctas):
    parameters = [*(f"const void* {name}" for name in inputs), *_result_parameters(*results),
                  "unsigned tokens", "unsigned columns"]
    if problem.groups is not None:
        function += "_ragged"
        parameters.insert(len(inputs), "const int* group_sizes")
        parameters += ["unsigned num_blocks", "unsigned token_blocks", "unsigned num_groups"]
    return Kernel(header, function, {"Threads": THREADS, **constants}, _types(problem), tuple(parameters),
                  THREADS, ctas)


def _plan_of_tokens(kernel, problem, **options):
    sizes = [problem.tokens, problem.columns]
    if problem.groups is not None:
        sizes += [problem.num_blocks, problem.token_blocks, problem.groups]
    return _plan(kernel, problem, problem.token_blocks, sizes, **options)


def _plan(kernel, problem, row_blocks, sizes, **options):
    """A CTA for each 128 x 128 elements; the arguments are all buffers, then the sizes."""
    grid = problem.batch * ceil_div(problem.columns, SCALE_BLOCK) * row_blocks
    if max(problem.batch, row_blocks * SCALE_BLOCK, *sizes) > MAX_SIZE or grid > MAX_GRID:
        raise NotImplementedError(f"{kernel.function}: the kernel takes sizes up to {MAX_SIZE} and "
                                  f"{MAX_GRID} blocks, got {problem}, {grid} blocks; use "
                                  "implementation='reference'")
    buffers = map(Pointer, range(len(kernel.parameters) - len(sizes)))
    return kernel.plan(grid, [*buffers, *map(Scalar, sizes)], **options)
