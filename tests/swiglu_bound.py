"""How far quantised SwiGLU may be from exact: derived.

In units of u = 2^-24, the relative error of an f32 rounding to nearest:

    exp                  8   four units in the last place (CUDA's has two)
    1 + exp              1
    gate / that          3   as a product with the kernel's reciprocal, off by one unit in the last place
    times up             1
    ------------------------
    y                   13   and so has the largest |y| of a block
    scale               15   times 1 / max_float8, which is rounded itself
    y * (1 / scale)     30   a rounding each for the reciprocal and the product

The FP8 value is at most half a step from the last, so at most half a step and 30 u from the exact quotient.
"""

import ml_dtypes
import numpy as np

from jax_fp8gemm.reference import MIN_SCALE

U = 2.0**-24


def exact_swiglu(x):
    """x [*, M, 2F] -> [*, M, F] in f64."""
    gate, up = np.split(np.asarray(x, np.float64), 2, -1)
    return gate / (1 + np.exp(-gate)) * up


def assert_is_quantized_swiglu(array, x):
    """Check a ScaledArray [*, M, F] against x [*, M, 2F], all of it finite and moderate."""
    y, info = exact_swiglu(x), ml_dtypes.finfo(array.dtype)
    *leading, columns = y.shape
    padded = np.pad(y, [(0, 0)] * len(leading) + [(0, -columns % 128)])
    blocks = padded.reshape(*leading, padded.shape[-1] // 128, 128)
    scales = np.maximum(np.abs(blocks).max(-1) / float(info.max), MIN_SCALE)
    np.testing.assert_allclose(array.scales, scales, rtol=15 * U)
    quotients = y / np.repeat(scales, 128, -1)[..., :columns]
    error = np.abs(np.asarray(array.values, np.float64) - quotients)
    slack = 30 * U * np.abs(quotients)
    _, exponents = np.frexp(np.abs(quotients) + slack)  # of a fraction between 1/2 and 1
    smallest_normal_exponent = int(np.log2(float(info.smallest_normal))) + 1
    half_steps = np.ldexp(1.0, np.maximum(exponents, smallest_normal_exponent) - info.nmant - 2)
    assert np.all(error <= half_steps + slack)
