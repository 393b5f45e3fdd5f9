"""ScaledArray to and from qwix's QArray, the same numbers, and errors by name."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from jax_fp8gemm import dequantize, fp8_gemm, quantize
from jax_fp8gemm.interop import from_qarray, to_qarray
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def assert_same_numbers(array, qarray):
    """Scales may be repeated; what is meant has to be equal, in f32."""
    np.testing.assert_array_equal(
        np.asarray(array.values).view(np.uint8), np.asarray(qarray.qvalue).view(np.uint8))
    meant = qwix.dequantize(dataclasses.replace(qarray, scale=qarray.scale.astype(jnp.float32)))
    np.testing.assert_array_equal(dequantize(array, jnp.float32), meant)


# Shape, tiles of the axes, granularity.
TILES = {
    "activations": ((5, 384), {0: 1, 1: 128}, ROW_BLOCKS),
    "weights": ((256, 384), {0: 128, 1: 128}, SQUARE_BLOCKS),
    "larger tiles": ((512, 768), {0: 256, 1: 384}, SQUARE_BLOCKS),
    "one scale of all": ((300, 200), {}, SQUARE_BLOCKS),
    "a scale of each row": ((300, 200), {0: 1}, ROW_BLOCKS),
    "a scale of each 128 columns": ((300, 256), {1: 128}, SQUARE_BLOCKS),
    "a scale of each 128 rows": ((256, 300), {0: 128}, SQUARE_BLOCKS),
    "less than a block": ((40, 77), {0: 40, 1: 77}, SQUARE_BLOCKS),
    "one row": ((1, 256), {1: 128}, ROW_BLOCKS),
    "groups": ((3, 256, 128), {0: 1, 1: 128, 2: 128}, SQUARE_BLOCKS),
    "groups that share scales": ((3, 256, 128), {1: 128, 2: 128}, SQUARE_BLOCKS),
    "leading axes": ((2, 3, 40, 256), {0: 1, 2: 1, 3: 128}, ROW_BLOCKS),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles_that_fit(rng, name):
    shape, tiled_axes, granularity = TILES[name]
    dtype = E5M2 if name == "weights" else E4M3
    qarray = qwix.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), dtype, tiled_axes=tiled_axes)
    array = from_qarray(qarray)
    assert (array.shape, array.dtype, array.granularity) == (shape, dtype, granularity)
    assert_same_numbers(array, qarray)


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_16_bits(rng, scale_dtype):
    x = jnp.asarray(rng.standard_normal((64, 256)), scale_dtype)
    qarray = qwix.quantize(x, E4M3, channelwise_axes=[0], tiled_axes={1: 128})
    assert qarray.scale.dtype == scale_dtype
    assert_same_numbers(from_qarray(qarray), qarray)


def test_a_weight_of_qwix_is_given_transposed(rng):
    """As qwix has it for `dot(x, w)`: [K, N], and a scale for each column."""
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 256), (256, 72)))
    qarray = qwix.quantize(w, E4M3, channelwise_axes=[1])
    rows = quantize(x)
    y = fp8_gemm(rows, from_qarray(qarray.mT), out_dtype=jnp.float32)
    terms = jnp.abs(dequantize(rows, jnp.float32)) @ jnp.abs(qwix.dequantize(qarray))
    expected = dequantize(rows, jnp.float32) @ qwix.dequantize(qarray)
    # Two sums of 256 f32 products, each with a rounding per term and one per factor.
    np.testing.assert_array_less(jnp.abs(y - expected), 2 * (256 + 2) * 2.0**-24 * terms)


@pytest.mark.parametrize(("shape", "granularity"), [
    ((5, 384), ROW_BLOCKS), ((5, 77), ROW_BLOCKS), ((256, 384), SQUARE_BLOCKS), ((128, 40), SQUARE_BLOCKS),
    ((3, 256, 128), SQUARE_BLOCKS)])
def test_there_and_back(rng, shape, granularity):
    array = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), granularity)
    qarray = to_qarray(array)
    assert isinstance(qarray, qwix.QArray)
    assert (qarray.qtype, qarray.zero_point) == (E4M3, None)
    assert_same_numbers(array, qarray)
    back = from_qarray(qarray)
    assert back.granularity == granularity
    np.testing.assert_array_equal(back.scales, array.scales)


def test_inside_of_jit(rng):
    x = jnp.asarray(rng.standard_normal((256, 384)), jnp.float32)
    qarray = qwix.quantize(x, E4M3, tiled_axes={0: 128, 1: 384})
    assert_same_numbers(jax.jit(from_qarray)(qarray), qarray)
    np.testing.assert_array_equal(jax.jit(lambda q: to_qarray(from_qarray(q)))(qarray).scale,
                                  jnp.repeat(qarray.scale, 3, 1))


def qarray(shape=(256, 384), scale=(2, 3), dtype=E4M3, scale_dtype=jnp.float32, zero_point=None):
    return qwix.QArray(jnp.ones(shape, dtype), jnp.ones(scale, scale_dtype), zero_point)


MISTAKES = {
    "an array": (lambda: from_qarray(jnp.ones((2, 2))), r"expected a qwix\.QArray, got ArrayImpl"),
    "no scale": (lambda: from_qarray(types.SimpleNamespace(qvalue=jnp.ones((2, 2), E4M3), scale=1.0,
                                                           zero_point=None)),
                 r"scale: expected an array, got float"),
    "integers": (lambda: from_qarray(qarray(dtype=jnp.int8)),
                 r"qvalue: expected dtype float8_e4m3fn or float8_e5m2, got int8"),
    "scales of 8 bits": (lambda: from_qarray(qarray(scale_dtype=jnp.float8_e8m0fnu)),
                         r"scale: expected dtype bfloat16 or float16 or float32, got float8_e8m0fnu"),
    "a zero point": (lambda: from_qarray(qarray(zero_point=jnp.ones((2, 3), E4M3))),
                     r"zero_point: expected None, got an array"),
    "a vector": (lambda: from_qarray(qarray((256,), (2,))),
                 r"qvalue: expected at least two axes, got shape \(256,\)"),
    "scales of another rank": (lambda: from_qarray(qarray(scale=(3,))),
                               r"scale: expected 2 axes, .* \(256, 384\), got shape \(3,\)"),
    "small tiles": (lambda: from_qarray(qarray(scale=(256, 12))),
                    r"scale: expected tiles of multiples of 128, .*axis -1 .*\(256, 384\), .*\(256, 12\)"),
    "tiles of rows alone": (lambda: from_qarray(qarray(scale=(2, 384))),
                            r"scale: .* multiples of 128, .*axis -1 .*\(2, 384\); .* given as its \.mT"),
    "tiles of 64 rows": (lambda: from_qarray(qarray(scale=(4, 3))),
                         r"scale: .*tiles of 1 or multiples of 128, .*axis -2 .*\(4, 3\)"),
    "as many tiles as there are blocks, of another size": (
        lambda: from_qarray(qarray((128, 130), (1, 2))), r"scale: .*axis -1 of qvalue of shape \(128, 130\)"),
    "tiles that do not divide": (lambda: from_qarray(qarray((128, 256), (1, 3))),
                                 r"scale: .*axis -1 .*\(1, 3\)"),
    "tiles of groups": (lambda: from_qarray(qarray((4, 128, 128), (2, 1, 1))),
                        r"scale: expected leading axes \(4,\), or 1 for any, got shape \(2, 1, 1\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_from_qarray_names_the_mistake(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"from_qarray: {message}"):
        call()


@pytest.mark.parametrize(("granularity", "shape", "axis"), [
    (ROW_BLOCKS, (2, 300), -1), (SQUARE_BLOCKS, (200, 128), -2), (SQUARE_BLOCKS, (3, 128, 130), -1)])
def test_partial_blocks_have_no_qarray(granularity, shape, axis):
    message = f"expected a multiple of 128 in axis {axis}, .*got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=f"to_qarray: array: {message}"):
        to_qarray(quantize(jnp.ones(shape), granularity))


def test_to_qarray_takes_nothing_else():
    with pytest.raises(ValueError, match="to_qarray: expected a ScaledArray, got ArrayImpl"):
        to_qarray(jnp.ones((2, 128)))
