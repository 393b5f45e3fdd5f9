"""permute and unpermute: against numpy, positions as a stable sort, dropped ids, every error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_fp8gemm import dequantize, fp8_gemm_ragged_m, permute, quantize, unpermute
from jax_fp8gemm.reference import MIN_SCALE
from jax_fp8gemm.scaling import SQUARE_BLOCKS

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def normal(rng, *shape, dtype=ml_dtypes.bfloat16):
    return rng.standard_normal(shape).astype(dtype)


def codes(array):
    return np.asarray(array.values).view(np.uint8)


def numpy_sort(ids, num_experts):
    """group_sizes and positions, one id after the other."""
    flat = ids.reshape(-1)
    positions, row = np.full(flat.shape, flat.size), 0
    group_sizes = np.zeros(num_experts, int)
    for expert in range(num_experts):
        for slot in np.flatnonzero(flat == expert):
            positions[slot] = row
            row += 1
            group_sizes[expert] += 1
    return group_sizes, positions.reshape(ids.shape)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize(("tokens", "columns", "top_k", "num_experts"), [
    (1, 1, 1, 1), (127, 300, 2, 8), (129, 128, 3, 256), (40, 77, 8, 300)])
def test_rows_are_the_quantised_tokens_in_sorted_order(rng, dtype, tokens, columns, top_k, num_experts):
    x = normal(rng, tokens, columns)
    x[0, 0] = np.nan
    ids = rng.integers(0, num_experts, (tokens, top_k)).astype(np.int32)
    expected_sizes, expected_positions = numpy_sort(ids, num_experts)
    order = np.argsort(ids.reshape(-1), kind="stable")
    quantized = quantize(x, dtype=dtype)
    for function in (permute, jax.jit(permute, static_argnums=2, static_argnames="dtype")):
        rows, group_sizes, positions = function(x, ids, num_experts, dtype=dtype)
        np.testing.assert_array_equal(group_sizes, expected_sizes)
        np.testing.assert_array_equal(positions, expected_positions)
        np.testing.assert_array_equal(codes(rows), codes(quantized)[order // top_k])
        np.testing.assert_array_equal(rows.scales, np.asarray(quantized.scales)[order // top_k])
        assert rows.dtype == dtype
        assert group_sizes.dtype == positions.dtype == jnp.int32


@given(hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
                  elements=st.one_of(st.integers(-2, 9), st.sampled_from([INT_MIN, INT_MAX]))),
       st.integers(0, 8))
@settings(deadline=None, max_examples=60)
def test_positions_are_a_stable_sort(ids, num_experts):
    _, group_sizes, positions = permute(np.ones((len(ids), 1), np.float32), ids, num_experts)
    expected_sizes, expected_positions = numpy_sort(ids, num_experts)
    np.testing.assert_array_equal(group_sizes, expected_sizes)
    np.testing.assert_array_equal(positions, expected_positions)


def test_dropped_ids_leave_zeros_behind_all_groups(rng):
    x = normal(rng, 50, 200)
    x[7] = np.nan
    ids = rng.integers(-3, 12, (50, 4)).astype(np.int32)
    ids[7] = [8, -1, INT_MAX, INT_MIN]
    rows, group_sizes, positions = permute(x, ids, 8)
    is_dropped = (ids < 0) | (ids >= 8)
    total = int(group_sizes.sum())
    assert total == (~is_dropped).sum() > 0
    np.testing.assert_array_equal(np.asarray(positions)[is_dropped], 200)
    assert sorted(np.asarray(positions)[~is_dropped]) == list(range(total))
    assert not codes(rows)[total:].any()
    np.testing.assert_array_equal(rows.scales[total:], MIN_SCALE)


def test_unpermute_sums_in_order_of_the_slots(rng):
    y, positions = normal(rng, 90, 33), rng.integers(0, 90, (40, 5)).astype(np.int32)
    weights = rng.standard_normal((40, 5)).astype(np.float32)
    exact = np.einsum("tj,tjd->td", weights.astype(np.float64), y.astype(np.float64)[positions])
    # Five products, rounded or not, and five sums err by 2^-24 of a partial sum each; the result by 2^-8.
    size = np.einsum("tj,tjd->td", np.abs(weights), np.abs(y.astype(np.float32))[positions])
    for function in (unpermute, jax.jit(unpermute)):
        out = function(y, positions, weights)
        assert out.dtype == jnp.bfloat16
        error = np.abs(np.asarray(out, np.float64) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 11 * 2.0**-24 * size).all()
        assert error.max() > 0
    # 2^26 + 1 - 2^26 is 0 in this order, and 1 in others.
    y = np.array([[2**26], [1], [-(2**26)]], ml_dtypes.bfloat16)
    out = unpermute(y, np.int32([[0, 1, 2], [0, 2, 1]]), np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(np.asarray(out, np.float32), [[0], [1]])


def test_positions_that_are_no_rows_add_nothing(rng):
    y, weights = normal(rng, 3, 20), np.full((4, 2), np.nan, np.float32)
    weights[:, 0] = 0.5
    positions = np.int32([[0, 3], [1, INT_MAX], [2, -1], [0, INT_MIN]])
    out = unpermute(y, positions, weights)
    np.testing.assert_array_equal(out, y[[0, 1, 2, 0]] * ml_dtypes.bfloat16(0.5))
    assert not np.asarray(unpermute(y, np.full((4, 2), 3, np.int32), weights), np.float32).any()
    # NaN of rows that count stays.
    assert np.isnan(np.asarray(unpermute(y, np.int32([[0, 1]]), np.float32([[1, np.nan]])), np.float32)).all()


def test_a_layer_of_one_gemm(rng):
    """permute, a GEMM, unpermute: each token times the weights of its experts."""
    x, experts = normal(rng, 30, 256), normal(rng, 4, 128, 256, dtype=np.float32)
    ids = np.argsort(rng.random((30, 5)), axis=1)[:, :2].astype(np.int32)  # of five experts, 4 is elsewhere
    weights = rng.random((30, 2)).astype(np.float32)
    w = quantize(experts, SQUARE_BLOCKS)
    rows, group_sizes, positions = permute(x, ids, 4)
    out = unpermute(fp8_gemm_ragged_m(rows, w, group_sizes), positions, weights)
    tokens = np.asarray(dequantize(quantize(x), jnp.float32), np.float64)
    matrices = np.asarray(dequantize(w, jnp.float32), np.float64)
    expected = np.zeros((30, 128))
    for token, slot in np.ndindex(30, 2):
        if ids[token, slot] < 4:
            expected[token] += weights[token, slot] * (matrices[ids[token, slot]] @ tokens[token])
    # Rounded to bf16 behind the GEMM and at the end, evenly spread; f32 sums err less.
    error = np.linalg.norm(np.asarray(out, np.float64) - expected)
    assert 0 < error <= 2 * 2.0**-8 / 3**0.5 * np.linalg.norm(expected)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_permute(rng, axes):
    x, ids = normal(rng, 3, 20, 150), rng.integers(-1, 6, (3, 20, 2)).astype(np.int32)
    args = [value if axis == 0 else value[0] for value, axis in zip((x, ids), axes, strict=True)]
    mapped = jax.vmap(lambda x, ids: permute(x, ids, 5), axes)(*args)
    for i in range(3):
        one = permute(*(value[i] if axis == 0 else value for value, axis in zip(args, axes, strict=True)), 5)
        for got, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            assert np.asarray(got[i]).tobytes() == np.asarray(expected).tobytes()


def test_nested_vmap_of_unpermute(rng):
    y, positions = normal(rng, 2, 3, 9, 40), rng.integers(-1, 10, (5, 3, 4)).astype(np.int32)
    weights = rng.standard_normal((5, 4)).astype(np.float32)
    mapped = jax.vmap(jax.vmap(unpermute, (0, 1, None)), (0, None, None))(y, positions, weights)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(mapped[i, j], unpermute(y[i, j], positions[:, j], weights))


@pytest.mark.parametrize(("tokens", "columns", "top_k", "num_experts"), [
    (0, 8, 2, 4), (3, 0, 2, 4), (3, 8, 0, 4), (3, 8, 2, 0)])
def test_empty(tokens, columns, top_k, num_experts):
    ids = np.zeros((tokens, top_k), np.int32)
    rows, group_sizes, positions = permute(np.ones((tokens, columns), np.float32), ids, num_experts)
    assert rows.shape == (tokens * top_k, columns)
    assert group_sizes.shape == (num_experts,)
    assert positions.shape == (tokens, top_k)
    if num_experts == 0:
        np.testing.assert_array_equal(positions, 6)
        np.testing.assert_array_equal(rows.scales, MIN_SCALE)
    y = np.ones((tokens * top_k, columns), ml_dtypes.bfloat16)
    out = unpermute(y, positions, np.ones((tokens, top_k), np.float32))
    np.testing.assert_array_equal(out, np.full((tokens, columns), 2 * (num_experts > 0) * (top_k > 0)))


@pytest.mark.parametrize("rows", [0, 2])
def test_unpermute_of_no_rows_is_zero(rows):
    out = unpermute(np.ones((rows, 8), ml_dtypes.bfloat16), np.full((3, 2), rows, np.int32),
                    np.ones((3, 2), np.float32))
    assert not np.asarray(out, np.float32).any()


X, IDS = np.ones((4, 6), np.float32), np.zeros((4, 2), np.int32)
Y, WEIGHTS = np.ones((8, 6), ml_dtypes.bfloat16), np.ones((4, 2), np.float32)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: permute(X[0], IDS, 3), r"permute: x: expected .* \[T, K\], got float32 of shape \(6,\)"),
    (lambda: permute(X[None], IDS, 3), r"permute: x: .* got float32 of shape \(1, 4, 6\)"),
    (lambda: permute(IDS, IDS, 3), "permute: x: expected bfloat16 or float16 or float32 .* got int32"),
    (lambda: permute([1.0], IDS, 3), "permute: x: .* got list"),
    (lambda: permute(X, IDS[:3], 3),
     r"permute: expert_ids: expected int32 of shape \[4, top_k\], got int32 of shape \(3, 2\)"),
    (lambda: permute(X, IDS.astype(np.int16), 3), "permute: expert_ids: .* got int16"),
    (lambda: permute(X, IDS, -1), "permute: num_experts: expected a whole number of at least 0, got -1"),
    (lambda: permute(X, IDS, 2.0), "permute: num_experts: .* got 2.0"),
    (lambda: permute(X, IDS, 3, dtype=jnp.bfloat16), "permute: dtype: expected float8_e4m3fn or .* bfloat16"),
    (lambda: permute(X, IDS, 3, implementation="cuda"), "permute: implementation: expected .* got 'cuda'"),
    (lambda: unpermute(X, IDS, WEIGHTS), "unpermute: y: expected bfloat16 .* got float32"),
    (lambda: unpermute(Y, IDS[0], WEIGHTS), r"unpermute: positions: .* got int32 of shape \(2,\)"),
    (lambda: unpermute(Y, IDS, WEIGHTS[:, :1]),
     r"unpermute: weights: expected float32 of shape \[4, 2\], got float32 of shape \(4, 1\)"),
    (lambda: unpermute(Y, IDS, IDS), "unpermute: weights: expected float32 .* got int32"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_hopper_is_insisted_on_in_vain():
    with pytest.raises(NotImplementedError,
                       match="fp8_sort_by_expert: implementation='hopper' needs an NVIDIA Hopper"):
        permute(X, IDS, 3, implementation="hopper")
