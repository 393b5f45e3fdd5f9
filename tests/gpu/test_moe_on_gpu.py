"""The kernels around the grouped GEMMs on a Hopper GPU: the reference's bits."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gpu_launch import assert_same_bytes, launch, on_cpu
from jax_fp8gemm import dequantize, permute, quantize_transposed, reference_moe
from jax_fp8gemm.jit.moe import PermuteProblem, SortProblem, plan_permute, plan_sort
from jax_fp8gemm.jit.quantize_transposed import TransposeProblem, plan_quantize_transposed

FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
INPUTS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def features(rng, *shape, dtype="bf16"):
    """Normal numbers of magnitudes that differ from row to row; zero rows, rows of NaN, infinities."""
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-9, 9, (*shape[:-1], 1)))
    x[rng.random(shape[:-1]) < 0.1] = 0
    x[rng.random(shape[:-1]) < 0.05] = np.nan
    x[rng.random(shape) < 0.001] = np.inf
    return jnp.asarray(x.astype(INPUTS[dtype]))


def draw_ids(rng, shape, num_experts, kind):
    if kind == "one expert":
        return np.full(shape, num_experts // 2, np.int32)
    ids = rng.integers(0, num_experts, shape)
    if kind == "few experts":
        ids = np.where(ids % 7, num_experts - 1, ids)
    if kind == "dropped":
        ids = np.where(rng.random(shape) < 0.7, rng.choice([-1, num_experts, INT_MIN, INT_MAX], shape), ids)
    return ids.astype(np.int32)


KINDS = ["random", "one expert", "few experts", "dropped"]


@pytest.mark.parametrize(("batch", "num_ids", "num_experts"), [
    (1, 1, 1), (1, 127, 8), (3, 129, 300), (2, 1024, 256), (1, 1025, 256), (1, 8 * 4099, 256),
    (2, 70_001, 300), (1, 40_000, 5000), (1, 2**20 + 7, 256), (1, 3000, 19_000)])
@pytest.mark.parametrize("kind", KINDS)
def test_sort(rng, batch, num_ids, num_experts, kind):
    ids = draw_ids(rng, (batch, num_ids, 1), num_experts, kind)
    expected = on_cpu(lambda ids: reference_moe.sort_by_expert(ids, num_experts=num_experts), ids)
    results = [(x.shape, jnp.int32) for x in expected]
    for _ in range(3):
        got = launch(plan_sort(SortProblem(batch, num_ids, num_experts)), results, jnp.asarray(ids))
        assert_same_bytes(got, expected)


@pytest.mark.parametrize(("batch", "tokens", "columns", "top_k", "num_experts"), [
    (1, 1, 1, 1, 1), (1, 127, 7168, 8, 256), (3, 129, 300, 2, 8), (1, 1000, 2048, 8, 300),
    (2, 77, 1021, 3, 5), (1, 40, 136, 20, 30), (1, 4096, 520, 8, 256), (1, 2500, 7168, 1, 4)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("input_dtype", "dtype"), [("bf16", "e4m3"), ("f16", "e4m3"), ("f32", "e5m2")])
def test_permute(rng, batch, tokens, columns, top_k, num_experts, kind, input_dtype, dtype):
    x = features(rng, batch, tokens, columns, dtype=input_dtype)
    ids = draw_ids(rng, (batch, tokens, top_k), num_experts, kind)
    sort, scatter = partial(reference_moe.sort_by_expert, num_experts=num_experts), reference_moe.permute
    _, positions, num_rows = on_cpu(sort, ids)
    values, scales = on_cpu(partial(scatter, dtype=FLOAT8[dtype]), x, positions, num_rows)
    plan = plan_permute(PermuteProblem(batch, tokens, columns, top_k, input_dtype, dtype))
    results = [(values.shape, FLOAT8[dtype]), (scales.shape, jnp.float32)]
    got = launch(plan, results, x, jnp.asarray(positions), jnp.asarray(num_rows))
    assert_same_bytes(got, [values, scales])


@pytest.mark.parametrize("tokens", [0, 1, 127, 129])
@pytest.mark.parametrize("num_experts", [0, 1, 8, 256, 300])
def test_permute_in_public(rng, tokens, num_experts):
    x = features(rng, tokens, 264)
    ids = jnp.asarray(rng.integers(-1, num_experts + 1, (tokens, 8)), jnp.int32)
    expected = on_cpu(lambda *args: permute(*args, num_experts, implementation="reference"), x, ids)
    for implementation in ("hopper", None, "reference"):
        call = jax.jit(lambda x, ids, each=implementation: permute(x, ids, num_experts, implementation=each))
        assert_same_bytes(call(x, ids), expected)


GROUP_SIZES = [[300, 0, 128, 129, 1], [0] * 5, [1] * 5, [500] * 5, [-5, 100, INT_MIN, 20, 0], [INT_MAX] * 5,
               [700, 0, 0, 0, 0], [0] * 100 + [3] * 156, [2, 0, 1] * 100, [558]]


@pytest.mark.parametrize("sizes", GROUP_SIZES, ids=lambda sizes: f"{sizes[:3]} of {len(sizes)}")
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (127, 136), (129, 77), (700, 264), (700, 1021)])
@pytest.mark.parametrize(("input_dtype", "dtype"), [("bf16", "e4m3"), ("f16", "e5m2"), ("f32", "e4m3")])
def test_quantize_transposed(rng, sizes, tokens, columns, input_dtype, dtype):
    x = features(rng, 2, tokens, columns, dtype=input_dtype)
    sizes = np.array([sizes, sizes[::-1]], np.int32)
    reference = partial(reference_moe.quantize_transposed, dtype=FLOAT8[dtype])
    values, scales = on_cpu(reference, x, sizes)
    plan = plan_quantize_transposed(TransposeProblem(2, tokens, columns, sizes.shape[1], input_dtype, dtype))
    results = [(values.shape, FLOAT8[dtype]), (scales.mT.shape, jnp.float32)]
    assert_same_bytes(launch(plan, results, x, jnp.asarray(sizes)), [values, scales.mT])


@pytest.mark.parametrize("columns", [2048, 7168])
def test_quantize_transposed_in_public(rng, columns):
    x, sizes = features(rng, 4099, columns), jnp.asarray(rng.multinomial(4000, np.ones(16) / 16), jnp.int32)
    expected = on_cpu(lambda *args: quantize_transposed(*args, implementation="reference"), x, sizes)
    for implementation in ("hopper", None, "reference"):
        call = jax.jit(lambda *args, each=implementation: quantize_transposed(*args, implementation=each))
        assert_same_bytes(call(x, sizes), expected)


def test_more_than_31_bits_of_elements(rng):
    """The last tokens of many have the bits that they have alone."""
    tokens, columns, top_k = 40_000, 7168, 8
    x = jnp.tile(features(rng, 1, 64, columns), (1, tokens // 64, 1))
    ids = jnp.asarray(rng.integers(0, 8, (1, tokens, top_k)), jnp.int32)
    rows, _, positions = permute(x[0], ids[0], 8, implementation="hopper")
    assert rows.values.size > 2**31
    expected, _, _ = permute(x[0, -64:], ids[0, -64:], 8, implementation="hopper")
    _, _, small = permute(x[0, -64:], ids[0, -64:], 8)
    np.testing.assert_array_equal(
        np.asarray(rows.values[positions[-64:].reshape(-1)]).view(np.uint8),
        np.asarray(expected.values[small.reshape(-1)]).view(np.uint8))


def test_vmap_and_replay(rng):
    """Routings change from call to call of one program, which XLA may record as a CUDA graph."""
    @jax.jit
    @jax.vmap
    def step(x, ids):
        rows, sizes, positions = permute(x, ids, 8, implementation="hopper")
        return rows, sizes, positions, quantize_transposed(dequantize(rows), sizes, implementation="hopper")

    x = jnp.asarray(rng.standard_normal((3, 200, 264)), jnp.bfloat16)
    for _ in range(6):
        ids = jnp.asarray(rng.integers(-1, 9, (3, 200, 4)), jnp.int32)
        whole = step(x, ids)
        for i in range(3):
            one = step(x[i : i + 1], ids[i : i + 1])
            assert_same_bytes(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], whole), one)
        expected = on_cpu(lambda x, ids: permute(x, ids, 8), x[0], ids[0])
        assert_same_bytes(jax.tree.map(lambda leaf: leaf[0], whole[:3]), expected)
