"""The kernel on a Hopper GPU: within derived bounds, the emulation's bits, the same from every configuration.

Every output lies in a buffer that held NaN before. The bounds need the whole product, which the GPU computes
in f64; the emulation, on the CPU, takes rows and columns of it.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import emulator
from bounds import assert_within_bound
from gpu_common import DTYPES, bits, draw, sample
from jax_fp8gemm import ScaledArray, fp8_gemm, quantize
from jax_fp8gemm.jit import compiler
from jax_fp8gemm.jit.choose import candidates, choose
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import current_device
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import TMA_ALIGNMENT, GemmProblem, ceil_div
from jax_fp8gemm.jit.warmup import compile_all
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

SIZES = [
    (1, 129280, 7168), (1, 2112, 384), (7, 576, 7168), (7, 1000, 1000), (16, 24576, 1536), (16, 33, 17),
    (33, 2112, 7296), (33, 7168, 128), (64, 2112, 7168), (64, 32768, 512), (64, 130, 16384), (83, 576, 384),
    (83, 1003, 1021), (128, 7168, 16384), (128, 100, 100), (129, 129280, 128), (129, 2112, 7168),
    (799, 576, 7296), (799, 4104, 1536), (799, 1, 300), (4096, 2112, 7168), (4096, 576, 16384),
    (4096, 7168, 2048), (4096, 250, 130),
]


def operands(m, n, k, kind="magnitudes", granularity=SQUARE_BLOCKS):
    return draw(1, (m, k), ROW_BLOCKS, kind), draw(2, (n, k), granularity, kind)


def jit_into_nan(**options):
    """fp8_gemm, jitted, with its result in the place of a donated array of NaN."""
    @jax.jit
    def nans(lhs, rhs):
        return jnp.full((lhs.shape[0], rhs.shape[0]), jnp.nan, options.get("out_dtype", jnp.bfloat16))

    def gemm(poison, lhs, rhs):
        return fp8_gemm(lhs, rhs, implementation="hopper", **options)

    jitted = jax.jit(gemm, donate_argnums=0, keep_unused=True)
    return lambda lhs, rhs: jitted(nans(lhs, rhs), lhs, rhs)


def padded(k):
    return ceil_div(k, TMA_ALIGNMENT) * TMA_ALIGNMENT


def default_config(lhs, rhs, out_dtype):
    problem = GemmProblem(lhs.shape[0], rhs.shape[0], padded(lhs.shape[1]), out_dtype=out_dtype)
    return choose(problem, current_device()).config


def assert_equals_emulation(out, lhs, rhs, split_k, rng):
    """Bit for bit, on a sample of rows and columns."""
    rows, columns = sample(lhs.shape[0], 48, rng), sample(rhs.shape[0], 128, rng)
    rhs_scales = rhs.scales[columns // rhs.granularity[0]]
    expected = emulator.gemm(
        lhs.values[rows], lhs.scales[rows], rhs.values[columns], rhs_scales, split_k=split_k,
        out_dtype=ml_dtypes.bfloat16 if out.dtype == jnp.bfloat16 else np.float32)
    np.testing.assert_array_equal(bits(out[rows][:, columns]), bits(expected))


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_sizes(rng, m, n, k, out_dtype):
    gemm = jit_into_nan(out_dtype=DTYPES[out_dtype])
    for kind in ("magnitudes", "positive"):
        lhs, rhs = operands(m, n, k, kind)
        out = gemm(lhs, rhs)
        split_k = default_config(lhs, rhs, out_dtype).split_k
        assert_within_bound(out, lhs, rhs, split_k=split_k, random_signs=kind != "positive" and m * n > 1000)
        assert_equals_emulation(out, lhs, rhs, split_k, rng)
        np.testing.assert_array_equal(bits(gemm(lhs, rhs)), bits(out))


@pytest.mark.parametrize(("m", "n", "k"), [
    (1, 576, 7168), (64, 2112, 7168), (130, 1003, 1021), (799, 576, 384)])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_row_scales_on_both_sides(rng, m, n, k, out_dtype):
    lhs, rhs = operands(m, n, k, granularity=ROW_BLOCKS)
    out = jit_into_nan(out_dtype=DTYPES[out_dtype], batch_invariant=True)(lhs, rhs)
    assert_within_bound(out, lhs, rhs, random_signs=True)
    assert_equals_emulation(out, lhs, rhs, 1, rng)


@pytest.mark.parametrize("lhs_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("rhs_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_dtypes(lhs_dtype, rhs_dtype):
    lhs = draw(1, (129, 1024), ROW_BLOCKS, "magnitudes", lhs_dtype)
    rhs = draw(2, (576, 1024), SQUARE_BLOCKS, "magnitudes", rhs_dtype)
    out = jit_into_nan(out_dtype=jnp.float32, batch_invariant=True)(lhs, rhs)
    assert_within_bound(out, lhs, rhs, random_signs=True)


def test_spike():
    values = jnp.ones((64, 4096)).at[0, 0].set(448).astype(jnp.float8_e4m3fn)
    lhs = ScaledArray(values, jnp.ones((64, 32)), ROW_BLOCKS)
    rhs = ScaledArray(values, jnp.ones((1, 32)), SQUARE_BLOCKS)
    out = jit_into_nan(out_dtype=jnp.float32, batch_invariant=True)(lhs, rhs)
    assert out[0, 0] == 204672
    assert out[1, 1] == 4096


def legal(problem, configs):
    device = current_device()
    return [config for config in dict.fromkeys(configs) if rejection(problem, config, device) is None]


def every_candidate(problem, rng):
    return legal(problem, candidates(problem, current_device()))


def some_variants(problem, rng):
    """60 of the candidates, with other numbers of products in flight, raster groups and output buffers."""
    others = itertools.product((1, 2, 4), (1, 8), (1, 2))
    variants = [dataclasses.replace(config, partials=partials, raster_group=raster_group, out_buffers=buffers)
                for partials, raster_group, buffers in others
                for config in candidates(problem, current_device())]
    return legal(problem, [variants[i] for i in rng.permutation(len(variants))])[:60]


CONFIGURED = [
    (83, 576, 1040, SQUARE_BLOCKS, every_candidate), (83, 576, 1040, ROW_BLOCKS, some_variants),
    (300, 520, 640, SQUARE_BLOCKS, some_variants), (300, 520, 640, ROW_BLOCKS, some_variants),
    (9, 1000, 2048, SQUARE_BLOCKS, some_variants), (9, 1000, 2048, ROW_BLOCKS, some_variants),
    (270, 650, 1021, SQUARE_BLOCKS, some_variants),
]


@pytest.mark.parametrize(("m", "n", "k", "granularity", "configurations"), CONFIGURED)
def test_every_configuration_gives_the_emulation_s_bits(rng, m, n, k, granularity, configurations):
    """All that do not split K give the same bits; those that do, the bits of their split."""
    lhs, rhs = operands(m, n, k, granularity=granularity)
    problem = GemmProblem(m, n, padded(k), out_dtype="f32", rhs_scale_rows=granularity[0])
    configs = configurations(problem, rng)
    compile_all([(problem, config) for config in configs], progress=False)
    numpy_operands = [np.asarray(x) for x in (lhs.values, lhs.scales, rhs.values, rhs.scales)]
    expected, different = {}, []
    for config in configs:
        if config.split_k not in expected:
            expected[config.split_k] = bits(emulator.gemm(*numpy_operands, split_k=config.split_k))
        with compiler.override(config):
            out = jit_into_nan(out_dtype=jnp.float32)(lhs, rhs)
        num_different = int((bits(out) != expected[config.split_k]).sum())
        if num_different:
            different.append(f"{config}: {num_different} of {m * n} differ")
    assert len(configs) > 20
    assert not different, "\n".join([f"{len(different)} of {len(configs)} configurations:", *different[:20]])


@pytest.mark.parametrize("cluster_n", [1, 2])
def test_output_buffers_are_taken_in_turn_from_tile_to_tile(cluster_n):
    """Three chunks a tile over two buffers: the next tile may not begin with the buffer used last."""
    lhs, rhs = operands(129, 129280, 128)
    outs = []
    for config in (GemmConfig(128, 128, 4), GemmConfig(192, 128, 4, cluster_n=cluster_n)):
        with compiler.override(config):
            gemm = jit_into_nan()
            outs.append([bits(gemm(lhs, rhs)) for _ in range(30)])
    for out in outs[1]:
        np.testing.assert_array_equal(out, outs[0][0])


def test_a_row_does_not_depend_on_m():
    lhs, rhs = operands(4096, 2112, 1536)
    gemm = jit_into_nan(out_dtype=jnp.float32, batch_invariant=True)
    whole = bits(gemm(lhs, rhs))
    for m in (1, 7, 64, 130, 1000):
        rows = jax.tree.map(lambda leaf, m=m: leaf[:m], lhs)
        np.testing.assert_array_equal(bits(gemm(rows, rhs)), whole[:m])


@pytest.mark.parametrize(("m", "n", "k"), [(33, 576, 1536), (130, 1003, 1021), (4096, 576, 2048)])
def test_accumulates_in_place(rng, m, n, k):
    lhs, rhs = operands(m, n, k)
    accumulator = jax.random.normal(jax.random.key(3), (m, n)) * 1e6
    start = np.asarray(accumulator)
    address = accumulator.unsafe_buffer_pointer()
    options = {"out_dtype": jnp.float32, "batch_invariant": True, "implementation": "hopper"}
    step = jax.jit(lambda a, x, w: fp8_gemm(x, w, accumulator=a, **options), donate_argnums=0)
    out = step(accumulator, lhs, rhs)
    assert out.unsafe_buffer_pointer() == address
    assert_within_bound(out, lhs, rhs, accumulator=start)
    alone = np.asarray(fp8_gemm(lhs, rhs, **options))
    np.testing.assert_array_equal(bits(out), bits(start + alone))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize(("m", "n", "k"), [(33, 576, 384), (129, 250, 1021)])
def test_vmap(axes, m, n, k):
    size = 3
    stack = lambda draws: jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
    lhs = [draw(10 + i, (m, k)) for i in range(size)]
    rhs = [draw(20 + i, (n, k), SQUARE_BLOCKS) for i in range(size)]
    args = [stack(x) if axis == 0 else x[0] for x, axis in zip((lhs, rhs), axes, strict=True)]
    gemm = lambda x, w: fp8_gemm(
        x, w, out_dtype=jnp.float32, batch_invariant=True, implementation="hopper")
    compiled = jax.jit(jax.vmap(gemm, axes)).lower(*args).compile()
    assert compiled.as_text().count("custom_call_target=\"jax_fp8gemm") == 1
    out = compiled(*args)
    for i in range(size):
        one = gemm(lhs[i if axes[0] == 0 else 0], rhs[i if axes[1] == 0 else 0])
        np.testing.assert_array_equal(bits(out[i]), bits(one))


def test_non_finite_values_reach_their_rows_and_columns_alone():
    x = jax.random.normal(jax.random.key(0), (130, 600)).at[5, 300].set(jnp.nan)
    w = jax.random.normal(jax.random.key(1), (300, 600)).at[200, 7].set(jnp.inf)
    out = np.asarray(fp8_gemm(quantize(x), quantize(w, SQUARE_BLOCKS), implementation="hopper"), np.float32)
    expected = np.zeros((130, 300), bool)
    expected[5], expected[:, 200] = True, True
    np.testing.assert_array_equal(np.isnan(out), expected)


def test_twenty_chained_calls_run_as_one_graph(driver_calls):
    """Launched once an execution, with the bits of a program for each call."""
    size, depth = 1024, 20
    draw_matrix = lambda seed: jax.random.normal(jax.random.key(seed), (size, size)) * size**-0.5
    weights = [quantize(draw_matrix(seed), SQUARE_BLOCKS) for seed in range(depth)]
    layer = lambda x, w: fp8_gemm(quantize(x), w, implementation="hopper")
    chain, one = jax.jit(lambda x, weights: functools.reduce(layer, weights, x)), jax.jit(layer)
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (64, size), jnp.bfloat16)
        expected = bits(functools.reduce(one, weights, x))
        for _ in range(4):
            driver_calls()
            out = chain(x, weights).block_until_ready()
            calls = driver_calls()
            np.testing.assert_array_equal(bits(out), expected)
            del out  # or the next one lies elsewhere, which records the graph anew
        assert calls["cuGraphLaunch"] == 1
        assert not any(name.startswith("cuLaunchKernel") for name in calls), calls
        assert "cuTensorMapEncodeTiled" not in calls
    assert chain._cache_size() == 1
