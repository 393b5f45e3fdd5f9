"""The grouped GEMMs as a user calls them: group sizes of any value, poisoned operands, vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bounds import assert_within_bound
from jax_fp8gemm import (
    ScaledArray,
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    group_sizes_from_ids,
    quantize,
)
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
M, N, K = 40, 140, 300
# Sizes as they come, and as they count for groups that lie one after the other in 40 rows (or blocks).
SIZES = {
    "uniform": ([10, 10, 10, 10], [10, 10, 10, 10]),
    "skewed": ([1, 37, 1, 1], [1, 37, 1, 1]),
    "some zero": ([0, 13, 0, 27], [0, 13, 0, 27]),
    "all zero": ([0, 0, 0, 0], [0, 0, 0, 0]),
    "below the rows": ([3, 0, 5, 7], [3, 0, 5, 7]),
    "one group": ([0, 0, 40, 0], [0, 0, 40, 0]),
    "negative": ([5, -3, 7, INT_MIN], [5, 0, 7, 0]),
    "oversized": ([15, 41, 3, 9], [15, 25, 0, 0]),
    "overflowing": ([9, INT_MAX, INT_MAX, 2], [9, 31, 0, 0]),
    "overflowing at once": ([INT_MAX] * 4, [40, 0, 0, 0]),
}


@pytest.fixture(params=SIZES)
def sizes(request):
    given, meant = SIZES[request.param]
    return jnp.array(given, jnp.int32), meant


def operand(rng, *shape, granularity=ROW_BLOCKS):
    return quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), granularity)


def weights(rng, *shape):
    return operand(rng, *shape, granularity=SQUARE_BLOCKS)


def at(array, *index):
    return jax.tree.map(lambda leaf: leaf[index], array)


def poisoned(array, is_valid):
    """The array with NaN as values and scales of the rows [*, R] that are not valid."""
    keep = lambda leaf: jnp.where(jnp.asarray(is_valid)[..., None], leaf, jnp.nan).astype(leaf.dtype)
    return jax.tree.map(keep, array)


def dense(lhs, rhs, **options):
    """The same products, by the dense GEMM. XLA may sum in another order here: in f32, to within `CLOSE`."""
    return fp8_gemm(lhs, rhs, out_dtype=jnp.float32, **options)


CLOSE = {"rtol": 2.0**-20, "atol": 2.0**-14}  # sums of 300 products, of the order of 16


@pytest.mark.parametrize("granularity", [ROW_BLOCKS, SQUARE_BLOCKS], ids=["1x128", "128x128"])
def test_ragged_m(rng, sizes, granularity):
    group_sizes, meant = sizes
    rhs = operand(rng, 4, N, K, granularity=granularity)
    lhs = poisoned(operand(rng, M, K), np.arange(M) < sum(meant))
    out = np.asarray(fp8_gemm_ragged_m(lhs, rhs, group_sizes, out_dtype=jnp.float32))
    end = 0
    for group, size in enumerate(meant):
        rows = slice(end, end := end + size)
        np.testing.assert_allclose(out[rows], dense(lhs, at(rhs, group))[rows], **CLOSE)
    np.testing.assert_array_equal(out[end:], 0)


def test_ragged_m_within_the_bounds(rng):
    lhs, rhs = operand(rng, M, K), weights(rng, 4, N, K)
    for out_dtype in (jnp.bfloat16, jnp.float32):
        out = fp8_gemm_ragged_m(lhs, rhs, jnp.array([20, 0, 20, 0]), out_dtype=out_dtype)
        assert out.dtype == out_dtype
        for group, rows in (0, slice(0, 20)), (2, slice(20, 40)):
            assert_within_bound(out[rows], at(lhs, rows), at(rhs, group), random_signs=True)


def test_many_groups(rng):
    lhs, rhs = operand(rng, 300, 130), operand(rng, 256, 8, 130)
    sizes = rng.multinomial(290, np.full(256, 1 / 256))
    out = fp8_gemm_ragged_m(lhs, rhs, jnp.asarray(sizes), out_dtype=jnp.float32)
    rows = at(rhs, np.repeat(np.arange(256), sizes))  # of every row of lhs the weights, [290, 8, 130]
    expected = jax.vmap(dense)(at(lhs, slice(0, 290), None), rows)[:, 0]
    np.testing.assert_allclose(out[:290], expected, **CLOSE)
    np.testing.assert_array_equal(out[290:], 0)


def test_masked(rng, sizes):
    group_sizes, _ = sizes
    valid = np.clip(np.asarray(group_sizes), 0, M)
    is_valid = np.arange(M) < valid[:, None]
    lhs, rhs = poisoned(operand(rng, 4, M, K), is_valid), weights(rng, 4, N, K)
    out = np.asarray(fp8_gemm_masked(lhs, rhs, group_sizes, expected_group_size=3, out_dtype=jnp.float32))
    for group, size in enumerate(valid):
        np.testing.assert_allclose(out[group, :size], dense(at(lhs, group), at(rhs, group))[:size], **CLOSE)
    assert np.isnan(out[~is_valid]).all(), "what must not be used shows"


def test_masked_within_the_bounds(rng):
    lhs, rhs = operand(rng, 2, 20, K), weights(rng, 2, N, K)
    out = fp8_gemm_masked(lhs, rhs, jnp.array([20, 13]))
    assert out.dtype == jnp.bfloat16
    assert_within_bound(out[0], at(lhs, 0), at(rhs, 0), random_signs=True)
    assert_within_bound(out[1, :13], at(lhs, 1, slice(13)), at(rhs, 1), random_signs=True)


TOKENS = {
    "in whole blocks": ([128, 256, 0, 128], [1, 2, 0, 1]),
    "at the edges": ([1, 127, 129, 0], [1, 1, 2, 0]),
    "all zero": ([0, 0, 0, 0], [0, 0, 0, 0]),
    "below K": ([0, 5, 0, 3], [0, 1, 0, 1]),
    "negative": ([200, -1, INT_MIN, 1], [2, 0, 0, 1]),
    "oversized": ([300, 1000, 7, 0], [3, 2, 0, 0]),
    "overflowing": ([1, INT_MAX, INT_MAX, 2], [1, 4, 0, 0]),
    "overflowing at once": ([INT_MAX] * 4, [5, 0, 0, 0]),
}


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("k", [640, 600])
def test_ragged_k(rng, case, k):
    """5 blocks of K, the last one whole or not; behind the groups both operands are NaN."""
    group_sizes, num_blocks = TOKENS[case]
    lhs, rhs = (behind_groups_nan(operand(rng, rows, k), sum(num_blocks)) for rows in (33, 130))
    accumulator = jnp.asarray(rng.standard_normal((4, 33, 130)), jnp.float32)
    function = partial(fp8_gemm_ragged_k, lhs, rhs, jnp.array(group_sizes, jnp.int32))
    outs = np.asarray([function(), function(accumulator=accumulator) - accumulator])
    end = 0
    for group, size in enumerate(num_blocks):
        blocks = slice(end, end := end + size)
        expected = dense(columns(lhs, blocks), columns(rhs, blocks)) if size else np.zeros((33, 130))
        for out in outs:
            np.testing.assert_allclose(out[group], expected, rtol=2.0**-20, atol=2.0**-13)


def columns(array, blocks):
    """These 128-blocks of K, as an operand of its own."""
    values = array.values[:, blocks.start * 128 : blocks.stop * 128]
    return ScaledArray(values, array.scales[:, blocks], ROW_BLOCKS)


def behind_groups_nan(array, num_blocks):
    return ScaledArray(array.values.at[:, num_blocks * 128 :].set(jnp.nan),
                       array.scales.at[:, num_blocks:].set(jnp.nan), ROW_BLOCKS)


def test_ragged_k_within_the_bounds(rng):
    lhs, rhs = operand(rng, 33, 512), operand(rng, 130, 512)
    group_sizes, accumulator = jnp.array([256, 256]), jnp.ones((2, 33, 130))
    plain = fp8_gemm_ragged_k(lhs, rhs, group_sizes)
    rounded = fp8_gemm_ragged_k(lhs, rhs, group_sizes, out_dtype=jnp.bfloat16)
    added = fp8_gemm_ragged_k(lhs, rhs, group_sizes, accumulator=accumulator)
    assert [x.dtype for x in (plain, rounded, added)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for group in range(2):
        parts = [columns(x, slice(2 * group, 2 * group + 2)) for x in (lhs, rhs)]
        assert_within_bound(plain[group], *parts, random_signs=True)
        assert_within_bound(rounded[group], *parts, random_signs=True)
        assert_within_bound(added[group], *parts, accumulator=accumulator[group])


def test_accumulates_in_place_where_donated(rng):
    lhs, rhs = operand(rng, 33, 512), operand(rng, 130, 512)
    accumulator = jnp.asarray(rng.standard_normal((2, 33, 130)), jnp.float32)
    start = np.asarray(accumulator).copy()
    group_sizes = jnp.array([512, 0])
    step = jax.jit(lambda a: fp8_gemm_ragged_k(lhs, rhs, group_sizes, accumulator=a), donate_argnums=0)
    out = step(accumulator)
    assert_within_bound(out[0], lhs, rhs, accumulator=start[0])
    np.testing.assert_array_equal(out[1], start[1])
    assert accumulator.is_deleted()


def cases(rng, kind, leads):
    """The function of a kind and its arguments lhs, rhs, group_sizes with axes in front."""
    lhs_lead, rhs_lead, sizes_lead = leads
    if kind == "ragged_k":
        return fp8_gemm_ragged_k, (operand(rng, *lhs_lead, 9, 640), operand(rng, *rhs_lead, 20, 640),
                                   jnp.asarray(rng.integers(0, 250, (*sizes_lead, 3)), jnp.int32))
    groups = (3,) * (kind == "masked")
    function = {"ragged_m": fp8_gemm_ragged_m, "masked": fp8_gemm_masked}[kind]
    return (partial(function, out_dtype=jnp.float32),
            (operand(rng, *lhs_lead, *groups, 20, 200), weights(rng, *rhs_lead, 3, 140, 200),
             jnp.asarray(rng.integers(0, 9, (*sizes_lead, 3)), jnp.int32)))


@pytest.mark.parametrize("kind", ["ragged_m", "masked", "ragged_k"])
@pytest.mark.parametrize("axes", [
    [(0, 0, 0)], [(0, None, 0)], [(None, 0, 0)], [(None, None, 0)], [(0, 0, None)], [(0, None, None)],
    [(None, 0, None)],
    [(0, 0, 0), (0, 0, 0)], [(0, None, 0), (0, 0, 0)], [(None, 0, None), (0, None, 0)],
], ids=str)
def test_vmap(rng, kind, axes):
    """Every element of the batch is what the function gives for it alone."""
    lengths = (2, 3)[-len(axes):]
    leads = [[n for n, in_axes in zip(lengths, axes, strict=True) if in_axes[i] == 0] for i in range(3)]
    function, args = cases(rng, kind, leads)
    batched = function
    for in_axes in reversed(axes):
        batched = jax.vmap(batched, in_axes)
    out = jax.jit(batched)(*args)
    for index in np.ndindex(lengths):
        own = [at(arg, *[j for j, in_axes in zip(index, axes, strict=True) if in_axes[i] == 0])
               for i, arg in enumerate(args)]
        np.testing.assert_allclose(out[index], function(*own), **CLOSE)


@pytest.mark.parametrize("axes", [
    (0, 0, 0, 0), (None, None, None, 0), (0, None, 0, None), (None, None, 0, 0)])
def test_vmap_with_an_accumulator(rng, axes):
    leads = [(3,) if axis == 0 else () for axis in axes]
    function, args = cases(rng, "ragged_k", leads[:3])
    accumulator = jnp.asarray(rng.standard_normal((*leads[3], 3, 9, 20)), jnp.float32)
    out = jax.vmap(lambda *x: function(*x[:3], accumulator=x[3]), axes)(*args, accumulator)
    args = *args, accumulator
    for i in range(3):
        own = [arg if axis is None else at(arg, i) for arg, axis in zip(args, axes, strict=True)]
        np.testing.assert_allclose(out[i], function(*own[:3]) + own[3], **CLOSE)


@pytest.mark.parametrize("kind", ["ragged_m", "masked", "ragged_k"])
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (None, 0, None)])
def test_vmap_over_nothing(rng, kind, axes):
    function, args = cases(rng, kind, [(0,) if axis == 0 else () for axis in axes])
    out = jax.vmap(function, axes)(*args)
    assert out.shape == (0, *{"ragged_m": (20, 140), "masked": (3, 20, 140), "ragged_k": (3, 9, 20)}[kind])


@pytest.mark.parametrize("kind", ["ragged_m", "masked", "ragged_k"])
def test_new_sizes_do_not_compile_again(rng, kind):
    function, (lhs, rhs, _) = cases(rng, kind, [(), (), ()])
    step = jax.jit(function)
    outs = [step(lhs, rhs, jnp.array(sizes, jnp.int32))
            for sizes in ([1, 2, 3], [0, 20, 0], [-1, INT_MAX, 5])]
    assert step._cache_size() == 1
    assert not np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.uint32])
def test_group_sizes_of_other_integers(rng, dtype):
    lhs, rhs = operand(rng, M, K), weights(rng, 4, N, K)
    sizes = np.array([9, np.iinfo(dtype).max, 3, 2], dtype)
    expected = fp8_gemm_ragged_m(lhs, rhs, jnp.array([9, 31, 0, 0], jnp.int32))
    for given in (sizes, jnp.asarray(sizes)):
        np.testing.assert_array_equal(fp8_gemm_ragged_m(lhs, rhs, given), expected)


def test_sizes_beyond_int32_do_not_wrap_around(rng):
    lhs, rhs = operand(rng, M, K), weights(rng, 4, N, K)
    expected = fp8_gemm_ragged_m(lhs, rhs, jnp.array([3, 0, M - 3, 0], jnp.int32))
    for dtype in (np.int64, np.uint64):
        sizes = np.array([3, 0, 2**33 + 1, 2], dtype)
        np.testing.assert_array_equal(fp8_gemm_ragged_m(lhs, rhs, sizes), expected)
    negative = np.array([3, -(2**33) + 5, M, 2])
    np.testing.assert_array_equal(fp8_gemm_ragged_m(lhs, rhs, negative), expected)


def test_the_scopes_show_in_the_program(rng):
    for kind in ("ragged_m", "masked", "ragged_k"):
        function, args = cases(rng, kind, [(), (), ()])
        text = jax.jit(lambda *args: function(*args)).lower(*args).compile().as_text()  # noqa: B023
        assert f"fp8_gemm_{kind}/" in text


@pytest.mark.parametrize(("ids", "expected"), [
    ([0, 0, 1, 3], [2, 1, 0, 1]),
    ([0, -1, -1, 2, 2, -1], [3, 0, 2, 0]),
    ([-1, -1, 1, 1], [2, 2, 0, 0]),
    ([-1, -1, -1], [0, 0, 0, 0]),
    ([1, 1, 4, 7], [0, 2, 0, 0]),
    ([], [0, 0, 0, 0]),
])
def test_group_sizes_from_ids(ids, expected):
    for function in (group_sizes_from_ids, jax.jit(group_sizes_from_ids, static_argnums=1)):
        sizes = function(np.array(ids, np.int32), 4)
        assert sizes.dtype == jnp.int32
        np.testing.assert_array_equal(sizes, expected)


def test_no_groups_from_ids():
    assert group_sizes_from_ids(jnp.array([0, 1, -1]), 0).shape == (0,)


def test_ids_and_sizes_mean_the_same(rng):
    """Groups that are padded to multiples of 8, as DeepGEMM wants them to 128, leave their rows in place."""
    lhs, rhs = operand(rng, M, K), weights(rng, 4, N, K)
    ids = np.repeat([0, -1, 1, -1, 3, -1], [5, 3, 16, 8, 2, 6])
    out = fp8_gemm_ragged_m(lhs, rhs, group_sizes_from_ids(jnp.asarray(ids), 4), out_dtype=jnp.float32)
    for group in (0, 1, 3):
        np.testing.assert_allclose(out[ids == group], dense(lhs, at(rhs, group))[ids == group], **CLOSE)
