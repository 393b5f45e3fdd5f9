"""The DeepSeek-V3-style model of examples/deepseek: its layers, and its training in both precisions."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.deepseek import compare, config, data, grouped, layers, log, model, precision, rows, step, train

TINY = config.load("tiny")
PRECISIONS = precision.PRECISIONS
TEXT = pathlib.Path(json.__file__).parents[1] / "email"  # one small package of the standard library


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of this module's time would be XLA's; what it computes is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def corpus():
    return data.read_corpus(TEXT)


def normal(rng, *shape):
    return jnp.array(rng.standard_normal(shape), jnp.bfloat16)


def first_batch(corpus):
    return data.Sampler(corpus.train, TINY.sequence, seed=0).batch(0, TINY.batch)


# ---- configuration


def test_v3_has_the_parameters_of_deepseek_v3():
    v3 = config.load("v3")
    sizes = {path: math.prod(shape) for path, shape in
             jax.tree.flatten_with_path(model.shapes(v3), is_leaf=lambda node: isinstance(node, tuple))[0]}
    # Of the released weights without the module for multi-token prediction; the biases of the router are no
    # parameters here.
    assert sum(sizes.values()) + v3.moe_layers * v3.experts == 671_026_419_200
    active = sum(size * v3.experts_per_token / v3.experts if path[-1].key.startswith("experts_") else size
                 for path, size in sizes.items())
    assert 36.5e9 < active < 38e9, "37B active, by the report, which counts the embedding or does not"


def test_a_configuration_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(TINY) | {"hidden": 96}))
    assert config.load(str(path), {"batch": 3}) == dataclasses.replace(TINY, hidden=96, batch=3)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"heads": 2.5}, r"Config: heads: expected int, got 2\.5"),
    ({"remat": 1}, r"Config: remat: expected bool, got 1"),
    ({"layers": 3}, r"unknown or no \['layers'\]"),
    ({"hidden": 0}, r"Config: hidden: expected at least 1, got 0"),
    ({"experts_per_token": 5}, r"experts_per_token: expected at most experts = 4, got 5"),
    ({"rope_dim": 7}, r"rope_dim: expected an even number, got 7"),
])
def test_a_wrong_field_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        config.load("tiny", overrides)


def test_an_unknown_configuration_or_precision_is_named():
    with pytest.raises(ValueError, match=r"one of tiny, small, v3, got 'huge'"):
        config.load("huge")
    with pytest.raises(ValueError, match=r"one of bf16, fp8, f32, got 'fp4'"):
        precision.ops("fp4")


# ---- data


def test_sequences_depend_on_position_and_seed_alone():
    text = np.arange(1000, dtype=np.uint16)
    sampler = data.Sampler(text, 16, seed=3)
    # Neighbours in the text, and as many times per epoch as there are sequences: each once.
    epoch = sampler.batch(0, sampler.per_epoch)
    assert (np.diff(epoch) == 1).all()
    assert sorted(epoch[:, 0]) == list(range(epoch[:, 0].min(), epoch[:, 0].min() + 16 * len(epoch), 16))
    # A batch is the same cut in two, across the end of an epoch, in another sampler.
    position = sampler.per_epoch - 3
    again = data.Sampler(text, 16, seed=3)
    np.testing.assert_array_equal(
        sampler.batch(position, 8), np.concatenate([again.batch(position, 5), again.batch(position + 5, 3)]))
    assert (sampler.batch(0, 8) != data.Sampler(text, 16, seed=4).batch(0, 8)).any()
    assert (epoch != sampler.batch(sampler.per_epoch, sampler.per_epoch)).any(), "the next epoch is another"


def test_the_corpus_is_the_same_wherever_its_files_are(tmp_path, corpus):
    for number, path in enumerate(sorted(TEXT.rglob("*.py"), reverse=True)):
        shutil.copy(path, tmp_path / f"{number}.py")
        shutil.copy(path, tmp_path / f"copy_{number}.py")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not the library's")
    copied = data.read_corpus(tmp_path)
    assert copied.digest() == corpus.digest()
    files = {path.read_bytes() for path in TEXT.rglob("*.py")}
    parts = [set(bytes(part).split(b"\0")) for part in (corpus.train, corpus.validation)]
    assert parts[0] | parts[1] == files
    assert not parts[0] & parts[1]


def test_a_folder_with_too_little_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"enough to keep one in 20 for validation, got 0 in"):
        data.read_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"text: expected more than 32 bytes for sequences of 16, got 17"):
        data.Sampler(np.zeros(17, np.uint8), 16, seed=0)


# ---- layers


def test_rotation_keeps_lengths_and_depends_on_distance(rng):
    q, k = (jnp.array(rng.standard_normal((1, 1, 3, 8)), jnp.float32) for _ in range(2))
    q, k = (layers.rotate(jnp.broadcast_to(x, (1, 11, 3, 8)), 100.0) for x in (q, k))
    lengths = np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[:, :1], lengths.shape), rtol=1e-5)
    products = jnp.einsum("bqhr,bkhr->bhqk", q, k)
    for distance in (1, 4):
        diagonal = jnp.diagonal(products, distance, axis1=2, axis2=3)
        # f32: 8 products of numbers around 1, angles of up to 10 radians.
        np.testing.assert_allclose(diagonal, diagonal[..., :1] * jnp.ones(11 - distance), atol=1e-4)
        assert jnp.abs(diagonal[..., 0] - products[..., 0, 0]).min() > 1e-2


def test_latent_attention_is_that_of_each_head(rng):
    params = jax.tree.map(lambda leaf: leaf[0], step.init(TINY, seed=0).params["dense"]["attention"])
    params |= {name: jnp.array(rng.uniform(0.5, 2, params[name].shape), jnp.float32)
               for name in ("q_norm", "kv_norm")}
    x = normal(rng, 2, 13, TINY.hidden)
    out = jax.jit(lambda x: layers.attention(params, x, TINY, precision.ops("bf16"))[0])(x)
    assert out.shape == x.shape
    assert out.dtype == jnp.bfloat16
    expected = attention_in_f64(jax.tree.map(np.float64, params), np.float64(x))
    # bf16 rounds x's products, queries, keys, values, probabilities and the result: seven times up to 2^-9,
    # in the root mean square less; relative to the result's norm.
    error = np.linalg.norm(np.float64(out) - expected) / np.linalg.norm(expected)
    assert 2.0**-12 < error < 7 * 2.0**-9


def attention_in_f64(params, x):
    """One head after the other, with a mask that is written out."""
    c, norm = TINY, lambda x, weight: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    q, kv, shared = np.split(x @ params["compress"], [c.q_rank, c.q_rank + c.kv_rank], axis=-1)
    q = np.split(norm(q, params["q_norm"]) @ params["q_up"], c.heads, axis=-1)
    kv = np.split(norm(kv, params["kv_norm"]) @ params["kv_up"], c.heads, axis=-1)
    position, half = np.arange(x.shape[1])[:, None], c.rope_dim // 2
    turn = np.exp(1j * position * c.rope_theta ** (-np.arange(half) / half))

    def rotated(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    heads = []
    for of_head, latent in zip(q, kv, strict=True):
        queries = np.concatenate([of_head[..., : c.nope_dim], rotated(of_head[..., c.nope_dim :])], -1)
        keys = np.concatenate([latent[..., : c.nope_dim], rotated(shared)], -1)
        scores = np.exp(queries @ keys.swapaxes(1, 2) / np.sqrt(c.qk_dim))
        scores *= np.tril(np.ones(scores.shape[1:]))
        heads.append(scores / scores.sum(-1, keepdims=True) @ latent[..., c.nope_dim :])
    return np.concatenate(heads, -1) @ params["out"]


def test_routing_weights_leave_the_bias_out(rng):
    x, router = normal(rng, 37, 16), jnp.array(rng.standard_normal((16, 4)), jnp.float32)
    experts, weights = layers.route(x, router, jnp.zeros(4), TINY)
    scores = 1 / (1 + np.exp(-(np.float64(x) @ np.float64(router))))
    best = np.argsort(-scores, axis=1)[:, :2]
    np.testing.assert_array_equal(experts, best)
    expected = np.take_along_axis(scores, best, axis=1)
    np.testing.assert_allclose(weights, 2.5 * expected / expected.sum(1, keepdims=True), rtol=1e-5)
    # A bias that decides alone: its experts, and weights of the scores.
    experts, weights = layers.route(x, router, jnp.array([0.0, 2.0, 0.0, 4.0]), TINY)
    np.testing.assert_array_equal(experts, np.tile([3, 1], (37, 1)))
    expected = scores[:, [3, 1]]
    np.testing.assert_allclose(weights, 2.5 * expected / expected.sum(1, keepdims=True), rtol=1e-5)


def test_the_bias_evens_out_the_load(rng):
    router = jnp.array(rng.standard_normal((16, 8)) / 4, jnp.float32)
    # Most tokens prefer one expert, and few another.
    x = normal(rng, 512, 16) + 2 * jnp.bfloat16(router[:, 0] - router[:, 5])
    route = jax.jit(lambda bias: rows.sort_by_expert(
        layers.route(x, router, bias, dataclasses.replace(TINY, experts=8))[0], 8).sizes)
    bias = jnp.zeros((1, 8))
    loads = []
    for _ in range(200):
        loads.append(np.array(route(bias[0])))
        bias = layers.update_bias(bias, jnp.array(loads[-1:]), 0.005)
    worst = [load.max() / load.mean() for load in loads]
    assert worst[0] > 1.8
    assert max(worst[-20:]) < 1.25
    assert all(load.sum() == 2 * 512 for load in loads)
    # One step: by the sign alone, and an expert that has the mean stays.
    np.testing.assert_allclose(
        layers.update_bias(jnp.zeros((1, 4)), jnp.array([[9, 5, 4, 2]]), 0.5), [[-0.5, 0, 0.5, 0.5]])


@pytest.mark.parametrize("sizes", [
    (128, 60, 100, 5),  # the smallest capacity, as on a mesh where most rows are of none
    (100, 150, 120, 130),
    (0, 300, 0, 190),  # empty groups, rows past the sum
    (1, 2, 495, 2),  # the largest one
])
def test_the_grouped_product_is_that_of_ragged_dot(rng, sizes):
    assert grouped.capacities(500, 4) == [128, 256, 500]
    assert grouped.capacities(1024, 2) == [384, 640, 1024]
    lhs, rhs, d_out = normal(rng, 500, 24), normal(rng, 4, 24, 40), normal(rng, 500, 40)
    sizes = jnp.array(sizes)
    results = []
    for function in (grouped.grouped_dot, jax.lax.ragged_dot):
        out, pull = jax.vjp(lambda lhs, rhs, function=function: function(lhs, rhs, sizes), lhs, rhs)
        results.append([out, *pull(d_out)])
    for ours, reference in zip(*map(jax.tree.leaves, results), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Two sums in f32 of up to 495 products, each rounded to bf16: neighbours at most.
        np.testing.assert_allclose(np.float32(ours), np.float32(reference), rtol=2.0**-7, atol=1e-4)
        np.testing.assert_array_equal(np.float32(ours) == 0, np.float32(reference) == 0)


# ---- model


def test_a_token_sees_no_later_one(corpus):
    params = step.init(TINY, seed=0).params
    tokens = first_batch(corpus)[:1, :20]
    run = jax.jit(lambda tokens: model.logits(
        params, jnp.zeros((TINY.moe_layers, TINY.experts)), tokens, TINY, precision.ops("bf16"))[0])
    before, after = run(tokens), run(np.concatenate([tokens[:, :12], tokens[:, 12:] ^ 1], axis=1))
    assert before.shape == (1, 20, 256)
    assert before.dtype == jnp.float32
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(axis=-1).all()


def test_no_sum_of_a_step_depends_on_an_order():
    """A scatter with indices that repeat adds up in any order on a GPU."""
    state = step.init(TINY, seed=0)
    sequences = jax.ShapeDtypeStruct((TINY.batch, TINY.sequence + 1), jnp.int32)
    program = step.train_step(TINY, "bf16").lower(state, sequences).as_text()
    scatters = re.findall(r'"stablehlo\.scatter".*?unique_indices = (\w+)', program, re.S)
    assert scatters == ["true"] * len(scatters)
    assert len(scatters) > 0, "the inverse of the order by experts"


@functools.cache
def of_sequences(sequences, **changes):
    """The loss, its gradient, and the program's text."""
    tiny, state = dataclasses.replace(TINY, **changes), step.init(TINY, seed=0)
    loss = partial(model.loss, config=tiny, ops=precision.ops("f32"))
    args = state.params, state.bias, np.frombuffer(sequences, np.int32).reshape(TINY.batch, -1)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*args)
    (value, _), gradient = run.compile()(*args)
    return value, gradient, run.as_text()


@pytest.mark.parametrize("name", ["unroll", "remat_experts"])
def test_how_a_model_is_compiled_changes_nothing_but_the_order_of_sums(corpus, name):
    sequences = first_batch(corpus).astype(np.int32).tobytes()
    value, gradient, program = of_sequences(sequences, **{name: True})
    expected_value, expected_gradient, other = of_sequences(sequences)
    assert program != other
    # Of at most 256 terms each, through 3 layers and back.
    np.testing.assert_allclose(value, expected_value, rtol=256 * 2.0**-24)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(got, expected, atol=6 * 256 * 2.0**-24 * float(jnp.abs(expected).max()))


# ---- training


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_loss_of_a_batch_falls_below_its_entropy(corpus, name):
    """Below what the frequencies of bytes alone can reach: the model uses what comes before."""
    sequences = first_batch(corpus)
    counts = np.bincount(sequences[:, 1:].ravel())
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * np.log(frequencies)).sum()
    state = step.init(TINY, seed=0)
    losses = []
    for _ in range(12):
        state, metrics = step.train_step(TINY, name)(state, sequences)
        losses.append(float(metrics["loss"]))
        assert math.isfinite(float(metrics["gradient_norm"]))
        np.testing.assert_array_equal(metrics["load"].sum(-1), [2 * TINY.tokens_per_step] * TINY.moe_layers)
    assert losses[0] > entropy + 1, "it begins near log(256)"
    assert losses[-1] < entropy
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    squares = jax.tree.leaves(optax.tree.get(state.optimizer, "nu"))
    assert len(squares) == len(jax.tree.leaves(state.params))
    assert all(bool((leaf > 0).any()) for leaf in squares), "a gradient reaches every parameter"


def test_first_losses_agree_within_fp8s_error(corpus):
    """The same seed is the same model on the same data: what differs is rounding.

    A product of two operands in e4m3, each rounded by up to 2^-4, in the root mean square 2^-4 / sqrt(3), has
    an error of up to sqrt(2) 2^-4 / sqrt(3) = 5 % of its norm. The residual stream ends as the sum of 6 such
    branches with as much variance in all as the embedding, so that logits of variance 1 err by about 0.1, and
    the loss of 256 tokens, whose errors are as often up as down, by much less.
    """
    sequences = first_batch(corpus)
    metrics = {name: step.train_step(TINY, name)(step.init(TINY, seed=0), sequences)[1]
               for name in PRECISIONS}
    bf16, fp8 = (float(metrics[name]["loss"]) for name in PRECISIONS)
    assert bf16 != fp8, "the switch has no effect"
    assert abs(bf16 - fp8) < 0.1
    norms = [float(metrics[name]["gradient_norm"]) for name in PRECISIONS]
    assert abs(norms[1] / norms[0] - 1) < 0.05


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, corpus, name):
    def run(folder, steps, **options):
        limits = train.Limits(steps, checkpoint_every=options.pop("checkpoint_every", 3))
        return train.train(TINY, name, 1, corpus, tmp_path / folder, limits, **options)

    whole = run("whole", 6)
    run("parts", 5, checkpoint_every=2)  # interrupted at 5, one step after its last checkpoint
    shutil.rmtree(tmp_path / "parts/checkpoints/5")
    about = json.loads((tmp_path / "parts/run.json").read_text())
    del about["identity"]["config"]["unroll"]  # recorded before there was that field
    (tmp_path / "parts/run.json").write_text(json.dumps(about))
    parts = run("parts", 6, resume=True)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert compare.first_difference(tmp_path / "whole", tmp_path / "parts") is None
    assert [line["step"] for line in log.read(tmp_path / "parts").steps] == [1, 2, 3, 4, 5, 6]
    assert run("parts", 6, resume=True) is None, "nothing is left to do"
