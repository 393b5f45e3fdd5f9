"""The rules of the quantisation primitives: what is lowered for CUDA, layouts, vmap, meshes, export."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import (
    export_checks,
    fp8_gemm,
    operation,
    quantize,
    quantize_swiglu,
)
from jax_fp8gemm.jit.problem import MASKED, MAX_SIZE, RAGGED_M
from jax_fp8gemm.jit.quantize import QuantizeProblem, plan_quantize
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS
from lowering import CALL, call_line, lower_for_cuda

SIZES = jnp.array([3, 5, 0], jnp.int32)


def x(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


ROW_MAJOR, ROWS_FASTEST = (f"dense<[{order}]> : tensor<3xindex>" for order in ("2, 1, 0", "1, 2, 0"))


@pytest.mark.parametrize(("granularity", "scales", "layout"), [
    (ROW_BLOCKS, "1x130x3", ROWS_FASTEST), (SQUARE_BLOCKS, "1x2x3", ROW_MAJOR)])
def test_one_call_with_the_scales_where_the_gemm_wants_them(planned, granularity, scales, layout):
    line = call_line(lower_for_cuda(lambda x: quantize(x, granularity, jnp.float8_e5m2), x(130, 300)))
    assert f"operand_layouts = [{ROW_MAJOR}], result_layouts = [{ROW_MAJOR}, {layout}]" in line
    assert f"(tensor<1x130x300xbf16>) -> (tensor<1x130x300xf8E5M2>, tensor<{scales}xf32>)" in line
    assert planned == [QuantizeProblem(1, 130, 300, "bf16", "e5m2", block_rows=granularity[0])]


def test_nothing_comes_between_quantize_and_the_gemm(planned, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path))
    gemm = lambda x, w: fp8_gemm(quantize(x), quantize(w, SQUARE_BLOCKS))
    text = lower_for_cuda(gemm, x(64, 512), x(256, 512))
    quantized, weights, product = (line for line in text.splitlines() if CALL in line)
    assert "tensor<1x64x4xf32>" in quantized
    assert f"result_layouts = [{ROW_MAJOR}, {ROWS_FASTEST}]" in quantized
    assert f"result_layouts = [{ROW_MAJOR}, {ROW_MAJOR}]" in weights
    assert f"operand_layouts = [{ROW_MAJOR}, {ROWS_FASTEST}, {ROW_MAJOR}, {ROW_MAJOR}]" in product
    operations = {line.split(" = ")[1].split()[0] for line in text.splitlines() if " = stablehlo." in line}
    assert operations == {"stablehlo.custom_call", "stablehlo.reshape"}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_leading_axes_become_a_batch(planned, dtype):
    text = lower_for_cuda(quantize, x(2, 3, 130, 300, dtype=dtype))
    assert "tensor<6x130x300xf8E4M3FN>, tensor<6x130x3xf32>" in call_line(text)
    assert planned == [QuantizeProblem(6, 130, 300, {jnp.float16: "f16", jnp.float32: "f32"}[dtype])]


def test_vmap_is_one_call(planned):
    line = call_line(lower_for_cuda(jax.vmap(jax.vmap(quantize, 1), 1), x(130, 5, 4, 300)))
    assert "(tensor<20x130x300xbf16>) -> (tensor<20x130x300xf8E4M3FN>, tensor<20x130x3xf32>)" in line


@pytest.mark.parametrize(("shape", "kind", "operands"), [
    ((130, 600), None, "tensor<1x130x600xbf16>"),
    ((130, 600), RAGGED_M, "tensor<1x130x600xbf16>, tensor<1x3xi32>"),
    ((3, 130, 600), MASKED, "tensor<3x130x600xbf16>, tensor<3xi32>"),
])
def test_swiglu(planned, shape, kind, operands):
    options = {"group_sizes": SIZES} if kind else {}
    line = call_line(lower_for_cuda(lambda x: quantize_swiglu(x, **options), x(*shape)))
    batch = 3 if kind == MASKED else 1
    assert f"({operands}) -> (tensor<{batch}x130x300xf8E4M3FN>, tensor<{batch}x130x3xf32>)" in line
    assert f"result_layouts = [{ROW_MAJOR}, {ROWS_FASTEST}]" in line
    groups = 3 if kind == RAGGED_M else 1
    assert planned == [QuantizeProblem(batch, 130, 300, swiglu=True, kind=kind, groups=groups)]


@pytest.mark.parametrize(("shape", "operands"), [
    ((2, 130, 600), "tensor<2x130x600xbf16>, tensor<2x3xi32>"),
    ((2, 3, 130, 600), "tensor<6x130x600xbf16>, tensor<6xi32>"),
])
def test_vmap_of_swiglu_is_one_call(planned, shape, operands):
    swiglu = lambda x, sizes: quantize_swiglu(x, group_sizes=sizes)
    assert f"({operands})" in call_line(lower_for_cuda(jax.vmap(swiglu, (0, None)), x(*shape), SIZES))
    text = lower_for_cuda(jax.vmap(swiglu), x(*shape), jnp.tile(SIZES, (2, 1)))
    assert f"({operands})" in call_line(text)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 2, 4)])
def test_empty_arrays_need_no_kernel(planned, shape):
    assert CALL not in lower_for_cuda(quantize, jnp.ones(shape))
    assert CALL not in lower_for_cuda(quantize_swiglu, jnp.ones(shape))
    assert CALL not in lower_for_cuda(jax.vmap(quantize), jnp.ones((0, *shape)))


def test_reference_is_plain_jnp_everywhere(planned):
    for function in quantize, quantize_swiglu:
        assert CALL not in lower_for_cuda(partial(function, implementation="reference"), x(4, 6))
        jaxpr = str(jax.make_jaxpr(partial(function, implementation="reference"))(x(4, 6)))
        assert "fp8_quantize" not in jaxpr


def test_other_gpus_and_cpus_take_jnp(monkeypatch):
    monkeypatch.setattr(operation, "targets_hopper", lambda: False)
    assert CALL not in lower_for_cuda(quantize, x(4, 6))
    with pytest.raises(NotImplementedError, match="fp8_quantize: implementation='hopper' needs an NVIDIA"):
        lower_for_cuda(partial(quantize, implementation="hopper"), x(4, 6))
    with pytest.raises(NotImplementedError, match="but is lowered for cpu"):
        quantize(x(4, 6), implementation="hopper")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"quantize: implementation: expected one of .*, got 'triton'"):
        quantize(x(4, 6), implementation="triton")


def test_sizes_beyond_31_bits_are_refused():
    with pytest.raises(NotImplementedError, match=f"sizes up to {MAX_SIZE} .*use implementation='reference'"):
        plan_quantize(QuantizeProblem(1, 2**31, 1))


def test_symbolic_sizes_take_jnp(planned):
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 256"), jnp.bfloat16)
    exported = jax.export.export(jax.jit(quantize), platforms=("cpu", "cuda"))(shape)
    got, expected = exported.call(x(5, 256)), quantize(x(5, 256))
    np.testing.assert_array_equal(got.scales, expected.scales)
    assert planned == []
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    swiglu = jax.jit(lambda x, sizes: quantize_swiglu(x, group_sizes=sizes))
    got = jax.export.export(swiglu)(shape, sizes).call(x(10, 256), SIZES)
    np.testing.assert_array_equal(got.scales, swiglu(x(10, 256), SIZES).scales)


def test_exported_programs_carry_their_kernel(planned):
    shape = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    export = jax.export.export(jax.jit(quantize), platforms=("cuda",), disabled_checks=export_checks())
    assert CALL in export(shape).mlir_module()


def test_shard_map(planned):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Auto,))
    swiglu = lambda x, sizes: quantize_swiglu(x, group_sizes=sizes).values
    mapped = jax.shard_map(swiglu, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert "tensor<1x2x512xbf16>, tensor<1x3xi32>" in call_line(lower_for_cuda(mapped, x(8, 512), SIZES))
    got, expected = mapped(x(8, 512), jnp.full(3, 2, jnp.int32)), quantize_swiglu(x(8, 512)).values
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(expected).view(np.uint8))


def test_explicit_meshes(planned):
    """Each device has a kernel for its shard. implementation="reference" has none, and is sharded as well."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x(8, 512), NamedSharding(mesh, P(None, "data")))
        assert "(tensor<1x8x128xbf16>) -> " in call_line(lower_for_cuda(quantize, sharded))
        for implementation in (None, "reference"):
            got = quantize(sharded, implementation=implementation)
            assert jax.typeof(got.scales).sharding.spec == P(None, "data")
            np.testing.assert_array_equal(got.scales, quantize(x(8, 512)).scales)
        assert CALL not in lower_for_cuda(partial(quantize, implementation="reference"), sharded)
        with pytest.raises(NotImplementedError, match="fp8_quantize: implementation='hopper' needs"):
            quantize(sharded, implementation="hopper")
