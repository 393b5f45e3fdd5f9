"""The primitive's rules: what is lowered for CUDA, for which platforms, under which transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bounds import assert_within_bound
from jax_fp8gemm import ScaledArray, export_checks, fp8_gemm, operation, quantize, save_gemms
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape
from lowering import CALL, call_line, lower_for_cuda

SHAPE = GemmProblem(m=33, n=200, k=304)  # K = 300, padded


def gemm(lhs, rhs, **options):
    return fp8_gemm(lhs, rhs, out_dtype=jnp.float32, **options)


def operand(*shape, granularity=ROW_BLOCKS, dtype=jnp.float8_e4m3fn):
    x = np.random.default_rng(len(shape)).standard_normal(shape)
    return quantize(jnp.asarray(x, jnp.float32), granularity, dtype)


def weight(*shape, **options):
    return operand(*shape, granularity=SQUARE_BLOCKS, **options)


def test_one_custom_call_with_the_contract_s_layouts(built):
    line = call_line(lower_for_cuda(fp8_gemm, operand(33, 300), weight(200, 300)))
    layout = "dense<[{}]> : tensor<3xindex>".format
    row_major, rows_fastest = layout("2, 1, 0"), layout("1, 2, 0")
    assert f"operand_layouts = [{row_major}, {rows_fastest}, {row_major}, {row_major}]" in line
    assert f"result_layouts = [{row_major}]" in line
    assert ("(tensor<1x33x304xf8E4M3FN>, tensor<1x33x3xf32>, tensor<1x200x304xf8E4M3FN>, "
            "tensor<1x2x3xf32>) -> tensor<1x33x200xbf16>") in line
    assert 'cubin = "\\7FELF\\00"' in line
    assert 'entry = "fp8_gemm"' in line
    assert "launch = dense<[132, 1, 1, 2, 1, 1, 384, 200000]> : tensor<8xi64>" in line
    assert "output_operand_aliases = []" in line or "output_operand_aliases" not in line
    assert built == [SHAPE]


def test_row_scales_of_rhs_are_wanted_with_rows_fastest(built):
    line = call_line(lower_for_cuda(gemm, operand(33, 304), operand(200, 304)))
    layouts = line[line.index("operand_layouts") : line.index("result_layouts")]
    assert [layouts.count(order) for order in ("2, 1, 0", "1, 2, 0")] == [2, 2]
    assert built == [GemmProblem(33, 200, 304, out_dtype="f32", rhs_scale_rows=1)]


def test_the_accumulator_is_aliased_and_donated(built):
    def step(accumulator, lhs, rhs):
        return gemm(lhs, rhs, accumulator=accumulator)

    text = lower_for_cuda(step, jnp.ones((33, 200)), operand(33, 304), weight(200, 304), donate_argnums=0)
    alias = "output_operand_alias<output_tuple_indices = [], operand_index = 4, operand_tuple_indices = []>"
    assert alias in call_line(text)
    assert "%arg0: tensor<33x200xf32> {tf.aliasing_output = 0" in text
    assert built == [GemmProblem(33, 200, 304, out_dtype="f32", accumulate=True)]


def test_dtypes_and_batch_invariance_reach_the_problem(built):
    lhs, rhs = operand(33, 304, dtype=jnp.float8_e5m2), weight(200, 304)
    lower_for_cuda(lambda x, w: fp8_gemm(x, w, batch_invariant=True, implementation="hopper"), lhs, rhs)
    assert built == [GemmProblem(33, 200, 304, lhs_dtype="e5m2", batch_invariant=True)]


def test_k_in_whole_16_is_not_copied(built):
    text = lower_for_cuda(gemm, operand(33, 304), weight(200, 304))
    assert "stablehlo.pad" not in text
    assert "stablehlo.transpose" not in text


def test_the_call_carries_a_cubin_that_the_compiler_made(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(operation, "targets_hopper", lambda: True)
    line = call_line(lower_for_cuda(fp8_gemm, operand(33, 304), weight(200, 304)))
    cubin, = tmp_path.rglob("*.cubin")
    assert 'cubin = "\\7FELF' in line
    assert len(line) > cubin.stat().st_size > 1000


BOTH, LHS, RHS = (0, 0), (0, None), (None, 0)


@pytest.mark.parametrize(("axes", "lhs_lead", "rhs_lead", "m", "batch", "lhs_batched", "rhs_batched"), [
    ([BOTH], (4,), (4,), 33, 4, True, True),
    ([LHS], (4,), (), 132, 1, True, True),
    ([RHS], (), (4,), 33, 4, False, True),
    ([BOTH, BOTH], (2, 4), (2, 4), 33, 8, True, True),
    ([BOTH, LHS], (2, 4), (2,), 132, 2, True, True),
    ([LHS, LHS], (2, 4), (), 264, 1, True, True),
    ([RHS, RHS], (), (2, 4), 33, 8, False, True),
    ([LHS, RHS], (2,), (4,), 66, 4, False, True),
    ([RHS, LHS], (4,), (2,), 132, 2, False, True),
])
def test_vmap_is_one_launch(built, axes, lhs_lead, rhs_lead, m, batch, lhs_batched, rhs_batched):
    function = gemm
    for in_axes in reversed(axes):
        function = jax.vmap(function, in_axes)
    text = lower_for_cuda(function, operand(*lhs_lead, 33, 304), weight(*rhs_lead, 200, 304))
    assert text.count(CALL) == 1
    assert "broadcast_in_dim" not in text
    assert built == [GemmProblem(m, 200, 304, batch, lhs_batched, rhs_batched, out_dtype="f32")]


def test_a_batch_of_accumulators_for_one_product_is_one_launch(built):
    def step(accumulator, lhs, rhs):
        return gemm(lhs, rhs, accumulator=accumulator)

    step = jax.vmap(step, (0, None, None))
    lower_for_cuda(step, jnp.ones((4, 33, 200)), operand(33, 304), weight(200, 304))
    assert built == [GemmProblem(33, 200, 304, out_dtype="f32")]


@pytest.mark.parametrize(("m", "n", "k"), [(0, 200, 304), (33, 0, 304), (33, 200, 0)])
def test_empty_problems_never_reach_the_kernel(built, m, n, k):
    assert CALL not in lower_for_cuda(gemm, operand(m, k), weight(n, k))
    assert built == []


def abstract(*shape, granularity=ROW_BLOCKS):
    scales = jax.ShapeDtypeStruct(scale_shape(shape, granularity), jnp.float32)
    return ScaledArray(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), scales, granularity)


@pytest.mark.parametrize(("name", "m", "n", "k"), [
    ("M", 2**31, 8, 16), ("N", 1, 2**31, 16), ("K", 1, 1, 2**31), ("K", 1, 1, 2**31 - 1)])
def test_sizes_beyond_31_bits_are_refused(built, name, m, n, k):
    message = f"fp8_gemm: {name}: .* up to .*, got 2147483648; use implementation='reference'"
    with pytest.raises(NotImplementedError, match=message):
        lower_for_cuda(gemm, abstract(m, k), abstract(n, k, granularity=SQUARE_BLOCKS))
    assert built == []


def test_symbolic_sizes_are_refused_but_for_the_reference(built):
    m, = jax.export.symbolic_shape("m")
    lhs = ScaledArray(jax.ShapeDtypeStruct((m, 256), jnp.float8_e4m3fn),
                      jax.ShapeDtypeStruct((m, 2), jnp.float32), ROW_BLOCKS)
    rhs = abstract(200, 256, granularity=SQUARE_BLOCKS)
    with pytest.raises(NotImplementedError, match=r"fp8_gemm: M: .*, got m; use implementation='reference'"):
        jax.export.export(jax.jit(gemm), platforms=("cuda",))(lhs, rhs)
    exported = jax.export.export(jax.jit(partial(gemm, implementation="reference")), platforms=("cuda",))
    assert exported(lhs, rhs).out_avals[0].shape == (m, 200)


def test_other_gpus_and_implementation_reference_take_jnp(built, monkeypatch):
    args = operand(33, 304), weight(200, 304)
    assert CALL not in lower_for_cuda(lambda x, w: gemm(x, w, implementation="reference"), *args)
    monkeypatch.setattr(operation, "targets_hopper", lambda: False)
    text = lower_for_cuda(gemm, *args)
    assert CALL not in text
    assert "stablehlo.dot_general" in text
    assert built == []


class FakeGpu:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.mark.parametrize(("gpus", "expected"), [(["9.0"], True), (["8.0"], False), (["9.0", "10.0"], False)])
def test_hopper_is_compute_capability_9(monkeypatch, gpus, expected):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [FakeGpu(gpu) for gpu in gpus])
    assert operation.targets_hopper() is expected


def test_cross_compilation_assumes_hopper(monkeypatch):
    def no_cuda(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_cuda)
    assert operation.targets_hopper()


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=jax.devices("cpu"), axis_types=(AxisType.Auto,) * 2)
    lhs, rhs = operand(64, 512), weight(512, 512)

    def split(function, lhs_spec, rhs_spec, out_spec):
        return jax.shard_map(function, mesh=mesh, in_specs=(lhs_spec, rhs_spec), out_specs=out_spec,
                             check_vma=check_vma)

    split_mn = split(gemm, P("x"), P("y"), P("x", "y"))
    split_k = split(lambda x, w: jax.lax.psum(gemm(x, w), "x"), P(None, "x"), P(None, "x"), P())
    for function in (split_mn, split_k):
        for run in (function, jax.jit(function)):
            assert_within_bound(run(lhs, rhs), lhs, rhs, random_signs=True)
    assert "all-gather" not in jax.jit(split_mn).lower(lhs, rhs).compile().as_text()


def test_shard_map_knows_what_varies(built):
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu"), axis_types=(AxisType.Auto,))
    lhs, rhs = operand(64, 512), weight(512, 512)
    with pytest.raises(ValueError, match="replicat"):
        jax.jit(jax.shard_map(gemm, mesh=mesh, in_specs=(P("x"), P()), out_specs=P()))(lhs, rhs)
    per_shard = jax.shard_map(gemm, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert lower_for_cuda(per_shard, lhs, rhs).count(CALL) == 1
    assert built == [GemmProblem(8, 512, 512, out_dtype="f32")]


def test_export_for_several_platforms(built):
    lhs, rhs = operand(33, 300), weight(200, 300)
    export = jax.export.export(jax.jit(gemm), platforms=("cpu", "cuda"), disabled_checks=export_checks())
    exported = export(lhs, rhs)
    assert exported.mlir_module().count(CALL) == 1
    np.testing.assert_array_equal(exported.call(lhs, rhs), gemm(lhs, rhs))


def test_exported_programs_are_serialised_with_their_scaled_arrays():
    pytest.importorskip("flatbuffers")
    lhs, rhs = operand(33, 300), weight(200, 300)
    data = jax.export.export(jax.jit(gemm))(lhs, rhs).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(lhs, rhs), gemm(lhs, rhs))


def test_save_gemms_keeps_the_results_of_gemms_alone():
    lhs, rhs = operand(33, 300), weight(200, 300)

    def loss(scale):
        return jnp.sin(gemm(lhs, rhs) * scale).sum()

    def count(policy):
        jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(2.0)
        return str(jaxpr).count("fp8_gemm[")

    assert [count(None), count(save_gemms)] == [2, 1]
