"""Rules, plans and the exchange of halves, without any operation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_fp8gemm.mesh.exchange import from_halves, to_halves
from jax_fp8gemm.mesh.plan import contradiction, fitting, make_plan, openness, refusal
from jax_fp8gemm.mesh.rule import Dim, rule

MESH = {"x": 4, "y": 2, "z": 3, "one": 1}
PRODUCT = rule({"lhs": "m k", "lhs.scales": "m k/128", "rhs": "n k", "rhs.scales": "n/128 k/128"},
               {"the result": "m n"})
SHAPES = [(24, 1024), (24, 8), (512, 1024), (4, 8), (24, 512)]


def plan(lhs, rhs, out=(None, None), product=PRODUCT):
    whole = P(None, None)
    return make_plan(product, MESH, SHAPES, [P(*lhs), whole, P(*rhs), whole, P(*out)])


def test_dimensions_are_read():
    assert [*map(Dim.parse, ("m", "k/128", "2*f", "."))] == [
        Dim("m"), Dim("k", block=128), Dim("f", copies=2), Dim(None)]
    assert PRODUCT.order == ("m", "n", "k")
    assert PRODUCT.summed == ("k",)
    assert PRODUCT.sizes(SHAPES) == {"m": 24, "n": 512, "k": 1024}
    assert [*map(PRODUCT.block, "mnk")] == [1, 128, 128]
    assert rule({"x": "m 2*f"}, {"values": "m f"}).sizes([(3, 10), (3, 5)]) == {"m": 3, "f": 5}


def test_mapped_axes_are_factors_that_choose_first():
    mapped = PRODUCT.mapped([(True, True, False, False), (True, True, True, True)])
    assert mapped.order == ("mapped0", "mapped1", "m", "n", "k")
    assert [len(array.dims) for array in mapped.arrays()] == [4, 4, 3, 3, 4]
    assert mapped.operands[2].dims[0] == Dim("mapped1")


@pytest.mark.parametrize(("axes", "size", "block", "used", "expected"), [
    (("x",), 24, 1, (), ("x",)), (("x",), 22, 1, (), ()), (("x", "y"), 24, 1, (), ("x", "y")),
    (("x", "y"), 512, 128, (), ("x",)), (("x", "y"), 24, 1, ("y",), ("x",)), (("x", "y"), 24, 1, ("x",), ()),
    (("one",), 100, 128, (), ("one",)), ((), 24, 1, (), ())])
def test_as_many_axes_are_kept_as_fit(axes, size, block, used, expected):
    assert fitting(axes, size, block, MESH, set(used)) == expected


@pytest.mark.parametrize(("lhs", "rhs", "lhs_kept", "rhs_kept", "result"), [
    (("x", None), ("y", None), ("x", None), ("y", None), ("x", "y")),
    (("x", None), ("x", None), ("x", None), (None, None), ("x", None)),
    (("x", None), (None, "x"), ("x", None), (None, None), ("x", None)),
    ((("x", "y"), None), (None, None), (("x", "y"), None), (None, None), (("x", "y"), None)),
    ((None, "y"), (None, None), (None, "y"), (None, "y"), (None, None)),
    ((None, "y"), ("x", "z"), (None, "y"), ("x", "y"), (None, "x")),
    (("z", None), ("z", None), ("z", None), (None, None), ("z", None)),
])
def test_operands_get_what_they_ask_for_where_they_can(lhs, rhs, lhs_kept, rhs_kept, result):
    got = plan(lhs, rhs)
    lhs_scale, rhs_scale = got.operands[1], got.operands[3]
    assert (got.operands[0], got.operands[2], got.results[0]) == (P(*lhs_kept), P(*rhs_kept), P(*result))
    assert (lhs_scale, rhs_scale) == (P(*lhs_kept), P(*rhs_kept)), "scales lie as their values"


@pytest.mark.parametrize(("out", "result", "reduce", "scatter"), [
    ((None, None), (None, None), ("x",), ()), (("x", None), ("x", None), (), ((0, ("x",)),)),
    ((None, "x"), (None, "x"), (), ((1, ("x",)),)), (("y", "x"), ("y", "x"), (), ((1, ("x",)),)),
    (("y", None), ("y", None), ("x",), ()), ((("y", "x"), None), (("y", "x"), None), (), ((0, ("x",)),)),
    ((("x", "z"), None), (None, None), ("x",), ()),
])
def test_a_sum_is_scattered_where_it_is_asked_to_be(out, result, reduce, scatter):
    got = plan((None, "x"), (None, "x"), out)
    assert (got.results[0], got.reduce, got.scatter) == (P(*result), reduce, scatter)


def test_what_is_wrong_is_said():
    whole = P(None, None)
    specs = lambda lhs, rhs: [P(*lhs), whole, P(*rhs), whole]
    assert contradiction(PRODUCT, specs((None, "x"), (None, "x"))) is None
    assert contradiction(PRODUCT, specs((None, "x"), (None, "y"))) == (
        "K is sharded over 'x' in lhs, but over 'y' in rhs; jax.sharding.reshard one of them")
    refusing = rule({"x": "t k"}, {"y": "t k"}, refused={"t": "Do it over {axes}."})
    assert refusal(refusing, MESH, [P("x", None)]) == "T is sharded over 'x' in x. Do it over 'x'."
    assert refusal(refusing, MESH, [P(("x", "y"), None)]).endswith("Do it over ('x', 'y').")
    assert refusal(refusing, MESH, [P(None, "x")]) is None
    is_open = lambda lhs, rhs: openness(PRODUCT, MESH, SHAPES, [*specs(lhs, rhs), whole], plan(lhs, rhs))
    assert is_open(("x", None), ("y", None)) is None
    assert is_open((None, "z"), (None, None)) == (
        "K is sharded over 'z' in lhs: 1024 over 3 devices makes no whole blocks of 128")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_halves_are_exchanged(count):
    mesh = jax.make_mesh((count,), ("x",), devices=jax.devices("cpu")[:count], axis_types=(AxisType.Auto,))
    x = jnp.arange(3 * 6 * count).reshape(3, 6 * count)
    over_columns = partial(jax.shard_map, mesh=mesh, in_specs=P(None, "x"), out_specs=P(None, "x"))
    there, back = (jax.jit(over_columns(partial(function, axes=("x",), count=count, axis=1)))
                   for function in (to_halves, from_halves))
    gate, up = (half.reshape(3, count, 3) for half in np.split(np.asarray(x), 2, axis=1))
    expected = np.concatenate([gate, up], axis=2).reshape(3, 6 * count)
    np.testing.assert_array_equal(there(x), expected)
    np.testing.assert_array_equal(back(there(x)), x)
