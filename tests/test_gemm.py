"""fp8_gemm as a user calls it: sizes, dtypes, batches, accumulation, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bounds import assert_within_bound
from jax_fp8gemm import ScaledArray, fp8_gemm, quantize
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS


def operand(rng, shape, granularity=ROW_BLOCKS, dtype=jnp.float8_e4m3fn):
    return quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), granularity, dtype)


def at(array, *index):
    return jax.tree.map(lambda leaf: leaf[index], array)


@pytest.mark.parametrize("granularity", [ROW_BLOCKS, SQUARE_BLOCKS], ids=["1x128", "128x128"])
@pytest.mark.parametrize(("m", "n", "k"), [
    (1, 1, 1), (7, 33, 17), (16, 576, 384), (83, 129, 300), (129, 257, 128), (64, 8, 2000)])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_sizes(rng, granularity, m, n, k, out_dtype):
    lhs, rhs = operand(rng, (m, k)), operand(rng, (n, k), granularity)
    out = fp8_gemm(lhs, rhs, out_dtype=out_dtype)
    assert (out.shape, out.dtype) == ((m, n), out_dtype)
    assert_within_bound(out, lhs, rhs)


@pytest.mark.parametrize("lhs_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("rhs_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_dtypes(rng, lhs_dtype, rhs_dtype):
    lhs, rhs = operand(rng, (20, 260), dtype=lhs_dtype), operand(rng, (140, 260), SQUARE_BLOCKS, rhs_dtype)
    assert_within_bound(fp8_gemm(lhs, rhs), lhs, rhs, random_signs=True)


def test_numpy_leaves(rng):
    lhs, rhs = operand(rng, (20, 260)), operand(rng, (140, 260), SQUARE_BLOCKS)
    out = fp8_gemm(jax.tree.map(np.asarray, lhs), jax.tree.map(np.asarray, rhs))
    np.testing.assert_array_equal(out, fp8_gemm(lhs, rhs))


def test_batch(rng):
    lhs, rhs = operand(rng, (3, 20, 260)), operand(rng, (3, 140, 260), SQUARE_BLOCKS)
    accumulator = jnp.asarray(rng.standard_normal((3, 20, 140)), jnp.float32)
    out = fp8_gemm(lhs, rhs, out_dtype=jnp.float32, accumulator=accumulator)
    for i in range(3):
        assert_within_bound(out[i], at(lhs, i), at(rhs, i), accumulator=accumulator[i])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 128), (5, 0, 128), (5, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_empty(m, n, k, batch):
    lhs, rhs = quantize(jnp.ones((*batch, m, k))), quantize(jnp.ones((*batch, n, k)), SQUARE_BLOCKS)
    out = fp8_gemm(lhs, rhs)
    np.testing.assert_array_equal(out, np.zeros((*batch, m, n)))
    accumulator = jnp.full((*batch, m, n), 3.0)
    np.testing.assert_array_equal(
        fp8_gemm(lhs, rhs, out_dtype=jnp.float32, accumulator=accumulator), accumulator)


def test_accumulates_in_place_where_donated(rng):
    lhs, rhs = operand(rng, (20, 260)), operand(rng, (140, 260), SQUARE_BLOCKS)
    accumulator = jnp.asarray(rng.standard_normal((20, 140)), jnp.float32)
    start = np.asarray(accumulator).copy()
    step = jax.jit(lambda a: fp8_gemm(lhs, rhs, out_dtype=jnp.float32, accumulator=a), donate_argnums=0)
    out = step(accumulator)
    assert_within_bound(out, lhs, rhs, accumulator=start)
    assert accumulator.is_deleted()


def test_scan_over_layers(rng):
    weights = operand(rng, (3, 256, 256), SQUARE_BLOCKS)
    x = jnp.asarray(rng.standard_normal((9, 256)), jnp.bfloat16)

    def layer(x, w):
        return fp8_gemm(quantize(x), w), None

    expected = x
    for i in range(3):
        expected = fp8_gemm(quantize(expected), at(weights, i))
    np.testing.assert_array_equal(jax.jit(lambda x: jax.lax.scan(layer, x, weights)[0])(x), expected)


def test_jit_gives_the_same(rng):
    lhs, rhs = operand(rng, (20, 384)), operand(rng, (140, 384), SQUARE_BLOCKS)
    out = jax.jit(fp8_gemm, static_argnames=("batch_invariant", "implementation"))(
        lhs, rhs, batch_invariant=True, implementation="reference")
    np.testing.assert_array_equal(out, fp8_gemm(lhs, rhs))


def assert_products(out, lhs, rhs, lhs_index, rhs_index):
    """Check every [M, N] of out against the operands at the given indices into their leading axes."""
    for index in np.ndindex(out.shape[:-2]):
        a, b = at(lhs, *lhs_index(*index)), at(rhs, *rhs_index(*index))
        assert_within_bound(out[index], a, b, random_signs=True)


def gemm(lhs, rhs):
    return fp8_gemm(lhs, rhs, out_dtype=jnp.float32)


@pytest.mark.parametrize(("function", "lhs_axes", "rhs_axes", "lhs_index", "rhs_index"), [
    (jax.vmap(gemm), (3,), (3,), lambda i: (i,), lambda i: (i,)),
    (jax.vmap(gemm, (0, None)), (3,), (), lambda i: (i,), lambda i: ()),
    (jax.vmap(gemm, (None, 0)), (), (3,), lambda i: (), lambda i: (i,)),
    (jax.vmap(jax.vmap(gemm)), (2, 3), (2, 3), lambda i, j: (i, j), lambda i, j: (i, j)),
    (jax.vmap(jax.vmap(gemm, (0, None))), (2, 3), (2,), lambda i, j: (i, j), lambda i, j: (i,)),
    (jax.vmap(jax.vmap(gemm, (None, 0))), (2,), (2, 3), lambda i, j: (i,), lambda i, j: (i, j)),
    (jax.vmap(jax.vmap(gemm, (0, None)), (None, 0)), (3,), (2,), lambda i, j: (j,), lambda i, j: (i,)),
    (jax.vmap(jax.vmap(gemm, (None, 0)), (0, None)), (3,), (2,), lambda i, j: (i,), lambda i, j: (j,)),
    (jax.vmap(jax.vmap(gemm), (0, None)), (2, 3), (3,), lambda i, j: (i, j), lambda i, j: (j,)),
    (jax.vmap(jax.vmap(gemm), (None, 0)), (3,), (2, 3), lambda i, j: (j,), lambda i, j: (i, j)),
    (jax.vmap(gemm, (0, None)), (2, 3), (3,), lambda i, j: (i, j), lambda i, j: (j,)),
    (jax.vmap(gemm, (None, 0)), (3,), (2, 3), lambda i, j: (j,), lambda i, j: (i, j)),
])
def test_vmap(rng, function, lhs_axes, rhs_axes, lhs_index, rhs_index):
    lhs, rhs = operand(rng, (*lhs_axes, 9, 260)), operand(rng, (*rhs_axes, 140, 260), SQUARE_BLOCKS)
    for out in (function(lhs, rhs), jax.jit(function)(lhs, rhs)):
        assert_products(out, lhs, rhs, lhs_index, rhs_index)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0), (0, None, 0), (None, None, 0), (0, 0, None),
                                  (None, 0, None), (0, None, None)])
def test_vmap_with_an_accumulator(rng, axes):
    shapes = (9, 260), (140, 260), (9, 140)
    lead = [() if axis is None else (3,) for axis in axes]
    lhs, rhs = operand(rng, (*lead[0], *shapes[0])), operand(rng, (*lead[1], *shapes[1]), SQUARE_BLOCKS)
    accumulator = jnp.asarray(rng.standard_normal((*lead[2], *shapes[2])), jnp.float32)
    with jax.numpy_rank_promotion("raise"):
        out = jax.vmap(lambda x, w, a: fp8_gemm(x, w, out_dtype=jnp.float32, accumulator=a), axes)(
            lhs, rhs, accumulator)
    for i in range(3):
        a, b, c = (x if axis is None else at(x, i)
                   for x, axis in zip((lhs, rhs, accumulator), axes, strict=True))
        assert_within_bound(out[i], a, b, accumulator=c)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0), (0, None, 0), (None, None, 0), (None, 0, None),
                                  (0, None, None)])
@pytest.mark.parametrize("k", [260, 0])
def test_vmap_over_nothing(axes, k):
    lead = [() if axis is None else (0,) for axis in axes]
    lhs, rhs = quantize(jnp.ones((*lead[0], 9, k))), quantize(jnp.ones((*lead[1], 140, k)), SQUARE_BLOCKS)
    out = jax.vmap(lambda x, w, a: fp8_gemm(x, w, out_dtype=jnp.float32, accumulator=a), axes)(
        lhs, rhs, jnp.ones((*lead[2], 9, 140)))
    assert out.shape == (0, 9, 140)


def test_vmap_along_other_axes(rng):
    lhs, rhs = operand(rng, (3, 9, 260)), operand(rng, (140, 260), SQUARE_BLOCKS)
    moved = ScaledArray.tree_unflatten(ROW_BLOCKS, [jnp.moveaxis(x, 0, 1) for x in (lhs.values, lhs.scales)])
    out = jax.vmap(gemm, (1, None), 1)(moved, rhs)
    np.testing.assert_array_equal(jnp.moveaxis(out, 1, 0), jax.vmap(gemm, (0, None))(lhs, rhs))


def test_the_scope_shows_in_the_program(rng):
    lhs, rhs = operand(rng, (20, 384)), operand(rng, (140, 384), SQUARE_BLOCKS)
    text = jax.jit(lambda x, w: fp8_gemm(x, w)).lower(lhs, rhs).compile().as_text()
    assert "fp8_gemm/" in text
