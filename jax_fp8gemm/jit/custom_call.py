"""The XLA custom call of a GEMM: its operands and result, their layouts, and what shares memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jax_fp8gemm import ffi
from jax_fp8gemm.jit.launch import LaunchPlan
from jax_fp8gemm.jit.problem import GemmProblem

DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bf16": jnp.bfloat16, "f32": jnp.float32}


def gemm_call(problem: GemmProblem, plan: LaunchPlan, *, has_side_effect: bool = False) -> Callable:
    """The function (lhs, lhs_scale, rhs, rhs_scale, *group_sizes, *accumulator) -> out that runs `plan`.

    `problem` has the shapes, that of the accumulator being the result's, and says which of the last two there
    are; `jit/plan.py` numbers these buffers. The accumulator's memory becomes the result's; `has_side_effect`
    keeps a call whose result nobody reads.
    """
    ffi.register()
    # NOTES: the kernel reads scales of single rows with the rows fastest. That is asked of XLA's layout
    # assignment, not of the caller: inside of a jit the quantisation then writes them so, and nothing is
    # transposed.
    lhs, rhs, out = map(_row_major, (problem.lhs_shape, problem.rhs_shape, problem.out_shape))
    rhs_scale = _rows_fastest(rhs) if problem.rhs_scale_rows == 1 else rhs
    layouts = [lhs, _rows_fastest(lhs), rhs, rhs_scale] + [(0, 1)] * problem.is_grouped
    aliases = {len(layouts): 0} if problem.accumulate else None
    call = jax.ffi.ffi_call(
        ffi.TARGET, jax.ShapeDtypeStruct(problem.out_shape, DTYPES[problem.out_dtype]),
        has_side_effect=has_side_effect, input_layouts=layouts + [out] * problem.accumulate,
        output_layouts=out, input_output_aliases=aliases)
    return partial(call, **plan.attributes())


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _rows_fastest(layout: tuple[int, ...]) -> tuple[int, ...]:
    *leading, rows, columns = layout
    return *leading, columns, rows
