"""The cases that jax.lax.ragged_dot and tokamax's ragged_dot are tested with, for the grouped GEMMs.

On integers with scales that are powers of two every sum is exact, also in the tensor core's 13 fraction bits
(its partial sums stay below 128 * 16 = 2^11), and the result has to be `jax.lax.ragged_dot`'s; on random data
it has to keep the bounds of bounds.py. Nothing here depends on the platform: tests/gpu runs the same tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bounds import assert_within_bound
from jax_fp8gemm import (
    ScaledArray,
    dequantize,
    export_checks,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    quantize,
)
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def integers(rng, *shape, granularity=ROW_BLOCKS, dtype=E4M3):
    """Values of -4 to 4, scales of 1/2, 1 or 2."""
    values = rng.integers(-4, 5, shape).astype(np.float32)
    scales = 2.0 ** rng.integers(-1, 2, scale_shape(shape, granularity))
    return ScaledArray(jnp.asarray(values, dtype), jnp.asarray(scales, jnp.float32), granularity)


def random(rng, *shape, granularity=ROW_BLOCKS, dtype=E4M3):
    return quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), granularity, dtype)


def random_sizes(rng, m, num_groups):
    """Sizes with the sum m, zero among them now and then."""
    ends = np.sort(rng.choice(m, num_groups - 1))
    return jnp.asarray(np.diff(ends, prepend=0, append=m), jnp.int32)


def f32(array):
    return dequantize(array, jnp.float32)


@jax.jit
def ragged_dot(lhs, rhs, group_sizes):
    """lax.ragged_dot of f32 [M, K] and [G, N, K]; zero behind the groups, which it does not promise."""
    out = lax.ragged_dot(lhs, rhs.mT, group_sizes, precision=lax.Precision.HIGHEST)
    return jnp.where((jnp.arange(len(lhs)) < group_sizes.sum())[:, None], out, 0)


def assert_is_ragged_dot(out, lhs, rhs, group_sizes):
    expected = ragged_dot(f32(lhs), f32(rhs), jnp.asarray(group_sizes))
    np.testing.assert_array_equal(out, expected.astype(out.dtype))


# ---- of jax.lax.ragged_dot


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("m", "k", "n", "num_groups"), [(64, 4, 3, 1), (64, 9, 8, 2), (16, 4, 3, 2)])
def test_shapes(rng, m, k, n, num_groups, dtype):
    lhs, rhs = integers(rng, m, k, dtype=dtype), integers(rng, num_groups, n, k, granularity=SQUARE_BLOCKS)
    group_sizes = random_sizes(rng, m, num_groups)
    for function in (fp8_gemm_ragged_m, jax.jit(fp8_gemm_ragged_m)):
        assert_is_ragged_dot(function(lhs, rhs, group_sizes), lhs, rhs, group_sizes)


@pytest.mark.parametrize(("m", "k", "n", "num_groups"), [
    (5, 4, 3, 1), (5, 4, 3, 2), (9, 4, 3, 1), (10, 9, 8, 2)])
def test_groups_of_one_row(rng, m, k, n, num_groups):
    lhs, rhs = integers(rng, m, k), integers(rng, num_groups, n, k, granularity=SQUARE_BLOCKS)
    group_sizes = jnp.ones(num_groups, jnp.int32)
    out = fp8_gemm_ragged_m(lhs, rhs, group_sizes)
    assert_is_ragged_dot(out, lhs, rhs, group_sizes)
    np.testing.assert_array_equal(out[num_groups:], 0)


@pytest.mark.parametrize(("batch", "m", "k", "n", "num_groups"), [
    (3, 128, 128, 128, 2), (5, 128, 1024, 128, 4), (3, 1024, 128, 128, 4), (5, 128, 128, 1024, 2)])
def test_vmap(rng, batch, m, k, n, num_groups):
    lhs, rhs = integers(rng, batch, m, k), integers(rng, batch, num_groups, n, k, granularity=SQUARE_BLOCKS)
    group_sizes = jnp.stack([random_sizes(rng, m, num_groups) for _ in range(batch)])
    out = jax.jit(jax.vmap(fp8_gemm_ragged_m))(lhs, rhs, group_sizes)
    for i in range(batch):
        one_lhs, one_rhs = jax.tree.map(lambda leaf: leaf[i], (lhs, rhs))  # noqa: B023
        assert_is_ragged_dot(out[i], one_lhs, one_rhs, group_sizes[i])


@pytest.mark.parametrize(("m", "k", "n", "group_sizes"), [(5, 4, 3, [5]), (10, 9, 8, [3, 7])])
def test_export(rng, device, m, k, n, group_sizes):
    args = (integers(rng, m, k), integers(rng, len(group_sizes), n, k, granularity=SQUARE_BLOCKS),
            jnp.array(group_sizes))
    platform = "cuda" if device.platform == "gpu" else device.platform
    exported = jax.export.export(jax.jit(fp8_gemm_ragged_m), platforms=[platform],
                                 disabled_checks=export_checks())(*args)
    assert_is_ragged_dot(exported.call(*args), *args)


CONTRACTING = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [1]), ([], [])), lhs_ragged_dimensions=[1], rhs_group_dimensions=[])


def in_blocks(array, group_sizes):
    """[R, T] -> [R, K]: every group of columns from a multiple of 128 on, and zeros in between.

    The scales of array are those of whole rows, so that moved columns keep theirs.
    """
    ends = np.cumsum(group_sizes)
    groups = [np.asarray(array)[:, end - size : end] for end, size in zip(ends, group_sizes, strict=True)]
    return np.concatenate([np.pad(x, ((0, 0), (0, -x.shape[1] % 128))) for x in groups], axis=1)


def contracted(rng, rows, group_sizes):
    """Integers f32 [R, T], and the operand of fp8_gemm_ragged_k that holds them times powers of two."""
    values = rng.integers(-4, 5, (rows, sum(group_sizes))).astype(np.float32)
    blocks = in_blocks(values, group_sizes)
    scales = 2.0 ** rng.integers(-1, 2, (rows, 1))
    operand = ScaledArray(jnp.asarray(blocks, E4M3),
                          jnp.asarray(np.broadcast_to(scales, (rows, blocks.shape[1] // 128)), jnp.float32),
                          ROW_BLOCKS)
    return jnp.asarray(values * scales, jnp.float32), operand


@pytest.mark.parametrize(("m", "n", "group_sizes"), [
    (11, 7, [2, 0, 3]), (11, 7, [5]), (64, 130, [128, 1, 127, 0, 129]), (192, 300, [128, 256])])
def test_contracting(rng, m, n, group_sizes):
    (dense_lhs, lhs), (dense_rhs, rhs) = (contracted(rng, rows, group_sizes) for rows in (m, n))
    expected = lax.ragged_dot_general(dense_lhs, dense_rhs, jnp.array(group_sizes), CONTRACTING,
                                      precision=lax.Precision.HIGHEST)
    out = fp8_gemm_ragged_k(lhs, rhs, jnp.array(group_sizes))
    assert out.shape == (len(group_sizes), m, n)
    np.testing.assert_array_equal(out, expected)
    accumulator = jnp.asarray(rng.integers(-9, 10, out.shape), jnp.float32)
    out = fp8_gemm_ragged_k(lhs, rhs, jnp.array(group_sizes), accumulator=accumulator)
    np.testing.assert_array_equal(out, expected + accumulator)


def test_contracting_with_a_batch(rng):
    sizes = [[2, 0, 3], [1, 2, 2]]
    lhs, rhs = zip(*[[contracted(rng, rows, s) for rows in (11, 7)] for s in sizes], strict=True)
    # Groups without tokens have no block, so pad both to the same K.
    width = max(operand.shape[1] for _, operand in lhs)
    lhs_fp8, rhs_fp8 = (jax.tree.map(lambda *x: jnp.stack(x), *(widen(x, width) for _, x in operands))
                        for operands in (lhs, rhs))
    out = jax.vmap(fp8_gemm_ragged_k)(lhs_fp8, rhs_fp8, jnp.array(sizes))
    assert out.shape == (2, 3, 11, 7)
    for i in range(2):
        expected = lax.ragged_dot_general(lhs[i][0], rhs[i][0], jnp.array(sizes[i]), CONTRACTING,
                                          precision=lax.Precision.HIGHEST)
        np.testing.assert_array_equal(out[i], expected)


def widen(array, width):
    """More columns, NaN: they belong to no group."""
    padding = ((0, 0), (0, width - array.shape[1]))
    values = jnp.pad(array.values, padding, constant_values=jnp.nan)
    padding = ((0, 0), (0, width // 128 - array.scales.shape[1]))
    return ScaledArray(values, jnp.pad(array.scales, padding, constant_values=jnp.nan), ROW_BLOCKS)


# ---- of tokamax's ragged_dot

NUM_GROUPS, M, K, N = 8, 1024, 128, 256


@pytest.fixture
def operands(rng):
    return integers(rng, M, K), integers(rng, NUM_GROUPS, N, K, granularity=SQUARE_BLOCKS)


@pytest.mark.parametrize("out_dtype", [None, jnp.bfloat16, jnp.float32])
def test_groups_of_equal_size(operands, out_dtype):
    group_sizes = jnp.full(NUM_GROUPS, M // NUM_GROUPS, jnp.uint32)
    options = {} if out_dtype is None else {"out_dtype": out_dtype}
    out = fp8_gemm_ragged_m(*operands, group_sizes, **options)
    assert out.dtype == (out_dtype or jnp.bfloat16)
    assert_is_ragged_dot(out, *operands, group_sizes)


def test_rows_behind_the_groups(rng, operands):
    group_sizes = jnp.asarray(rng.integers(0, M // NUM_GROUPS, NUM_GROUPS), jnp.int32)
    assert_is_ragged_dot(fp8_gemm_ragged_m(*operands, group_sizes), *operands, group_sizes)


def test_every_pattern_of_empty_groups(rng, operands):
    sizes = rng.integers(1, M // NUM_GROUPS, NUM_GROUPS)
    function = jax.jit(fp8_gemm_ragged_m)
    for pattern in np.ndindex((2,) * NUM_GROUPS):
        group_sizes = jnp.asarray(sizes * pattern, jnp.int32)
        assert_is_ragged_dot(function(*operands, group_sizes), *operands, group_sizes)


@pytest.mark.parametrize(("granularity", "dtype"), [
    (ROW_BLOCKS, E4M3), (SQUARE_BLOCKS, E4M3), (SQUARE_BLOCKS, E5M2)])
def test_quantised_random_numbers(rng, granularity, dtype):
    lhs, rhs = random(rng, 512, 256, dtype=dtype), random(rng, NUM_GROUPS, 512, 256, granularity=granularity)
    sizes = rng.permutation([0, 0, 33, 33, 33, 61, 61, 61])  # few shapes, for which the bounds are compiled
    out = fp8_gemm_ragged_m(lhs, rhs, jnp.asarray(sizes))
    end = 0
    for group, size in enumerate(sizes):
        rows = slice(end, end := end + size)
        part, weight = (jax.tree.map(lambda leaf: leaf[index], x)  # noqa: B023
                        for x, index in ((lhs, rows), (rhs, group)))
        assert_within_bound(out[rows], part, weight, random_signs=True)
    np.testing.assert_array_equal(out[end:], 0)


@pytest.mark.parametrize(("group_sizes", "meant"), [
    ([2, 3, -1, 4], [2, 3, 0, 4]), ([1022, 1, 1, 1], [1022, 1, 1, 0])])
def test_invalid_sizes(rng, group_sizes, meant):
    lhs, rhs = integers(rng, M, K), integers(rng, 4, N, K, granularity=SQUARE_BLOCKS)
    assert_is_ragged_dot(fp8_gemm_ragged_m(lhs, rhs, jnp.array(group_sizes)), lhs, rhs, meant)


@pytest.mark.parametrize(("num_groups", "m", "k", "n"), [(8, 1024, 128, 256), (8, 128, 64, 128)])
def test_the_three_products_of_training(rng, num_groups, m, k, n):
    """The result and both gradients of ragged_dot, each by its grouped GEMM."""
    sizes = np.full(num_groups, m // num_groups)
    values = {"lhs": (m, k), "rhs": (num_groups, k, n), "dout": (m, n)}
    lhs, rhs, dout = (rng.integers(-4, 5, shape).astype(np.float32) for shape in values.values())

    def unscaled(x):
        return ScaledArray(jnp.asarray(x, E4M3), jnp.ones(scale_shape(x.shape, ROW_BLOCKS)), ROW_BLOCKS)

    group_sizes = jnp.asarray(sizes, jnp.int32)
    out, vjp = jax.vjp(lambda lhs, rhs: ragged_dot(lhs, rhs.mT, group_sizes), lhs, rhs)
    dlhs, drhs = vjp(jnp.asarray(dout))
    options = {"out_dtype": jnp.float32}
    np.testing.assert_array_equal(
        fp8_gemm_ragged_m(unscaled(lhs), unscaled(np.swapaxes(rhs, 1, 2)), group_sizes, **options), out)
    np.testing.assert_array_equal(
        fp8_gemm_ragged_m(unscaled(dout), unscaled(rhs), group_sizes, **options), dlhs)
    np.testing.assert_array_equal(
        fp8_gemm_ragged_k(*(unscaled(in_blocks(x.T, sizes)) for x in (lhs, dout)), group_sizes), drhs)


@pytest.mark.parametrize(("m", "group_sizes"), [(4096, [4096, 0, 0, 0, 0, 0, 0, 0]), (8, [1] * 8)],
                         ids=["compute bound", "memory bound"])
def test_benchmark_shapes(rng, device, m, group_sizes):
    """4096 x 4096 weights, a sixteenth of that in both axes without a GPU."""
    size = 4096 if device.platform == "gpu" else 256
    lhs, rhs = integers(rng, m, size), integers(rng, 8, size, size, granularity=SQUARE_BLOCKS)
    assert_is_ragged_dot(fp8_gemm_ragged_m(lhs, rhs, jnp.array(group_sizes)), lhs, rhs, group_sizes)


def test_masked_is_ragged_dot_of_the_valid_rows(rng):
    """Not theirs: the same groups, each with room for 70 rows, give the rows of ragged_dot."""
    sizes = np.array([70, 0, 1, 64, 33])
    lhs, rhs = integers(rng, 5, 70, 300), integers(rng, 5, 200, 300, granularity=SQUARE_BLOCKS)
    out = fp8_gemm_masked(lhs, rhs, jnp.asarray(sizes), expected_group_size=32)
    is_valid = np.arange(70) < sizes[:, None]
    packed = f32(lhs)[is_valid]
    expected = ragged_dot(packed, f32(rhs), jnp.asarray(sizes)).astype(out.dtype)
    np.testing.assert_array_equal(out[is_valid], expected)
