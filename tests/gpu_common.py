"""Random operands, and what outputs are compared by."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm import quantize
from jax_fp8gemm.jit.problem import SCALE_BLOCK, ceil_div
from jax_fp8gemm.scaling import ROW_BLOCKS

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def draw(seed, shape, granularity=ROW_BLOCKS, kind="magnitudes", dtype=jnp.float8_e4m3fn):
    """A quantised [*, R, K]: normal in blocks of magnitudes from 1e-6 to 1e6, or uniform between 0 and 1."""
    key, magnitude_key = jax.random.split(jax.random.key(seed))
    if kind == "positive":
        return quantize(jax.random.uniform(key, shape), granularity, dtype)
    *leading, rows, k = shape
    blocks = *leading, ceil_div(rows, granularity[0]), ceil_div(k, SCALE_BLOCK)
    magnitudes = 10 ** jax.random.uniform(magnitude_key, blocks, minval=-6, maxval=6)
    magnitudes = jnp.repeat(jnp.repeat(magnitudes, granularity[0], -2), SCALE_BLOCK, -1)[..., :rows, :k]
    return quantize(jax.random.normal(key, shape) * magnitudes, granularity, dtype)


def bits(x):
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


def sample(size, count, rng):
    """Sorted indices below size, the first and the last among them."""
    drawn = rng.choice(size, min(size, count), replace=False)
    return np.unique([0, size - 1, *drawn])
