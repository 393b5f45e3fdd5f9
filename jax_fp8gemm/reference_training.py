"""The meaning in plain jnp, as in reference.py, of the quantisations that a training step makes.

`quantize_both` and `quantize_weights` are defined to the bit; `quantize_swiglu_backward` up to the rounding
of its f32 arithmetic.
"""

from __future__ import annotations

import jax.numpy as jnp

from jax_fp8gemm import reference_moe
from jax_fp8gemm.jit.problem import SCALE_BLOCK
from jax_fp8gemm.reference import group_bounds, quantize
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS


def quantize_both(x, *group_sizes, dtype):
    """x [B, T, N], group sizes [B, G] or none -> two pairs of values of FP8 `dtype` and their scales, f32.

    * rows [B, T, N], scales [B, T, ceil(N/128)]: `quantize` of x, the rows of no group as zeros;
    * columns [B, N, K], scales [B, N, K/128]: `reference_moe.quantize_transposed`. Without group sizes all
      tokens are one group.
    """
    return [*_rows(x, *group_sizes, dtype=dtype), *_columns(x, *group_sizes, dtype=dtype)]


def quantize_weights(w, *, dtype):
    """w [B, K, N] -> two pairs of values of FP8 `dtype` and their scales, f32.

    * forward [B, N, K], scales [B, ceil(N/128), ceil(K/128)]: the transpose of
    * backward [B, K, N], scales [B, ceil(K/128), ceil(N/128)]: `quantize` of w in blocks of 128 x 128.
    """
    backward = quantize(w, granularity=SQUARE_BLOCKS, dtype=dtype)
    return [*(array.mT for array in backward), *backward]


def quantize_swiglu_backward(gate_up, d_hidden, *group_sizes, dtype):
    """gate_up [B, T, 2F], d_hidden [B, T, F], group sizes [B, G] or none -> three pairs of values and scales.

    * rows [B, T, 2F] and columns [B, 2F, K]: `quantize_both` of `swiglu_gradients`' d_gate | d_up;
    * hidden_columns [B, F, K]: of its hidden, as the columns are.
    """
    d_gate_up, hidden = swiglu_gradients(gate_up, d_hidden)
    hidden_columns = _columns(hidden, *group_sizes, dtype=dtype)
    return [*quantize_both(d_gate_up, *group_sizes, dtype=dtype), *hidden_columns]


def swiglu_gradients(gate_up, d_hidden):
    """gate | up [B, T, 2F], d_hidden [B, T, F] -> d_gate | d_up [B, T, 2F], hidden [B, T, F], all f32.

    hidden = silu(gate) * up, and d_hidden is the gradient of it. With s = 1 / (1 + exp(-gate)):

        silu(gate) = gate * s        d_up = d_hidden * silu(gate)
        d_gate = d_hidden * up * (s * (1 + gate * (1 - s)))
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=2)
    d_hidden = d_hidden.astype(jnp.float32)
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    d_gate = d_hidden * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    return jnp.concatenate([d_gate, d_hidden * silu], axis=2), silu * up


def _rows(x, *group_sizes, dtype):
    if group_sizes:
        tokens = x.shape[1]
        num_valid = group_bounds(*group_sizes, tokens)[1].max(axis=1, initial=0)
        x = jnp.where(jnp.arange(tokens)[:, None] < num_valid[:, None, None], x, 0)
    return quantize(x, granularity=ROW_BLOCKS, dtype=dtype)


def _columns(x, *group_sizes, dtype):
    if group_sizes:
        return reference_moe.quantize_transposed(x, *group_sizes, dtype=dtype)
    whole_blocks = jnp.pad(x, ((0, 0), (0, -x.shape[1] % SCALE_BLOCK), (0, 0)))
    return quantize(whole_blocks.mT, granularity=ROW_BLOCKS, dtype=dtype)
