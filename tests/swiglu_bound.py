"""How far quantised SwiGLU may be from exact: derived.

In units of u = 2^-24, the relative error of an f32 rounding to nearest, g the largest |gate| of a block:

    -gate * log2(e)      1.25 g   in the exponential: that is a rounding, and 1/4 for log2(e), of a number of
                                  magnitude |gate| log2(e), which each change 2^x by ln(2) times as much
    exp2                 8        four units in the last place (the kernel's has two)
    1 + exp              1        and no more of the errors above than there were
    gate / that          3        as a product with the kernel's reciprocal, off by one unit in the last place
    times up             1
    ------------------------
    y                   13 + 1.25 g   and so has the largest |y| of a block
    scale               15 + 1.25 g   times 1 / max_float8, which is rounded itself
    y * (1 / scale)     30 + 2.5 g    a rounding each for the reciprocal and the product

The FP8 value is at most half a step from the last, so at most half a step and so many u from the exact
quotient. Where exp(-gate) exceeds 2^126, which a gate below -87.3 makes it, the kernel's silu is -0.
"""

import ml_dtypes
import numpy as np

from jax_fp8gemm.reference import MIN_SCALE

U = 2.0**-24


def exact_swiglu(x):
    """x [*, M, 2F] -> [*, M, F] in f64."""
    gate, up = np.split(np.asarray(x, np.float64), 2, -1)
    return gate / (1 + np.exp(-gate)) * up


def largest_of_blocks(x):
    """x [*, M, F] -> [*, M, ceil(F/128)], the largest magnitudes of 1 x 128."""
    *leading, columns = x.shape
    padded = np.pad(np.abs(x), [(0, 0)] * len(leading) + [(0, -columns % 128)])
    return padded.reshape(*leading, padded.shape[-1] // 128, 128).max(-1)


def assert_is_quantized_swiglu(array, x):
    """Check a ScaledArray [*, M, F] against x [*, M, 2F], all of it finite and moderate."""
    y, info = exact_swiglu(x), ml_dtypes.finfo(array.dtype)
    columns = y.shape[-1]
    of_columns = lambda of_blocks: np.repeat(of_blocks, 128, -1)[..., :columns]
    gates = largest_of_blocks(np.asarray(x, np.float64)[..., :columns])
    scales = np.maximum(largest_of_blocks(y) / float(info.max), MIN_SCALE)
    assert np.all(np.abs(array.scales - scales) <= (15 + 1.25 * gates) * U * scales)
    quotients = y / of_columns(scales)
    error = np.abs(np.asarray(array.values, np.float64) - quotients)
    slack = (30 + 2.5 * of_columns(gates)) * U * np.abs(quotients)
    assert np.all(error <= half_steps(np.abs(quotients) + slack, info) + slack)


def half_steps(magnitudes, info):
    """Half of the distance between the numbers of an FP8 format, at these."""
    _, exponents = np.frexp(magnitudes)  # of a fraction between 1/2 and 1
    smallest_normal_exponent = int(np.log2(float(info.smallest_normal))) + 1
    return np.ldexp(1.0, np.maximum(exponents, smallest_normal_exponent) - info.nmant - 2)
