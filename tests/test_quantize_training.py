"""What a training step quantises: against the quantisers of one order, and SwiGLU's gradient against f64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from arranged import arranged, with_zeros_behind
from jax_fp8gemm import (
    dequantize,
    fp8_gemm,
    quantize,
    quantize_both,
    quantize_swiglu_backward,
    quantize_transposed,
    quantize_weights,
)
from jax_fp8gemm.reference import MIN_SCALE
from swiglu_backward_bound import U, assert_is_quantized_swiglu_backward, exact_gradients

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
ROUTINGS = [[0, 127, 128, 129, 1], [0, 0, 0, 0, 0], [-5, 100, INT_MIN, 200, 3], [INT_MAX] * 5, []]
FLOAT8 = [jnp.float8_e4m3fn, jnp.float8_e5m2]
SQUARE = (128, 128)


def assert_same_bytes(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


BOTH, WEIGHTS, SWIGLU_BACKWARD = (jax.jit(function, static_argnames="dtype") for function in (
    quantize_both, quantize_weights, quantize_swiglu_backward))


def features(rng, *shape, dtype=ml_dtypes.bfloat16):
    x = (rng.standard_normal(shape) * np.exp(rng.uniform(-5, 5, (*shape[:-1], 1)))).astype(dtype)
    x[(*(rng.integers(0, size, 9) for size in shape),)] = np.inf
    return x


@pytest.mark.parametrize("sizes", ROUTINGS, ids=str)
def test_both_orders_of_groups(rng, sizes):
    x, sizes = features(rng, 385, 70), np.array(sizes, np.int32)
    expected = quantize(with_zeros_behind(x, sizes)), quantize_transposed(x, sizes)
    assert_same_bytes(BOTH(x, sizes), expected)
    assert_same_bytes(quantize_both(x, sizes), expected)


@pytest.mark.parametrize("shape", [(1, 1), (130, 70), (2, 3, 128, 5)])
@pytest.mark.parametrize(("input_dtype", "dtype"), [
    (ml_dtypes.bfloat16, jnp.float8_e4m3fn), (np.float16, jnp.float8_e5m2), (np.float32, jnp.float8_e4m3fn)])
def test_both_orders_without_groups(rng, shape, input_dtype, dtype):
    x = features(rng, *shape, dtype=input_dtype)
    rows, columns = BOTH(x, dtype=dtype)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -shape[-2] % 128), (0, 0)]
    assert_same_bytes(rows, quantize(x, dtype=dtype))
    assert_same_bytes(columns, quantize(np.pad(x, padding).mT, dtype=dtype))


def test_no_groups_are_one_group(rng):
    x, sizes = features(rng, 130, 70), np.array([130], np.int32)
    assert_same_bytes(BOTH(x), BOTH(x, sizes))
    operands = swiglu_operands(rng, 130, 70)
    assert_same_bytes(SWIGLU_BACKWARD(*operands), SWIGLU_BACKWARD(*operands, sizes))


def test_rows_of_no_group_are_zeros_whatever_they_held(rng):
    x = rng.standard_normal((300, 5)).astype(np.float32)
    x[133:] = np.nan
    rows, columns = quantize_both(x, np.int32([130, 0, 3]))
    np.testing.assert_array_equal(np.asarray(rows.values[133:]).view(np.uint8), 0)
    np.testing.assert_array_equal(rows.scales[133:], MIN_SCALE)
    assert (np.asarray(rows.scales[:133]) > MIN_SCALE).all()
    assert not np.isnan(dequantize(columns)).any()


@pytest.mark.parametrize("shape", [(1, 1), (300, 200), (2, 3, 128, 260)])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_weights(rng, shape, dtype):
    w = features(rng, *shape)
    forward, backward = WEIGHTS(w, dtype=dtype)
    assert_same_bytes(forward, quantize(w.mT, SQUARE, dtype))
    assert_same_bytes(backward, quantize(w, SQUARE, dtype))
    assert_same_bytes((forward, backward), quantize_weights(w, dtype=dtype))


def test_operands_of_a_layer_and_of_its_gradients(rng):
    """x @ w, dy @ w.T and x.T @ dy, each with what was quantised for it."""
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 200), (200, 150), (40, 150)))
    (x_rows, x_columns), (dy_rows, dy_columns) = quantize_both(x), quantize_both(dy)
    forward, backward = quantize_weights(w)
    for got, (a, b) in ((fp8_gemm(x_rows, forward), (x, w)), (fp8_gemm(dy_rows, backward), (dy, w.T)),
                        (fp8_gemm(x_columns, dy_columns), (x.T, dy))):
        # Each operand errs by 2^-4 / sqrt(3) of its size in the root mean square at most, signs are random;
        # the result by 2^-9.
        bound = (2**0.5 * 2.0**-4 / 3**0.5 + 2.0**-9) * np.linalg.norm(a) * np.linalg.norm(b)
        assert np.linalg.norm(got.astype(np.float32) - a @ b) <= bound
        assert np.asarray(got, np.float32).any()


def swiglu_operands(rng, *shape, dtype=ml_dtypes.bfloat16):
    """gate_up and d_hidden for d_hidden of this shape."""
    *leading, f = shape
    gate_up = 3 * rng.standard_normal((*leading, 2 * f))
    return gate_up.astype(dtype), rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("sizes", [None, *ROUTINGS], ids=str)
def test_swiglu_backward_of_groups(rng, sizes):
    gate_up, d_hidden = swiglu_operands(rng, 385, 77)
    arguments = [] if sizes is None else [np.array(sizes, np.int32)]
    valid = 385 if sizes is None else min(sum(max(size, 0) for size in sizes), 385)
    poisoned = [np.where(np.arange(385)[:, None] < valid, x, np.nan).astype(x.dtype)
                for x in (gate_up, d_hidden)]
    got = SWIGLU_BACKWARD(*poisoned, *arguments)
    assert_is_quantized_swiglu_backward(got, gate_up, d_hidden, sizes)


@pytest.mark.parametrize(("input_dtype", "dtype"), [
    (ml_dtypes.bfloat16, jnp.float8_e5m2), (np.float16, jnp.float8_e4m3fn), (np.float32, jnp.float8_e4m3fn)])
def test_swiglu_backward_numbers(rng, input_dtype, dtype):
    gate_up, d_hidden = swiglu_operands(rng, 2, 3, 130, 136, dtype=input_dtype)
    got = quantize_swiglu_backward(gate_up, d_hidden, dtype=dtype)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    for index in np.ndindex(2, 3):
        arrays = [jax.tree.map(lambda leaf, index=index: leaf[index], array) for array in got]
        assert_is_quantized_swiglu_backward(arrays, gate_up[index], d_hidden[index])


def test_bound_of_the_kernel_s_formula():
    """silu (1 - s) + s times d_hidden up, each step rounded to f32 as the kernel does it, an FMA but once."""
    gate = np.linspace(-87, 87, 1_000_001, dtype=np.float32)
    s = np.float32(1) / (1 + np.exp2(gate * -np.float32(np.log2(np.e))))
    silu = gate * s
    derivative = (np.float64(silu) * (1 - s) + s).astype(np.float32)
    up, d_hidden = np.full_like(gate, -1.3), np.full_like(gate, 0.7)
    got = d_hidden * up * derivative
    assert got.dtype == np.float32
    exact, error, *_ = exact_gradients(np.stack([gate, up], 1), d_hidden[:, None])
    exact, error = exact[:, 0], error[:, 0]
    assert np.all(np.abs(got - exact) <= error)
    assert np.any(np.abs(got - exact) > error / 8)
    assert np.any(np.abs(got - exact) > 1000 * U * np.abs(exact))  # where the derivative is next to zero


def test_exact_gradients_are_those_of_swiglu(rng):
    gate_up, d_hidden = (x.astype(np.float64) for x in swiglu_operands(rng, 20, 6, dtype=np.float32))
    gradients, _, hidden, _ = exact_gradients(gate_up, d_hidden)
    step = 1e-6
    swiglu = lambda x: x[:, :6] / (1 + np.exp(-x[:, :6])) * x[:, 6:]
    np.testing.assert_allclose(hidden, swiglu(gate_up), rtol=1e-14)
    for column in range(12):
        change = step * np.eye(12)[column]
        slopes = (swiglu(gate_up + change) - swiglu(gate_up - change)) / (2 * step)
        np.testing.assert_allclose(gradients[:, column], (slopes * d_hidden).sum(1), rtol=1e-6, atol=1e-8)


def test_what_is_not_finite_becomes_nan_alone(rng):
    clean = [x.astype(np.float32) for x in swiglu_operands(rng, 8, 136)]
    clean[0][2, [10, 146]], clean[1][2, 10] = 0, 0
    scales_of = lambda arrays: [array.scales for array in arrays]
    expected = scales_of(quantize_swiglu_backward(*clean))
    for gate, up, d_hidden, is_nan in (
            (np.nan, 1, 1, (1, 1, 1)), (1, np.nan, 1, (1, 0, 1)), (1, 1, np.nan, (1, 1, 0)),
            (np.inf, 1, 1, (1, 1, 1)), (1, -np.inf, 1, (1, 0, 1)), (-np.inf, 1, 1, (1, 1, 1)),
            (1, 3e38, 3e38, (1, 0, 0))):
        gate_up, d = clean[0].copy(), clean[1].copy()
        gate_up[2, [10, 146]], d[2, 10] = (gate, up), d_hidden
        rows, columns, hidden_columns = quantize_swiglu_backward(gate_up, d)
        nan = [np.isnan(np.asarray(array.values, np.float32)) for array in (rows, columns, hidden_columns)]
        expected_nan = [[2, column] for column, is_it in ((10, is_nan[0]), (146, is_nan[1])) if is_it]
        np.testing.assert_array_equal(np.argwhere(nan[0]), np.reshape(expected_nan, (-1, 2)))
        np.testing.assert_array_equal(nan[1][:, :8], nan[0].T)
        np.testing.assert_array_equal(np.argwhere(nan[2]), [[10, 2]] if is_nan[2] else np.zeros((0, 2)))
        if all(is_nan):
            for a, b in zip(scales_of((rows, columns, hidden_columns)), expected, strict=True):
                np.testing.assert_array_equal(a, b)


def mapped(function, axes, operands):
    """jax.vmap of it, and what it is for each of two."""
    take = lambda i: [x[i] if axis == 0 else x for x, axis in zip(operands, axes, strict=True)]
    both = jax.vmap(function, axes)(*operands)
    return [(jax.tree.map(lambda leaf, i=i: leaf[i], both), function(*take(i))) for i in range(2)]


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap(rng, axes):
    x, sizes = features(rng, 2, 200, 20), np.int32([[150, 0, 5], [1, 128, 3]])
    operands = [v if axis == 0 else v[0] for v, axis in zip((x, sizes), axes, strict=True)]
    for got, expected in mapped(BOTH, axes, operands):
        assert_same_bytes(got, expected)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, None)])
def test_vmap_of_swiglu_backward(rng, axes):
    operands = *swiglu_operands(rng, 2, 200, 10), np.int32([[150, 0, 5], [1, 128, 3]])
    operands = [v if axis == 0 else v[0] for v, axis in zip(operands, axes, strict=True)]
    for got, expected in mapped(SWIGLU_BACKWARD, axes, operands):
        assert_same_bytes(got, expected)


def test_vmap_of_what_has_axes_already(rng):
    w = features(rng, 2, 3, 40, 20)
    for function in (WEIGHTS, BOTH):
        for got, expected in mapped(function, (0,), [w]):
            assert_same_bytes(got, expected)


@pytest.mark.parametrize(("tokens", "columns", "groups"), [
    (0, 8, None), (5, 0, None), (0, 8, 3), (5, 0, 3), (5, 8, 0), (0, 0, 0)])
def test_empty(tokens, columns, groups):
    sizes = [] if groups is None else [np.ones(groups, np.int32)]
    x = np.ones((tokens, columns), np.float32)
    gate_up = np.ones((tokens, 2 * columns), np.float32)
    arrays = *quantize_both(x, *sizes), *quantize_swiglu_backward(gate_up, x, *sizes), *quantize_weights(x)
    k = len(arranged(x, [tokens] if groups is None else sizes[0]))
    assert [array.shape for array in arrays] == [
        x.shape, (columns, k), gate_up.shape, (2 * columns, k), (columns, k), x.T.shape, x.shape]
    for array in arrays:
        array.validate("array")
    if groups == 0:
        np.testing.assert_array_equal(np.asarray(arrays[0].values).view(np.uint8), 0)


X, SIZES = np.ones((4, 6), np.float32), np.ones(2, np.int32)
BACKWARD = "quantize_swiglu_backward"


@pytest.mark.parametrize(("call", "message"), [
    (lambda: quantize_both(X[0]), "quantize_both: expected x with at least two axes"),
    (lambda: quantize_both(SIZES[None]), "quantize_both: expected x of dtype bfloat16, .* got int32"),
    (lambda: quantize_both(X[None], SIZES),
     r"quantize_both: x: expected \[T, N\] with group_sizes, got shape \(1, 4, 6\); use jax.vmap for more"),
    (lambda: quantize_both(X, [1, 2]), "quantize_both: group_sizes: expected an int32 array, got list"),
    (lambda: quantize_both(X, X[0]), "quantize_both: group_sizes: expected an int32 array, got float32"),
    (lambda: quantize_both(X, SIZES[None]), r"quantize_both: group_sizes: expected one axis, got"),
    (lambda: quantize_both(X, dtype=jnp.int8), "quantize_both: expected dtype float8_e4m3fn or .* got int8"),
    (lambda: quantize_both(X, implementation="cuda"), "quantize_both: implementation: .* got 'cuda'"),
    (lambda: quantize_weights(X[0]), "quantize_weights: expected w with at least two axes"),
    (lambda: quantize_weights(SIZES[None]), "quantize_weights: expected w of dtype bfloat16, .* got int32"),
    (lambda: quantize_weights(X, dtype=jnp.int8), "quantize_weights: expected dtype float8_e4m3fn or .*int8"),
    (lambda: quantize_weights(X, implementation="cuda"), "quantize_weights: implementation: .* got 'cuda'"),
    (lambda: quantize_swiglu_backward(X[:, :5], X), f"{BACKWARD}: gate_up: expected an even number"),
    (lambda: quantize_swiglu_backward(X, X),
     rf"{BACKWARD}: d_hidden: expected float32 of shape \(4, 3\), as .* got float32 of shape \(4, 6\)"),
    (lambda: quantize_swiglu_backward(X, X[:, :3].astype(np.float16)),
     rf"{BACKWARD}: d_hidden: expected float32 of shape \(4, 3\), .* got float16 of shape \(4, 3\)"),
    (lambda: quantize_swiglu_backward(SIZES[None], X), f"{BACKWARD}: expected gate_up of dtype .* got int32"),
    (lambda: quantize_swiglu_backward(X[None], X[None, :, :3], SIZES),
     rf"{BACKWARD}: gate_up: expected \[T, 2F\] with group_sizes, got shape \(1, 4, 6\); use jax.vmap"),
    (lambda: quantize_swiglu_backward(X, X[:, :3], [1, 2]), f"{BACKWARD}: group_sizes: expected an int32"),
    (lambda: quantize_swiglu_backward(X, X[:, :3], dtype=jnp.int8), f"{BACKWARD}: expected dtype float8_e4"),
    (lambda: quantize_swiglu_backward(X, X[:, :3], implementation="cuda"), f"{BACKWARD}: implementation: .*"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "name"), [
    (lambda **options: quantize_both(X, **options), "fp8_quantize_both"),
    (lambda **options: quantize_weights(X, **options), "fp8_quantize_weights"),
    (lambda **options: quantize_swiglu_backward(X, X[:, :3], **options), "fp8_quantize_swiglu_backward"),
])
def test_hopper_is_insisted_on_in_vain(call, name):
    with pytest.raises(NotImplementedError, match=f"{name}: implementation='hopper' needs an NVIDIA Hopper"):
        call(implementation="hopper")
