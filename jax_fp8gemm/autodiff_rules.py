"""The `custom_vjp` rules of the differentiable products, on operands that have been checked.

What they keep for the backward pass are FP8 tensors: the input, quantised along the tokens in the pass that
quantises it along its features, and the weight:

| GEMM            | lhs           | rhs            | contracts |
|-----------------|---------------|----------------|-----------|
| forward         | x, 1x128      | w.T, 128x128   | K         |
| input gradient  | dy, 1x128     | w, 128x128     | N         |
| weight gradient | x.T, 1x128    | dy.T, 1x128    | tokens    |

x is [T, K]; group_sizes are [G], or None for a product without groups.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jax_fp8gemm.gemm import fp8_gemm, fp8_gemm_ragged_k, fp8_gemm_ragged_m
from jax_fp8gemm.mesh.explicit import spec_of
from jax_fp8gemm.mesh.plan import axes_of
from jax_fp8gemm.prepared import PreparedWeight
from jax_fp8gemm.quantize import quantize, quantize_swiglu
from jax_fp8gemm.quantize_training import quantize_both, quantize_swiglu_backward

# What kept tensors and the results of GEMMs are called, for `jax.checkpoint_policies`.
GEMM_NAME = "fp8_gemm"
RESIDUAL_NAME = "fp8_residual"


class Options(NamedTuple):
    """Static arguments of the rules; gradients have the dtypes of what they are gradients of.

    They lie as that does, too: specs are those of types on Explicit mesh axes, and None elsewhere.
    """

    x_dtype: jnp.dtype
    weight_dtypes: tuple[jnp.dtype, ...]
    out_dtype: jnp.dtype
    implementation: str | None
    x_spec: PartitionSpec | None = None
    weight_specs: tuple[PartitionSpec | None, ...] = (None, None)
    out_spec: PartitionSpec | None = None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(options, group_sizes, x, weight):
    rows = quantize(x, implementation=options.implementation)
    return _multiply(options, rows, weight.forward, group_sizes, options.out_dtype, options.out_spec)


def _product_forward(options, group_sizes, x, weight):
    rows, columns = quantize_both(x, group_sizes, implementation=options.implementation)
    out = _multiply(options, rows, weight.forward, group_sizes, options.out_dtype, options.out_spec)
    return out, (group_sizes, *_kept(columns, weight.backward))


def _product_backward(options, residuals, dy):
    group_sizes, x_columns, weight = residuals
    dy_rows, dy_columns = quantize_both(dy, group_sizes, implementation=options.implementation)
    dx = _multiply(options, dy_rows, weight, group_sizes, options.x_dtype, options.x_spec)
    dw = _weight_gradient(options, x_columns, dy_columns, group_sizes, 0)
    return None, dx, PreparedWeight(dw, None, None)


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_product(options, group_sizes, x, gate_up, down):
    rows = quantize(x, implementation=options.implementation)
    return _gated(options, group_sizes, rows, gate_up, down)[1]


def _gated(options, group_sizes, rows, gate_up, down):
    """gate | up [T, 2F], and the result [T, N]."""
    pre = _multiply(options, rows, gate_up.forward, group_sizes, options.out_dtype, _gate_up_spec(options))
    hidden = quantize_swiglu(pre, group_sizes=group_sizes, implementation=options.implementation)
    return pre, _multiply(options, hidden, down.forward, group_sizes, options.out_dtype, options.out_spec)


def _gate_up_spec(options):
    """Where gate | up lies on Explicit axes: as x does along tokens, and else as the weight along 2F."""
    if options.x_spec is None:
        return None
    tokens, columns = axes_of(options.x_spec[0]), axes_of(options.weight_specs[0][-1])
    return PartitionSpec(tokens or None, None if set(tokens) & set(columns) else columns or None)


def _feed_forward_forward(options, group_sizes, x, gate_up, down):
    rows, columns = quantize_both(x, group_sizes, implementation=options.implementation)
    pre, out = _gated(options, group_sizes, rows, gate_up, down)
    return out, (group_sizes, pre, *_kept(columns, gate_up.backward, down.backward))


def _feed_forward_backward(options, residuals, dy):
    group_sizes, pre, x_columns, gate_up, down = residuals
    dy_rows, dy_columns = quantize_both(dy, group_sizes, implementation=options.implementation)
    d_hidden = _multiply(options, dy_rows, down, group_sizes, options.out_dtype, spec_of(pre))
    d_pre_rows, d_pre_columns, hidden_columns = quantize_swiglu_backward(
        pre, d_hidden, group_sizes, implementation=options.implementation)
    dx = _multiply(options, d_pre_rows, gate_up, group_sizes, options.out_dtype, options.x_spec)
    d_gate_up = _weight_gradient(options, x_columns, d_pre_columns, group_sizes, 0)
    d_down = _weight_gradient(options, hidden_columns, dy_columns, group_sizes, 1)
    return None, dx, PreparedWeight(d_gate_up, None, None), PreparedWeight(d_down, None, None)


gated_product.defvjp(_feed_forward_forward, _feed_forward_backward)


# ---- what the rules are made of


def _multiply(options, lhs, rhs, group_sizes, dtype, out_sharding):
    gemm_options = {"out_dtype": _kernel_dtype(dtype), "implementation": options.implementation,
                    "out_sharding": out_sharding}
    if group_sizes is None:
        out = fp8_gemm(lhs, rhs, **gemm_options)
    else:
        out = fp8_gemm_ragged_m(lhs, rhs, group_sizes, **gemm_options)
    return checkpoint_name(out.astype(dtype), GEMM_NAME)


def _weight_gradient(options, lhs, rhs, group_sizes, weight):
    """lhs [K, T'], rhs [N, T'] -> [K, N], or [G, K, N], the gradient of the weight of this number."""
    dtype = options.weight_dtypes[weight]
    gemm_options = {"out_dtype": _kernel_dtype(dtype), "implementation": options.implementation,
                    "out_sharding": options.weight_specs[weight]}
    if group_sizes is None:
        return fp8_gemm(lhs, rhs, **gemm_options).astype(dtype)
    return fp8_gemm_ragged_k(lhs, rhs, group_sizes, **gemm_options).astype(dtype)


def _kernel_dtype(dtype):
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def _kept(*arrays):
    return [jax.tree.map(lambda leaf: checkpoint_name(leaf, RESIDUAL_NAME), array) for array in arrays]
