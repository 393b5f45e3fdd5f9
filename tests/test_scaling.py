"""ScaledArray as a pytree: through JAX's transformations, Flax and checkpoints; and its checks."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from jax_fp8gemm import ScaledArray, dequantize, quantize, register_flax_serialization
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape

E4M3 = jnp.float8_e4m3fn


@pytest.fixture
def array(rng):
    return quantize(jnp.asarray(rng.standard_normal((3, 130, 300)), jnp.float32), SQUARE_BLOCKS)


def assert_same(a, b):
    assert a.granularity == b.granularity
    np.testing.assert_array_equal(np.asarray(a.values).view(np.uint8), np.asarray(b.values).view(np.uint8))
    np.testing.assert_array_equal(a.scales, b.scales)


def test_looks_like_an_array(array):
    assert (array.shape, array.dtype, array.ndim) == ((3, 130, 300), E4M3, 3)
    assert isinstance(array, Float[ScaledArray, "G N K"])
    assert not isinstance(array, Float[ScaledArray, "N K"])


@pytest.mark.parametrize(("shape", "granularity", "expected"), [
    ((256, 512), SQUARE_BLOCKS, (2, 4)),
    ((129, 1), SQUARE_BLOCKS, (2, 1)),
    ((7, 257), ROW_BLOCKS, (7, 3)),
    ((5, 2, 0, 128), ROW_BLOCKS, (5, 2, 0, 1)),
    ((4, 0), SQUARE_BLOCKS, (1, 0)),
])
def test_scale_shape(shape, granularity, expected):
    assert scale_shape(shape, granularity) == expected
    scaled = ScaledArray(jnp.ones(shape, E4M3), jnp.ones(expected), granularity)
    assert scaled.scales.shape == expected


@pytest.mark.parametrize(("values", "scales", "granularity", "message"), [
    (jnp.ones((4, 256)), jnp.ones((4, 2)), ROW_BLOCKS, "values: expected dtype float8_e4m3fn or .*float32"),
    (jnp.ones((4, 256), E4M3), jnp.ones((4, 2), jnp.bfloat16), ROW_BLOCKS, "expected dtype float32, got bfl"),
    (jnp.ones((4, 256), E4M3), jnp.ones((4, 3)), ROW_BLOCKS, r"scales: expected shape \(4, 2\) .* \(4, 3\)"),
    (jnp.ones((4, 256), E4M3), jnp.ones((2, 4)), SQUARE_BLOCKS, r"expected shape \(1, 2\) .*got \(2, 4\)"),
    (jnp.ones(256, E4M3), jnp.ones(2), ROW_BLOCKS, r"at least two axes, got shape \(256,\)"),
    (jnp.ones((4, 256), E4M3), jnp.ones((4, 2)), (1, 64), r"granularity of .*got \(1, 64\)"),
])
def test_rejects_arrays_that_do_not_fit(values, scales, granularity, message):
    with pytest.raises(ValueError, match=message):
        ScaledArray(values, scales, granularity)


def test_tree_takes_any_leaves(array):
    leaves, structure = jax.tree.flatten(array)
    for placeholder in (None, object(), 0, jax.ShapeDtypeStruct((7,), jnp.int32), PartitionSpec("x")):
        rebuilt = jax.tree.unflatten(structure, [placeholder] * len(leaves))
        assert rebuilt.values is placeholder
        assert rebuilt.granularity == SQUARE_BLOCKS
    assert jax.tree.map(jnp.ndim, array).scales == 3
    assert ScaledArray(PartitionSpec("x"), PartitionSpec(), ROW_BLOCKS).values == PartitionSpec("x")


def test_keys_name_the_leaves(array):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(array)[0]]
    assert paths == [".values", ".scales"]


def test_jit_vmap_scan_and_eval_shape(array):
    assert_same(jax.jit(lambda x: x)(array), array)
    assert_same(jax.vmap(lambda x: x)(array), array)
    shared = jax.vmap(lambda x, i: x, in_axes=(ScaledArray(0, 0, SQUARE_BLOCKS), 0))(array, jnp.arange(3))
    assert_same(shared, array)
    sums = jax.lax.scan(lambda total, x: (total + dequantize(x).sum(), x.shape[0] * jnp.ones(())), 0.0, array)
    np.testing.assert_allclose(sums[0], np.asarray(dequantize(array), np.float32).sum(), rtol=1e-2, atol=2)
    np.testing.assert_array_equal(sums[1], [130] * 3)
    shapes = jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[0], x), array)
    assert (shapes.values.shape, shapes.scales.shape) == ((130, 300), (2, 3))


def test_leading_axes_come_and_go(array):
    first = jax.tree.map(lambda leaf: leaf[0], array)
    first.validate("first")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, first)
    stacked.validate("stacked")
    assert stacked.shape == (2, 130, 300)


def test_donation_frees_both_leaves(array):
    out = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + leaf, x), donate_argnums=0)(array)
    np.testing.assert_array_equal(out.scales > 0, True)
    assert array.values.is_deleted()
    assert array.scales.is_deleted()


def test_device_put_with_a_tree_of_shardings(rng):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices("cpu")[:4],
                         axis_types=(jax.sharding.AxisType.Auto,))
    array = quantize(jnp.asarray(rng.standard_normal((512, 256)), jnp.float32), SQUARE_BLOCKS)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    placed = jax.device_put(array, ScaledArray(sharding, sharding, SQUARE_BLOCKS))
    assert placed.values.sharding == placed.scales.sharding == sharding
    assert_same(placed, array)


def test_is_a_linen_parameter(array):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self):
            return dequantize(self.param("kernel", lambda key: array))

    variables = Layer().init(jax.random.key(0))
    assert_same(variables["params"]["kernel"], array)
    np.testing.assert_array_equal(Layer().apply(variables), dequantize(array))


def test_is_an_nnx_parameter(array):
    class Layer(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(array)

    graph, state = nnx.split(Layer())
    assert len(jax.tree.leaves(state)) == 2
    assert_same(nnx.merge(graph, state).kernel.get_value(), array)


def test_flax_serialization_round_trip(array):
    register_flax_serialization()
    restored = serialization.from_bytes({"w": array}, serialization.to_bytes({"w": array}))["w"]
    assert_same(restored, array)


def test_replace_checks_again(array):
    with pytest.raises(ValueError, match=re.escape("ScaledArray.scales: expected shape (3, 2, 3)")):
        dataclasses.replace(array, scales=jnp.ones((3, 2, 4)))
