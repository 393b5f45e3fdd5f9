"""quantize and dequantize: every bit against numpy, jitted and not, and the documented corners."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_fp8gemm import dequantize, quantize
from jax_fp8gemm.reference import MIN_SCALE
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
GRANULARITIES = pytest.mark.parametrize("granularity", [ROW_BLOCKS, SQUARE_BLOCKS], ids=["1x128", "128x128"])
DTYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2])


def spread(values, granularity, shape):
    """One number per block, repeated for each element of [R, C]."""
    return np.repeat(np.repeat(values, granularity[0], 0), granularity[1], 1)[: shape[0], : shape[1]]


def numpy_quantize(x, granularity, dtype):
    """The documented formula for finite x [R, C], with numpy's division and ml_dtypes' cast."""
    x = np.asarray(x, np.float32)
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    rows, columns = (-(-size // block) for size, block in zip(x.shape, granularity, strict=True))
    amax = np.zeros((rows, columns), np.float32)
    for i, j in np.ndindex(rows, columns):
        row, column = i * granularity[0], j * granularity[1]
        amax[i, j] = np.abs(x[row : row + granularity[0], column : column + granularity[1]]).max()
    scales = np.maximum(amax * (np.float32(1) / largest), np.float32(MIN_SCALE))
    return (x * spread(np.float32(1) / scales, granularity, x.shape)).astype(dtype), scales


def codes(values):
    return np.asarray(values).view(np.uint8)


@GRANULARITIES
@DTYPES
@pytest.mark.parametrize("input_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 300), (257, 127)])
def test_every_bit_eager_and_jitted(rng, granularity, dtype, input_dtype, shape):
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-9, 9, shape))
    x = jnp.asarray(x, input_dtype)
    values, scales = numpy_quantize(x, granularity, dtype)
    for function in (quantize, jax.jit(quantize, static_argnums=(1, 2))):
        got = function(x, granularity, dtype)
        np.testing.assert_array_equal(codes(got.values), codes(values))
        np.testing.assert_array_equal(got.scales, scales)
        assert got.shape == shape


def test_scales_of_all_magnitudes_have_their_exact_reciprocals(rng):
    x = np.exp(rng.uniform(-40, 88, (20_000, 1))).astype(np.float32) * np.float32([[1, 0.3, -0.07]])
    values, scales = numpy_quantize(x, ROW_BLOCKS, E4M3)
    got = quantize(x)
    np.testing.assert_array_equal(got.scales, scales)
    np.testing.assert_array_equal(codes(got.values), codes(values))


def test_rounds_to_nearest_even_also_below_the_normal_numbers():
    cases = {448: 448, 17: 16, 19: 20, -21: -20, 2**-6 * 1.0625: 2**-6, 2**-10: 0, 3 * 2**-10: 2**-8,
             1.01 * 2**-10: 2**-9, -5 * 2**-10: -4 * 2**-10, 7 * 2**-10: 8 * 2**-10, 15 * 2**-10: 2**-6}
    got = quantize(np.float32([list(cases)]))
    np.testing.assert_array_equal(got.scales, [[1]])
    np.testing.assert_array_equal(np.asarray(got.values, np.float32), [list(cases.values())])


@GRANULARITIES
@DTYPES
def test_error_is_half_a_step(rng, granularity, dtype):
    x = (rng.standard_normal((200, 500)) * np.exp(rng.uniform(-5, 5, (200, 500)))).astype(np.float32)
    array = quantize(x, granularity, dtype)
    info = ml_dtypes.finfo(dtype)
    scales = spread(np.asarray(array.scales), granularity, x.shape)
    half_step = np.maximum(np.abs(x) * 2.0 ** -(info.nmant + 1), scales * info.smallest_subnormal / 2)
    error = np.abs(np.asarray(dequantize(array, jnp.float32), np.float64) - x)
    assert np.all(error <= half_step * (1 + 2.0**-20))
    assert error.max() > 0


@GRANULARITIES
def test_zero_blocks_and_tiny_ones(granularity):
    x = np.zeros((256, 256), np.float32)
    x[:, 128:] = 3e-30
    array = quantize(x, granularity)
    np.testing.assert_array_equal(array.scales, MIN_SCALE)
    np.testing.assert_array_equal(codes(array.values), 0)
    assert np.float32(MIN_SCALE) ** 2 == np.finfo(np.float32).smallest_normal


@GRANULARITIES
@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_elements_become_nan_alone(rng, granularity, dtype, bad):
    clean = rng.standard_normal((130, 140)).astype(np.float32)
    clean[5, 7] = 0
    x = clean.copy()
    x[5, 7] = bad
    got, expected = quantize(x, granularity, dtype), quantize(clean, granularity, dtype)
    np.testing.assert_array_equal(got.scales, expected.scales)
    is_nan = np.isnan(np.asarray(got.values, np.float32))
    assert codes(got.values)[5, 7] == 0x7F, "one code of NaN, whatever the platform and the version of JAX"
    assert is_nan[5, 7]
    assert is_nan.sum() == 1
    np.testing.assert_array_equal(codes(got.values)[~is_nan], codes(expected.values)[~is_nan])


def test_a_block_without_finite_elements():
    array = quantize(np.full((1, 128), np.nan, np.float32))
    np.testing.assert_array_equal(array.scales, MIN_SCALE)
    assert np.isnan(np.asarray(array.values, np.float32)).all()


@DTYPES
def test_the_largest_numbers_do_not_overflow(dtype):
    x = np.float32([[3.4e38, -3.4e38, 1e38]])
    np.testing.assert_allclose(dequantize(quantize(x, dtype=dtype), jnp.float32), x, rtol=0.13)


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0), (2, 0, 5)])
@GRANULARITIES
def test_empty(shape, granularity):
    array = quantize(jnp.ones(shape), granularity)
    array.validate("array")
    assert dequantize(array).shape == shape


def test_leading_axes_and_vmap_are_one_thing(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 130, 200)), jnp.bfloat16)
    whole = quantize(x, SQUARE_BLOCKS)
    mapped = jax.vmap(jax.vmap(lambda y: quantize(y, SQUARE_BLOCKS)))(x)
    one = quantize(x[1, 2], SQUARE_BLOCKS)
    np.testing.assert_array_equal(codes(whole.values), codes(mapped.values))
    np.testing.assert_array_equal(whole.scales, mapped.scales)
    np.testing.assert_array_equal(codes(whole.values[1, 2]), codes(one.values))
    np.testing.assert_array_equal(dequantize(whole)[1, 2], dequantize(one))


@GRANULARITIES
def test_dequantize_rounds_once(rng, granularity):
    array = quantize(rng.standard_normal((130, 200)).astype(np.float32), granularity)
    scales = spread(np.asarray(array.scales), granularity, (130, 200))
    product = np.asarray(array.values, np.float32) * scales
    np.testing.assert_array_equal(dequantize(array, jnp.float32), product)
    np.testing.assert_array_equal(dequantize(array), product.astype(ml_dtypes.bfloat16))
