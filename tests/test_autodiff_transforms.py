"""Gradients under JAX's transformations: remat, scan, vmap, jit, donation, export, caches, microbatches.

All arithmetic is exact here, so that results have to be equal to the bit however XLA orders the sums:
operands are of magnitude 7, which FP8 holds with scales of 1/64, and activations make such of results and of
gradients. Where a feed-forward layer's hidden activations are an operand, with FP8's 4 bits and 17 exponents,
the other one is of magnitude 7, and sums are of at most 8 products.
"""

import os
import pathlib
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import checkpoint_policies, lax

from jax_fp8gemm import (
    GEMM_NAME,
    RESIDUAL_NAME,
    dot,
    feed_forward,
    prepare,
    ragged_dot,
    ragged_feed_forward,
    save_dense_gemms,
    save_gemms,
)
from jax_fp8gemm.scaling import FLOAT8_DTYPES
from jaxprs import equations

BF16, F32 = jnp.bfloat16, jnp.float32
T, D, F, G = 8, 131, 4, 3  # an odd D: sums of D products are never zero
SIZES = np.array([3, 0, 4], np.int32)  # the last row belongs to no group

# Each maps [T, D] to [T, D]. The weights' shapes, and the GEMMs of the forward pass; the backward pass has
# two for each of them.
LAYERS = {
    "dot": (dot, [(D, D)], 1),
    "ragged_dot": (lambda x, w: ragged_dot(x, w, SIZES), [(G, D, D)], 1),
    "feed_forward": (feed_forward, [(D, 2 * F), (F, D)], 2),
    "ragged_feed_forward": (
        lambda x, *weights: ragged_feed_forward(x, *weights, SIZES), [(G, D, 2 * F), (G, F, D)], 2),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
# Compiling takes most of the time here: these have both kinds of rules, and groups or none.
one_of_each_kind = pytest.mark.parametrize("name", ["ragged_dot", "feed_forward"])


def sevens(rng, *shape, dtype=BF16):
    return jnp.asarray(7 * rng.choice([-1, 1], shape), dtype)


def inputs(rng, name, *leading, dtype=BF16):
    """x [T, D] and the weights, these with leading axes."""
    return sevens(rng, T, D), [sevens(rng, *leading, *shape, dtype=dtype) for shape in LAYERS[name][1]]


@jax.custom_vjp
def activation(x):
    return 7 * jnp.sign(x)


activation.defvjp(lambda x: (activation(x), x), lambda x, dy: (7 * jnp.sign(x) * jnp.sign(dy),))


def loss(name, x, weights, wrap=lambda layer: layer):
    """Of two layers with the same weights. Their results are needed again for the activations' gradients."""
    layer = wrap(lambda x, weights: activation(LAYERS[name][0](x, *weights)))
    return layer(layer(x, weights), weights).astype(F32).sum()


def gradient(name, **options):
    return jax.grad(lambda x, weights: loss(name, x, weights, **options), (0, 1))


@cache
def compiled_gradient(name):
    return jax.jit(gradient(name))


def gemms(jaxpr):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name.startswith("fp8_gemm")]


def quantisations(jaxpr):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name.startswith("fp8_quantize")]


def assert_same(results, expected):
    for result, wanted in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        assert np.abs(np.asarray(wanted, np.float32)).max() > 0
        np.testing.assert_array_equal(result, wanted, strict=True)


# ---- what is kept, and what is computed again


@each_layer
def test_what_is_kept_is_fp8(rng, name):
    x, weights = inputs(rng, name)
    layer, shapes, _ = LAYERS[name]
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(layer, *args)[1], x, *weights))
    narrow = [leaf for leaf in kept if leaf.dtype in FLOAT8_DTYPES]
    scales = [leaf for leaf in kept if leaf.dtype == F32]
    wide = [leaf for leaf in kept if leaf.dtype == BF16]
    assert len(kept) == len(narrow) + len(scales) + len(wide) + name.startswith("ragged")
    # x along its tokens, then each weight; of a feed-forward layer also its first product.
    assert [leaf.shape[:-1] for leaf in narrow] == [(D,), *(shape[:-1] for shape in shapes)]
    assert [leaf.shape for leaf in narrow[1:]] == shapes
    assert len(scales) == len(narrow)
    assert [leaf.shape for leaf in wide] == ([(T, 2 * F)] if "feed_forward" in name else [])


POLICIES = {
    "nothing": None,
    "save_gemms": save_gemms,
    "save_dense_gemms": save_dense_gemms,
    "results, by name": checkpoint_policies.save_only_these_names(GEMM_NAME),
    "results and kept tensors, by name": checkpoint_policies.save_only_these_names(GEMM_NAME, RESIDUAL_NAME),
}


@each_layer
@pytest.mark.parametrize("policy", POLICIES)
def test_remat_computes_again_what_the_policy_does_not_keep(rng, name, policy):
    x, weights = inputs(rng, name)
    num_forward = 2 * LAYERS[name][2]
    plain, remat = (jax.make_jaxpr(gradient(name, wrap=wrap))(x, weights)
                    for wrap in (lambda layer: layer, partial(jax.checkpoint, policy=POLICIES[policy])))
    assert len(gemms(plain)) == 3 * num_forward
    runs_again = policy == "nothing" or (policy == "save_dense_gemms" and name.startswith("ragged"))
    assert len(gemms(remat)) == (4 if runs_again else 3) * num_forward
    more = len(quantisations(remat)) - len(quantisations(plain))
    assert more == 0 if policy == "results and kept tensors, by name" else more > 0


@pytest.mark.parametrize(("name", "policy"), [
    ("dot", "nothing"), ("ragged_dot", "save_gemms"), ("feed_forward", "save_gemms")])
def test_remat_changes_no_bit(rng, name, policy):
    args = inputs(rng, name)
    remat = gradient(name, wrap=partial(jax.checkpoint, policy=POLICIES[policy]))
    assert_same(jax.jit(remat)(*args), compiled_gradient(name)(*args))


# ---- scan and vmap


def scanned_loss(name, x, weights):
    @partial(jax.checkpoint, policy=save_gemms)
    def layer(x, weights):
        return activation(LAYERS[name][0](x, *weights)), None

    return lax.scan(layer, x, weights)[0].astype(F32).sum()


def unrolled_loss(name, x, weights):
    for i in range(len(weights[0])):
        x = activation(LAYERS[name][0](x, *[w[i] for w in weights]))
    return x.astype(F32).sum()


@each_layer
def test_a_scan_with_save_gemms_computes_no_gemm_again(rng, name):
    scanned = jax.grad(partial(scanned_loss, name), (0, 1))
    assert len(gemms(jax.make_jaxpr(scanned)(*inputs(rng, name, 3)))) == 3 * LAYERS[name][2]


@one_of_each_kind
def test_scan_over_layers(rng, name):
    x, weights = inputs(rng, name, 3)
    scanned, unrolled = (jax.grad(partial(loss, name), (0, 1)) for loss in (scanned_loss, unrolled_loss))
    assert_same(jax.jit(scanned)(x, weights), jax.jit(unrolled)(x, weights))


@each_layer
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_of_gradients_has_one_launch_for_each_gemm(rng, name, axes):
    args = [arg if axis == 0 else jax.tree.map(lambda leaf: leaf[0], arg)
            for arg, axis in zip((sevens(rng, 3, T, D), inputs(rng, name, 3)[1]), axes, strict=True)]
    jaxpr = jax.make_jaxpr(jax.vmap(gradient(name), axes))(*args)
    assert len(gemms(jaxpr)) == 6 * LAYERS[name][2]
    assert [aval.shape for aval in jaxpr.out_avals] == [(3, T, D), *((3, *s) for s in LAYERS[name][1])]


@pytest.mark.parametrize(("name", "axes"), [
    ("dot", (0, None)), ("dot", (None, 0)), ("dot", (0, 0)), ("ragged_dot", (0, 0)),
    ("feed_forward", (0, None))])
def test_vmap_of_gradients(rng, name, axes):
    """The gradients of each example by itself, also of x or of weights that are shared."""
    x, weights = sevens(rng, 3, T, D), inputs(rng, name, 3)[1]
    pick = lambda arg, axis, i: arg if axis is None else jax.tree.map(lambda leaf: leaf[i], arg)
    args = [arg if axis == 0 else pick(arg, 0, 0) for arg, axis in zip((x, weights), axes, strict=True)]
    got, one = jax.jit(jax.vmap(gradient(name), axes))(*args), compiled_gradient(name)
    for i in range(3):
        assert_same(pick(got, 0, i), one(*(pick(arg, axis, i) for arg, axis in zip(args, axes, strict=True))))


@pytest.mark.parametrize("name", ["dot", "ragged_dot"])
def test_gradient_of_vmap(rng, name):
    """The gradient of shared weights is the sum of the examples' gradients."""
    x, weights = sevens(rng, 3, T, D), inputs(rng, name, dtype=F32)[1]

    def total(x, weights):
        return jax.vmap(lambda x: loss(name, x, weights))(x).sum()

    dx, dw = jax.jit(jax.grad(total, (0, 1)))(x, weights)
    examples = [compiled_gradient(name)(x[i], weights) for i in range(3)]
    assert_same(list(dx), [dx for dx, _ in examples])
    assert_same(dw, jax.tree.map(lambda *parts: sum(parts), *[dw for _, dw in examples]))


# ---- compiled once


def sgd(name, weights, x):
    value, gradients = jax.value_and_grad(lambda weights: loss(name, x, weights))(weights)
    return value, jax.tree.map(lambda w, dw: w - dw / 64, weights, gradients)


@cache
def compiled_sgd(name):
    return jax.jit(partial(sgd, name))


@one_of_each_kind
def test_a_step_that_donates_its_weights_is_compiled_ahead_of_time(rng, name):
    x, weights = inputs(rng, name)
    expected = compiled_sgd(name)(weights, x)
    donated = jax.tree.map(jnp.copy, weights)
    step = jax.jit(partial(sgd, name), donate_argnums=0).lower(donated, x).compile()
    assert_same(step(donated, x), expected)
    assert all(w.is_deleted() for w in donated)
    assert not x.is_deleted()


@one_of_each_kind
def test_export_of_a_step(rng, name):
    x, weights = inputs(rng, name)
    step = compiled_sgd(name)
    data = jax.export.export(step)(weights, x).serialize()
    assert_same(jax.export.deserialize(bytearray(data)).call(weights, x), step(weights, x))


def test_prepared_weights_are_arguments_of_an_exported_program(rng):
    x, (w,) = inputs(rng, "dot")
    prepared, apply = prepare(w), jax.jit(dot)
    data = jax.export.export(apply)(x, prepared).serialize()
    assert_same(jax.export.deserialize(bytearray(data)).call(x, prepared), apply(x, w))


@pytest.mark.parametrize("name", ["ragged_dot", "ragged_feed_forward"])
def test_other_group_sizes_compile_nothing(rng, name):
    x, weights = inputs(rng, name)
    op = {"ragged_dot": ragged_dot, "ragged_feed_forward": ragged_feed_forward}[name]
    traces = []

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(x, weights, sizes):
        traces.append(sizes)
        return op(x, *weights, sizes).astype(F32).sum()

    for sizes in ([3, 0, 4], [0, 6, 2]):
        dx, dws = gradients(x, weights, np.array(sizes, np.int32))
        assert jnp.any(dx[sum(sizes) - 2:] != 0, axis=1).tolist() == [True] * 2 + [False] * (T - sum(sizes))
        for dw in dws:
            assert jnp.any(dw != 0, axis=(1, 2)).tolist() == [size > 0 for size in sizes]
    assert len(traces) == 1


SCRIPT = """
import jax, jax.numpy as jnp
from jax_fp8gemm import feed_forward, prepare, ragged_dot

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

def loss(x, gate_up, down, experts):
    y = feed_forward(x, prepare(gate_up), down)
    return ragged_dot(y, experts, jnp.array([3, 2])).astype(jnp.float32).sum()

shapes = [(5, 96), (96, 256), (128, 72), (2, 72, 40)]
args = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
events.clear()
dx = jax.block_until_ready(jax.jit(jax.grad(loss))(*args))
print(*(events.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses")),
      jnp.abs(dx.astype(jnp.float32)).sum())
"""


def test_a_second_process_finds_the_compiled_step(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                   "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                   "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}

    def run():
        process = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], env=environment, check=True,
                                 capture_output=True, text=True)
        hits, misses, checksum = process.stdout.split()
        return int(hits), int(misses), checksum

    first, second = run(), run()
    assert first[:2] == (0, 1)
    assert second == (1, 0, first[2])


# ---- prepared weights in microbatches


def loss_of_microbatches(name, quantised, wrap, weights, x):
    weights = [quantised(w) for w in weights]
    return lax.scan(lambda total, x: (total + loss(name, x, weights, wrap), None), jnp.zeros(()), x)[0]


@each_layer
@pytest.mark.parametrize("wrap", [lambda layer: layer, partial(jax.checkpoint, policy=save_gemms)],
                         ids=["no remat", "save_gemms"])
def test_a_scan_over_microbatches_carries_nothing_but_sums_of_gradients(rng, name, wrap):
    weights, x = inputs(rng, name, dtype=F32)[1], sevens(rng, 5, T, D)
    jaxpr = jax.make_jaxpr(jax.grad(partial(loss_of_microbatches, name, prepare, wrap)))(weights, x)
    scans = list(equations(jaxpr, "scan"))
    assert len(scans) >= 2
    # What a scan carries are its results without the axis of microbatches in front.
    results = [var.aval for scan in scans for var in scan.outvars]
    carried = [aval for aval in results if aval.shape and aval.shape[0] != len(x)]
    assert sorted(aval.shape for aval in carried) == sorted(w.shape for w in weights)
    assert {aval.dtype for aval in carried} == {jnp.dtype(F32)}
    # Weights are quantised in front of the scans.
    assert len(list(equations(jaxpr, "fp8_quantize_weights"))) == len(weights)
    assert not any(list(equations(scan.params["jaxpr"], "fp8_quantize_weights")) for scan in scans)


@pytest.mark.parametrize("name", ["dot", "ragged_dot"])
def test_gradients_of_microbatches_arrive_at_the_master_weights(rng, name):
    weights, x = inputs(rng, name, dtype=F32)[1], sevens(rng, 5, T, D)
    keep = lambda layer: layer
    got = jax.jit(jax.grad(partial(loss_of_microbatches, name, prepare, keep)))(weights, x)
    parts = [compiled_gradient(name)(x[i], weights)[1] for i in range(len(x))]
    assert_same(got, jax.tree.map(lambda *parts: sum(parts), *parts))
