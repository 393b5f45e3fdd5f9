"""The primitives of the grouped GEMMs: what is lowered for CUDA, how many launches, what is broadcast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import (
    ScaledArray,
    export_checks,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    quantize,
    save_gemms,
)
from jax_fp8gemm.jit.problem import MASKED, RAGGED_K, RAGGED_M, GemmProblem
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape
from lowering import CALL, call_line, lower_for_cuda

FUNCTIONS = {RAGGED_M: fp8_gemm_ragged_m, MASKED: fp8_gemm_masked, RAGGED_K: fp8_gemm_ragged_k}
SHAPES = {RAGGED_M: ((33, 304), (5, 200, 304)), MASKED: ((5, 33, 304), (5, 200, 304)),
          RAGGED_K: ((33, 304), (200, 304))}
PROBLEMS = {
    RAGGED_M: GemmProblem(33, 200, 304, kind=RAGGED_M, groups=5),
    MASKED: GemmProblem(33, 200, 304, kind=MASKED, groups=5),
    RAGGED_K: GemmProblem(33, 200, 304, kind=RAGGED_K, groups=5, out_dtype="f32", rhs_scale_rows=1),
}
OUT = {RAGGED_M: "33x200xbf16", MASKED: "5x33x200xbf16", RAGGED_K: "5x33x200xf32"}
KINDS = [*FUNCTIONS]


def operands(kind, lhs_lead=(), rhs_lead=(), sizes_lead=()):
    """lhs, rhs and group sizes, with axes in front of them."""
    granularity = ROW_BLOCKS if kind == RAGGED_K else SQUARE_BLOCKS
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(rng.standard_normal((*lead, *shape)), jnp.float32)
                for lead, shape in zip((lhs_lead, rhs_lead), SHAPES[kind], strict=True))
    sizes = jnp.asarray(rng.integers(0, 10, (*sizes_lead, 5)), jnp.int32)
    return quantize(lhs), quantize(rhs, granularity), sizes


def problem(kind, **changes):
    fields = {name: getattr(PROBLEMS[kind], name) for name in PROBLEMS[kind].__dataclass_fields__}
    return GemmProblem(**{**fields, **changes})


LAYOUTS = {
    RAGGED_M: "[2, 1, 0], [1, 2, 0], [3, 2, 1, 0], [3, 2, 1, 0], [1, 0]",
    MASKED: "[3, 2, 1, 0], [2, 3, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [1, 0]",
    RAGGED_K: "[2, 1, 0], [1, 2, 0], [2, 1, 0], [1, 2, 0], [1, 0]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_custom_call_with_the_contract_s_layouts(built, kind):
    text = lower_for_cuda(FUNCTIONS[kind], *operands(kind))
    line = call_line(text)
    layouts = line[line.index("operand_layouts") : line.index("result_layouts")]
    assert [part.split("]")[0] for part in layouts.split("dense<[")[1:]] == LAYOUTS[kind][1:-1].split("], [")
    assert line.endswith(f"-> tensor<1x{OUT[kind]}>")
    assert "tensor<1x5xi32>) ->" in line
    assert "stablehlo.pad" not in text
    assert "stablehlo.transpose" not in text
    assert built == [PROBLEMS[kind]]


def test_row_scales_of_grouped_weights_are_wanted_with_rows_fastest(built):
    lhs, _, sizes = operands(RAGGED_M)
    line = call_line(lower_for_cuda(fp8_gemm_ragged_m, lhs, quantize(jnp.ones((5, 200, 304))), sizes))
    assert "dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[2, 3, 1, 0]> : tensor<4xindex>" in line
    assert built == [problem(RAGGED_M, rhs_scale_rows=1)]


@pytest.mark.parametrize("kind", KINDS)
def test_k_is_padded_to_whole_16_bytes(built, kind):
    lhs, rhs, sizes = operands(kind)
    cut = lambda x: ScaledArray(x.values[..., :300], x.scales, x.granularity)
    text = lower_for_cuda(FUNCTIONS[kind], cut(lhs), cut(rhs), sizes)
    assert text.count("stablehlo.pad") == 2
    assert built == [PROBLEMS[kind]]


def test_options_reach_the_problem(built):
    def masked(*args):
        return fp8_gemm_masked(*args, expected_group_size=np.int64(7), out_dtype=jnp.float32)

    lower_for_cuda(masked, *operands(MASKED))
    lower_for_cuda(lambda *args: fp8_gemm_ragged_k(*args, out_dtype=jnp.bfloat16), *operands(RAGGED_K))
    assert built == [problem(MASKED, expected_m=7, out_dtype="f32"), problem(RAGGED_K, out_dtype="bf16")]


def test_the_accumulator_is_aliased_and_donated(built):
    def step(accumulator, *args):
        return fp8_gemm_ragged_k(*args, accumulator=accumulator)

    text = lower_for_cuda(step, jnp.ones((5, 33, 200)), *operands(RAGGED_K), donate_argnums=0)
    alias = "output_operand_alias<output_tuple_indices = [], operand_index = 5, operand_tuple_indices = []>"
    assert alias in call_line(text)
    assert "%arg0: tensor<5x33x200xf32> {tf.aliasing_output = 0" in text
    assert built == [problem(RAGGED_K, accumulate=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("axes", "lhs_lead", "rhs_lead", "sizes_lead", "batch", "has_lhs", "has_rhs"), [
    ([(0, 0, 0)], (4,), (4,), (4,), 4, True, True),
    ([(0, None, 0)], (4,), (), (4,), 4, True, False),
    ([(None, 0, 0)], (), (4,), (4,), 4, False, True),
    ([(None, None, 0)], (), (), (4,), 4, False, False),
    ([(0, None, None)], (4,), (), (), 4, True, False),
    ([(None, 0, None)], (), (4,), (), 4, False, True),
    ([(0, 0, None)], (4,), (4,), (), 4, True, True),
    ([(0, 0, 0), (0, 0, 0)], (2, 4), (2, 4), (2, 4), 8, True, True),
    ([(0, None, 0), (0, None, 0)], (2, 4), (), (2, 4), 8, True, False),
    ([(None, 0, None), (None, 0, 0)], (), (2, 4), (4,), 8, False, True),
    ([(None, None, 0), (None, None, 0)], (), (), (2, 4), 8, False, False),
])
def test_vmap_is_one_launch(built, kind, axes, lhs_lead, rhs_lead, sizes_lead, batch, has_lhs, has_rhs):
    """has_lhs and has_rhs: whether the operand has the batch, or is shared by it."""
    function = FUNCTIONS[kind]
    for in_axes in reversed(axes):
        function = jax.vmap(function, in_axes)
    text = lower_for_cuda(function, *operands(kind, lhs_lead, rhs_lead, sizes_lead))
    assert text.count(CALL) == 1
    broadcasts = [line for line in text.splitlines() if "broadcast_in_dim" in line]
    assert all("xi32>" in line for line in broadcasts), "only group sizes are copied"
    assert built == [problem(kind, batch=batch, lhs_batched=has_lhs, rhs_batched=has_rhs)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_outer_product_is_one_launch(built, kind):
    function = jax.vmap(jax.vmap(FUNCTIONS[kind], (None, 0, None)), (0, None, 0))
    text = lower_for_cuda(function, *operands(kind, (2,), (4,), (2,)))
    assert text.count(CALL) == 1
    assert built == [problem(kind, batch=8)]


def test_a_batch_of_accumulators_is_one_launch(built):
    def step(accumulator, *args):
        return fp8_gemm_ragged_k(*args, accumulator=accumulator)

    for axes, sizes_lead, expected in [
            ((0, None, None, None), (), problem(RAGGED_K)),
            ((0, None, None, 0), (4,), problem(RAGGED_K, batch=4, lhs_batched=False, rhs_batched=False,
                                               accumulate=True))]:
        text = lower_for_cuda(jax.vmap(step, axes), jnp.ones((4, 5, 33, 200)),
                              *operands(RAGGED_K, sizes_lead=sizes_lead))
        assert text.count(CALL) == 1
        assert built.pop() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["m", "n", "k", "g"])
def test_empty_problems_never_reach_the_kernel(built, kind, empty):
    m, n, k, g = (0 if name == empty else size for name, size in zip("mnkg", (33, 200, 304, 5), strict=True))
    lhs_lead, rhs_lead = (g,) * (kind == MASKED), (g,) * (kind != RAGGED_K)
    args = (quantize(jnp.ones((*lhs_lead, m, k))), quantize(jnp.ones((*rhs_lead, n, k))),
            jnp.zeros(g, jnp.int32))
    assert CALL not in lower_for_cuda(FUNCTIONS[kind], *args)
    assert built == []
    out = FUNCTIONS[kind](*args)
    assert out.shape == ((m, n) if kind == RAGGED_M else (g, m, n))
    if kind != MASKED:
        np.testing.assert_array_equal(out, np.zeros(out.shape))


def abstract(*shape, granularity=ROW_BLOCKS):
    scales = jax.ShapeDtypeStruct(scale_shape(shape, granularity), jnp.float32)
    return ScaledArray(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), scales, granularity)


@pytest.mark.parametrize(("name", "g", "m"), [
    ("M", 1, 2**31), ("G", 2**31, 1), ("rows of all groups", 2**16, 2**15)])
def test_sizes_beyond_31_bits_are_refused(built, name, g, m):
    args = (abstract(g, m, 16), abstract(g, 8, 16), jax.ShapeDtypeStruct((g,), jnp.int32))
    message = f"fp8_gemm_masked: {name}: .* up to .*, got 2147483648; use implementation='reference'"
    with pytest.raises(NotImplementedError, match=message):
        lower_for_cuda(fp8_gemm_masked, *args)
    assert built == []


def test_groups_of_a_batch_beyond_31_bits_are_refused(built):
    batch, g = 2**11, 2**20
    args = (abstract(1, 16), abstract(batch, g, 1, 16), jax.ShapeDtypeStruct((batch, g), jnp.int32))
    message = "fp8_gemm_ragged_m: groups of all batches: .* up to .*, got 2147483648; use"
    with pytest.raises(NotImplementedError, match=message):
        lower_for_cuda(jax.vmap(fp8_gemm_ragged_m, in_axes=(None, 0, 0)), *args)
    assert built == []


@pytest.mark.parametrize("kind", KINDS)
def test_export_for_several_platforms(built, kind):
    args = operands(kind)
    export = jax.export.export(jax.jit(FUNCTIONS[kind]), platforms=("cpu", "cuda"),
                               disabled_checks=export_checks())
    exported = export(*args)
    assert exported.mlir_module().count(CALL) == 1
    np.testing.assert_array_equal(*map(np.float32, (exported.call(*args), FUNCTIONS[kind](*args))))


@pytest.mark.parametrize("kind", KINDS)
def test_shard_map_over_groups(kind):
    """Each device has some of the groups (ragged M, masked) or of the rows (ragged K)."""
    mesh = jax.make_mesh((5,), ("x",), devices=jax.devices("cpu")[:5], axis_types=(AxisType.Auto,))
    specs, out_spec = {
        RAGGED_M: ((P(), P("x"), P("x")), P("x")),
        MASKED: ((P("x"), P("x"), P("x")), P("x")),
        RAGGED_K: ((P(), P("x"), P()), P(None, None, "x")),
    }[kind]
    lhs, rhs, sizes = operands(kind)
    out = jax.jit(jax.shard_map(FUNCTIONS[kind], mesh=mesh, in_specs=specs, out_specs=out_spec))(
        lhs, rhs, sizes)
    expected = FUNCTIONS[kind](lhs, rhs, sizes)
    if kind == RAGGED_M:  # every device has all rows, of which the first ones are its group's
        shards = [jax.tree.map(lambda leaf: leaf[g : g + 1], rhs) for g in range(5)]  # noqa: B023
        expected = jnp.concatenate([fp8_gemm_ragged_m(lhs, shard, sizes[g : g + 1])
                                    for g, shard in enumerate(shards)])
        assert (expected != 0).any()
    # One place of bf16, and what f32 sums in another order may differ by where terms cancel out.
    np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=2**-7, atol=2**-14)


@pytest.mark.parametrize("kind", KINDS)
def test_save_gemms_knows_them(kind):
    args = operands(kind)

    def loss(scale):
        return jnp.sin(FUNCTIONS[kind](*args).astype(jnp.float32) * scale).sum()

    def count(policy):
        jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(2.0)
        return str(jaxpr).count(f"{FUNCTIONS[kind].__name__}[")

    assert [count(None), count(save_gemms)] == [2, 1]
