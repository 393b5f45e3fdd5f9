"""The rules of the training quantisers: what is lowered for CUDA, layouts, vmap, shard_map, export."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import (
    export_checks,
    fp8_gemm,
    fp8_gemm_ragged_k,
    quantize_both,
    quantize_swiglu_backward,
    quantize_weights,
)
from jax_fp8gemm.jit import quantize_training
from jax_fp8gemm.jit.launch import Pointer, Scalar
from jax_fp8gemm.jit.problem import MAX_SIZE
from jax_fp8gemm.jit.quantize_training import TokensProblem, WeightsProblem
from jax_fp8gemm.jit.quantize_transposed import TransposeProblem
from lowering import CALL, call_line, lower_for_cuda, signatures

ROW_MAJOR, ROWS_FASTEST = (f"dense<[{order}]> : tensor<3xindex>" for order in ("2, 1, 0", "1, 2, 0"))
SIZES = jnp.array([3, 5, 0], jnp.int32)


def x(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def test_both_is_one_call_with_the_scales_where_the_gemms_want_them(planned):
    line = call_line(lower_for_cuda(partial(quantize_both, dtype=jnp.float8_e5m2), x(130, 300)))
    assert f"result_layouts = [{ROW_MAJOR}, {ROWS_FASTEST}, {ROW_MAJOR}, {ROWS_FASTEST}]" in line
    assert line.endswith("(tensor<1x130x300xbf16>) -> (tensor<1x130x300xf8E5M2>, tensor<1x130x3xf32>, "
                         "tensor<1x300x256xf8E5M2>, tensor<1x300x2xf32>)")
    line = call_line(lower_for_cuda(quantize_both, x(130, 300, dtype=jnp.float32), SIZES))
    assert line.endswith("(tensor<1x130x300xf32>, tensor<1x3xi32>) -> (tensor<1x130x300xf8E4M3FN>, "
                         "tensor<1x130x3xf32>, tensor<1x300x384xf8E4M3FN>, tensor<1x300x3xf32>)")
    assert planned == [TokensProblem(1, 130, 300, None, "bf16", "e5m2"), TokensProblem(1, 130, 300, 3, "f32")]


def test_weights_are_one_call(planned):
    line = call_line(lower_for_cuda(quantize_weights, x(5, 130, 300, dtype=jnp.float16)))
    assert f"result_layouts = [{', '.join([ROW_MAJOR] * 4)}]" in line
    assert line.endswith("(tensor<5x130x300xf16>) -> (tensor<5x300x130xf8E4M3FN>, tensor<5x3x2xf32>, "
                         "tensor<5x130x300xf8E4M3FN>, tensor<5x2x3xf32>)")
    assert planned == [WeightsProblem(5, 130, 300, "f16")]


def test_swiglu_backward_is_one_call(planned):
    line = call_line(lower_for_cuda(quantize_swiglu_backward, x(130, 512), x(130, 256), SIZES))
    assert f"result_layouts = [{', '.join([ROW_MAJOR, ROWS_FASTEST] * 3)}]" in line
    assert line.endswith(
        "(tensor<1x130x512xbf16>, tensor<1x130x256xbf16>, tensor<1x3xi32>) -> "
        "(tensor<1x130x512xf8E4M3FN>, tensor<1x130x4xf32>, tensor<1x512x384xf8E4M3FN>, tensor<1x512x3xf32>, "
        "tensor<1x256x384xf8E4M3FN>, tensor<1x256x3xf32>)")
    assert planned == [TokensProblem(1, 130, 256, 3)]


@pytest.mark.parametrize(("sizes", "groups"), [([], None), ([SIZES], 3)])
def test_swiglu_backward_of_parts_of_blocks_is_two_calls(planned, sizes, groups):
    text = lower_for_cuda(quantize_swiglu_backward, x(130, 300), x(130, 150), *sizes)
    k = 384 if sizes else 256
    of_sizes = ", tensor<1x3xi32>" if sizes else ""
    assert signatures(text) == [
        f"(tensor<1x130x300xf32>{of_sizes}) -> (tensor<1x130x300xf8E4M3FN>, tensor<1x130x3xf32>, "
        f"tensor<1x300x{k}xf8E4M3FN>, tensor<1x300x{k // 128}xf32>)",
        f"(tensor<1x130x150xf32>, tensor<1x{groups or 1}xi32>) -> (tensor<1x150x{k}xf8E4M3FN>, "
        f"tensor<1x150x{k // 128}xf32>)"]
    assert planned == [TokensProblem(1, 130, 300, groups, "f32"),
                       TransposeProblem(1, 130, 150, groups or 1, "f32")]


def test_nothing_comes_between_a_layer_s_calls(planned, monkeypatch, tmp_path):
    """Of a linear layer and its gradients; scales of rows go by columns in the same memory."""
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path))

    def layer(x, w, dy):
        (x_rows, x_columns), (dy_rows, dy_columns) = quantize_both(x), quantize_both(dy)
        forward, backward = quantize_weights(w)
        return (fp8_gemm(x_rows, forward), fp8_gemm(dy_rows, backward),
                fp8_gemm_ragged_k(x_columns, dy_columns, jnp.full(1, 128, jnp.int32)))

    text = lower_for_cuda(layer, x(128, 256), x(256, 384), x(128, 384))
    assert text.count(CALL) == 6
    operations = {line.split(" = ")[1].split()[0] for line in text.splitlines() if " = stablehlo." in line}
    assert operations <= {"stablehlo.custom_call", "stablehlo.reshape", "stablehlo.constant",
                          "stablehlo.broadcast_in_dim"}


@pytest.mark.parametrize(("function", "axes", "operands", "expected"), [
    (quantize_both, (0,), [x(2, 3, 130, 300)], "(tensor<6x130x300xbf16>)"),
    (quantize_both, (0, None), [x(2, 3, 130, 300), SIZES], "(tensor<6x130x300xbf16>, tensor<6x3xi32>)"),
    (quantize_weights, (1,), [x(130, 2, 3, 300)], "(tensor<6x130x300xbf16>)"),
    (quantize_swiglu_backward, (None, 0, None), [x(130, 256), x(2, 3, 130, 128), SIZES],
     "(tensor<6x130x256xbf16>, tensor<6x130x128xbf16>, tensor<6x3xi32>)"),
])
def test_vmap_is_one_call(planned, function, axes, operands, expected):
    text = lower_for_cuda(jax.vmap(jax.vmap(function, axes), axes), *operands)
    assert [signature.split(" -> ")[0] for signature in signatures(text)] == [expected]


CALLS = {
    "both": (quantize_both, (12, 300)), "weights": (quantize_weights, (12, 300)),
    "swiglu backward": (quantize_swiglu_backward, (12, 512), (12, 256)),
}


@pytest.mark.parametrize("name", CALLS)
def test_empty_arrays_need_no_kernel(planned, name):
    function, *shapes = CALLS[name]
    assert CALL not in lower_for_cuda(function, *(jnp.ones((0, columns)) for _, columns in shapes))
    assert CALL not in lower_for_cuda(function, *(jnp.ones((rows, 0)) for rows, _ in shapes))
    assert planned == []


@pytest.mark.parametrize("name", CALLS)
def test_reference_and_symbolic_sizes_are_plain_jnp(planned, name):
    function, *shapes = CALLS[name]
    operands = [x(*shape) for shape in shapes]
    assert CALL not in lower_for_cuda(partial(function, implementation="reference"), *operands)
    rows, = jax.export.symbolic_shape("t")
    symbolic = [jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16) for _, columns in shapes]
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda"))(*symbolic)
    got, expected = exported.call(*operands), function(*operands)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert planned == []


@pytest.mark.parametrize("name", CALLS)
def test_exported_programs_carry_their_kernel(planned, name):
    function, *shapes = CALLS[name]
    export = jax.export.export(jax.jit(function), platforms=("cuda",), disabled_checks=export_checks())
    assert CALL in export(*(x(*shape) for shape in shapes)).mlir_module()


@pytest.mark.parametrize("f", [256, 250])
def test_shard_map(planned, f):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Auto,))

    def local(gate_up, d_hidden, sizes):
        arrays = *quantize_both(gate_up), *quantize_swiglu_backward(gate_up, d_hidden, sizes)
        return [array.values for array in arrays]

    specs = {"in_specs": (P("data"), P("data"), P()), "out_specs": P("data")}
    mapped = jax.shard_map(local, mesh=mesh, **specs)
    operands = x(8, 2 * f), x(8, f), jnp.ones(2, jnp.int32)
    assert lower_for_cuda(mapped, *operands).count(CALL) == (2 if f == 256 else 3)
    first = local(*(operand[:2] for operand in operands))
    for whole, part in zip(mapped(*operands), first, strict=True):
        assert np.asarray(whole[: len(part)]).tobytes() == np.asarray(part).tobytes()


def test_sizes_beyond_31_bits_are_refused():
    for plan, problem in (
            (quantize_training.plan_quantize_both, TokensProblem(1, 2**31, 1)),
            (quantize_training.plan_quantize_both, TokensProblem(1, 2**24, 1, 2**25)),
            (quantize_training.plan_quantize_swiglu_backward, TokensProblem(2**31, 1, 128)),
            (quantize_training.plan_quantize_weights, WeightsProblem(1, 1, 2**31)),
            (quantize_training.plan_quantize_weights, WeightsProblem(2**30, 200, 200))):
        with pytest.raises(NotImplementedError, match=rf"sizes up to {MAX_SIZE}.*implementation='reference'"):
            plan(problem)


@pytest.mark.parametrize(("problem", "blocks", "token_blocks"), [
    (TokensProblem(1, 300, 8), 3, 3), (TokensProblem(1, 300, 8, 2), 4, 5),
    (TokensProblem(1, 128, 8, 1), 1, 2), (TokensProblem(1, 1, 8, 9), 1, 1)])
def test_blocks_are_enough_for_groups_and_for_the_rows_of_none(problem, blocks, token_blocks):
    assert (problem.num_blocks, problem.token_blocks) == (blocks, token_blocks)
    tokens, groups = problem.tokens, problem.groups
    if groups is not None:
        rng = np.random.default_rng(0)
        needed = []
        for _ in range(300):
            sizes = rng.multinomial(tokens, rng.dirichlet(np.full(groups + 1, 0.1)))
            needed.append((-(-sizes // 128)).sum())
        assert max(needed) <= token_blocks


def test_grids_and_arguments(monkeypatch):
    plans = []
    monkeypatch.setattr(quantize_training.Kernel, "plan",
                        lambda kernel, grid, arguments, **options: plans.append((grid, arguments, options)))
    quantize_training.plan_quantize_both(TokensProblem(3, 300, 200, 2))
    quantize_training.plan_quantize_swiglu_backward(TokensProblem(3, 300, 256))
    quantize_training.plan_quantize_weights(WeightsProblem(3, 300, 200))
    pointers = lambda count: [Pointer(i) for i in range(count)]
    assert plans == [
        (3 * 2 * 5, [*pointers(6), *map(Scalar, (300, 200, 4, 5, 2))], {}),
        (3 * 2 * 3, [*pointers(8), *map(Scalar, (300, 256))], {"shared_bytes": 112_128}),
        (3 * 2 * 3, [*pointers(5), *map(Scalar, (300, 200))], {}),
    ]
