"""Prefill and decoding of examples/deepseek: the logits of the training model, token by token."""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.deepseek import config, generate, inference, mesh, model, precision, rows, step, train
from examples.deepseek.inference import inference_ops
from meshes import collectives

TINY = dataclasses.replace(config.load("tiny"), batch=4, moe_layers=1)
U = 2.0**-24
TOKENS = np.random.default_rng(2).integers(0, 256, (4, 9)).astype(np.int32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of this module's time would be XLA's; what it computes is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def state(device):
    return state_of(device)


@functools.cache
def state_of(device):
    """Parameters as training leaves them, with norms and a bias that are not those of the first step."""
    with jax.default_device(device):
        return draw_state()


def draw_state():
    state, rng = step.init(TINY, 0), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf * jnp.array(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32),
                          state.params)
    bias = jnp.array(rng.uniform(-0.1, 0.1, state.bias.shape), jnp.float32)
    return dataclasses.replace(state, params=params, bias=bias)


@pytest.fixture
def tokens():
    return TOKENS


def layout_of(*sizes):
    return mesh.Layout(mesh.make_mesh(*sizes, devices=jax.devices("cpu")))


def load(state, ops, layout):
    params = state.params if layout.mesh is None else jax.device_put(
        state.params, step.shardings(TINY, layout).params)
    return jax.jit(partial(inference.load, ops=ops, layout=layout))(params)


def run(state, tokens, lengths, ops, layout):
    """Logits after prompts, the first `lengths` tokens, and after each token that follows."""
    weights = load(state, ops, layout)
    static = {"config": TINY, "ops": ops, "layout": layout}
    prefill = jax.jit(partial(generate.prefill, size=9, **static))
    decode = jax.jit(partial(generate.decode, **static), donate_argnames="cache")
    logits, cache = prefill(weights, state.bias, layout.place(tokens[:, :5]), layout.place(lengths))
    found = [logits]
    for number in range(9 - lengths.max()):
        token = tokens[np.arange(4), lengths + number]
        logits, cache = decode(weights, state.bias, layout.place(token), cache=cache)
        found.append(logits)
    np.testing.assert_array_equal(cache.length, lengths + number + 1)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_logits_are_those_of_the_whole_sequence(state, tokens, sizes):
    """In f32, where keys are not rounded before they are cached: prompts of 3, 5, 1 and 4 tokens."""
    lengths = np.int32([3, 5, 1, 4])
    layout = mesh.ONE_DEVICE if sizes is None else layout_of(*sizes)
    found = run(state, tokens, lengths, inference_ops("f32"), layout)
    whole, _ = model.logits(state.params, state.bias, tokens, TINY, precision.ops("f32"))
    expected = np.stack([whole[np.arange(4), lengths - 1 + idx] for idx in range(found.shape[1])], axis=1)
    # 2 layers of about 10 products with sums of 128 terms each, which come in another order.
    assert np.linalg.norm(found - expected) < np.sqrt(20 * 128) / 2 * U * np.linalg.norm(expected)
    assert np.abs(expected).max() > 0.1


def test_fp8_is_as_near_as_it_is_in_training(state, tokens):
    lengths = np.int32([5, 5, 5, 5])
    ops, devices = inference_ops("fp8", jnp.float32), layout_of(1, 4, 1)
    found, on_mesh = (run(state, tokens, lengths, ops, layout) for layout in (mesh.ONE_DEVICE, devices))
    fp8 = dataclasses.replace(precision.ops("fp8"), dtype=jnp.dtype(jnp.float32))
    exact, trained = (np.asarray(model.logits(state.params, state.bias, tokens, TINY, ops)[0])[:, 4:]
                      for ops in (precision.ops("f32"), fp8))
    error = np.linalg.norm(trained - exact)
    # The prompt's last logits come from the same numbers; later ones from a cache whose products are exact.
    assert np.linalg.norm(found[:, 0] - trained[:, 0]) < error / 4
    assert 0.5 * error < np.linalg.norm(found - exact) < 1.5 * error
    assert np.linalg.norm(on_mesh - found) < error / 4


def test_a_step_gathers_nothing_and_sends_tokens_there_and_back(state):
    """Of the cache and of weights every device has what it needs."""
    layout, ops = layout_of(2, 2, 1), inference_ops("fp8")
    weights = load(state, ops, layout)
    static = {"config": TINY, "ops": ops, "layout": layout}
    tokens = layout.place(np.zeros((4, 5), np.int32))
    _, cache = jax.jit(partial(generate.prefill, size=9, **static))(
        weights, state.bias, tokens, layout.place(np.full(4, 5, np.int32)))
    decode = jax.jit(partial(generate.decode, **static), donate_argnames="cache")
    compiled = decode.lower(weights, state.bias, tokens[:, 0], cache=cache).compile()
    # And what is added up over the axis `tensor`, of one device here.
    assert collectives(compiled) == {"all-to-all": 2, "all-reduce": 1}
    assert re.search(r" all-reduce\(.*shard_map/psum_invariant", compiled.as_text())
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased == sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / 4


def test_rows_in_blocks_are_the_sorted_ones(rng):
    experts = jnp.array(rng.integers(-1, 4, (11, 2)), jnp.int32)
    by_expert = rows.sort_by_expert(experts, 4)
    blocks = rows.in_blocks(by_expert, 9)
    np.testing.assert_array_equal(blocks.sizes, by_expert.sizes)
    starts = np.cumsum(by_expert.sizes) - by_expert.sizes
    for expert, size in enumerate(np.asarray(by_expert.sizes)):
        for kind in ("of_tokens", "of_slots"):
            got, expected = (np.asarray(getattr(each, kind).token) for each in (blocks, by_expert))
            np.testing.assert_array_equal(got[9 * expert : 9 * expert + size],
                                          expected[starts[expert] : starts[expert] + size])
            assert (got[9 * expert + size : 9 * expert + 9] == len(getattr(blocks, kind).row)).all()
    for token, slot in np.ndindex(11, 2):
        row = int(blocks.of_tokens.row[token, slot])
        expert = int(experts[token, slot])
        assert row // 9 == expert if expert >= 0 else row == 36
        if expert >= 0:
            assert blocks.of_tokens.token[row] == token


def test_the_command_line_continues_prompts(tmp_path, capsys, monkeypatch):
    text = b"abcdefgh" * 4000
    (tmp_path / "text").mkdir()
    for number in range(40):  # files of one content count once
        (tmp_path / "text" / f"{number}.py").write_bytes(text + b"#" * number)
    run = ["--config", "tiny", "--set", "moe_layers=1", "batch=2", "warmup=2", "validation_every=1000"]
    monkeypatch.setenv("XLA_FLAGS", "")
    train.main([*run, "--text", str(tmp_path / "text"), "--out", str(tmp_path), "--steps", "60",
                "--precision", "fp8"])
    capsys.readouterr()
    assert generate.main([str(tmp_path / "fp8-0"), "--prompt", "abcde", "fghabcd", "--tokens", "12"]) == 0
    printed = capsys.readouterr().out
    assert "abcde\033[1mfghabcdefgha\033[0m" in printed
    assert "fghabcd\033[1mefghabcdefgh\033[0m" in printed
    for arguments, message in (
            ([str(tmp_path / "bf16-0")], "No such file"),
            ([str(tmp_path / "fp8-0"), "--prompt", "a", ""], "--prompt: expected at least one character"),
            ([str(tmp_path / "fp8-0"), "--tokens", "0"], "--tokens: expected a whole number of at least 1"),
            ([str(tmp_path / "fp8-0"), "--mesh", "data=2", "--prompt", "a"], "expected a multiple of 2")):
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert message in capsys.readouterr().err
