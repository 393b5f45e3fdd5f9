"""reference.gemm: the product, its order of additions, shared operands, odd sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from bounds import assert_within_bound
from jax_fp8gemm import ScaledArray, quantize, reference
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

E4M3 = jnp.float8_e4m3fn


def operand(rng, shape, granularity, dtype=E4M3):
    return quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), granularity, dtype)


def gemm(lhs, rhs, accumulator=None, out_dtype=jnp.float32):
    return reference.gemm(lhs.values, lhs.scales, rhs.values, rhs.scales, accumulator, out_dtype=out_dtype)


@pytest.mark.parametrize("granularity", [ROW_BLOCKS, SQUARE_BLOCKS], ids=["1x128", "128x128"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 129, 130), (130, 257, 384), (64, 128, 127)])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_is_the_product_of_the_dequantised(rng, granularity, m, n, k, out_dtype):
    lhs = operand(rng, (2, m, k), ROW_BLOCKS)
    rhs = operand(rng, (2, n, k), granularity, jnp.float8_e5m2)
    out = gemm(lhs, rhs, out_dtype=out_dtype)
    assert (out.shape, out.dtype) == ((2, m, n), out_dtype)
    for i in range(2):
        a, b = (ScaledArray(x.values[i], x.scales[i], x.granularity) for x in (lhs, rhs))
        assert_within_bound(out[i], a, b)


def test_a_leading_axis_of_one_is_shared(rng):
    lhs, rhs = operand(rng, (1, 9, 200), ROW_BLOCKS), operand(rng, (3, 140, 200), SQUARE_BLOCKS)
    out = gemm(lhs, rhs)
    for i in range(3):
        one = ScaledArray(rhs.values[i : i + 1], rhs.scales[i : i + 1], SQUARE_BLOCKS)
        np.testing.assert_allclose(out[i], gemm(lhs, one)[0], rtol=1e-5, atol=1e-5)


def from_block_products(products):
    """Operands [1, 1, K] whose 128-blocks of K contribute these products, exactly, through their scales."""
    values = np.zeros((1, 1, 128 * len(products)), np.float32)
    values[..., ::128] = 1
    return (ScaledArray(jnp.asarray(values, E4M3), jnp.float32([[products]]), ROW_BLOCKS),
            ScaledArray(jnp.asarray(values, E4M3), jnp.ones((1, 1, len(products))), ROW_BLOCKS))


def test_adds_the_blocks_in_k_order():
    assert gemm(*from_block_products([2.0**24, 1, -(2.0**24)]))[0, 0, 0] == 0
    assert gemm(*from_block_products([2.0**24, -(2.0**24), 1]))[0, 0, 0] == 1


def test_adds_the_accumulator_last():
    accumulator = jnp.full((1, 1, 1), -(2.0**24))
    assert gemm(*from_block_products([2.0**24, 1]), accumulator)[0, 0, 0] == 0


def test_rounds_once_to_bf16():
    assert gemm(*from_block_products([256, 1, 1]), out_dtype=jnp.bfloat16)[0, 0, 0] == 258


def test_no_k_is_zero():
    lhs, rhs = (quantize(jnp.ones((1, rows, 0)), ROW_BLOCKS) for rows in (3, 5))
    np.testing.assert_array_equal(gemm(lhs, rhs), np.zeros((1, 3, 5)))
    np.testing.assert_array_equal(gemm(lhs, rhs, jnp.full((1, 3, 5), 2.0)), np.full((1, 3, 5), 2))


@pytest.mark.parametrize(("sizes", "starts", "ends"), [
    ([3, 0, 4], [0, 3, 3], [3, 3, 7]),
    ([3, -5, 4], [0, 3, 3], [3, 3, 7]),
    ([3, 8, 4], [0, 3, 10], [3, 10, 10]),
    ([3, 2**31 - 1, 2**31 - 1], [0, 3, 10], [3, 10, 10]),
    ([-(2**31), 10, 1], [0, 0, 10], [0, 10, 10]),
    ([], [], []),
])
def test_group_bounds_saturate(sizes, starts, ends):
    np.testing.assert_array_equal(reference.group_bounds(jnp.array(sizes, jnp.int32), 10), [starts, ends])
    limit = 2**31 - 1  # where a plain sum of two sizes overflows
    ends = reference.group_bounds(jnp.array([[limit, limit], [limit - 1, 5]]), limit)[1]
    np.testing.assert_array_equal(ends, [[limit, limit], [limit - 1, limit]])
