"""What a training step quantises: each array once for every GEMM that it goes into.

A layer x @ w has two more products in its gradient, dy @ w.T and x.T @ dy, and each contracts another axis.
FP8 operands are scaled along the contracted axis, so that x and dy are needed by rows and by columns, and w
in both orders of its axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_fp8gemm import reference_training
from jax_fp8gemm.operation import bind_or_reference, match_varying
from jax_fp8gemm.quantize import (
    check_is_int32,
    check_quantizable,
    mapped_axes,
    scaled_array,
    with_batch_axis,
)
from jax_fp8gemm.quantize_training_primitives import (
    quantize_both_p,
    quantize_swiglu_backward_p,
    quantize_weights_p,
)
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, ScaledArray


def quantize_both(
    x: Float[Array, "*batch T N"],
    group_sizes: Int32[Array, " G"] | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: str | None = None,
) -> tuple[ScaledArray, ScaledArray]:
    """Quantise by rows and by columns in one pass: for the product with a weight, and for its gradient.

    rows is `quantize(x)` and columns `quantize_transposed(x, group_sizes)`, to the bit. Without group_sizes
    all T tokens are one group. Rows past the sum of the sizes are not read: they are zeros with the smallest
    scale in rows, and not in columns.

    On Hopper this is one kernel, also under `vmap`; it reads x once.

    Args:
      x: [*, T, N] bfloat16, float16 or float32, [T, N] with group_sizes; an N that is a multiple of 8 is
        fastest.
      group_sizes: [G] int32, tokens sorted by group. A negative one counts as zero; tokens that do not exist
        are left out.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: as for `quantize`; "reference" takes `reference_training.quantize_both`.

    Returns:
      rows, [*, T, N], and columns, [*, N, K], of granularity (1, 128). K is `ragged_k_size(T, G)`, and
      without group_sizes T in whole blocks of 128.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist.

    Example:
      >>> rows, columns = quantize_both(jnp.ones((5, 64), jnp.bfloat16), jnp.array([2, 3], jnp.int32))
      >>> rows.shape, columns.shape, dequantize(columns)[0, 126:132]
      ((5, 64), (64, 256), Array([0, 0, 1, 1, 1, 0], dtype=bfloat16))
    """
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    check_quantizable("quantize_both", x, dtype, implementation)
    sizes = _checked_sizes("quantize_both", "x", x, "[T, N]", group_sizes)
    with jax.named_scope("fp8_quantize_both"):
        operands = match_varying(with_batch_axis(x), *sizes)
        results = bind_or_reference(quantize_both_p, reference_training.quantize_both, *operands, dtype=dtype,
                                    implementation=implementation, mapped=mapped_axes(x))
        return _scaled_arrays(x, results, ROW_BLOCKS)


def quantize_weights(
    w: Float[Array, "*batch K N"],
    *,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: str | None = None,
) -> tuple[ScaledArray, ScaledArray]:
    """Quantise a weight in both orders of its axes in one pass: for x @ w, and for dy @ w.T.

    Each is the rhs of `fp8_gemm`, or with leading axes of `fp8_gemm_ragged_m`, which contract the last axis:
    forward is `quantize(w.mT, (128, 128))` and backward `quantize(w, (128, 128))`, to the bit. They have the
    same values and scales.

    On Hopper this is one kernel, also under `vmap`; it reads w once.

    Args:
      w: [*, K, N] bfloat16, float16 or float32; K and N that are multiples of 16 are fastest.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: as for `quantize`; "reference" takes `reference_training.quantize_weights`.

    Returns:
      forward, [*, N, K], and backward, [*, K, N], of granularity (128, 128).

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist.

    Example:
      >>> forward, backward = quantize_weights(jnp.ones((256, 384), jnp.bfloat16))
      >>> forward.shape, backward.shape, backward.scales.shape
      ((384, 256), (256, 384), (2, 3))
    """
    w, dtype = jnp.asarray(w), jnp.dtype(dtype)
    check_quantizable("quantize_weights", w, dtype, implementation, name="w")
    with jax.named_scope("fp8_quantize_weights"):
        results = bind_or_reference(quantize_weights_p, reference_training.quantize_weights,
                                    with_batch_axis(w), dtype=dtype, implementation=implementation,
                                    mapped=mapped_axes(w))
        return _scaled_arrays(w, results, SQUARE_BLOCKS)


def quantize_swiglu_backward(
    gate_up: Float[Array, "*batch T 2F"],
    d_hidden: Float[Array, "*batch T F"],
    group_sizes: Int32[Array, " G"] | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: str | None = None,
) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
    """Quantise the gradient of hidden = silu(gate) * up, and hidden itself, in one pass.

    What the gradients of a feed-forward layer take besides dy. gate is the first half of gate_up's columns
    and up the second; with s = 1 / (1 + exp(-gate)):

        d_gate = d_hidden * up * s * (1 + gate * (1 - s))        d_up = d_hidden * gate * s

    All of it is f32 arithmetic, without a rounding to bfloat16 in between; `quantize_both` of the result,
    [d_gate | d_up], is rows and columns. `exp` differs between platforms in its last bits, so that scales
    may, and values whose exact number is next to the middle between two of the FP8 format.

    On Hopper this is one kernel, also under `vmap`, which reads both operands once, where F is a multiple of
    128; with another F XLA computes the gradient, and two kernels quantise it.

    Args:
      gate_up: [*, T, 2F] bfloat16, float16 or float32, [T, 2F] with group_sizes.
      d_hidden: [*, T, F], the gradient of hidden, of the same dtype.
      group_sizes: [G] int32, as for `quantize_both`.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: as for `quantize`; "reference" takes `reference_training.quantize_swiglu_backward`.

    Returns:
      rows, [*, T, 2F], columns, [*, 2F, K], and hidden_columns, [*, F, K], the columns of hidden, all of
      granularity (1, 128). K as in `quantize_both`.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist.

    Example:
      >>> gate_up, d_hidden = jnp.ones((5, 512), jnp.bfloat16), jnp.ones((5, 256), jnp.bfloat16)
      >>> rows, columns, hidden_columns = quantize_swiglu_backward(gate_up, d_hidden)
      >>> rows.shape, columns.shape, hidden_columns.shape
      ((5, 512), (512, 128), (256, 128))
      >>> dequantize(rows)[0, ::256], dequantize(hidden_columns)[0, 4:6]
      (Array([0.925781, 0.730469], dtype=bfloat16), Array([0.730469, 0], dtype=bfloat16))
    """
    function = "quantize_swiglu_backward"
    gate_up, d_hidden, dtype = jnp.asarray(gate_up), jnp.asarray(d_hidden), jnp.dtype(dtype)
    check_quantizable(function, gate_up, dtype, implementation, name="gate_up")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{function}: gate_up: expected an even number of columns, gate and up, got shape "
                         f"{gate_up.shape}")
    expected = *gate_up.shape[:-1], gate_up.shape[-1] // 2
    if d_hidden.shape != expected or d_hidden.dtype != gate_up.dtype:
        raise ValueError(f"{function}: d_hidden: expected {gate_up.dtype} of shape {expected}, as gate_up is "
                         f"of shape {gate_up.shape}, got {d_hidden.dtype} of shape {d_hidden.shape}")
    sizes = _checked_sizes(function, "gate_up", gate_up, "[T, 2F]", group_sizes)
    with jax.named_scope("fp8_quantize_swiglu_backward"):
        operands = match_varying(*map(with_batch_axis, (gate_up, d_hidden)), *sizes)
        results = bind_or_reference(
            quantize_swiglu_backward_p, reference_training.quantize_swiglu_backward, *operands, dtype=dtype,
            implementation=implementation, mapped=mapped_axes(gate_up, d_hidden))
        return _scaled_arrays(gate_up, results, ROW_BLOCKS)


def _checked_sizes(function, name, x, axes, group_sizes):
    """The group sizes as an operand with a batch axis, or no operand."""
    if group_sizes is None:
        return []
    if x.ndim != 2:
        raise ValueError(f"{function}: {name}: expected {axes} with group_sizes, got shape {x.shape}; use "
                         "jax.vmap for more")
    check_is_int32(f"{function}: group_sizes", group_sizes)
    if group_sizes.ndim != 1:
        raise ValueError(f"{function}: group_sizes: expected one axis, got shape {group_sizes.shape}")
    return [jnp.asarray(group_sizes)[None]]


def _scaled_arrays(x, results, granularity):
    """Values and scales in turn, with the leading axes of x, as arrays."""
    pairs = zip(results[::2], results[1::2], strict=True)
    return tuple(scaled_array(x, values, scales, granularity) for values, scales in pairs)
