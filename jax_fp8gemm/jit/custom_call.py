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
    """The function (lhs, lhs_scale, rhs, rhs_scale, *accumulator) -> out that runs `plan`.

    lhs [B, M, K], rhs [B, N, K], accumulator and out [B, M, N]; lhs_scale [B, M, Kb], rhs_scale [B, Nb, Kb],
    with Nb = N or ceil(N/128). B is 1 for an operand that the batch shares. `jit/plan.py` numbers these
    buffers. The accumulator's memory becomes the result's; `has_side_effect` keeps a call whose result nobody
    reads.
    """
    ffi.register()
    # NOTES: the kernel reads scales of single rows with the rows fastest. That is asked of XLA's layout
    # assignment, not of the caller: inside of a jit the quantisation then writes them so, and nothing is
    # transposed.
    row_major, rows_fastest = (0, 1, 2), (0, 2, 1)
    layouts = [row_major, rows_fastest, row_major, rows_fastest if problem.rhs_scale_rows == 1 else row_major]
    call = jax.ffi.ffi_call(
        ffi.TARGET, jax.ShapeDtypeStruct((problem.batch, problem.m, problem.n), DTYPES[problem.out_dtype]),
        has_side_effect=has_side_effect, input_layouts=layouts + [row_major] * problem.accumulate,
        output_layouts=row_major, input_output_aliases={4: 0} if problem.accumulate else None)
    return partial(call, **plan.attributes())
