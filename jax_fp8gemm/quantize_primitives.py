"""Quantisation as JAX primitives: results, batching and lowering, as one table entry each.

Operands are in canonical form: x of rank 3, [batch, rows, columns], and all vary over the same manual mesh
axes (`match_varying`). Scales of single rows leave the kernel with the rows fastest in memory, as the GEMMs
want them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_fp8gemm import reference, reference_moe, sharding
from jax_fp8gemm.jit.custom_call import DTYPES
from jax_fp8gemm.jit.kernel import kernel_call
from jax_fp8gemm.jit.problem import RAGGED_M
from jax_fp8gemm.jit.quantize import QuantizeProblem, plan_quantize
from jax_fp8gemm.jit.quantize_transposed import TransposeProblem, plan_quantize_transposed
from jax_fp8gemm.operation import Operation, fold_into_batch, register
from jax_fp8gemm.scaling import ROW_BLOCKS, ragged_k_size, scale_shape

DTYPE_NAMES = {jnp.dtype(dtype): name for name, dtype in {**DTYPES, "f16": jnp.float16}.items()}


def scaled_results(shape, granularity, dtype):
    """Shapes and dtypes of a ScaledArray's values and scales."""
    return [(shape, dtype), (scale_shape(shape, granularity), jnp.dtype(jnp.float32))]


def scaled_call(plan, shape, granularity, dtype, *operands):
    """The kernel whose results are such values and scales."""
    results = [jax.ShapeDtypeStruct(*result) for result in scaled_results(shape, granularity, dtype)]
    scales_layout = (0, 2, 1) if granularity == ROW_BLOCKS else (0, 1, 2)
    return kernel_call(plan, results, [None, scales_layout])(*operands)


# ---- fp8_quantize: x [B, R, C] -> values [B, R, C], scales [B, ceil(R/rows), ceil(C/128)]


def _quantize_results(x, *, granularity, dtype):
    return scaled_results(x.shape, granularity, dtype)


def _quantize_hopper(x, *, granularity, dtype):
    problem = QuantizeProblem(*x.shape, input_dtype=DTYPE_NAMES[x.dtype], float8_dtype=DTYPE_NAMES[dtype],
                              block_rows=granularity[0])
    return scaled_call(plan_quantize(problem), x.shape, granularity, dtype, x)


quantize_p = register(Operation("fp8_quantize", _quantize_results, fold_into_batch, reference.quantize,
                                _quantize_hopper, sharding.quantize))


# ---- fp8_quantize_swiglu: x [B, M, 2F], [group_sizes] -> values [B, M, F], scales [B, M, ceil(F/128)]
#      group_sizes: [B, G] if kind is RAGGED_M, [B] if it is MASKED


def _swiglu_shape(x):
    return *x.shape[:-1], x.shape[-1] // 2


def _swiglu_results(x, *group_sizes, kind, dtype):
    return scaled_results(_swiglu_shape(x), ROW_BLOCKS, dtype)


def _swiglu_hopper(x, *group_sizes, kind, dtype):
    shape = _swiglu_shape(x)
    groups = group_sizes[0].shape[1] if kind == RAGGED_M else 1
    problem = QuantizeProblem(*shape, input_dtype=DTYPE_NAMES[x.dtype], float8_dtype=DTYPE_NAMES[dtype],
                              swiglu=True, kind=kind, groups=groups)
    return scaled_call(plan_quantize(problem), shape, ROW_BLOCKS, dtype, x, *group_sizes)


quantize_swiglu_p = register(Operation("fp8_quantize_swiglu", _swiglu_results, fold_into_batch,
                                       reference.quantize_swiglu, _swiglu_hopper, sharding.quantize_swiglu))


# ---- fp8_quantize_transposed: x [B, T, N], group_sizes [B, G] -> values [B, N, K], scales [B, N, K/128]


def _transposed_shape(x, group_sizes):
    return x.shape[0], x.shape[2], ragged_k_size(x.shape[1], group_sizes.shape[1])


def _transposed_results(x, group_sizes, *, dtype):
    return scaled_results(_transposed_shape(x, group_sizes), ROW_BLOCKS, dtype)


def _transposed_hopper(x, group_sizes, *, dtype):
    shape = _transposed_shape(x, group_sizes)
    problem = TransposeProblem(*x.shape, groups=group_sizes.shape[1], input_dtype=DTYPE_NAMES[x.dtype],
                               float8_dtype=DTYPE_NAMES[dtype])
    return scaled_call(plan_quantize_transposed(problem), shape, ROW_BLOCKS, dtype, x, group_sizes)


quantize_transposed_p = register(Operation("fp8_quantize_transposed", _transposed_results, fold_into_batch,
                                           reference_moe.quantize_transposed, _transposed_hopper,
                                           sharding.quantize_transposed))
