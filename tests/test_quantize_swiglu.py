"""quantize_swiglu: its numbers against f64, rows that groups do not have, every error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_fp8gemm import dequantize, quantize_swiglu
from jax_fp8gemm.reference import MIN_SCALE
from swiglu_bound import U, assert_is_quantized_swiglu, exact_swiglu

GROUPS = [([3, 0, 20], 23), ([0, 0, 0], 0), ([40, 5, 5], 40), ([-7, 10, -2147483648], 10),
          ([2147483647, 2147483647, 2147483647], 40), ([], 0)]


def gate_and_up(rng, *shape, dtype=np.float32):
    return (4 * rng.standard_normal(shape)).astype(dtype)


def gate_and_up_without_exponential(rng, *shape):
    """Gates of 20 and more: exp(-gate) is below half a unit of 1 + exp(-gate), which is 1.

    So bits do not depend on XLA's exponential, which a CPU computes in another way in a loop's last steps.
    """
    x = gate_and_up(rng, *shape)
    x[..., : shape[-1] // 2] = 20 + np.abs(x[..., : shape[-1] // 2])
    return x


def is_nan(array):
    return np.isnan(np.asarray(array.values, np.float32))


def leaf_bytes(array):
    return [np.asarray(leaf).tobytes() for leaf in (array.values, array.scales)]


@pytest.mark.parametrize("input_dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("shape", [(1, 2), (40, 512), (33, 600), (2, 3, 5, 274)])
def test_numbers(rng, input_dtype, dtype, shape):
    x = gate_and_up(rng, *shape, dtype=input_dtype)
    for function in (quantize_swiglu, jax.jit(quantize_swiglu, static_argnames="dtype")):
        got = function(x, dtype=dtype)
        assert got.shape == (*shape[:-1], shape[-1] // 2)
        assert got.dtype == dtype
        assert_is_quantized_swiglu(got, x)


def test_bound_of_the_kernel_s_formula():
    """gate * (1 / (1 + 2^(-gate * log2 e))) * up, each step rounded to f32 as the kernel does it."""
    gate = np.linspace(-87, 87, 1_000_001, dtype=np.float32)
    exponential = np.exp2(gate * -np.float32(np.log2(np.e)))
    y = gate * (np.float32(1) / (1 + exponential))
    exact = exact_swiglu(np.stack([gate, np.ones_like(gate)], 1))[:, 0]
    error = np.abs(y - exact) / (U * np.maximum(np.abs(exact), 1e-300))
    assert y.dtype == np.float32
    assert np.all(error <= 12 + 1.25 * np.abs(gate))
    assert np.any(error > 12)


def test_large_gates():
    """exp(-gate) overflows for gates below -88; silu is then a negative zero, and the gate itself above."""
    gate = np.float32([[-3e38, -1000, -89, -20, 0, 20, 1000, 3e38]])
    got = quantize_swiglu(np.concatenate([gate, np.ones_like(gate)], 1))
    assert np.isfinite(np.asarray(got.values, np.float32)).all()
    np.testing.assert_array_equal(np.asarray(got.values, np.float32)[0, [0, 1, 2, 4]], 0)
    np.testing.assert_allclose(dequantize(got)[0, -1], 3e38, rtol=2**-8)


def test_what_is_not_finite_becomes_nan_alone(rng):
    clean = gate_and_up(rng, 8, 400)
    clean[2, 10], clean[2, 210] = 0, 0
    for gate, up in ((np.nan, 1), (1, np.nan), (np.inf, 1), (1, -np.inf), (-np.inf, 1), (-np.inf, np.inf)):
        x = clean.copy()
        x[2, 10], x[2, 210] = gate, up
        got = quantize_swiglu(x)
        np.testing.assert_array_equal(np.argwhere(is_nan(got)), [[2, 10]])
        np.testing.assert_array_equal(got.scales, quantize_swiglu(clean).scales)


@pytest.mark.parametrize(("sizes", "valid"), GROUPS)
def test_ragged_rows_past_the_sum_are_zeros_whatever_they_held(rng, sizes, valid):
    x = gate_and_up_without_exponential(rng, 40, 400)
    x[valid:] = np.nan
    got = jax.jit(quantize_swiglu)(x, group_sizes=jnp.array(sizes, jnp.int32))
    np.testing.assert_array_equal(np.asarray(got.values[valid:]).view(np.uint8), 0)
    np.testing.assert_array_equal(got.scales[valid:], MIN_SCALE)
    assert leaf_bytes(jax.tree.map(lambda leaf: leaf[:valid], got)) == leaf_bytes(quantize_swiglu(x[:valid]))


def test_masked_rows_beyond_the_size_are_nan(rng):
    x = gate_and_up_without_exponential(rng, 5, 40, 400)
    sizes = np.int32([40, 0, 7, -3, 100])
    got = quantize_swiglu(x, group_sizes=sizes)
    beyond = np.arange(40) >= np.clip(sizes, 0, 40)[:, None]
    np.testing.assert_array_equal(is_nan(got), np.broadcast_to(beyond[:, :, None], (5, 40, 200)))
    whole = quantize_swiglu(x)
    np.testing.assert_array_equal(np.asarray(got.scales)[~beyond], np.asarray(whole.scales)[~beyond])


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_vmap(rng, axes, leading):
    x, sizes = gate_and_up_without_exponential(rng, 2, *leading, 40, 300), np.int32([[3, 20, 9], [0, 40, 1]])
    args = [value if axis == 0 else value[0] for value, axis in zip((x, sizes), axes, strict=True)]
    swiglu = lambda x, sizes: quantize_swiglu(x, group_sizes=sizes)
    mapped = jax.vmap(swiglu, axes)(*args)
    for i in range(2):
        one = swiglu(*(arg[i] if axis == 0 else arg for arg, axis in zip(args, axes, strict=True)))
        assert leaf_bytes(jax.tree.map(lambda leaf, i=i: leaf[i], mapped)) == leaf_bytes(one)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 3, 8)])
def test_empty(shape):
    sizes = jnp.ones(shape[:-2] or (2,), jnp.int32)
    for got in (quantize_swiglu(jnp.ones(shape)), quantize_swiglu(jnp.ones(shape), group_sizes=sizes)):
        assert got.shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize(("x", "options", "message"), [
    ((4, 5), {}, r"x: expected an even number of columns, gate and up, got shape \(4, 5\)"),
    ((4,), {}, r"expected x with at least two axes, got shape \(4,\)"),
    ((4, 6), {"dtype": jnp.bfloat16}, "expected dtype float8_e4m3fn or float8_e5m2, got bfloat16"),
    ((4, 6), {"implementation": "cuda"}, "implementation: expected one of .* got 'cuda'"),
    ((4, 6), {"group_sizes": [1, 2]}, "group_sizes: expected an int32 array, got list"),
    ((4, 6), {"group_sizes": np.ones(2)}, "group_sizes: expected an int32 array, got float64"),
    ((4, 6), {"group_sizes": np.ones((1, 2), np.int32)}, r"expected one axis, got shape \(1, 2\)"),
    ((3, 4, 6), {"group_sizes": np.ones(2, np.int32)}, r"expected shape \(3,\), as x has shape \(3, 4, 6\), "
                                                       r"got shape \(2,\)"),
    ((2, 3, 4, 6), {"group_sizes": np.ones(2, np.int32)}, "use jax.vmap for more"),
])
def test_errors(x, options, message):
    with pytest.raises(ValueError, match=f"quantize_swiglu: .*{message}|quantize_swiglu: {message}"):
        quantize_swiglu(np.ones(x, np.float32), **options)


def test_hopper_is_insisted_on_in_vain():
    with pytest.raises(NotImplementedError, match="fp8_quantize_swiglu: implementation='hopper' needs an NV"):
        quantize_swiglu(np.ones((2, 4), np.float32), implementation="hopper")
