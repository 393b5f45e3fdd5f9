"""Gradients of the differentiable products: data, FSDP, tensor and expert parallel, in every mesh mode."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import dot, feed_forward, prepare, ragged_dot, ragged_feed_forward
from meshes import assert_same_bits, mesh_of, normal, run, run_alone

AUTO, EXPLICIT = (mesh_of(kind, x=2, y=2) for kind in (AxisType.Auto, AxisType.Explicit))
T, K, N, F, G = 256, 256, 256, 256, 4  # F: hidden features
SIZES = jnp.array([100, 0, 100, 50], jnp.int32)


def exact(*shape, seed=0, dtype=jnp.bfloat16):
    """Small whole numbers, and in each 128 neighbours along either of the last two axes one 448.

    So every scale is 1, FP8 holds every number, and every sum of products is exact in f32: a result does not
    depend on how it is cut, and its bits show every rounding.
    """
    x = np.random.default_rng(seed).integers(-8, 9, shape)
    rows, columns = np.ogrid[: shape[-2], : shape[-1]]
    return jnp.asarray(np.where(rows % 128 == columns % 128, 448, x), dtype)


def small(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 8, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, how its operands and its result are sharded, and the collectives of it with its gradients."""

    function: Callable
    operands: tuple
    specs: tuple
    out: P
    collectives: dict
    is_exact: bool = True

    def cotangent(self):
        shape = *self.operands[0].shape[:-1], N
        return exact(*shape, seed=9) if self.is_exact else small(*shape, seed=9)


def of_groups(function):
    return lambda *operands, **options: function(*operands, SIZES, **options)


LINEAR = exact(T, K), exact(K, N, seed=1)
GATED = small(T, K), small(K, 2 * F, seed=1), small(F, N, seed=2)
EXPERTS = exact(T, K), exact(G, K, N, seed=1)
GATED_EXPERTS = small(T, K), small(G, K, 2 * F, seed=1), small(G, F, N, seed=2)
TOKENS, WHOLE = P("x", None), P(None, None)
COLUMN, ROW = P(None, "y"), P("y", None)
OF_EXPERTS = P("x", None, None)

LAYERS = {
    "dot, data": Layer(
        dot, (exact(2, 128, K), LINEAR[1]), (OF_EXPERTS, WHOLE), OF_EXPERTS, {"all-reduce": 1}),
    "dot, FSDP": Layer(dot, LINEAR, (ROW, ROW), ROW, {"all-gather": 4, "reduce-scatter": 1}),
    "dot, data and tensor, columns": Layer(dot, LINEAR, (TOKENS, COLUMN), P("x", "y"), {"all-reduce": 2}),
    "dot, data and tensor, rows": Layer(dot, LINEAR, (P("x", "y"), ROW), TOKENS, {"all-reduce": 2}),
    "gated, FSDP": Layer(feed_forward, GATED, (ROW, ROW, COLUMN), ROW, {"all-gather": 8, "reduce-scatter": 2},
                         False),
    "gated, data and tensor": Layer(
        feed_forward, GATED, (TOKENS, COLUMN, ROW), TOKENS, {"all-reduce": 2}, False),
    "experts": Layer(of_groups(ragged_dot), EXPERTS, (WHOLE, OF_EXPERTS), WHOLE, {"all-reduce": 1}),
    "experts and tensor": Layer(
        of_groups(ragged_dot), EXPERTS, (WHOLE, P("x", None, "y")), COLUMN, {"all-reduce": 2}),
    "gated experts and tensor": Layer(
        of_groups(ragged_feed_forward), GATED_EXPERTS, (WHOLE, P("x", None, "y"), P("x", "y", None)), WHOLE,
        {"all-reduce": 2}, False),
}


def with_gradients(function, *operands_and_cotangent):
    *operands, cotangent = operands_and_cotangent
    out, pullback = jax.vjp(function, *operands)
    return out, *pullback(cotangent)


@functools.cache
def expected(name):
    """What one device makes of it."""
    layer = LAYERS[name]
    return run_alone(partial(with_gradients, layer.function), *layer.operands, layer.cotangent())


def assert_equals_one_device_s(name, actual):
    assert_equals(name, actual, expected(name))


def assert_equals(name, actual, of_one_device):
    """To the bit, or to what the norm of a gated layer's results may change by.

    There, f32 arithmetic that differs in its last bits (of exp, of a sum) takes a number to another FP8
    number only if it is that near to the middle of two: less than one in 2^10, by at most 2^-3 of itself.
    """
    for got, wanted in zip(actual, of_one_device, strict=True):
        assert got.dtype == wanted.dtype
        if LAYERS[name].is_exact:
            assert_same_bits(got, wanted)
        else:
            got, wanted = np.float64(got), np.float64(wanted)
            assert np.linalg.norm(got - wanted) < 2**-8 * np.linalg.norm(wanted)


def without_exchange(found):
    """Gate and up change places between devices where F is sharded; XLA does some of that once for two."""
    return {kind: count for kind, count in found.items() if kind != "collective-permute"}


@pytest.mark.parametrize("name", LAYERS)
def test_auto(name):
    layer = LAYERS[name]
    specs = *layer.specs, layer.out
    shardings = tuple(NamedSharding(AUTO, spec) for spec in (layer.out, *layer.specs))
    function, operands = partial(with_gradients, layer.function), (*layer.operands, layer.cotangent())
    actual, found = run(AUTO, function, operands, specs, out_shardings=shardings)
    assert_equals_one_device_s(name, actual)
    assert without_exchange(found) == layer.collectives


@pytest.mark.parametrize("name", LAYERS)
def test_explicit(name):
    """Gradients lie as what they are gradients of."""
    layer = LAYERS[name]
    function = partial(with_gradients, partial(layer.function, out_sharding=layer.out))
    actual, found = run(EXPLICIT, function, (*layer.operands, layer.cotangent()), (*layer.specs, layer.out))
    assert_equals_one_device_s(name, actual)
    assert [x.sharding.spec for x in actual] == [layer.out, *layer.specs]
    assert without_exchange(found) == layer.collectives


# ---- shard_map: sums over devices are in the dtype of the gradient, so that these are f32


def gathered(x, w):
    return dot(x, lax.all_gather(w, "x", tiled=True))


MANUAL = {
    "data": (dot, (exact(T, K), exact(K, N, seed=1, dtype=jnp.float32)), (TOKENS, P()), TOKENS,
             {"all-reduce": 1}),
    "FSDP": (gathered, (exact(T, K), exact(K, N, seed=1, dtype=jnp.float32)), (TOKENS, TOKENS), TOKENS,
             {"all-gather": 1, "reduce-scatter": 1}),
    "tensor, columns": (dot, (exact(T, K, dtype=jnp.float32), exact(K, N, seed=1)), (P(), P(None, "x")),
                        P(None, "x"), {"all-reduce": 1}),
    "tensor, rows": (lambda x, w: lax.psum(dot(x, w), "y"),
                     (exact(T, K, dtype=jnp.float32), exact(K, N, seed=1)), (COLUMN, ROW), P(),
                     {"all-reduce": 1}),
}


@pytest.mark.parametrize("name", MANUAL)
def test_shard_map(name):
    function, operands, specs, out, collectives = MANUAL[name]
    mapped = jax.shard_map(function, mesh=AUTO, in_specs=specs, out_specs=out)
    cotangent = exact(T, N, seed=9, dtype=operands[0].dtype)
    actual, found = run(AUTO, partial(with_gradients, mapped), (*operands, cotangent), (*specs, out))
    assert_same_bits(actual, run_alone(partial(with_gradients, dot), *operands, cotangent))
    assert found == collectives


def test_experts_in_shard_map():
    """Every device has two experts and the tokens that came for these; nothing is left to send."""
    sizes = jnp.array([100, 28, 0, 64], jnp.int32)
    arrays = exact(T, K), exact(G, K, N, seed=1), exact(T, N, seed=9), sizes
    layer = jax.shard_map(ragged_dot, mesh=AUTO, in_specs=(TOKENS, OF_EXPERTS, P("x")), out_specs=TOKENS)

    def gradients(function, x, w, cotangent, sizes):
        return with_gradients(lambda x, w: function(x, w, sizes), x, w, cotangent)

    actual, found = run(AUTO, partial(gradients, layer), arrays, (TOKENS, OF_EXPERTS, TOKENS, P("x")))
    halves = zip(*(jnp.split(array, 2) for array in arrays), strict=True)
    parts = [run_alone(partial(gradients, ragged_dot), *half) for half in halves]
    assert_same_bits(actual, tuple(map(jnp.concatenate, zip(*parts, strict=True))))
    assert found == {}


# ---- what goes with them


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_a_prepared_weight_is_sharded_as_the_weight(mesh):
    """FSDP with two microbatches: the weight is quantised once, where it lies."""
    x, w, cotangents = exact(2, T, K), exact(K, N, seed=1, dtype=jnp.float32), exact(2, T, N, seed=9)

    def loss(w, x, cotangents, **options):
        prepared = prepare(w)
        product = lambda x, cotangent: (dot(x, prepared, **options) * cotangent).astype(jnp.float32)
        return lax.map(lambda pair: product(*pair), (x, cotangents)).sum()

    explicit = {"out_sharding": ROW} if mesh is EXPLICIT else {}
    auto = {"out_shardings": NamedSharding(mesh, ROW)} if mesh is AUTO else {}
    microbatches = P(None, "y", None)
    actual, _ = run(mesh, jax.grad(partial(loss, **explicit)), (w, x, cotangents),
                    (ROW, microbatches, microbatches), **auto)
    assert_same_bits(actual, run_alone(jax.grad(loss), w, x, cotangents))
    assert actual.sharding.spec == ROW


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_tokens_that_are_sorted_by_group_cannot_be_sharded(mesh):
    error = NotImplementedError if mesh is EXPLICIT else jax.errors.JaxRuntimeError
    with pytest.raises(error, match=r"is sharded over 'x' in (x|lhs)\. All tokens are sorted by group"):
        run(mesh, of_groups(ragged_dot), EXPERTS, (TOKENS, P()))


def test_a_result_that_is_left_open():
    with pytest.raises(ValueError, match="fp8_gemm: out_sharding: expected a PartitionSpec, got None, but K"):
        run(EXPLICIT, dot, LINEAR, (COLUMN, ROW))
    with pytest.raises(ValueError, match="dot: out_sharding: expected at most 2 entries"):
        run(EXPLICIT, partial(dot, out_sharding=P(None, None, "x")), LINEAR, (COLUMN, ROW))


def test_shards_of_part_of_a_block_are_gathered():
    """192 tokens of a device are 1.5 blocks: each device quantises all of them."""
    operands, specs = (normal(384, K), small(K, N)), (TOKENS, WHOLE)
    for mesh, options in (AUTO, {}), (EXPLICIT, {"out_sharding": TOKENS}):
        gradients = jax.grad(lambda x, w: dot(x, w, **options).astype(jnp.float32).sum(), (0, 1))  # noqa: B023
        actual, found = run(mesh, gradients, operands, specs)
        one = run_alone(jax.grad(lambda x, w: dot(x, w).astype(jnp.float32).sum(), (0, 1)), *operands)
        for got, wanted in zip(actual, one, strict=True):
            np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=2**-7, atol=2**-7)
        assert found.get("all-gather")
