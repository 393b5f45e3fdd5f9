"""`jax.lax.dot_general` through FP8: what Flax's layers take as their `dot_general`."""

from __future__ import annotations

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jax_fp8gemm.autodiff import dot
from jax_fp8gemm.mesh.explicit import is_sharded
from jax_fp8gemm.quantize import INPUT_DTYPES


class Fp8FallbackWarning(UserWarning):
    """`dot_general` computes something without FP8. It comes once in a process for each reason."""


def dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: jax.sharding.Sharding | jax.P | None = None,
    implementation: str | None = None,
) -> Array:
    """`jax.lax.dot_general` through FP8, with its signature: for the layers of Flax, linen and nnx.

    lhs are the activations and rhs is the weight, as in Flax's layers, quantised as `dot` does; results and
    gradients, in reverse mode, have the shapes and dtypes of `jax.lax.dot_general`. Both operands are
    contracted where they lie if lhs has the contracted axes last and rhs has them first, in the same order;
    others are transposed, which costs a copy.

    These are left to `jax.lax.dot_general`, with one `Fp8FallbackWarning` for each reason: batch dimensions,
    as of attention scores; no contracted axes, or a rhs without others; dtypes, of the operands or the
    result, other than bfloat16, float16 and float32; and arrays sharded over an Explicit mesh axis.

    Args:
      lhs, rhs, dimension_numbers, preferred_element_type, out_sharding: as for `jax.lax.dot_general`.
      precision: without meaning in FP8, whose products are exact and whose sums are float32; what is left to
        `jax.lax.dot_general` has it.
      implementation: as for `dot`.

    Returns:
      What `jax.lax.dot_general` would, with FP8's rounding of the operands.

    Raises:
      ValueError, TypeError: whatever `jax.lax.dot_general` raises them for; implementation is none of those.
      NotImplementedError: as for `dot`.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(256, 128, dot_general=dot_general, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4, 256), jnp.bfloat16)).shape
      (2, 4, 128)
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    plain = functools.partial(
        lax.dot_general, dimension_numbers=dimension_numbers, precision=precision,
        preferred_element_type=preferred_element_type, out_sharding=out_sharding)
    out = jax.eval_shape(plain, lhs, rhs)  # raises what lax.dot_general does
    contracted, batch = (tuple(map(_as_axes, axes)) for axes in dimension_numbers)
    reason = _reason_to_fall_back(lhs, rhs, out, contracted, batch, out_sharding)
    if reason:
        _warn_once(reason)
        return plain(lhs, rhs)
    activations, weight = _as_matrices(lhs, rhs, *contracted)
    product = dot(activations, weight, preferred_element_type=out.dtype, implementation=implementation)
    return product.reshape(out.shape)


def _as_axes(axes):
    return tuple(map(int, np.atleast_1d(axes)))


def _reason_to_fall_back(lhs, rhs, out, contracted, batch, out_sharding):
    if batch[0]:
        return "a contraction has batch dimensions"
    if not contracted[0] or len(contracted[1]) == rhs.ndim:
        return "a contraction is no product with a matrix: it has no contracted axes, or rhs no others"
    if any(x.dtype not in INPUT_DTYPES for x in (lhs, rhs, out)):
        return "a contraction has operands or a result other than bfloat16, float16 and float32"
    if out_sharding is not None or any(is_sharded(jax.typeof(x)) for x in (lhs, rhs)):
        return "a contraction is sharded over an Explicit mesh axis, and would be in FP8 inside jax.shard_map"
    return None


@functools.cache
def _warn_once(reason):
    warnings.warn(f"jax_fp8gemm.dot_general: {reason}; it and others like it are left to "
                  "jax.lax.dot_general, without FP8", Fp8FallbackWarning, stacklevel=3)


def _as_matrices(lhs, rhs, lhs_contracted, rhs_contracted):
    """lhs [*, K] and rhs [K, N], transposed only where the contracted axes do not lie so."""
    # Any order of the contracted axes is right. That of lhs leaves at least lhs as it is.
    pairs = sorted(zip(lhs_contracted, rhs_contracted, strict=True))
    lhs_contracted, rhs_contracted = zip(*pairs, strict=True)
    lhs_free, rhs_free = (tuple(axis for axis in range(x.ndim) if axis not in axes)
                          for x, axes in ((lhs, lhs_contracted), (rhs, rhs_contracted)))
    k = math.prod(lhs.shape[axis] for axis in lhs_contracted)
    n = math.prod(rhs.shape[axis] for axis in rhs_free)
    activations = lhs.transpose(lhs_free + lhs_contracted).reshape(*(lhs.shape[i] for i in lhs_free), k)
    return activations, rhs.transpose(rhs_contracted + rhs_free).reshape(k, n)
