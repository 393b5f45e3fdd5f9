"""quantize_transposed: against numpy, with any group sizes, and as an operand of the ragged-K GEMM."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arranged import arranged
from jax_fp8gemm import fp8_gemm_ragged_k, quantize, quantize_transposed, ragged_k_size
from jax_fp8gemm.reference import MIN_SCALE

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
ROUTINGS = [
    [0, 127, 128, 129, 1], [385, 0, 0, 0, 0], [0, 0, 0, 0, 385], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1],
    [-5, 100, INT_MIN, 200, 3], [INT_MAX, INT_MAX, INT_MAX, INT_MAX, INT_MAX], [100, 500, 7, 0, 20], [],
]


def leaf_bytes(array):
    return [np.asarray(leaf).tobytes() for leaf in (array.values, array.scales)]


@pytest.mark.parametrize("sizes", ROUTINGS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_groups_are_quantised_along_their_tokens(rng, sizes, dtype):
    x = rng.standard_normal((385, 70)).astype(ml_dtypes.bfloat16)
    x[rng.integers(0, 385, 9), rng.integers(0, 70, 9)] = np.inf
    expected = quantize(arranged(x, sizes).T.copy(), dtype=dtype)
    for function in (quantize_transposed, jax.jit(quantize_transposed, static_argnames="dtype")):
        got = function(x, np.array(sizes, np.int32), dtype=dtype)
        assert got.shape == (70, ragged_k_size(385, len(sizes)))
        assert leaf_bytes(got) == leaf_bytes(expected)


def test_blocks_without_tokens(rng):
    got = quantize_transposed(rng.standard_normal((300, 5)).astype(np.float32), np.int32([130, 0, 0, 3]))
    assert got.shape == (5, 768)
    np.testing.assert_array_equal(np.asarray(got.values[:, 384:]).view(np.uint8), 0)
    np.testing.assert_array_equal(np.asarray(got.values[:, 259:384]).view(np.uint8), 0)
    np.testing.assert_array_equal(got.scales[:, 3:], MIN_SCALE)
    assert (np.asarray(got.scales[:, :3]) > MIN_SCALE).all()


@pytest.mark.parametrize("sizes", ROUTINGS[:8], ids=str)
def test_the_weight_gradient(rng, sizes):
    """The GEMM finds each group's columns where this puts them, whatever the sizes."""
    x, dy = (rng.standard_normal((385, n)).astype(np.float32) for n in (24, 40))
    sizes = np.array(sizes, np.int32)
    dw = fp8_gemm_ragged_k(quantize_transposed(dy, sizes), quantize_transposed(x, sizes), sizes)
    ends = np.minimum(np.cumsum(np.clip(sizes.astype(np.int64), 0, None)), 385)
    for g, (start, end) in enumerate(zip(np.r_[0, ends[:-1]], ends, strict=True)):
        exact = dy[start:end].T @ x[start:end]
        # Each operand errs by 2^-4 / sqrt(3) of its size in the root mean square at most, signs are random.
        bound = 2**0.5 * 2.0**-4 / 3**0.5 * np.linalg.norm(dy[start:end]) * np.linalg.norm(x[start:end])
        assert np.linalg.norm(dw[g] - exact) <= bound
        assert np.asarray(dw[g]).any() == (end > start)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(0, 50))
def test_k_is_enough_for_any_sizes(sizes, more):
    blocks = sum(-(-size // 128) for size in sizes)
    assert ragged_k_size(sum(sizes) + more, len(sizes)) >= blocks * 128


@given(st.integers(0, 2000), st.integers(0, 30))
def test_k_is_no_more_than_some_sizes_need(tokens, num_groups):
    ones = min(tokens, num_groups)
    sizes = [tokens - ones + 1, *[1] * (ones - 1)] if ones else []
    assert ragged_k_size(tokens, num_groups) == sum(-(-size // 128) for size in sizes) * 128


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap(rng, axes):
    x = rng.standard_normal((2, 200, 20)).astype(np.float32)
    sizes = np.int32([[150, 0, 50], [1, 128, 3]])
    args = [value if axis == 0 else value[0] for value, axis in zip((x, sizes), axes, strict=True)]
    mapped = jax.vmap(quantize_transposed, axes)(*args)
    for i in range(2):
        one = quantize_transposed(*(v[i] if axis == 0 else v for v, axis in zip(args, axes, strict=True)))
        assert leaf_bytes(jax.tree.map(lambda leaf, i=i: leaf[i], mapped)) == leaf_bytes(one)


@pytest.mark.parametrize(("tokens", "columns", "groups"), [(0, 8, 3), (5, 0, 3), (5, 8, 0)])
def test_empty(tokens, columns, groups):
    got = quantize_transposed(np.ones((tokens, columns), np.float32), np.ones(groups, np.int32))
    got.validate("got")
    assert got.shape == (columns, ragged_k_size(tokens, groups))


X, SIZES = np.ones((4, 6), np.float32), np.ones(2, np.int32)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: quantize_transposed(X[None], SIZES), r"x: expected \[T, N\], got shape \(1, 4, 6\); use"),
    (lambda: quantize_transposed(X[0], SIZES), "expected x with at least two axes"),
    (lambda: quantize_transposed(SIZES[None], SIZES), "expected x of dtype bfloat16, .* got int32"),
    (lambda: quantize_transposed(X, [1, 2]), "group_sizes: expected an int32 array, got list"),
    (lambda: quantize_transposed(X, X[0]), "group_sizes: expected an int32 array, got float32"),
    (lambda: quantize_transposed(X, SIZES[None]), r"group_sizes: expected one axis, got shape \(1, 2\)"),
    (lambda: quantize_transposed(X, SIZES, dtype=jnp.int8), "expected dtype float8_e4m3fn or .* got int8"),
    (lambda: quantize_transposed(X, SIZES, implementation="cuda"), "implementation: .* got 'cuda'"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"quantize_transposed: {message}"):
        call()


def test_hopper_is_insisted_on_in_vain():
    with pytest.raises(NotImplementedError, match="fp8_quantize_transposed: implementation='hopper' needs"):
        quantize_transposed(X, SIZES, implementation="hopper")
