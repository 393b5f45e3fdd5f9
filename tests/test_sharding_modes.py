"""Sharded programs: vmap, partial shard_map, what lies where, donation, lowering for CUDA, export."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bounds import assert_within_bound
from jax_fp8gemm import ScaledArray, export_checks, fp8_gemm, fp8_gemm_ragged_m, limit_sms, quantize
from jax_fp8gemm.jit import compiler, settings
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.mesh import auto, shard
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS
from lowering import CALL, lower_for_cuda
from meshes import (
    AUTO,
    EXPLICIT,
    assert_same_bits,
    collectives,
    mesh_of,
    normal,
    place,
    run,
    run_alone,
    scaled,
    use,
    weights,
)
from test_sharding import CASES, K, M, N

gemm = partial(fp8_gemm, out_dtype=jnp.float32)
LHS, RHS = scaled(M, K), weights(N, K)
LHS_BATCH, RHS_BATCH = scaled(4, M, K), weights(4, N, K)
MIXED = mesh_of(AxisType.Explicit, AxisType.Auto)
MESHES = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
PARTITIONED = "CustomSPMDPartitioning"


# ---- vmap


MAPPED = {
    "lhs, over the mapped axis and N": ((0, None), LHS_BATCH, RHS, P("x"), P("y")),
    "lhs, over M and N": ((0, None), LHS_BATCH, RHS, P(None, "x"), P("y")),
    "rhs, over the mapped axis and M": ((None, 0), LHS, RHS_BATCH, P("y"), P("x")),
    "rhs, over N": ((None, 0), LHS, RHS_BATCH, P(), P(None, "x")),
    "both": ((0, 0), LHS_BATCH, RHS_BATCH, P("x", "y"), P("x")),
}


@MESHES
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_sharded_in_place(mesh, name):
    axes, lhs, rhs, *specs = MAPPED[name]
    function = jax.vmap(gemm, axes)
    actual, found = run(mesh, function, (lhs, rhs), specs)
    assert_same_bits(actual, function(lhs, rhs))
    assert found == {}


@MESHES
@pytest.mark.parametrize("name", [
    "ragged M, N", "masked, M", "quantize, C", "swiglu, masked, M", "permute, K"])
def test_vmap_of_other_operations(mesh, name):
    """The mapped axis over one mesh axis, what the case shards over the other."""
    case = CASES[name]
    on_y = lambda spec: P("x", *("y" if axis == "x" else axis for axis in spec))
    operands = jax.tree.map(lambda x: jnp.stack([x] * 4), case.operands)
    actual, found = run(mesh, jax.vmap(case.call), operands, [*map(on_y, case.specs)])
    assert_same_bits(actual, run_alone(jax.vmap(case.call), *operands))
    assert found == {}


@MESHES
def test_vmap_with_a_sum(mesh):
    call = jax.vmap(partial(gemm, out_sharding=P("y")) if mesh is EXPLICIT else gemm, (0, None))
    options = {} if mesh is EXPLICIT else {"out_shardings": NamedSharding(mesh, P("x", "y"))}
    actual, found = run(mesh, call, (LHS_BATCH, RHS), (P("x", None, "y"), P(None, "y")), **options)
    assert_same_bits(actual, jax.vmap(gemm, (0, None))(LHS_BATCH, RHS))
    assert found == {"reduce-scatter": 1}


@MESHES
@pytest.mark.parametrize("out", [P(), P("x"), P(None, "x")], ids=["whole", "over the mapped axis", "over M"])
def test_vmap_over_the_accumulator_alone(mesh, out):
    """The sum over K is one for all accumulators."""
    def step(total, lhs, rhs, **options):
        return gemm(lhs, rhs, accumulator=total, **options)

    of_one = P(*out[1:]) if mesh is EXPLICIT else None
    explicit = {} if of_one is None else {"out_sharding": of_one}
    options = {"out_shardings": NamedSharding(mesh, out)} if mesh is AUTO else {}
    totals = jnp.arange(4.0)[:, None, None] * jnp.ones((M, N))
    call = jax.vmap(partial(step, **explicit), (0, None, None))
    actual, found = run(mesh, call, (totals, LHS, RHS), (out, P(None, "y"), P(None, "y")), **options)
    assert_same_bits(actual, totals + gemm(LHS, RHS))
    assert found == {"all-reduce": 1}


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_vmap_with_spmd_axis_name(mode):
    within = jax.shard_map(gemm, mesh=AUTO, in_specs=(P("y"), P()), out_specs=P("y"))
    function = jax.vmap(gemm if mode == "auto" else within, (0, None), spmd_axis_name="x")
    actual, found = run(AUTO, function, (LHS_BATCH, RHS), (P("x", "y"), P()))
    assert_same_bits(actual, jax.vmap(gemm, (0, None))(LHS_BATCH, RHS))
    assert found == {}


@MESHES
def test_scan_over_weights(mesh):
    layers = lambda lhs, rhs: lax.scan(lambda carry, w: (carry, gemm(carry, w)), lhs, rhs)[1]
    actual, found = run(mesh, layers, (LHS, RHS_BATCH), (P("x"), P(None, "y")))
    assert_same_bits(actual, layers(LHS, RHS_BATCH))
    assert found == {}


# ---- shard_map over some axes


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_k(check_vma):
    total = jax.shard_map(lambda *args: lax.psum(gemm(*args), "x"), mesh=AUTO, in_specs=P(None, "x"),
                          out_specs=P(), check_vma=check_vma)
    actual, found = run(AUTO, total, (LHS, RHS), (P(None, "x"),) * 2)
    assert_same_bits(actual, gemm(LHS, RHS))
    assert found == {"all-reduce": 1}


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT, MIXED], ids=["auto", "explicit", "mixed"])
def test_shard_map_over_one_of_two_axes(mesh):
    over_m = jax.shard_map(gemm, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), axis_names={"x"})
    with jax.set_mesh(mesh):
        actual = jax.jit(over_m)(*place(mesh, (LHS, RHS), (P("x"), P("y"))))
    assert_same_bits(actual, gemm(LHS, RHS))


def test_a_mesh_of_explicit_and_auto_axes():
    with jax.set_mesh(MIXED):
        actual = jax.jit(gemm)(*place(MIXED, (LHS, RHS), (P("x"), P("y"))))
    assert jax.typeof(actual).sharding.spec == P("x", None)
    assert_same_bits(actual, gemm(LHS, RHS))


# ---- what lies where


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["M", "K"])
def test_scales_follow_their_values(spec):
    """On Auto axes, where nothing says how the scales lie."""
    lhs, rhs = place(AUTO, (LHS.values, RHS.values), (spec, spec))
    call = lambda lhs, lhs_scale, rhs, rhs_scale: gemm(
        ScaledArray(lhs, lhs_scale, ROW_BLOCKS), ScaledArray(rhs, rhs_scale, SQUARE_BLOCKS))
    compiled = jax.jit(call).lower(lhs, LHS.scales, rhs, RHS.scales).compile()
    shardings = [sharding.spec for sharding in compiled.input_shardings[0]]
    assert shardings[:2] == [spec, spec]
    if spec != P("x"):  # N of rhs would be sharded over the axis of M
        assert shardings == [spec] * 4


def test_scales_need_not_lie_as_their_values():
    with jax.set_mesh(EXPLICIT):
        lhs, rhs = place(EXPLICIT, (LHS, RHS), (P("x"), P("y")))
        replicated, = place(EXPLICIT, (LHS.scales,), (P(),))
        compiled = jax.jit(gemm).lower(ScaledArray(lhs.values, replicated, ROW_BLOCKS), rhs).compile()
    assert collectives(compiled) == {}


def test_shards_of_part_of_a_block_are_gathered():
    """384 rows of weights over 2 devices: 1.5 blocks of 128 for each. The scales are whole already."""
    rhs = weights(384, K)
    for mesh, options in (AUTO, {}), (EXPLICIT, {"out_sharding": P("x")}):
        actual, found = run(mesh, partial(gemm, **options), (LHS, rhs), (P("x"), P("y")))
        assert_same_bits(actual, gemm(LHS, rhs))
        assert found == {"all-gather": 1}


def test_contradicting_shards_of_k_are_exchanged_on_auto_axes():
    actual, found = run(AUTO, gemm, (LHS, RHS), (P(None, "x"), P(None, "y")))
    assert_same_bits(actual, gemm(LHS, RHS))
    assert found["all-reduce"] == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_axis_of_size_one_cuts_nothing(kind):
    """Neither is a block cut by it, nor is a token on another device."""
    mesh = mesh_of(kind, x=1)
    experts, sizes = weights(4, 192, K), jnp.array([5, 0, 9, 7], jnp.int32)
    call = lambda lhs, rhs, experts: (fp8_gemm(lhs, rhs), fp8_gemm_ragged_m(lhs, experts, sizes))
    operands = LHS, weights(192, K), experts
    with jax.set_mesh(mesh):
        compiled = jax.jit(call).lower(*place(mesh, operands, (P("x"), P(), P()))).compile()
        actual = compiled(*place(mesh, operands, (P("x"), P(), P())))
    assert_same_bits(actual, call(*operands))
    assert collectives(compiled) == {}


def test_a_result_is_computed_where_it_is_wanted():
    """On Explicit axes, from operands that every device has."""
    actual, found = run(EXPLICIT, partial(gemm, out_sharding=P("x", "y")), (LHS, RHS), (P(), P()))
    assert actual.sharding.spec == P("x", "y")
    assert found == {}


def test_a_sum_over_devices_is_within_the_bound_of_one_device():
    """Real numbers: f32 sums in another order."""
    lhs, rhs = quantize(normal(M, K)), quantize(normal(N, K), (128, 128))
    actual, _ = run(AUTO, gemm, (lhs, rhs), (P(None, "x"), P(None, "x")))
    assert_within_bound(actual, lhs, rhs, random_signs=True)


def test_arguments_that_no_mesh_is_known_of():
    """The mesh of the context counts where arguments have none."""
    x = np.asarray(normal(N, K))
    project = lambda x: gemm(LHS, quantize(lax.with_sharding_constraint(x, P("x")), (128, 128)))
    with jax.set_mesh(AUTO):
        compiled = jax.jit(project).lower(x).compile()
    assert collectives(compiled) == {}
    assert compiled(x).sharding.spec == P(None, "x")


@MESHES
@pytest.mark.parametrize(("specs", "out"), [
    ((P("x"), P("y"), P("x", "y")), P("x", "y")), ((P(None, "x"), P(None, "x"), P("x")), P("x"))],
    ids=["M and N", "K"])
def test_the_accumulator_s_memory_becomes_the_result_s(mesh, specs, out):
    step = lambda lhs, rhs, total, **options: gemm(lhs, rhs, accumulator=total, **options)
    options = {"out_sharding": out} if mesh is EXPLICIT else {}
    shardings = {} if mesh is EXPLICIT else {"out_shardings": NamedSharding(mesh, out)}
    with use(mesh):
        placed = place(mesh, (LHS, RHS, jnp.ones((M, N))), specs)
        compiled = jax.jit(partial(step, **options), donate_argnums=2, **shardings).lower(*placed).compile()
        compiled(*placed)
    assert placed[2].is_deleted()
    shard = placed[2].sharding.shard_shape((M, N))
    assert compiled.memory_analysis().alias_size_in_bytes == 4 * math.prod(shard)


# ---- programs


@pytest.mark.parametrize("name", CASES)
def test_a_program_for_one_device_knows_nothing_of_meshes(name):
    case = CASES[name]
    text = jax.jit(lambda *args: case.call(*args)).lower(*case.operands).as_text()
    assert PARTITIONED not in text
    assert "sdy." not in text


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_two_lowerings_are_equal(mode):
    mesh = EXPLICIT if mode == "explicit" else AUTO

    def lower():
        call = lambda *args: gemm(*args)
        if mode == "shard_map":
            call = jax.shard_map(call, mesh=AUTO, in_specs=(P("x"), P("y")), out_specs=P("x", "y"))
        with use(mesh):
            placed = place(mesh, (LHS, RHS), (P("x"), P("y")))
            text = jax.jit(lambda *args: call(*args)).lower(*placed).as_text()
        assert (PARTITIONED in text) == (mode == "auto")
        return re.sub(r'backend_config = "\d+"', "", text)  # the address of the callback

    assert lower() == lower()


def test_explicit_shards_are_lowered_for_cuda(built):
    with jax.set_mesh(EXPLICIT):
        text = lower_for_cuda(gemm, *place(EXPLICIT, (LHS, RHS), (P("x"), P("y"))))
    assert text.count(CALL) == 1
    assert built == [GemmProblem(M // 4, N // 2, K, out_dtype="f32")]


def test_auto_shards_are_lowered_for_cuda_as_the_call_was(built, monkeypatch):
    """XLA asks for them when it compiles: then `limit_sms` is long over, and must still hold."""
    calls, limits = [], []
    build = compiler.build

    def remember(static, *operands):
        calls.append(static)
        return shard.run_alone(static.call, *operands)

    def build_limited(problem):
        limits.append(settings.num_sms())
        return build(problem)

    monkeypatch.setattr(auto, "_partitioned", remember)
    monkeypatch.setattr(compiler, "build", build_limited)
    with limit_sms(64):
        lower_for_cuda(gemm, *place(AUTO, (LHS, RHS), (P("x"), P("y"))))
    del built[:], limits[:]

    def typed(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(AUTO, P(None, *spec)))

    operands = [typed((1, *x.shape), x.dtype, axis) for array, axis in ((LHS, "x"), (RHS, "y"))
                for x in (array.values, array.scales)]
    (static,), results = calls, [typed((1, M, N), jnp.float32)]
    _, run_shard, result_shardings, shardings = auto._partition(static, AUTO, operands, results)
    assert [sharding.spec for sharding in result_shardings] == [P(None, "x", "y")]
    shards = [jnp.ones(sharding.shard_shape(x.shape), x.dtype)
              for x, sharding in zip(operands, shardings, strict=True)]
    assert CALL in jax.jit(run_shard).trace(*shards).lower(lowering_platforms=("cuda",)).as_text()
    assert built == [GemmProblem(M // 4, N // 2, K, out_dtype="f32")]
    assert limits == [64]


@pytest.mark.parametrize("mode", ["explicit", "shard_map"])
def test_export(built, mode):
    mesh = EXPLICIT if mode == "explicit" else AUTO
    call = gemm if mode == "explicit" else jax.shard_map(
        gemm, mesh=AUTO, in_specs=(P("x"), P("y")), out_specs=P("x", "y"))
    with use(mesh):
        placed = place(mesh, (LHS, RHS), (P("x"), P("y")))
        export = jax.export.export(jax.jit(call), platforms=("cpu", "cuda"), disabled_checks=export_checks())
        exported = export(*placed)
        actual = jax.jit(jax.export.deserialize(exported.serialize()).call)(*placed)
    assert exported.mlir_module().count(CALL) == 1
    assert_same_bits(actual, gemm(LHS, RHS))
