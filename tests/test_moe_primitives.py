"""The rules of the primitives around the grouped GEMMs: what is lowered for CUDA, layouts, vmap, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import (
    export_checks,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    permute,
    quantize,
    quantize_transposed,
    unpermute,
)
from jax_fp8gemm.jit import moe
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.moe import PermuteProblem, SortProblem
from jax_fp8gemm.jit.problem import MAX_SIZE
from jax_fp8gemm.jit.quantize_transposed import TransposeProblem, plan_quantize_transposed
from jax_fp8gemm.scaling import SQUARE_BLOCKS
from lowering import CALL, lower_for_cuda, signatures

ROWS_FASTEST = "dense<[1, 2, 0]> : tensor<3xindex>"
X, IDS = jnp.ones((12, 300), jnp.bfloat16), jnp.zeros((12, 2), jnp.int32)
Y, WEIGHTS = jnp.ones((24, 300), jnp.bfloat16), jnp.ones((12, 2))
SIZES = jnp.array([3, 5, 0], jnp.int32)


def test_permute_is_two_calls(planned):
    text = lower_for_cuda(lambda x, ids: permute(x, ids, 5, dtype=jnp.float8_e5m2), X, IDS)
    assert signatures(text) == [
        "(tensor<1x12x2xi32>) -> (tensor<1x5xi32>, tensor<1x12x2xi32>, tensor<1xi32>)",
        "(tensor<1x12x300xbf16>, tensor<1x12x2xi32>, tensor<1xi32>) "
        "-> (tensor<1x24x300xf8E5M2>, tensor<1x24x3xf32>)"]
    assert ROWS_FASTEST not in text  # XLA turns the scales to what follows
    assert planned == [SortProblem(1, 24, 5), PermuteProblem(1, 12, 300, 2, "bf16", "e5m2")]


def test_unpermute_is_plain_jnp(planned):
    assert CALL not in lower_for_cuda(unpermute, Y, IDS, WEIGHTS)
    assert planned == []


def test_quantize_transposed_is_one_call(planned):
    text = lower_for_cuda(quantize_transposed, X, SIZES)
    assert signatures(text) == ["(tensor<1x12x300xbf16>, tensor<1x3xi32>) "
                                "-> (tensor<1x300x384xf8E4M3FN>, tensor<1x300x3xf32>)"]
    assert f"result_layouts = [dense<[2, 1, 0]> : tensor<3xindex>, {ROWS_FASTEST}]" in text
    assert planned == [TransposeProblem(1, 12, 300, 3)]


def test_vmap_adds_no_calls(planned):
    stack = lambda x: jnp.stack([jnp.stack([x] * 3)] * 2)
    nested = lambda f, *axes: jax.vmap(jax.vmap(f, axes), axes)
    text = lower_for_cuda(nested(lambda x, ids: permute(x, ids, 5), 0, None), stack(X), IDS)
    assert [s.split(" -> ")[0] for s in signatures(text)] == [
        "(tensor<1x12x2xi32>)", "(tensor<6x12x300xbf16>, tensor<6x12x2xi32>, tensor<6xi32>)"]
    text = lower_for_cuda(nested(quantize_transposed, 0, 0), stack(X), stack(SIZES))
    assert [s.split(" -> ")[0] for s in signatures(text)] == ["(tensor<6x12x300xbf16>, tensor<6x3xi32>)"]


def test_nothing_but_calls_in_a_layer_and_its_gradient(planned, built):
    """Nothing from the host between the kernels; only layouts differ, those of permute's scales."""
    weights = jax.jit(lambda: quantize(jnp.ones((5, 256, 512)), SQUARE_BLOCKS))()

    def layer(x, ids, weights):
        rows, sizes, positions = permute(x, ids, 5)
        y = fp8_gemm_ragged_m(rows, weights, sizes)
        return y, positions, fp8_gemm_ragged_k(
            quantize_transposed(y, sizes), quantize_transposed(y, sizes), sizes)

    text = lower_for_cuda(layer, jnp.ones((12, 512), jnp.bfloat16), IDS, weights)
    assert text.count(CALL) == 6
    operations = {line.split(" = ")[1].split()[0] for line in text.splitlines() if " = stablehlo." in line}
    assert operations == {"stablehlo.custom_call", "stablehlo.reshape"}


@pytest.mark.parametrize("call", [
    lambda: lower_for_cuda(lambda x, ids: permute(x, ids, 5), X[:0], IDS[:0]),
    lambda: lower_for_cuda(lambda x, ids: permute(x, ids, 5), X, IDS[:, :0]),
    lambda: lower_for_cuda(quantize_transposed, X[:0], SIZES),
    lambda: lower_for_cuda(quantize_transposed, X, SIZES[:0]),
])
def test_empty_arrays_need_no_kernel(planned, call):
    assert CALL not in call()
    assert planned == []


def test_reference_is_plain_jnp_everywhere(planned):
    options = {"implementation": "reference"}
    assert CALL not in lower_for_cuda(lambda x, ids: permute(x, ids, 5, **options), X, IDS)
    assert CALL not in lower_for_cuda(lambda *args: quantize_transposed(*args, **options), X, SIZES)


def test_symbolic_sizes_take_jnp(planned):
    tokens, = jax.export.symbolic_shape("t", constraints=["t >= 3"])
    shape = lambda dtype, *rest: jax.ShapeDtypeStruct((tokens, *rest), dtype)
    permuted = jax.export.export(jax.jit(lambda x, ids: permute(x, ids, 5)), platforms=("cpu", "cuda"))(
        shape(jnp.bfloat16, 300), shape(jnp.int32, 2))
    for got, expected in zip(permuted.call(X, IDS), permute(X, IDS, 5), strict=True):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    transposed = jax.export.export(jax.jit(quantize_transposed))(shape(jnp.bfloat16, 300), SIZES)
    np.testing.assert_array_equal(transposed.call(X, SIZES).scales, quantize_transposed(X, SIZES).scales)
    assert planned == []


def test_exported_programs_carry_their_kernels(planned):
    function = jax.jit(lambda x, ids: permute(x, ids, 5))
    export = jax.export.export(function, platforms=("cuda",), disabled_checks=export_checks())
    assert CALL in export(X, IDS).mlir_module()


def test_shard_map(planned):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Auto,))

    def local(x, ids, weights):
        rows, sizes, positions = permute(x, ids, 5)
        y = rows.values.astype(jnp.bfloat16)
        return unpermute(y, positions, weights), quantize_transposed(y, sizes).values

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((12, 300)), jnp.bfloat16)
    ids = rng.integers(0, 6, (12, 2)).astype(np.int32)
    assert len(signatures(lower_for_cuda(mapped, x, ids, WEIGHTS[:3]))) == 3
    out = mapped(x, ids, WEIGHTS[:3])[0]
    np.testing.assert_array_equal(out[3:6], local(x[3:6], ids[3:6], WEIGHTS[:3])[0])


def test_an_explicit_mesh_on_which_nothing_is_sharded(planned):
    """Results of another rank than the operands have a sharding of their rank."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Explicit,))
    x, ids = np.asarray(X), np.asarray(IDS)
    expected = permute(x, ids, 5)
    with jax.set_mesh(mesh):
        got = permute(*(jax.device_put(array, NamedSharding(mesh, P())) for array in (x, ids)), 5)
        assert len(signatures(lower_for_cuda(lambda x, ids: permute(x, ids, 5), x, ids))) == 2
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_sizes_beyond_the_kernels_are_refused():
    for plan, problem in [
            (moe.plan_sort, SortProblem(1, 2**31, 8)), (moe.plan_permute, PermuteProblem(1, 2**28, 8, 8)),
            (plan_quantize_transposed, TransposeProblem(1, 1, 2**31, 8))]:
        with pytest.raises(NotImplementedError, match=rf"sizes up to {MAX_SIZE}.*implementation='reference'"):
            plan(problem)
    with pytest.raises(NotImplementedError, match=r"num_experts: the kernel counts in .* room for 100000"):
        moe.plan_sort(SortProblem(1, 8, 100_000))


@pytest.mark.parametrize(("experts", "threads"), [
    (1, 1024), (256, 1024), (1700, 1024), (5000, 256), (19000, 32)])
def test_the_sort_takes_the_threads_that_shared_memory_has_room_for(experts, threads):
    assert moe.sort_kernel(SortProblem(1, 2**15, experts)).threads == threads
    assert moe.sort_shared_bytes(threads, experts) <= H200.shared_bytes


@pytest.mark.parametrize(("problem", "blocks"), [
    (PermuteProblem(1, 4096, 7168, 8), 4), (PermuteProblem(1, 64, 7168, 8), 1),
    (PermuteProblem(1, 1, 1, 1), 1),
    (PermuteProblem(1, 4096, 7168, 8, "f32"), 2), (PermuteProblem(1, 4096, 7169, 8), 1),
    (PermuteProblem(1, 160, 7168, 8), 2), (PermuteProblem(1, 131072, 128, 8), 1),
    (PermuteProblem(1, 131072, 296, 8), 4)])
def test_permute_fills_the_gpu_where_it_can(problem, blocks):
    assert moe.choose_thread_blocks(problem, H200) == blocks
