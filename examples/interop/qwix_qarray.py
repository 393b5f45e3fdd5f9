"""A weight that qwix has quantised, in fp8_gemm, and a weight of ours in qwix.dot.

    python examples/interop/qwix_qarray.py
"""

import jax
import jax.numpy as jnp
import qwix

from jax_fp8gemm import fp8_gemm, quantize
from jax_fp8gemm.interop import from_qarray, to_qarray

# qwix has weights as [K, N], and fp8_gemm as [N, K]: .mT is in between.
TILINGS = {
    "a scale of each column": {"channelwise_axes": [1]},
    "a scale of 128 x 128": {"tiled_axes": {0: 128, 1: 128}},
}


def relative_error(y, expected):
    return float(jnp.linalg.norm(jnp.float32(y) - expected) / jnp.linalg.norm(expected))


if __name__ == "__main__":
    x = jax.random.normal(jax.random.key(0), (64, 512), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (512, 384), jnp.bfloat16)
    exact = jnp.float32(x) @ jnp.float32(w)

    print(f"{'':34}granularity or tiles   error")
    for name, options in TILINGS.items():
        weight = from_qarray(qwix.quantize(w, jnp.float8_e4m3fn, **options).mT)
        error = relative_error(fp8_gemm(quantize(x), weight), exact)
        print(f"{f'fp8_gemm, {name}':34}{weight.granularity!s:22}{error:6.2%}")

    qarray = to_qarray(quantize(w.mT, (128, 128))).mT
    error = relative_error(qwix.dot(x, qarray), exact)
    print(f"{'qwix.dot, which leaves x in bf16':34}{qarray.scale_tile_shape!s:22}{error:6.2%}")
