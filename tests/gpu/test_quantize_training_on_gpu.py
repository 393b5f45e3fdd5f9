"""What a training step quantises, on a Hopper GPU: the reference's bits; SwiGLU's gradient within its bound.

What the kernels may not read is NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from arranged import arranged
from gpu_launch import assert_same_bytes, launch, on_cpu
from jax_fp8gemm import (
    ScaledArray,
    quantize_both,
    quantize_swiglu_backward,
    quantize_weights,
    reference_training,
)
from jax_fp8gemm.jit.quantize_training import (
    TokensProblem,
    WeightsProblem,
    plan_quantize_both,
    plan_quantize_swiglu_backward,
    plan_quantize_weights,
)
from jax_fp8gemm.scaling import ROW_BLOCKS
from swiglu_backward_bound import assert_is_quantized_swiglu_backward

FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
INPUTS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
DTYPES = [("bf16", "e4m3"), ("f16", "e5m2"), ("f32", "e4m3")]
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GROUP_SIZES = [None, [300, 0, 128, 129, 1], [0] * 5, [1] * 5, [500] * 5, [-5, 100, INT_MIN, 20, 0],
               [INT_MAX] * 5, [700, 0, 0, 0, 0], [0] * 100 + [3] * 156, [2, 0, 1] * 100, [558]]
name_of = lambda sizes: "no groups" if sizes is None else f"{sizes[:3]} of {len(sizes)}"


def numbers_of_all_kinds(rng, shape, dtype):
    """Normal numbers of magnitudes that differ from row to row and from block to block; zero blocks, tiny,
    subnormal and huge ones; NaN and infinities."""
    *leading, columns = shape
    magnitudes = np.exp(rng.uniform(-90, 88, (*leading, -(-columns // 128))))
    magnitudes[rng.random(magnitudes.shape) < 0.5] = 1
    magnitudes[rng.random(magnitudes.shape) < 0.1] = 0
    x = rng.standard_normal(shape) * np.repeat(magnitudes, 128, -1)[..., :columns]
    for bad in (np.nan, np.inf, -np.inf):
        x[rng.random(shape) < 0.0005] = bad
    x[rng.random(shape) < 0.05] = -0.0
    with np.errstate(over="ignore"):
        return x.astype(INPUTS[dtype])


def operands_of_groups(sizes, *operands):
    """Of a batch of two: NaN in the rows of no group, and the sizes, those of the second batch reversed."""
    if sizes is None:
        return [jnp.asarray(x) for x in operands]
    tokens = operands[0].shape[1]
    valid = min(sum(max(size, 0) for size in sizes), tokens)
    is_valid = np.arange(tokens)[:, None] < valid
    return [*(jnp.asarray(np.where(is_valid, x, np.nan).astype(x.dtype)) for x in operands),
            jnp.array([sizes, sizes[::-1]], jnp.int32)]


def memory(results):
    """Values and scales of single rows as the kernels leave them: scales with the rows fastest."""
    return [np.swapaxes(x, 1, 2) if i % 2 else x for i, x in enumerate(results)]


def shapes_and_dtypes(results):
    return [(x.shape, x.dtype) for x in results]


@pytest.mark.parametrize("sizes", GROUP_SIZES, ids=name_of)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (127, 136), (129, 77), (700, 264), (700, 1021)])
@pytest.mark.parametrize(("input_dtype", "dtype"), DTYPES)
def test_quantize_both(rng, sizes, tokens, columns, input_dtype, dtype):
    operands = operands_of_groups(sizes, numbers_of_all_kinds(rng, (2, tokens, columns), input_dtype))
    reference = partial(reference_training.quantize_both, dtype=FLOAT8[dtype])
    expected = memory(on_cpu(reference, *operands))
    groups = None if sizes is None else len(sizes)
    plan = plan_quantize_both(TokensProblem(2, tokens, columns, groups, input_dtype, dtype))
    assert_same_bytes(launch(plan, shapes_and_dtypes(expected), *operands), expected)


@pytest.mark.parametrize("rows", [1, 127, 272, 300])
@pytest.mark.parametrize("columns", [8, 77, 264, 1024])
@pytest.mark.parametrize(("input_dtype", "dtype"), DTYPES)
def test_quantize_weights(rng, rows, columns, input_dtype, dtype):
    w = numbers_of_all_kinds(rng, (3, rows, columns), input_dtype)
    expected = on_cpu(partial(reference_training.quantize_weights, dtype=FLOAT8[dtype]), w)
    plan = plan_quantize_weights(WeightsProblem(3, rows, columns, input_dtype, dtype))
    assert_same_bytes(launch(plan, shapes_and_dtypes(expected), jnp.asarray(w)), expected)


def swiglu_operands(rng, *shape, dtype="bf16"):
    """gate_up and d_hidden for d_hidden of this shape."""
    *leading, f = shape
    gate_up = 3 * rng.standard_normal((*leading, 2 * f))
    return gate_up.astype(INPUTS[dtype]), rng.standard_normal(shape).astype(INPUTS[dtype])


@pytest.mark.parametrize("sizes", GROUP_SIZES, ids=name_of)
@pytest.mark.parametrize(("tokens", "f"), [(1, 128), (129, 256), (700, 384)])
@pytest.mark.parametrize(("input_dtype", "dtype"), DTYPES)
def test_quantize_swiglu_backward(rng, sizes, tokens, f, input_dtype, dtype):
    numbers = swiglu_operands(rng, 2, tokens, f, dtype=input_dtype)
    operands = operands_of_groups(sizes, *numbers)
    groups = None if sizes is None else len(sizes)
    plan = plan_quantize_swiglu_backward(TokensProblem(2, tokens, f, groups, input_dtype, dtype))
    k = len(arranged(numbers[0][0], [tokens] if sizes is None else sizes))
    results = [result for rows, columns in ((tokens, 2 * f), (2 * f, k), (f, k)) for result in (
        ((2, rows, columns), FLOAT8[dtype]), ((2, columns // 128, rows), jnp.float32))]
    got = memory(launch(plan, results, *operands))
    for batch, of_batch in enumerate([sizes, sizes and sizes[::-1]]):
        arrays = [ScaledArray(got[i][batch], got[i + 1][batch], ROW_BLOCKS) for i in (0, 2, 4)]
        assert_is_quantized_swiglu_backward(arrays, *(x[batch] for x in numbers), of_batch)


@pytest.mark.parametrize("d_hidden", [1, -2, 0, 1e30, np.inf, np.nan])
def test_swiglu_backward_of_extremes_is_the_reference_s_but_for_rounding(d_hidden):
    """All pairs of special numbers: the same places of NaN, the rest within a step."""
    special = np.float32([0, 1, 1e-30, 20, 87, 89, 100, 1e30, 3e38, np.inf, np.nan])
    special = np.concatenate([special, -special])
    gate, up = (each.ravel() for each in np.meshgrid(special, special))
    # A row for each pair, so that no number hides beside a larger one.
    gate_up, d = np.zeros((len(gate), 256), np.float32), np.zeros((len(gate), 128), np.float32)
    gate_up[:, 5], gate_up[:, 133], d[:, 5] = gate, up, d_hidden
    got = quantize_swiglu_backward(jnp.asarray(gate_up), jnp.asarray(d), implementation="hopper")
    expected = on_cpu(partial(quantize_swiglu_backward, implementation="reference"), gate_up, d)
    for a, b in zip(got, expected, strict=True):
        # The derivative at 100 errs most, by (1 + 100) (3 + 6) u; twice, and two roundings more each.
        np.testing.assert_allclose(a.scales, b.scales, rtol=2 * (101 * 9 + 2) * 2.0**-24)
        a, b = (np.asarray(array.values, np.float32) for array in (a, b))
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        # Neighbours differ by an eighth at most; by a step of 2^-9 next to zero.
        np.testing.assert_allclose(a, b, rtol=1 / 8, atol=2.0**-9)


PUBLIC = {
    "both": (quantize_both, [(4099, 7168)]),
    "both of awkward columns": (quantize_both, [(1000, 2047)]),
    "weights": (quantize_weights, [(3, 1024, 2048)]),
    "weights of awkward rows": (quantize_weights, [(1023, 2047)]),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_in_public(rng, name):
    function, shapes = PUBLIC[name]
    operands = [numbers_of_all_kinds(rng, shape, "bf16") for shape in shapes]
    if function is quantize_both:
        operands.append(rng.multinomial(shapes[0][0] - 99, np.ones(16) / 16).astype(np.int32))
    expected = on_cpu(partial(function, implementation="reference"), *operands)
    operands = [jnp.asarray(x) for x in operands]
    for implementation in ("hopper", None, "reference"):
        call = jax.jit(partial(function, implementation=implementation))
        assert_same_bytes(call(*operands), expected)


@pytest.mark.parametrize("f", [2048, 1000, 77])
@pytest.mark.parametrize("grouped", [False, True])
def test_swiglu_backward_in_public(rng, f, grouped):
    gate_up, d_hidden = swiglu_operands(rng, 1000, f)
    sizes = [rng.multinomial(900, np.ones(5) / 5).astype(np.int32)] if grouped else []
    for implementation in ("hopper", None, "reference"):
        call = jax.jit(partial(quantize_swiglu_backward, implementation=implementation))
        arrays = call(*map(jnp.asarray, (gate_up, d_hidden, *sizes)))
        assert_is_quantized_swiglu_backward(arrays, gate_up, d_hidden, *sizes)


def test_more_than_31_bits_of_elements():
    """The last blocks of many have the bits of the first: the rows repeat every 128."""
    rows, columns = 2**19 + 128, 4096 + 128
    x = jax.random.normal(jax.random.key(0), (128, columns), jnp.bfloat16)
    few = quantize_both(x, implementation="hopper")
    by_rows, by_columns = quantize_both(jnp.tile(x, (rows // 128, 1)), implementation="hopper")
    assert by_rows.values.size > 2**31
    for i in (0, rows // 256 * 128, rows - 128):
        part = jax.tree.map(lambda leaf, i=i: leaf[i : i + 128], by_rows)
        turned = by_columns.values[:, i : i + 128], by_columns.scales[:, i // 128 : i // 128 + 1]
        assert_same_bytes((part, turned), (few[0], jax.tree.leaves(few[1])))


def test_swiglu_backward_of_more_than_31_bits_of_elements(rng):
    """The same: the last tokens and features of many."""
    f, rows = 2**13, 2**17 + 128
    gate_up, d_hidden = map(jnp.asarray, swiglu_operands(rng, 128, f))
    few = quantize_swiglu_backward(gate_up, d_hidden, implementation="hopper")
    by_rows, by_columns, hidden = quantize_swiglu_backward(
        jnp.tile(gate_up, (rows // 128, 1)), jnp.tile(d_hidden, (rows // 128, 1)), implementation="hopper")
    assert by_rows.values.size > 2**31
    last = slice(rows - 128, rows)
    assert_same_bytes(by_rows.values[last], few[0].values)
    assert_same_bytes(by_rows.scales[last], few[0].scales)
    for many, one in ((by_columns, few[1]), (hidden, few[2])):
        assert_same_bytes(many.values[-128:, last], one.values[-128:])
        assert_same_bytes(many.scales[-128:, -1:], one.scales[-128:])


def test_vmap_and_replay(rng):
    """Sizes change from call to call of one program, which XLA may record as a CUDA graph."""
    @jax.jit
    @jax.vmap
    def step(x, w, gate_up, d_hidden, sizes):
        options = {"implementation": "hopper"}
        return (quantize_both(x, sizes, **options), quantize_weights(w, **options),
                quantize_swiglu_backward(gate_up, d_hidden, sizes, **options))

    x, w = (jnp.asarray(numbers_of_all_kinds(rng, (3, *shape), "bf16")) for shape in ((200, 264), (144, 200)))
    gate_up, d_hidden = map(jnp.asarray, swiglu_operands(rng, 3, 200, 256))
    for _ in range(6):
        sizes = jnp.asarray(rng.multinomial(190, np.ones(4) / 4, 3), jnp.int32)
        whole = step(x, w, gate_up, d_hidden, sizes)
        for i in range(3):
            part = [operand[i : i + 1] for operand in (x, w, gate_up, d_hidden, sizes)]
            assert_same_bytes(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], whole), step(*part))
        expected = on_cpu(quantize_both, x[0], sizes[0]), on_cpu(quantize_weights, w[0])
        assert_same_bytes(jax.tree.map(lambda leaf: leaf[0], whole[:2]), expected)
