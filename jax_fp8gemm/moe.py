"""What surrounds the grouped GEMMs of a Mixture-of-Experts layer: tokens to the rows of experts, and back."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jax_fp8gemm import reference_moe
from jax_fp8gemm.moe_primitives import permute_p, sort_by_expert_p
from jax_fp8gemm.operation import IMPLEMENTATIONS, bind_or_reference, match_varying
from jax_fp8gemm.scaling import FLOAT8_DTYPES, ROW_BLOCKS, ScaledArray, is_array

_INPUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def permute(
    x: Float[Array, "T K"],
    expert_ids: Int32[Array, "T top_k"],
    num_experts: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: str | None = None,
) -> tuple[ScaledArray, Int32[Array, " E"], Int32[Array, "T top_k"]]:
    """Sort tokens by expert and quantise them: the operands of `fp8_gemm_ragged_m`.

    Each token becomes as many rows as it has experts. Rows are sorted by expert; those of one expert follow
    (token, slot), so that the order depends on the ids alone. A row is what `quantize` makes of its token, to
    the bit.

    An id outside of [0, num_experts), such as that of an expert on another device, is dropped: its position
    is T * top_k, which is no row. The rows that are left over stand behind all groups, and are zeros with the
    smallest scale.

    On Hopper these are two kernels, also under `vmap`: one sorts, the other reads each token once, quantises
    it once, and writes its rows. XLA then turns the scales to the layout that a GEMM wants, in a small copy.
    Nothing is copied to the host. On a mesh K may be sharded; T cannot, outside of `jax.shard_map`, in which
    each device sorts its own tokens.

    Args:
      x: [T, K] bfloat16, float16 or float32; a K that is a multiple of 8 is fastest.
      expert_ids: [T, top_k] int32, the experts of each token.
      num_experts: E, at least 0.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: None takes the kernels on Hopper GPUs, unless a size is symbolic (`jax.export`), and
        plain jnp elsewhere, with the same bits; "hopper" insists on the kernels; "reference" takes jnp
        (`reference_moe`) everywhere.

    Returns:
      The rows, a ScaledArray [T * top_k, K] of granularity (1, 128); group_sizes [E] int32, how many of them
      each expert has; positions [T, top_k] int32, the row of each token and slot, for `unpermute`.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist, or a size is
        beyond what the kernels take.

    Example:
      >>> tokens = jnp.arange(1, 4, dtype=jnp.bfloat16)[:, None] * jnp.ones((3, 128), jnp.bfloat16)
      >>> rows, group_sizes, positions = permute(tokens, jnp.array([[1, 0], [2, 1], [0, -1]]), 3)
      >>> dequantize(rows)[:, 0]
      Array([1, 3, 1, 2, 2, 0], dtype=bfloat16)
      >>> group_sizes.tolist(), positions.tolist()
      ([2, 2, 1], [[2, 0], [4, 3], [1, 6]])
    """
    dtype = jnp.dtype(dtype)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"permute: implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    x = _checked("permute: x", x, ("T", "K"), *_INPUT_DTYPES)
    expert_ids = _checked("permute: expert_ids", expert_ids, (x.shape[0], "top_k"), jnp.int32)
    if not isinstance(num_experts, numbers.Integral) or num_experts < 0:
        raise ValueError(f"permute: num_experts: expected a whole number of at least 0, got {num_experts!r}")
    if dtype not in FLOAT8_DTYPES:
        raise ValueError(f"permute: dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")

    with jax.named_scope("fp8_permute"):
        x, expert_ids = match_varying(*map(_with_batch_axis, (x, expert_ids)))
        group_sizes, positions, num_rows = bind_or_reference(
            sort_by_expert_p, reference_moe.sort_by_expert, expert_ids, num_experts=int(num_experts),
            implementation=implementation)
        values, scales = bind_or_reference(permute_p, reference_moe.permute, x, positions, num_rows,
                                           dtype=dtype, implementation=implementation)
        group_sizes, positions, values, scales = map(
            _without_batch_axis, (group_sizes, positions, values, scales))
        return ScaledArray(values, scales, ROW_BLOCKS), group_sizes, positions


def unpermute(
    y: BFloat16[Array, "M D"],
    positions: Int32[Array, "T top_k"],
    weights: Float32[Array, "T top_k"],
) -> BFloat16[Array, "T D"]:
    """Add up the rows of each token, each times its routing weight: what follows the experts' last GEMM.

    out[t] is the sum over slots j of weights[t, j] * y[positions[t, j]], in float32, in the order of the
    slots, rounded once. A position outside of [0, M) contributes nothing, not even a NaN of its weight; so
    do those of the ids that `permute` dropped.

    This is plain jnp on every platform, and XLA makes one kernel of it.

    Args:
      y: [M, D] bfloat16.
      positions: [T, top_k] int32, from `permute`.
      weights: [T, top_k] float32.

    Returns:
      [T, D] bfloat16. Platforms differ in whether a product is rounded before it is added.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.

    Example:
      >>> y = jnp.array([[1.0], [2.0], [4.0]], jnp.bfloat16)
      >>> unpermute(y, jnp.array([[2, 0], [1, 3]]), jnp.array([[0.5, 0.25], [1.0, jnp.nan]]))
      Array([[2.25],
             [2]], dtype=bfloat16)
    """
    y = _checked("unpermute: y", y, ("M", "D"), jnp.bfloat16)
    positions = _checked("unpermute: positions", positions, ("T", "top_k"), jnp.int32)
    weights = _checked("unpermute: weights", weights, positions.shape, jnp.float32)

    with jax.named_scope("fp8_unpermute"):
        return reference_moe.unpermute(y, positions, weights)


def _with_batch_axis(x):
    return x.reshape(1, *x.shape)


def _without_batch_axis(x):
    return x.reshape(x.shape[1:])


def _checked(name, x, shape, *dtypes):
    """x as an array. `shape` has a size for each axis, or a name where any will do."""
    expected = f"{name}: expected {' or '.join(jnp.dtype(dtype).name for dtype in dtypes)} of shape " \
               f"[{', '.join(map(str, shape))}]"
    if not is_array(x):
        raise ValueError(f"{expected}, got {type(x).__name__}")
    fits = len(x.shape) == len(shape) and all(
        isinstance(size, str) or size == got for size, got in zip(shape, x.shape, strict=True))
    if not fits or x.dtype not in map(jnp.dtype, dtypes):
        raise ValueError(f"{expected}, got {x.dtype} of shape {x.shape}")
    return jnp.asarray(x)
