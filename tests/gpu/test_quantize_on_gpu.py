"""The quantisation kernels on a Hopper GPU: the reference's bits, and SwiGLU within its derived bound.

Every kernel is launched once on its own, into results that are full of sentinels: what it does not write
shows. What it may not read is NaN.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_fp8gemm import ScaledArray, ffi, fp8_gemm, quantize, quantize_swiglu, reference
from jax_fp8gemm.jit.problem import MASKED, RAGGED_M
from jax_fp8gemm.jit.quantize import QuantizeProblem, plan_quantize
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape
from swiglu_bound import assert_is_quantized_swiglu

FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
VALUE_SENTINEL, SCALE_SENTINEL = 0x55, -7.0
INPUTS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
SHAPES = [(1, 1, 1), (1, 1, 128), (1, 3, 8), (1, 7, 7168), (1, 64, 7168), (1, 129, 1000), (1, 257, 1021),
          (1, 1000, 136), (1, 4096, 264), (5, 40, 520), (3, 200, 77)]
GROUP_SIZES = [[300, 0, 128, 129], [0, 0, 0, 0], [1, 1, 1, 1], [500, 500, 500, 500], [-5, 100, -(2**31), 20],
               [2**31 - 1] * 4, [700, 0, 0, 0], [0] * 100 + [3] * 156]


def on_cpu(function, *args):
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.tree.map(np.asarray, function(*(np.asarray(arg) for arg in args)))


def codes(values):
    return np.asarray(values).view(np.uint8)


def assert_same_bits(got, expected):
    np.testing.assert_array_equal(np.asarray(got.scales), np.asarray(expected.scales))
    np.testing.assert_array_equal(codes(got.values), codes(expected.values))


def blocks_of_all_kinds(rng, shape, dtype):
    """Normal numbers of magnitudes that differ from row to row and from block to block; zero and constant
    blocks, tiny, subnormal and huge ones; NaN and infinities."""
    *leading, columns = shape
    num_blocks = -(-columns // 128)
    magnitudes = np.exp(rng.uniform(-90, 88, (*leading, num_blocks)))
    magnitudes[rng.random(magnitudes.shape) < 0.5] = 1
    magnitudes[rng.random(magnitudes.shape) < 0.1] = 0
    x = rng.standard_normal(shape) * np.repeat(magnitudes, 128, -1)[..., :columns]
    for bad in (np.nan, np.inf, -np.inf):
        x[rng.random(shape) < 0.002] = bad
    x[rng.random(shape) < 0.05] = -0.0
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(INPUTS[dtype]))


def launch(problem, *operands):
    """The kernel's results, in the place of operands that held sentinels."""
    shape, granularity = (problem.batch, problem.rows, problem.columns), (problem.block_rows, 128)
    scales_shape, dtype = scale_shape(shape, granularity), FLOAT8[problem.float8_dtype]
    if granularity == ROW_BLOCKS:
        scales_shape = scales_shape[0], scales_shape[2], scales_shape[1]
    plan = plan_quantize(problem)

    @jax.jit
    def run(*operands):
        values = jax.lax.bitcast_convert_type(jnp.full(shape, VALUE_SENTINEL, jnp.uint8), dtype)
        results = [values, jnp.full(scales_shape, SCALE_SENTINEL)]
        # The plan's last two buffers are operands here, which share their memory with the results.
        aliases = {len(operands) + i: i for i in range(2)}
        call = jax.ffi.ffi_call(ffi.TARGET, results, input_output_aliases=aliases)
        values, scales = call(*operands, *results, **plan.attributes())
        return values, scales.mT if granularity == ROW_BLOCKS else scales

    ffi.register()
    return ScaledArray(*run(*operands), granularity)


def rows_of(array, index):
    return jax.tree.map(lambda leaf: leaf[index], array)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("input_dtype", INPUTS)
@pytest.mark.parametrize("granularity", [ROW_BLOCKS, SQUARE_BLOCKS], ids=["1x128", "128x128"])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_quantize_gives_the_reference_s_bits(rng, shape, input_dtype, granularity, dtype):
    x = blocks_of_all_kinds(rng, shape, input_dtype)
    options = {"granularity": granularity, "dtype": FLOAT8[dtype]}
    expected = on_cpu(lambda x: quantize(x, **options, implementation="reference"), x)
    problem = QuantizeProblem(shape[0], *shape[1:], input_dtype, dtype, granularity[0])
    assert_same_bits(launch(problem, x), expected)
    assert_same_bits(quantize(x, **options, implementation="hopper"), expected)
    for implementation in None, "reference":
        jitted = jax.jit(lambda x, each=implementation: quantize(x, **options, implementation=each))
        assert_same_bits(jitted(x), expected)


@pytest.mark.parametrize("dtype", list(FLOAT8.values()))
def test_every_bf16_and_f16_number_is_rounded_as_in_the_reference(dtype):
    """Each of them beside the block's largest, whose scale is 1: the quotient is the number itself."""
    largest = float(jnp.finfo(dtype).max)
    for bits_to in (ml_dtypes.bfloat16, np.float16):
        numbers = np.arange(2**16, dtype=np.uint16).view(bits_to)
        is_small = np.abs(numbers.astype(np.float32)) <= largest
        x = np.where(is_small, numbers, bits_to(0)).reshape(-1, 64)
        x = jnp.asarray(np.concatenate([x, np.full_like(x, largest)], 1))
        got = quantize(x, dtype=dtype, implementation="hopper")
        np.testing.assert_allclose(got.scales, 1, rtol=2**-23)
        assert_same_bits(got, on_cpu(lambda x: quantize(x, dtype=dtype, implementation="reference"), x))


def test_quantize_more_than_2_to_the_31_elements():
    rows, columns = 2**19 + 8, 4096 + 128
    x = jax.random.normal(jax.random.key(0), (64, columns), jnp.bfloat16)
    whole = jnp.tile(x, (rows // 64 + 1, 1))[:rows]
    got, part = quantize(whole, implementation="hopper"), quantize(x, implementation="hopper")
    for i in (0, rows // 128 * 64 - 64, rows // 64 * 64 - 64):
        assert_same_bits(rows_of(got, slice(i, i + 64)), part)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(rng, axis):
    x = blocks_of_all_kinds(rng, (5, 4, 300), "bf16")
    mapped = jax.jit(jax.vmap(lambda x: quantize(x, implementation="hopper"), axis))
    assert mapped.lower(x).compile().as_text().count('custom_call_target="jax_fp8gemm') == 1
    assert_same_bits(mapped(x), quantize(jnp.moveaxis(x, axis, 0)))


def test_scales_go_into_the_gemm_as_they_come():
    x, w = (jax.random.normal(jax.random.key(i), (256, 1024), jnp.bfloat16) for i in range(2))
    gemm = jax.jit(lambda x, w: fp8_gemm(quantize(x), quantize(w, SQUARE_BLOCKS)))
    text = gemm.lower(x, w).compile().as_text()
    assert text.count('custom_call_target="jax_fp8gemm') == 3
    assert "fusion(" not in text
    assert "transpose(" not in text
    assert "copy(" not in text
    operands = [on_cpu(lambda x, g=g: quantize(x, g), each)
                for each, g in ((x, ROW_BLOCKS), (w, SQUARE_BLOCKS))]
    np.testing.assert_array_equal(gemm(x, w), jax.jit(fp8_gemm)(*jax.tree.map(jnp.asarray, operands)))


def gate_and_up(rng, *shape, dtype="bf16"):
    return (3 * rng.standard_normal(shape)).astype(INPUTS[dtype])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 2048), (1, 129, 1000), (1, 33, 300), (3, 200, 137),
                                   (1, 4096, 512)], ids=str)
@pytest.mark.parametrize("input_dtype", INPUTS)
@pytest.mark.parametrize("dtype", FLOAT8)
def test_swiglu(rng, shape, input_dtype, dtype):
    x = gate_and_up(rng, *shape[:2], 2 * shape[2], dtype=input_dtype)
    got = launch(QuantizeProblem(*shape, input_dtype, dtype, swiglu=True), jnp.asarray(x))
    assert_is_quantized_swiglu(got, x)
    assert_same_bits(quantize_swiglu(jnp.asarray(x), dtype=FLOAT8[dtype], implementation="hopper"), got)


def test_swiglu_of_extremes_is_the_reference_s_but_for_rounding():
    """All pairs of special numbers: the same places of NaN, infinity and zero, the rest within a step."""
    special = np.float32([0, 1, 1e-30, 20, 87, 89, 100, 1e30, 3e38, np.inf, np.nan])
    special = np.concatenate([special, -special])
    gate, up = (each.ravel() for each in np.meshgrid(special, special))
    # A block for each pair, so that no number hides beside a larger one.
    x = np.zeros((len(gate), 256), np.float32)
    x[:, 5], x[:, 133] = gate, up
    got = quantize_swiglu(jnp.asarray(x), implementation="hopper")
    expected = on_cpu(lambda x: quantize_swiglu(x, implementation="reference"), x)
    np.testing.assert_allclose(got.scales, expected.scales, rtol=2 * (16 + 1.25 * 87) * 2.0**-24)
    assert np.abs(codes(got.values).astype(int) - codes(expected.values)).max() <= 1


@pytest.mark.parametrize("sizes", GROUP_SIZES, ids=lambda sizes: str(sizes[:4]))
@pytest.mark.parametrize("columns", [512, 500, 77])
def test_swiglu_ragged(rng, sizes, columns):
    rows = 700
    valid = min(sum(max(size, 0) for size in sizes), rows)
    x = gate_and_up(rng, rows, 2 * columns)
    x[valid:] = np.nan
    problem = QuantizeProblem(1, rows, columns, swiglu=True, kind=RAGGED_M, groups=len(sizes))
    operands = jnp.asarray(x), jnp.array(sizes, jnp.int32)
    got = rows_of(launch(problem, *(operand[None] for operand in operands)), 0)
    assert_is_quantized_swiglu(rows_of(got, slice(valid)), x[:valid])
    np.testing.assert_array_equal(codes(got.values)[valid:], 0)
    np.testing.assert_array_equal(got.scales[valid:], reference.MIN_SCALE)
    public = quantize_swiglu(operands[0], group_sizes=operands[1], implementation="hopper")
    assert_same_bits(public, got)


@pytest.mark.parametrize(("groups", "rows", "columns"), [
    (1, 130, 512), (8, 64, 1024), (32, 100, 77), (100, 257, 128), (3, 4096, 2048)])
@pytest.mark.parametrize("fill", ["some", "none", "all"])
def test_swiglu_masked_leaves_other_rows_alone(rng, groups, rows, columns, fill):
    sizes = {"some": rng.integers(-3, rows + 10, groups), "none": np.full(groups, -1),
             "all": np.full(groups, 2**31 - 1)}[fill].astype(np.int32)
    beyond = np.arange(rows) >= np.clip(sizes, 0, rows)[:, None]
    x = gate_and_up(rng, groups, rows, 2 * columns)
    x[beyond] = np.nan
    problem = QuantizeProblem(groups, rows, columns, swiglu=True, kind=MASKED)
    got = launch(problem, jnp.asarray(x), jnp.asarray(sizes))
    values, scales = codes(got.values), np.asarray(got.scales)
    assert (values[beyond] == VALUE_SENTINEL).all()
    assert (scales[beyond] == SCALE_SENTINEL).all()
    numpy_leaves = ScaledArray(np.asarray(got.values), scales, ROW_BLOCKS)
    assert_is_quantized_swiglu(rows_of(numpy_leaves, ~beyond), x[~beyond])
    public = quantize_swiglu(jnp.asarray(x), group_sizes=jnp.asarray(sizes), implementation="hopper")
    np.testing.assert_array_equal(codes(public.values)[~beyond], values[~beyond])
    np.testing.assert_array_equal(np.asarray(public.scales)[~beyond], scales[~beyond])
