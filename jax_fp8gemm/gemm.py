"""The GEMMs on scaled arrays: checks, documentation, one bind each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_fp8gemm.operation import IMPLEMENTATIONS, match_varying
from jax_fp8gemm.primitives import gemm_p
from jax_fp8gemm.scaling import GRANULARITIES, ROW_BLOCKS, ScaledArray, is_array

_OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def fp8_gemm(
    lhs: Float[ScaledArray, "*batch M K"],
    rhs: Float[ScaledArray, "*batch N K"],
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    accumulator: Float32[Array, "*batch M N"] | None = None,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch M N"]:
    """lhs @ rhs.T of two scaled FP8 arrays, on Hopper's tensor cores; any M, N, K >= 0.

    Every 128 of K are summed in the tensor cores, then added with their scales to an f32 register, in K
    order; `accumulator` comes last, and the result is rounded once. The bits do not change from run to run,
    nor with the tiling, except that a small M or N may have K split into a few parts, which are summed in a
    fixed order.

    K that is no multiple of 16 costs a padded copy of both values; nothing else is padded. Under `vmap`, over
    one operand or both and nested, the call stays one kernel launch.

    Args:
      lhs: [M, K] or [B, M, K], float8_e4m3fn or float8_e5m2, granularity (1, 128).
      rhs: [N, K] or [B, N, K], the same dtypes, granularity (128, 128) or (1, 128).
      out_dtype: bfloat16 or float32.
      accumulator: [M, N] or [B, M, N] float32, added to the product; needs out_dtype=float32. The result
        takes its place in memory where it is donated to `jit`, or is not used afterwards inside of it.
      batch_invariant: never split K, so that a row's bits do not depend on M, at some cost for small M.
      implementation: None takes the kernel on Hopper GPUs and plain jnp elsewhere; "hopper" insists on the
        kernel; "reference" takes jnp (`reference.gemm`) everywhere.

    Returns:
      [M, N] or [B, M, N] of out_dtype.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: implementation="hopper" is lowered for something else, an operand is sharded over
        an Explicit mesh axis (call it inside `jax.shard_map`), or the kernel would have to be compiled for a
        size that is symbolic (`jax.export`) or does not fit into 31 bits.

    Example:
      >>> w = quantize(jnp.ones((2112, 7168), jnp.bfloat16), granularity=(128, 128))
      >>>
      >>> @jax.jit
      ... def project(x):
      ...     return fp8_gemm(quantize(x), w)
      >>>
      >>> y = project(jnp.ones((64, 7168), jnp.bfloat16))
      >>> y.shape, y.dtype, y[0, 0]
      ((64, 2112), dtype(bfloat16), Array(7168, dtype=bfloat16))
    """
    _check_operands(lhs, rhs)
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype not in _OUT_DTYPES:
        raise ValueError(f"fp8_gemm: out_dtype: expected bfloat16 or float32, got {out_dtype}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"fp8_gemm: implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    out_shape = *lhs.shape[:-1], rhs.shape[-2]
    if accumulator is not None:
        _check_accumulator(accumulator, out_shape, out_dtype)

    with jax.named_scope("fp8_gemm"):
        arrays = [lhs.values, lhs.scales, rhs.values, rhs.scales]
        if accumulator is not None:
            arrays.append(accumulator)
        operands = [jnp.reshape(x, x.shape if lhs.ndim == 3 else (1, *x.shape)) for x in arrays]
        (out,) = gemm_p.bind(*match_varying(*operands), out_dtype=out_dtype, implementation=implementation,
                             batch_invariant=bool(batch_invariant))
        return out.reshape(out_shape)


def _check_operands(lhs, rhs):
    for name, array, granularities in ("lhs", lhs, (ROW_BLOCKS,)), ("rhs", rhs, GRANULARITIES):
        if not isinstance(array, ScaledArray):
            raise ValueError(
                f"fp8_gemm: {name}: expected a ScaledArray (see quantize), got {type(array).__name__}")
        array.validate(f"fp8_gemm: {name}")
        if array.ndim not in (2, 3):
            raise ValueError(f"fp8_gemm: {name}: expected two axes, or three with a batch in front, "
                             f"got shape {array.shape}; use jax.vmap for more")
        if array.granularity not in granularities:
            raise ValueError(
                f"fp8_gemm: {name}: expected a granularity of {granularities}, got {array.granularity}")
    if lhs.shape[:-2] != rhs.shape[:-2]:
        raise ValueError(f"fp8_gemm: rhs: expected leading axes {lhs.shape[:-2]}, as in lhs of shape "
                         f"{lhs.shape}, got shape {rhs.shape}; use jax.vmap to share an operand")
    if lhs.shape[-1] != rhs.shape[-1]:
        raise ValueError(f"fp8_gemm: rhs: expected K = {lhs.shape[-1]} in the last axis, as in lhs of shape "
                         f"{lhs.shape}, got shape {rhs.shape}")


def _check_accumulator(accumulator, out_shape, out_dtype):
    if out_dtype != jnp.float32:
        raise ValueError(f"fp8_gemm: out_dtype: expected float32 with an accumulator, got {out_dtype}")
    if not is_array(accumulator):
        raise ValueError(f"fp8_gemm: accumulator: expected float32 of shape {out_shape}, "
                         f"got {type(accumulator).__name__}")
    if accumulator.dtype != jnp.float32 or accumulator.shape != out_shape:
        raise ValueError(f"fp8_gemm: accumulator: expected float32 of shape {out_shape}, "
                         f"got {accumulator.dtype} of shape {accumulator.shape}")
