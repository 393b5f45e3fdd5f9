"""Generates text: prefill reads the prompts, each decoding step then adds a token to every sequence.

    python -m examples.deepseek.generate runs/tiny/fp8-0 --prompt "def main(" --tokens 64

Both have static shapes, and leave everything on the device: a step is one program without a host's decision
in it. A cache keeps what keys and values are made of, the latent of each token, in one copy for all heads:
decoding multiplies queries and results with `kv_up` instead of all cached tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples.deepseek import inference, layers, log
from examples.deepseek.arguments import add_mesh, layout_of, positive
from examples.deepseek.checkpoint import Checkpoints
from examples.deepseek.config import Config
from examples.deepseek.inference import InferenceOps, apply_experts_masked, inference_ops
from examples.deepseek.mesh import ONE_DEVICE, TENSOR, TOKENS, Layout, check
from examples.deepseek.model import through_layers
from examples.deepseek.precision import PRECISIONS, REFERENCE
from examples.deepseek.step import init


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers of B sequences.

    Attributes:
      latent: [L, B, S, C] of layers, sequences and positions.
      rope: [L, B, S, R], the rotated keys that all heads share.
      length: [B] int32, the positions that are filled.
    """

    latent: jax.Array
    rope: jax.Array
    length: jax.Array


def prefill(weights: dict[str, Any], bias: jax.Array, tokens: jax.Array, lengths: jax.Array, size: int,
            config: Config, ops: InferenceOps, layout: Layout = ONE_DEVICE) -> tuple[jax.Array, Cache]:
    """Reads prompts: tokens [B, S] of which each sequence has the first `lengths` [B].

    Args:
      weights: of `inference.load`.
      bias: [moe_layers, E], of the choice of experts.
      size: positions of the cache, at least S.

    Returns:
      The logits [B, V] f32 of the token after each prompt, and the cache.
    """
    def attend(layer, x, state):
        out, *cached = layers.attention(layer, layers.rms_norm(x, layer["norm"]), config, ops)
        return x + layout.tokens(out), state, cached

    x = _embed(weights, tokens, layout)
    x, _, cached, _ = through_layers(weights, bias, x, None, attend, _without_limit(config), ops, layout)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    room = ((0, 0), (0, 0), (0, size - tokens.shape[1]), (0, 0))
    latent, rope = (jnp.pad(layout.constrain(leaf, None, TOKENS), room) for leaf in cached)
    return _logits(weights, last), Cache(latent, rope, lengths)


def decode(weights: dict[str, Any], bias: jax.Array, token: jax.Array, cache: Cache, config: Config,
           ops: InferenceOps, layout: Layout = ONE_DEVICE) -> tuple[jax.Array, Cache]:
    """One more token [B] int32 of each sequence -> the logits [B, V] f32 of the next one, and the cache.

    The cache is changed in place where the caller donates it. Of a sequence that fills it already, new tokens
    are not remembered, and do not see themselves either.
    """
    update = partial(_attend_to_cache, config=config)
    if layout.mesh is not None:
        update = jax.shard_map(
            update, mesh=layout.mesh, out_specs=(P(TOKENS, TENSOR), _CACHED),
            in_specs=(*_QUERIES, *_NEW, _CACHED, P(TOKENS), P(), P(None, TENSOR)))

    def attend(layer, x, state):
        idx, cached = state
        normed = layers.rms_norm(x, layer["norm"])
        parts = layers.compress(layer, normed, config, ops, cache.length[:, None])
        queries_and_new = (part[:, 0] for part in parts)
        out, cached = update(*queries_and_new, cached, cache.length, idx, layer["kv_up_for_cache"])
        out = ops.dot(out.reshape(len(x), 1, -1), layer["out"])
        return x + layout.tokens(out), (idx + 1, cached), None

    x, state = _embed(weights, token[:, None], layout), (jnp.int32(0), (cache.latent, cache.rope))
    x, (_, cached), _, _ = through_layers(
        weights, bias, x, state, attend, _without_limit(config), ops, layout, apply=apply_experts_masked)
    return _logits(weights, x), Cache(*cached, cache.length + 1)


# Of one layer's queries, of what is new of its tokens, and of both caches.
_QUERIES, _NEW, _CACHED = (P(TOKENS, TENSOR),) * 2, (P(TOKENS),) * 2, (P(None, TOKENS),) * 2


def _attend_to_cache(q_nope, q_rope, new_latent, new_rope, cached, length, layer_idx, kv_up, config):
    """Puts new tokens [B, C] and [B, R] into the cache, and attends to it: -> [B, H, V], and the cache.

    Keys are latent @ k_up, so that a product with them is one of q @ k_up.T with the latent; and results are
    latents, mixed, times v_up.
    """
    place = layer_idx, jnp.arange(len(length)), length
    latent, rope = (old.at[place].set(new, mode="drop", unique_indices=True)
                    for old, new in zip(cached, (new_latent, new_rope), strict=True))
    k_up, v_up = jnp.split(kv_up.reshape(len(kv_up), q_nope.shape[1], -1), [config.nope_dim], axis=-1)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    q_latent = jnp.einsum("bhn,chn->bhc", q_nope, k_up)
    scores = product("bhc,bsc->bhs", q_latent, latent[layer_idx])
    scores += product("bhr,bsr->bhs", q_rope, rope[layer_idx])
    is_there = jnp.arange(latent.shape[2]) <= length[:, None, None]
    weights = jax.nn.softmax(jnp.where(is_there, scores / math.sqrt(config.qk_dim), -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhs,bsc->bhc", weights.astype(latent.dtype), latent[layer_idx])
    return jnp.einsum("bhc,chv->bhv", mixed, v_up), (latent, rope)


def _embed(weights, tokens, layout):
    return layout.tokens(weights["embedding"].at[tokens].get(mode="clip"))


def _logits(weights, x):
    """Of x [B, 1, D]."""
    x = layers.rms_norm(x, weights["norm"])
    return jnp.dot(x, weights["head"], preferred_element_type=jnp.float32)[:, 0]


def _without_limit(config):
    """A request is answered as if it were alone: no token is left out for want of room."""
    return dataclasses.replace(config, capacity_factor=math.inf)


# ---- the program


def generate(weights, bias, prompts: list[bytes], num_tokens: int, config: Config, ops: InferenceOps,
             layout: Layout = ONE_DEVICE, *, temperature: float = 0.0, seed: int = 0) -> list[bytes]:
    """`num_tokens` bytes after each prompt, of one byte at least; with temperature 0 the most likely ones."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = list(prompt)
    static = {"config": config, "ops": ops, "layout": layout}
    read = jax.jit(partial(prefill, size=int(lengths.max()) + num_tokens, **static))
    step = jax.jit(partial(decode, **static), donate_argnames="cache")

    @jax.jit
    def pick(logits, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        drawn = jax.random.categorical(key, logits / max(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)

    logits, cache = read(weights, bias, layout.place(tokens), layout.place(lengths))
    picked = []
    for number in tqdm(range(num_tokens), unit="token"):
        picked.append(pick(logits, number))
        if number + 1 < num_tokens:
            logits, cache = step(weights, bias, picked[-1], cache=cache)
    return [bytes(row) for row in np.stack(jax.device_get(picked), axis=1).astype(np.uint8)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.deepseek.generate",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a training run with a checkpoint")
    parser.add_argument("--prompt", nargs="+", default=["import ", "def main("])
    parser.add_argument("--tokens", type=positive, default=64, help="to add to each prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn where the temperature is not 0")
    parser.add_argument("--precision", choices=(*PRECISIONS, REFERENCE), help="the run's by default")
    add_mesh(parser)
    args = parser.parse_args(arguments)
    try:
        identity = log.read(args.run).identity
        config = Config(**identity["config"])
        if config.vocabulary > 256:
            raise ValueError(f"{args.run}: expected a model of bytes, got {config.vocabulary} tokens")
        if not all(args.prompt):
            raise ValueError("--prompt: expected at least one character in each, got an empty one")
        layout = layout_of(args.mesh)
        if layout.mesh is not None:
            check(dataclasses.replace(config, batch=len(args.prompt)), layout.mesh)
        with Checkpoints(args.run / "checkpoints") as checkpoints:
            restored = checkpoints.restore(init(config, 0, layout))
        if restored is None:
            raise ValueError(f"{args.run}: expected a checkpoint, got a run without one")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    state, _ = restored
    ops = inference_ops(args.precision or identity["precision"])
    weights = jax.jit(partial(inference.load, ops=ops, layout=layout))(state.params)
    prompts = [prompt.encode() for prompt in args.prompt]
    for prompt, text in zip(prompts, generate(weights, state.bias, prompts, args.tokens, config, ops, layout,
                                              temperature=args.temperature, seed=args.seed), strict=True):
        print(f"{prompt.decode()}\033[1m{text.decode(errors='replace')}\033[0m")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
