"""bf16, f16 or f32 -> ScaledArray, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_fp8gemm import reference
from jax_fp8gemm.scaling import FLOAT8_DTYPES, GRANULARITIES, ROW_BLOCKS, ScaledArray

_INPUT_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def quantize(
    x: Float[Array, "*batch R C"],
    granularity: tuple[int, int] = ROW_BLOCKS,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
) -> ScaledArray:
    """Quantise to FP8 with one f32 scale per block.

    A block's scale is its largest magnitude divided by the largest FP8 number (448 for e4m3, 57344 for e5m2),
    so that no finite element saturates; values are rounded to nearest, ties to even. `reference.quantize`
    defines every bit, the same on every platform, inside and outside of `jit`.

    * All-zero blocks get the smallest scale, 2^-63, and zeros; so do blocks whose largest magnitude is below
      what that scale can tell from zero. The product of two scales is then never subnormal.
    * NaN and infinities become NaN, alone: the scale is that of the block's finite elements.
    * The last blocks of R and C may be partial; zero-sized axes are fine.

    Args:
      x: [*, R, C] bfloat16, float16 or float32; C is the axis that a GEMM will contract.
      granularity: (1, 128) for activations, (128, 128) for weights.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      A ScaledArray of the shape of x.

    Raises:
      ValueError: x has fewer than two axes or another dtype, or granularity or dtype is none of those above.

    Example:
      >>> x = quantize(jnp.ones((4, 256), jnp.bfloat16))
      >>> x.shape, x.scales.shape
      ((4, 256), (4, 2))
    """
    x = jnp.asarray(x)
    dtype = jnp.dtype(dtype)
    if x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"quantize: expected x of dtype bfloat16, float16 or float32, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"quantize: expected x with at least two axes, got shape {x.shape}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"quantize: expected a granularity of {GRANULARITIES}, got {granularity!r}")
    if dtype not in FLOAT8_DTYPES:
        raise ValueError(f"quantize: expected dtype float8_e4m3fn or float8_e5m2, got {dtype}")
    with jax.named_scope("fp8_quantize"):
        return ScaledArray(*reference.quantize(x, granularity=granularity, dtype=dtype), granularity)


def dequantize(array: ScaledArray, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Float[Array, "*batch R C"]:
    """Values times scales: the product in f32, rounded once to `dtype`.

    Args:
      array: of shape [*, R, C].
      dtype: of the result.

    Returns:
      [*, R, C] of `dtype`.

    Raises:
      ValueError: array is no ScaledArray, or its values and scales do not fit together.

    Example:
      >>> dequantize(quantize(jnp.full((4, 256), 3.0)), jnp.float32)[0, 0]
      Array(3., dtype=float32)
    """
    if not isinstance(array, ScaledArray):
        raise ValueError(f"dequantize: expected a ScaledArray, got {type(array).__name__}")
    array.validate("dequantize: array")
    return reference.dequantize(array.values, array.scales, array.granularity).astype(dtype)
