"""The bit-exact emulation against the hardware's own vectors; the error bounds against the emulation."""

import fractions
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import emulator
from bounds import assert_groups_within_bound, assert_within_bound
from jax_fp8gemm import quantize, reference
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS
from meshes import scaled, weights
from test_sharding_autodiff import exact

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
VECTORS = np.load(pathlib.Path(__file__).parent / "data" / "wgmma_vectors_h200.npz")


@pytest.mark.parametrize("name", sorted({key.split(".")[0] for key in VECTORS}))
def test_equals_the_hardware_in_every_bit(name):
    a, b = (VECTORS[f"{name}.{operand}"].view(E4M3) for operand in "ab")
    out = emulator.tensor_core(a, b, VECTORS.get(f"{name}.c"))
    np.testing.assert_array_equal(out.view(np.uint32), VECTORS[f"{name}.d"].view(np.uint32))


# ---- the data of sharded programs: on a GPU, too, the order of sums must not show in a bit


def test_sums_of_small_whole_numbers_are_exact():
    lhs, rhs = scaled(40, 512), weights(136, 512)
    operands = [np.asarray(x) for x in (lhs.values, lhs.scales, rhs.values, rhs.scales)]
    a, b = (np.float64(x.values) * np.kron(x.scales, np.ones(x.granularity))[:x.shape[0]] for x in (lhs, rhs))
    for split_k in (1, 2, 4):
        np.testing.assert_array_equal(emulator.gemm(*operands, split_k=split_k), a @ b.T)


def test_sums_of_blocks_with_one_large_number_come_in_any_order():
    """A block's own sum is not exact, where 448 meets 448; but blocks are whole on every device."""
    x, w = (np.asarray(exact(128, 512, seed=seed)).astype(E4M3) for seed in (0, 1))
    ones = np.ones((128, 4), np.float32)
    out = emulator.gemm(x, ones, w, ones)
    blocks = [emulator.tensor_core(x[:, k : k + 128], w[:, k : k + 128]) for k in range(0, 512, 128)]
    np.testing.assert_array_equal(out, np.sum(np.float64(blocks), axis=0))
    assert (out != np.float64(x) @ np.float64(w).T).any()


def spike(k=4096):
    """448 at the start, 1 elsewhere, and unit scales: the exact product is 204799."""
    values = np.ones((1, k), np.float32)
    values[0, 0] = 448
    return values.astype(E4M3), np.ones((1, k // 128), np.float32)


def test_spike():
    values, scales = spike()
    assert emulator.gemm(values, scales, values, scales) == 204672
    assert emulator.tensor_core(values, values) == 200704


def test_fma_rounds_once(rng):
    x, y, z = (rng.standard_normal(2000) * np.exp2(rng.integers(-40, 40, 2000)) for _ in range(3))
    x, y, z = (v.astype(np.float32) for v in (x, y, z))
    z[:1000] = -(x * y)[:1000]
    for got, *terms in zip(emulator._fma(x, y, z), x, y, z, strict=True):
        a, b, c = (fractions.Fraction(float(term)) for term in terms)
        exact = a * b + c
        neighbours = [np.nextafter(got, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
        error = abs(fractions.Fraction(float(got)) - exact)
        assert all(error <= abs(fractions.Fraction(float(other)) - exact) for other in neighbours)


def operands(rng, m, n, k, granularity=SQUARE_BLOCKS, kind="normal", dtype=E4M3):
    def draw(rows):
        if kind == "positive":
            return rng.uniform(0, 1, (rows, k))
        magnitude = 10 ** rng.uniform(-6, 6, (rows, 1)) if kind == "magnitudes" else 1
        return rng.standard_normal((rows, k)) * magnitude
    return (quantize(draw(m).astype(np.float32), ROW_BLOCKS, dtype),
            quantize(draw(n).astype(np.float32), granularity))


def emulate(lhs, rhs, **options):
    return emulator.gemm(lhs.values, lhs.scales, rhs.values, rhs.scales, **options)


@pytest.mark.parametrize("kind", ["normal", "positive", "magnitudes"])
@pytest.mark.parametrize("granularity", [ROW_BLOCKS, SQUARE_BLOCKS], ids=["1x128", "128x128"])
@pytest.mark.parametrize("k", [1, 128, 200, 2048])
def test_is_within_the_derived_bound(rng, kind, granularity, k):
    lhs, rhs = operands(rng, 130, 260, k, granularity, kind)
    for out_dtype in (np.float32, ml_dtypes.bfloat16):
        out = emulate(lhs, rhs, out_dtype=out_dtype)
        largest, _ = assert_within_bound(out, lhs, rhs, random_signs=kind != "positive" and k > 1)
        assert largest > 0 or k == 1
    assert out.dtype == ml_dtypes.bfloat16


def test_e5m2_is_within_the_derived_bound(rng):
    lhs, rhs = operands(rng, 33, 129, 1024, dtype=E5M2)
    assert_within_bound(emulate(lhs, rhs), lhs, rhs, random_signs=True)


@pytest.mark.parametrize("split_k", [2, 3, 5, 16])
def test_split_k_adds_the_parts_in_order(rng, split_k):
    lhs, rhs = operands(rng, 20, 140, 5 * 128)
    out = emulate(lhs, rhs, split_k=split_k)
    assert_within_bound(out, lhs, rhs, split_k=split_k, random_signs=True)
    blocks = -(-5 // split_k)
    total = None
    for start in range(0, 5, blocks):
        k = slice(start * 128, (start + blocks) * 128)
        part = emulator.gemm(lhs.values[:, k], lhs.scales[:, start : start + blocks],
                             rhs.values[:, k], rhs.scales[:, start : start + blocks])
        total = part if total is None else total + part
    np.testing.assert_array_equal(out, total)
    assert (out != emulate(lhs, rhs)).any()


def test_accumulates_last(rng):
    lhs, rhs = operands(rng, 20, 140, 256)
    accumulator = rng.standard_normal((20, 140)).astype(np.float32) * 100
    out = emulate(lhs, rhs, accumulator=accumulator)
    np.testing.assert_array_equal(out, accumulator + emulate(lhs, rhs))
    assert_within_bound(out, lhs, rhs, accumulator=accumulator)


def lose_a_tile(out):
    out[128:, 128:256] = 0


def mis_scale_a_tile(out):
    out[128:, 128:256] *= 1.01


def poison(out):
    out[129, 200] = np.nan


@pytest.mark.parametrize("plant", [lose_a_tile, mis_scale_a_tile, poison])
@pytest.mark.parametrize("out_dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_bound_catches(rng, plant, out_dtype):
    lhs, rhs = operands(rng, 256, 384, 2048)
    out = emulate(lhs, rhs)
    plant(out)
    with pytest.raises(AssertionError, match=r"tile \(1, 1\) of \(2, 3\)"):
        assert_within_bound(jnp.asarray(out.astype(out_dtype)), lhs, rhs, random_signs=True)


def test_the_bound_catches_a_lost_block_of_k(rng):
    lhs, rhs = operands(rng, 128, 128, 7168, kind="positive")
    out = emulator.gemm(lhs.values[:, 128:], lhs.scales[:, 1:], rhs.values[:, 128:], rhs.scales[:, 1:])
    with pytest.raises(AssertionError, match="times what is possible"):
        assert_within_bound(out, lhs, rhs)


def grouped_operands(rng, kind, m, n, k, num_groups):
    stack = lambda arrays: jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    draws = [operands(rng, m, n, k, ROW_BLOCKS if kind == "ragged_k" else SQUARE_BLOCKS)
             for _ in range(num_groups)]
    lhs, rhs = ([draw[i] for draw in draws] for i in (0, 1))
    return stack(lhs) if kind == "masked" else lhs[0], rhs[0] if kind == "ragged_k" else stack(rhs)


GROUPED = [
    ("ragged_m", 60, 70, 200, [20, 0, -3, 33]), ("ragged_m", 60, 70, 200, [2**31 - 1, 2**31 - 1]),
    ("masked", 20, 70, 200, [20, 0, 7, 2**31 - 1, -1]), ("ragged_k", 20, 30, 600, [130, 0, 1, 256]),
    ("ragged_k", 20, 30, 600, [2**31 - 1, 5, -(2**31)]),
]


@pytest.mark.parametrize(("kind", "m", "n", "k", "group_sizes"), GROUPED)
def test_groups_are_within_the_bound_and_as_the_reference_says(rng, kind, m, n, k, group_sizes):
    lhs, rhs = grouped_operands(rng, kind, m, n, k, len(group_sizes))
    arrays = [np.asarray(x) for x in (lhs.values, lhs.scales, rhs.values, rhs.scales)]
    out = getattr(emulator, f"gemm_{kind}")(*arrays, group_sizes)
    assert_groups_within_bound(out, lhs, rhs, group_sizes, kind=kind, random_signs=True)
    batched = [x[None] for x in (*arrays, np.array(group_sizes, np.int32))]
    expected = getattr(reference, f"gemm_{kind}")(*batched, out_dtype=jnp.float32)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-2 * np.nanstd(out))


@pytest.mark.parametrize(("kind", "m", "n", "k", "group_sizes"), GROUPED)
def test_an_error_in_one_group_is_found(rng, kind, m, n, k, group_sizes):
    lhs, rhs = grouped_operands(rng, kind, m, n, k, len(group_sizes))
    arrays = [np.asarray(x) for x in (lhs.values, lhs.scales, rhs.values, rhs.scales)]
    out = getattr(emulator, f"gemm_{kind}")(*arrays, group_sizes)
    out[(0,) * (out.ndim - 1)] *= 1.5  # a row of the first group
    with pytest.raises(AssertionError, match="possible"):
        assert_groups_within_bound(out, lhs, rhs, group_sizes, kind=kind)
