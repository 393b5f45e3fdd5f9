"""The quantisations of a training step as JAX primitives: results, batching and lowering, as table entries.

Operands are in canonical form: each has a batch axis first, and all vary over the same manual mesh axes
(`match_varying`). Group sizes, [B, G], are an operand or absent; without them all tokens are one group.
Scales of single rows leave the kernels with the rows fastest in memory, as the GEMMs want them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_fp8gemm import reference_training, sharding
from jax_fp8gemm.jit.kernel import kernel_call
from jax_fp8gemm.jit.problem import SCALE_BLOCK, round_up
from jax_fp8gemm.jit.quantize_training import (
    TokensProblem,
    WeightsProblem,
    plan_quantize_both,
    plan_quantize_swiglu_backward,
    plan_quantize_weights,
)
from jax_fp8gemm.operation import Operation, fold_into_batch, match_varying, register
from jax_fp8gemm.quantize_primitives import DTYPE_NAMES, quantize_transposed_p, scaled_results
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, ragged_k_size


def _results(shapes, dtype):
    """Shapes and dtypes of the values and scales of arrays, (shape, granularity) each."""
    return [result for shape, granularity in shapes for result in scaled_results(shape, granularity, dtype)]


def _call(plan, shapes, dtype, *operands):
    """The kernel whose results are such values and scales."""
    results = [jax.ShapeDtypeStruct(*result) for result in _results(shapes, dtype)]
    layouts = [layout for _, granularity in shapes
               for layout in (None, (0, 2, 1) if granularity == ROW_BLOCKS else None)]
    return kernel_call(plan, results, layouts)(*operands)


def _tokens_problem(x, group_sizes, dtype):
    groups = group_sizes[0].shape[1] if group_sizes else None
    return TokensProblem(*x.shape, groups, DTYPE_NAMES[x.dtype], DTYPE_NAMES[dtype])


def _columns_shape(x, *group_sizes):
    """Of x [B, T, N], quantised along the tokens of groups."""
    batch, tokens, columns = x.shape
    k = ragged_k_size(tokens, group_sizes[0].shape[1]) if group_sizes else round_up(tokens, SCALE_BLOCK)
    return batch, columns, k


# ---- fp8_quantize_both: x [B, T, N], [group_sizes]
#      -> rows [B, T, N], scales [B, T, ceil(N/128)], columns [B, N, K], scales [B, N, K/128]


def _both_shapes(x, *group_sizes):
    return (x.shape, ROW_BLOCKS), (_columns_shape(x, *group_sizes), ROW_BLOCKS)


def _both_results(x, *group_sizes, dtype):
    return _results(_both_shapes(x, *group_sizes), dtype)


def _both_hopper(x, *group_sizes, dtype):
    plan = plan_quantize_both(_tokens_problem(x, group_sizes, dtype))
    return _call(plan, _both_shapes(x, *group_sizes), dtype, x, *group_sizes)


quantize_both_p = register(Operation("fp8_quantize_both", _both_results, fold_into_batch,
                                     reference_training.quantize_both, _both_hopper,
                                     sharding.quantize_both))


# ---- fp8_quantize_weights: w [B, K, N]
#      -> forward [B, N, K], scales [B, ceil(N/128), ceil(K/128)], backward [B, K, N], scales


def _weights_shapes(w):
    batch, k, n = w.shape
    return ((batch, n, k), SQUARE_BLOCKS), ((batch, k, n), SQUARE_BLOCKS)


def _weights_results(w, *, dtype):
    return _results(_weights_shapes(w), dtype)


def _weights_hopper(w, *, dtype):
    plan = plan_quantize_weights(WeightsProblem(*w.shape, DTYPE_NAMES[w.dtype], DTYPE_NAMES[dtype]))
    return _call(plan, _weights_shapes(w), dtype, w)


quantize_weights_p = register(Operation("fp8_quantize_weights", _weights_results, fold_into_batch,
                                        reference_training.quantize_weights, _weights_hopper,
                                        sharding.quantize_weights))


# ---- fp8_quantize_swiglu_backward: gate_up [B, T, 2F], d_hidden [B, T, F], [group_sizes]
#      -> rows [B, T, 2F], columns [B, 2F, K], hidden columns [B, F, K], each with its scales


def _swiglu_backward_shapes(gate_up, d_hidden, *group_sizes):
    hidden_columns = _columns_shape(d_hidden, *group_sizes)
    return *_both_shapes(gate_up, *group_sizes), (hidden_columns, ROW_BLOCKS)


def _swiglu_backward_results(gate_up, d_hidden, *group_sizes, dtype):
    return _results(_swiglu_backward_shapes(gate_up, d_hidden, *group_sizes), dtype)


def _swiglu_backward_hopper(gate_up, d_hidden, *group_sizes, dtype):
    if d_hidden.shape[2] % SCALE_BLOCK:
        return _swiglu_backward_by_parts(gate_up, d_hidden, *group_sizes, dtype=dtype)
    plan = plan_quantize_swiglu_backward(_tokens_problem(d_hidden, group_sizes, dtype))
    shapes = _swiglu_backward_shapes(gate_up, d_hidden, *group_sizes)
    return _call(plan, shapes, dtype, gate_up, d_hidden, *group_sizes)


def _swiglu_backward_by_parts(gate_up, d_hidden, *group_sizes, dtype):
    """For an F with which a block of a row may have columns of d_gate and of d_up: XLA computes these."""
    batch, tokens, _ = gate_up.shape
    d_gate_up, hidden = reference_training.swiglu_gradients(gate_up, d_hidden)
    hidden, sizes = match_varying(hidden, *(group_sizes or [jnp.full((batch, 1), tokens, jnp.int32)]))
    options = {"dtype": dtype, "implementation": "hopper"}
    return [*quantize_both_p.kernel.bind(d_gate_up, *group_sizes, **options),
            *quantize_transposed_p.kernel.bind(hidden, sizes, **options)]


quantize_swiglu_backward_p = register(Operation(
    "fp8_quantize_swiglu_backward", _swiglu_backward_results, fold_into_batch,
    reference_training.quantize_swiglu_backward, _swiglu_backward_hopper, sharding.quantize_swiglu_backward))
