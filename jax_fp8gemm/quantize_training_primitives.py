"""The quantisations of a training step as JAX primitives: results, batching and lowering, as table entries.

Operands are in canonical form: each has a batch axis first, and all vary over the same manual mesh axes
(`match_varying`). Group sizes, [B, G], are an operand or absent; without them all tokens are one group.
Scales of single rows leave the kernels with the rows fastest in memory, as the GEMMs want them.
"""

from __future__ import annotations

from jax_fp8gemm import reference_training, sharding
from jax_fp8gemm.jit.problem import SCALE_BLOCK, round_up
from jax_fp8gemm.operation import Operation, fold_into_batch, register
from jax_fp8gemm.quantize_primitives import scaled_results
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, ragged_k_size


def _results(shapes, dtype):
    """Shapes and dtypes of the values and scales of arrays, (shape, granularity) each."""
    return [result for shape, granularity in shapes for result in scaled_results(shape, granularity, dtype)]


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


quantize_both_p = register(Operation("fp8_quantize_both", _both_results, fold_into_batch,
                                     reference_training.quantize_both, reference_training.quantize_both,
                                     sharding.quantize_both))


# ---- fp8_quantize_weights: w [B, K, N]
#      -> forward [B, N, K], scales [B, ceil(N/128), ceil(K/128)], backward [B, K, N], scales


def _weights_shapes(w):
    batch, k, n = w.shape
    return ((batch, n, k), SQUARE_BLOCKS), ((batch, k, n), SQUARE_BLOCKS)


def _weights_results(w, *, dtype):
    return _results(_weights_shapes(w), dtype)


quantize_weights_p = register(Operation("fp8_quantize_weights", _weights_results, fold_into_batch,
                                        reference_training.quantize_weights,
                                        reference_training.quantize_weights, sharding.quantize_weights))


# ---- fp8_quantize_swiglu_backward: gate_up [B, T, 2F], d_hidden [B, T, F], [group_sizes]
#      -> rows [B, T, 2F], columns [B, 2F, K], hidden columns [B, F, K], each with its scales


def _swiglu_backward_shapes(gate_up, d_hidden, *group_sizes):
    hidden_columns = _columns_shape(d_hidden, *group_sizes)
    return *_both_shapes(gate_up, *group_sizes), (hidden_columns, ROW_BLOCKS)


def _swiglu_backward_results(gate_up, d_hidden, *group_sizes, dtype):
    return _results(_swiglu_backward_shapes(gate_up, d_hidden, *group_sizes), dtype)


quantize_swiglu_backward_p = register(Operation(
    "fp8_quantize_swiglu_backward", _swiglu_backward_results, fold_into_batch,
    reference_training.quantize_swiglu_backward, reference_training.quantize_swiglu_backward,
    sharding.quantize_swiglu_backward))
