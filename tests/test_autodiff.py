"""dot, ragged_dot, feed_forward: their products and gradients against those of the quantised operands.

What a GEMM gets is quantised here once more, by `quantize` of what is transposed by hand, and each result has
to be the exact product of that within the bounds of bounds.py. On integers that FP8 holds, products and
gradients have to be `jax.lax`'s own. Nothing here depends on the platform: tests/gpu runs the same tests.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bounds import assert_groups_within_bound, assert_within_bound
from jax_fp8gemm import quantize as eager_quantize
from jax_fp8gemm import ragged_k_size
from jax_fp8gemm.autodiff import (
    PreparedWeight,
    dot,
    feed_forward,
    prepare,
    ragged_dot,
    ragged_feed_forward,
)
from jax_fp8gemm.scaling import SQUARE_BLOCKS

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
quantize = jax.jit(eager_quantize, static_argnums=1)
SIZES = [[70, 0, 1, 129], [200, 0, 0, 0], [0, 0, 0, 0], [-4, 30, 2**31 - 1, 5]]


def normal(rng, *shape, dtype=BF16):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def bounds_of(sizes, rows):
    ends = np.minimum(np.cumsum(np.clip(np.asarray(sizes, np.int64), 0, None)), rows)
    return list(zip(np.r_[0, ends[:-1]], ends, strict=True))


def columns_of(x, sizes=None):
    """x [T, N] quantised along the tokens of each group, which begin at multiples of 128: [N, K]."""
    x = np.asarray(x)
    sizes = [len(x)] if sizes is None else sizes
    columns = np.zeros((x.shape[1], ragged_k_size(len(x), len(sizes))), x.dtype)
    column = 0
    for start, end in bounds_of(sizes, len(x)):
        columns[:, column : column + end - start] = x[start:end].T
        column += -(-(end - start) // 128) * 128
    return quantize(columns)


def with_gradients(function, *args, dy, others=()):
    """function(*args, *others) and its gradients for args, under jit."""
    return _with_gradients(function, args, others, dy)


@partial(jax.jit, static_argnums=0)
def _with_gradients(function, args, others, dy):
    y, vjp = jax.vjp(lambda *args: function(*args, *others), *args)
    return y, *vjp(dy)


# ---- dense


@pytest.mark.parametrize(("tokens", "k", "n"), [(200, 192, 136), (1, 128, 7), (129, 77, 300)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, BF16), (BF16, F32), (F32, F32)])
def test_dot_and_its_gradients(rng, tokens, k, n, dtype, weight_dtype):
    x, w, dy = normal(rng, tokens, k, dtype=dtype), normal(rng, k, n, dtype=weight_dtype), \
        normal(rng, tokens, n, dtype=dtype)
    y, dx, dw = with_gradients(dot, x, w, dy=dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, weight_dtype)
    assert_within_bound(y, quantize(x), quantize(w.T, SQUARE_BLOCKS), random_signs=True)
    assert_within_bound(dx, quantize(dy), quantize(w, SQUARE_BLOCKS), random_signs=True)
    assert_within_bound(dw, columns_of(x), columns_of(dy), random_signs=True)
    np.testing.assert_array_equal(jax.jit(dot)(x, w), y)


def test_dot_of_f16_is_that_of_f32_rounded(rng):
    x, w, dy = (normal(rng, *shape, dtype=F16) for shape in ((40, 200), (200, 60), (40, 60)))
    results = with_gradients(dot, x, w, dy=dy)
    wide_results = with_gradients(dot, *(each.astype(F32) for each in (x, w)), dy=dy.astype(F32))
    for got, wide in zip(results, wide_results, strict=True):
        np.testing.assert_array_equal(got, wide.astype(F16))


def test_preferred_element_type(rng):
    x, w, dy = normal(rng, 40, 200), normal(rng, 200, 60), normal(rng, 40, 60, dtype=F32)
    y, dx, dw = with_gradients(lambda x, w: dot(x, w, preferred_element_type=F32), x, w, dy=dy)
    assert y.dtype == F32
    np.testing.assert_array_equal(y.astype(BF16), dot(x, w))
    # Gradients come from f32, not rounded to bf16 first.
    assert (dx.dtype, dw.dtype) == (BF16, BF16)
    assert_within_bound(dx, quantize(dy), quantize(w, SQUARE_BLOCKS), random_signs=True)
    assert_within_bound(dw, columns_of(x), columns_of(dy), random_signs=True)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_leading_axes(rng, leading):
    x, w, dy = normal(rng, *leading, 96), normal(rng, 96, 40), normal(rng, *leading, 40)
    results = with_gradients(dot, x, w, dy=dy)
    flat_results = with_gradients(dot, x.reshape(-1, 96), w, dy=dy.reshape(-1, 40))
    assert [each.shape for each in results] == [(*leading, 40), x.shape, w.shape]
    for got, flat in zip(results, flat_results, strict=True):
        np.testing.assert_array_equal(got.ravel(), flat.ravel())


def test_a_weight_without_tokens_has_a_gradient_of_zeros(rng):
    dw = jax.grad(lambda w: dot(jnp.zeros((0, 96), BF16), w).sum())(normal(rng, 96, 40))
    np.testing.assert_array_equal(dw, np.zeros((96, 40)))


# ---- groups


@pytest.mark.parametrize(("sizes", "dtype", "weight_dtype"), [
    *[(sizes, BF16, BF16) for sizes in SIZES], (SIZES[0], BF16, F32), (SIZES[0], F32, F32)])
def test_ragged_dot_and_its_gradients(rng, sizes, dtype, weight_dtype):
    rows, k, n, groups = 203, 130, 72, len(sizes)
    lhs, rhs = normal(rng, rows, k, dtype=dtype), normal(rng, groups, k, n, dtype=weight_dtype)
    dy = normal(rng, rows, n, dtype=dtype)
    bounds = bounds_of(sizes, rows)
    end, counts = bounds[-1][1], np.diff(bounds)[:, 0]
    # Rows of no group may hold anything, and take part in nothing.
    outside = (np.arange(rows) >= end)[:, None]
    poisoned_lhs, poisoned_dy = (jnp.where(outside, jnp.nan, x).astype(dtype) for x in (lhs, dy))
    y, dlhs, drhs = with_gradients(ragged_dot, poisoned_lhs, rhs, dy=poisoned_dy,
                                   others=(np.array(sizes, np.int32),))
    assert (y.dtype, dlhs.dtype, drhs.dtype) == (dtype, dtype, weight_dtype)
    np.testing.assert_array_equal(y[end:], 0)
    np.testing.assert_array_equal(dlhs[end:], 0)
    np.testing.assert_array_equal(drhs[counts == 0], 0)
    check = partial(assert_groups_within_bound, group_sizes=counts, random_signs=True)
    check(y, quantize(lhs), quantize(rhs.mT, SQUARE_BLOCKS), kind="ragged_m")
    check(dlhs, quantize(dy), quantize(rhs, SQUARE_BLOCKS), kind="ragged_m")
    check(drhs, columns_of(lhs, sizes), columns_of(dy, sizes), kind="ragged_k")


def sevens(rng, *shape):
    """Integers from -7 to 7, a 7 in every block of any granularity: FP8 holds them, with scales of 1/64."""
    x = rng.integers(-7, 8, shape)
    x[..., ::128] = 7
    x[..., 0, :] = 7
    return jnp.asarray(x, BF16)


# The shapes and sizes of jax.lax.ragged_dot's own tests of gradients.
@pytest.mark.parametrize(("m", "k", "n", "num_groups"), [
    (5, 4, 3, 1), (5, 4, 3, 2), (9, 4, 3, 1), (10, 9, 8, 2), (64, 4, 3, 1), (64, 9, 8, 2)])
@pytest.mark.parametrize("whole", [True, False], ids=["all rows", "some rows"])
def test_gradients_are_those_of_lax_ragged_dot(rng, m, k, n, num_groups, whole):
    ends = np.sort(rng.choice(np.arange(1, m), num_groups - 1, replace=False))
    sizes = np.diff(ends, prepend=0, append=m if whole else m - 1).astype(np.int32)
    lhs, rhs, dy = sevens(rng, m, k), sevens(rng, num_groups, k, n), sevens(rng, m, n)
    lhs, dy = (x.at[starts].set(7) for x in (lhs, dy) for starts in [np.cumsum(sizes) - sizes])
    options = {"preferred_element_type": F32}
    # The cotangent is f32 and 7 at most, like the operands: exact sums, rounded to bf16 at the end.
    y, dlhs, drhs = with_gradients(lambda lhs, rhs: ragged_dot(lhs, rhs, sizes, **options), lhs, rhs,
                                   dy=dy.astype(F32))
    expected, expected_vjp = jax.vjp(
        lambda lhs, rhs: lax.ragged_dot(lhs, rhs, sizes, lax.Precision.HIGHEST), lhs.astype(F32),
        rhs.astype(F32))
    inside = (jnp.arange(m) < sizes.sum())[:, None]  # lax promises nothing of the other rows
    np.testing.assert_array_equal(y, jnp.where(inside, expected, 0))
    expected_dlhs, expected_drhs = expected_vjp(jnp.where(inside, dy, 0).astype(F32))
    np.testing.assert_array_equal(dlhs, jnp.where(inside, expected_dlhs, 0).astype(BF16))
    np.testing.assert_array_equal(drhs, expected_drhs.astype(BF16))


# ---- the feed-forward layers


@jax.jit
def swiglu_backward(pre, d_hidden):
    """d_gate | d_up and the hidden activations, by JAX, in f32."""
    def swiglu(pre):
        gate, up = jnp.split(pre, 2, axis=-1)
        return jax.nn.silu(gate) * up

    hidden, vjp = jax.vjp(swiglu, pre.astype(F32))
    return *vjp(d_hidden.astype(F32)), hidden


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, F32), (F32, BF16)])
def test_feed_forward_and_its_gradients(rng, dtype, weight_dtype):
    tokens, k, f, n = 150, 136, 160, 72
    x, dy = normal(rng, tokens, k, dtype=dtype), normal(rng, tokens, n, dtype=dtype)
    gate_up = normal(rng, k, 2 * f, dtype=weight_dtype) / k**0.5
    down = normal(rng, f, n, dtype=weight_dtype)
    y, dx, d_gate_up, d_down = with_gradients(feed_forward, x, gate_up, down, dy=dy)
    assert [g.dtype for g in (y, dx, d_gate_up, d_down)] == [dtype, dtype, weight_dtype, weight_dtype]
    np.testing.assert_array_equal(jax.jit(feed_forward)(x, gate_up, down), y)

    _, d_hidden, _ = with_gradients(dot, jnp.zeros((tokens, f), dtype), down, dy=dy)
    d_pre, hidden = swiglu_backward(jax.jit(dot)(x, gate_up), d_hidden)
    assert_within_bound(y, quantize(hidden), quantize(down.T, SQUARE_BLOCKS))
    assert_within_bound(dx, quantize(d_pre), quantize(gate_up, SQUARE_BLOCKS))
    assert_within_bound(d_gate_up, columns_of(x), columns_of(d_pre))
    assert_within_bound(d_down, columns_of(hidden), columns_of(dy))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ragged_feed_forward_and_its_gradients(rng, sizes):
    rows, k, f, n, groups = 203, 128, 64, 40, len(sizes)
    x, dy = normal(rng, rows, k), normal(rng, rows, n)
    gate_up, down = normal(rng, groups, k, 2 * f) / k**0.5, normal(rng, groups, f, n)
    bounds = bounds_of(sizes, rows)
    end, counts = bounds[-1][1], np.diff(bounds)[:, 0]
    outside = (np.arange(rows) >= end)[:, None]
    others = (np.array(sizes, np.int32),)
    y, dx, d_gate_up, d_down = with_gradients(
        ragged_feed_forward, jnp.where(outside, jnp.nan, x), gate_up, down,
        dy=jnp.where(outside, jnp.nan, dy), others=others)
    np.testing.assert_array_equal(y[end:], 0)
    np.testing.assert_array_equal(dx[end:], 0)
    np.testing.assert_array_equal(d_gate_up[counts == 0], 0)
    np.testing.assert_array_equal(d_down[counts == 0], 0)

    _, d_hidden, _ = with_gradients(ragged_dot, jnp.zeros((rows, f), BF16), down, dy=dy, others=others)
    pre = jax.jit(ragged_dot)(x, gate_up, *others)
    d_pre, hidden = swiglu_backward(pre, d_hidden)
    check = partial(assert_groups_within_bound, group_sizes=counts)
    check(y, quantize(hidden), quantize(down.mT, SQUARE_BLOCKS), kind="ragged_m")
    check(dx, quantize(d_pre), quantize(gate_up, SQUARE_BLOCKS), kind="ragged_m")
    check(d_gate_up, columns_of(x, sizes), columns_of(d_pre, sizes), kind="ragged_k")
    check(d_down, columns_of(hidden, sizes), columns_of(dy, sizes), kind="ragged_k")


# ---- prepared weights


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_prepared_weights_give_the_same_bits(rng, dtype):
    x, w, dy = normal(rng, 50, 128), normal(rng, 128, 72, dtype=dtype), normal(rng, 50, 72)
    prepared = prepare(w)
    assert isinstance(prepared, PreparedWeight)
    assert (prepared.shape, prepared.dtype) == (w.shape, w.dtype)
    plain = with_gradients(dot, x, w, dy=dy)
    inside = with_gradients(lambda x, w: dot(x, prepare(w)), x, w, dy=dy)
    y, dx, dw = with_gradients(dot, x, prepared, dy=dy)
    for got, expected in zip([*inside, y, dx, dw.master], [*plain, *plain], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_gradients_of_microbatches_add_up_at_the_master_weight(rng):
    x, w, dy = sevens(rng, 3, 50, 128), sevens(rng, 128, 72).astype(F32), sevens(rng, 3, 50, 72)

    def loss(w):
        prepared = prepare(w)
        return lax.map(lambda batch: (dot(batch[0], prepared) * batch[1]).sum(dtype=F32), (x, dy)).sum()

    total = jnp.einsum("btk,btn->kn", x.astype(F32), dy.astype(F32), precision="highest")
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w), total)
