"""How far the quantised gradient of SwiGLU may be from exact: derived.

In units of u = 2^-24, the relative error of an f32 rounding to nearest, with s = 1 / (1 + exp(-gate)):

    exp(-gate)           1.25 |gate| + 8   as in swiglu_bound.py
    1 + exp              that times 1 - s, the share that the exponential has of the sum, and 1
    1 / that             2 more, one unit in the last place
    ------------------------
    s                    e = (1.25 |gate| + 8) (1 - s) + 3
    silu = gate s        e + 1
    hidden = silu up     e + 2       and so has d_up = d_hidden silu

The derivative of silu, s (1 + gate (1 - s)), is zero near gate = -1.28, so that no relative error bounds it.
1 - s has the absolute error s e, and one rounding. The kernel computes silu (1 - s) + s with one FMA:

    silu (1 - s)         |gate| s ((1 - s) (e + 1) + s e + (1 - s))
    + s                  s e, and one rounding of a number of s (1 + |gate| (1 - s)) at most
    ------------------------
    derivative           s (1 + |gate|) (e + 3)

and the reference s (1 + gate (1 - s)), with one more rounding: s (1 + |gate|) (e + 4). Two products with
d_hidden and up add a rounding each:

    d_gate               |d_hidden up| s (1 + |gate|) (e + 6)

What is then quantised is y with an absolute error of E. A block's largest |y| has the largest E of the block
at most, and its scale two roundings more; a quotient has that relative error, two more roundings, and E over
the scale.
"""

import ml_dtypes
import numpy as np

from arranged import arranged, with_zeros_behind
from jax_fp8gemm.reference import MIN_SCALE
from swiglu_bound import U, half_steps, largest_of_blocks


def exact_gradients(gate_up, d_hidden):
    """[T, 2F], [T, F] -> d_gate | d_up [T, 2F] with its error, hidden [T, F] with its error, all f64."""
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, -1)
    d_hidden = np.asarray(d_hidden, np.float64)
    s = 1 / (1 + np.exp(-gate))
    e = (1.25 * np.abs(gate) + 8) * (1 - s) + 3
    d_gate, d_up, hidden = d_hidden * up * s * (1 + gate * (1 - s)), d_hidden * gate * s, gate * s * up
    d_gate_error = np.abs(d_hidden * up) * s * (1 + np.abs(gate)) * (e + 6)
    errors = np.concatenate([d_gate_error, np.abs(d_up) * (e + 2)], -1), np.abs(hidden) * (e + 2)
    return np.concatenate([d_gate, d_up], -1), errors[0] * U, hidden, errors[1] * U


def assert_is_quantized(array, y, y_error):
    """Check a ScaledArray [R, C] of 1 x 128 against y [R, C], of which it may have seen y +- y_error."""
    info = ml_dtypes.finfo(array.dtype)
    of_columns = lambda of_blocks: np.repeat(of_blocks, 128, -1)[..., : y.shape[-1]]
    scales = np.maximum(largest_of_blocks(y) / float(info.max), MIN_SCALE)
    scale_errors = largest_of_blocks(y_error) / float(info.max) / scales + 2 * U
    assert np.all(scale_errors < 0.5), "the bound says nothing"
    assert np.all(np.abs(np.asarray(array.scales, np.float64) - scales) <= scale_errors * scales)
    quotients = y / of_columns(scales)
    of_scale = of_columns(scale_errors)
    slack = (y_error / of_columns(scales) + np.abs(quotients) * (of_scale + 2 * U)) / (1 - of_scale)
    error = np.abs(np.asarray(array.values, np.float64) - quotients)
    assert np.all(error <= half_steps(np.abs(quotients) + slack, info) + slack)


def assert_is_quantized_swiglu_backward(arrays, gate_up, d_hidden, sizes=None):
    """Check rows, columns and hidden columns of gate_up [T, 2F] and d_hidden [T, F], moderate in groups."""
    rows, columns, hidden_columns = arrays
    sizes = [len(gate_up)] if sizes is None else sizes
    gate_up, d_hidden = with_zeros_behind(gate_up, sizes), with_zeros_behind(d_hidden, sizes)
    y, y_error, hidden, hidden_error = exact_gradients(gate_up, d_hidden)
    assert_is_quantized(rows, y, y_error)
    assert_is_quantized(columns, arranged(y, sizes).T, arranged(y_error, sizes).T)
    assert_is_quantized(hidden_columns, arranged(hidden, sizes).T, arranged(hidden_error, sizes).T)
