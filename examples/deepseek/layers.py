"""The layers of DeepSeek-V3 as functions of their parameters: activations are bf16, parameters f32.

Letters of axes: B sequences, S tokens of a sequence, T = B * S tokens, D hidden, H heads, R rotated features,
E experts, k experts of a token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from examples.deepseek import dispatch
from examples.deepseek.config import Config
from examples.deepseek.mesh import DATA, EXPERT, TENSOR, TOKENS, Layout
from examples.deepseek.precision import Ops
from examples.deepseek.rows import combine, sort_by_expert, spread


class Routing(NamedTuple):
    """How the routing of a batch went.

    Attributes:
      load: [E] int32, the tokens of each expert.
      dropped: int32, of these what there was no room for.
    """

    load: jax.Array
    dropped: jax.Array


def rms_norm(x, weight):
    """x [*, D] over its root mean square, times weight [D], in f32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)
    return (x32 * scale * weight).astype(x.dtype)


def rotate(x, theta, positions=None):
    """Rotary positions: x [B, S, H, R] with features i and i + R/2 turned by position * theta^(-2i/R).

    positions are [B, S], by default 0 to S - 1.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(x.shape[1]) if positions is None else positions
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [*, S, 1, R/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attention(params, x, config: Config, ops: Ops):
    """Multi-head latent attention: x [B, S, D] -> [B, S, D], and what a cache keeps: see `compress`.

    Queries come from one compressed vector of a token, keys and values from another, the latent. Positions
    are in a part of their own, `rope_dim` features that are rotated, and that all heads share in the keys.
    """
    q_nope, q_rope, latent, k_rope = compress(params, x, config, ops)
    kv = _by_head(ops.dot(latent, params["kv_up"]), config)
    k_nope, v = jnp.split(kv, [config.nope_dim], axis=-1)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.rope_dim))
    q, k = jnp.concatenate([q_nope, q_rope], axis=-1), jnp.concatenate([k_nope, shared], axis=-1)
    out = causal_attention(q, k, v, config.attention)
    return ops.dot(out.reshape(*x.shape[:2], -1), params["out"]), latent, k_rope


def compress(params, x, config: Config, ops: Ops, positions=None):
    """x [B, S, D] -> queries [B, S, H, nope and R], and what keys and values are made of: the latent and the
    rotated keys, [B, S, C] and [B, S, R]. One GEMM makes all that is compressed."""
    compressed = ops.dot(x, params["compress"])
    q, kv, k_rope = jnp.split(compressed, [config.q_rank, config.q_rank + config.kv_rank], axis=-1)
    q = _by_head(ops.dot(rms_norm(q, params["q_norm"]), params["q_up"]), config)
    q_nope, q_rope = jnp.split(q, [config.nope_dim], axis=-1)
    q_rope = rotate(q_rope, config.rope_theta, positions)
    k_rope = rotate(k_rope[:, :, None], config.rope_theta, positions)[:, :, 0]
    return q_nope, q_rope, rms_norm(kv, params["kv_norm"]), k_rope


def _by_head(x, config):
    return x.reshape(*x.shape[:2], config.heads, -1)


def causal_attention(q, k, v, implementation):
    """q, k [B, S, H, Q], v [B, S, H, V], V <= Q -> [B, S, H, V], in bf16 with an f32 softmax."""
    # The library wants values as wide as keys.
    padded = jnp.pad(v, ((0, 0),) * 3 + ((0, q.shape[-1] - v.shape[-1]),))
    out = jax.nn.dot_product_attention(q, k, padded, is_causal=True, implementation=implementation)
    return out[..., : v.shape[-1]]


def dense_feed_forward(params, x, ops: Ops):
    return ops.feed_forward(x, params["gate_up"], params["down"])


def mixture_of_experts(params, bias, x, config: Config, ops: Ops, layout: Layout, apply):
    """The shared expert and the routed ones: x [T, D] -> [T, D], and how the routing went."""
    routed, routing = routed_experts(params, bias, x, config, ops, layout, apply)
    shared = ops.feed_forward(x, params["shared_gate_up"], params["shared_down"])
    return (routed + shared).astype(x.dtype), routing


def routed_experts(params, bias, x, config: Config, ops: Ops, layout: Layout, apply):
    """x [T, D] -> the sum of its experts' results, each times its weight, [T, D] f32.

    apply: what a device computes, such as `apply_experts`.
    """
    if layout.mesh is None:
        experts, weights = route(x, params["router"], bias, config)
        gate_up, down = ops.expert_weights(params["experts_gate_up"], params["experts_down"])
        out, sizes = apply(x, experts, weights, gate_up, down, ops)
        return out, Routing(sizes, jnp.int32(0))
    tokens = P(TOKENS)
    out, routing = jax.shard_map(
        partial(_routed_experts_of_device, config=config, ops=ops, apply=apply), mesh=layout.mesh,
        in_specs=(tokens, P(), P(), *ops.expert_specs), out_specs=(tokens, tokens))(
            x, bias, params["router"], params["experts_gate_up"], params["experts_down"])
    # Added up here, where XLA leaves it out if nobody asks.
    return out, jax.tree.map(lambda of_devices: of_devices.sum(0), routing)


def _routed_experts_of_device(x, bias, router, gate_up, down, config, ops, apply):
    """`routed_experts` of one device's tokens, with the other devices' help."""
    num_devices = lax.axis_size(EXPERT)
    room = dispatch.room(len(x), config.experts_per_token, config.experts, num_devices,
                         config.capacity_factor)
    experts, weights = route(x, router, bias, config)
    rows = dispatch.plan(experts, config.experts, num_devices, room)
    # Here, so that their gradients are added up over `tensor` by token and not by row.
    x, weights = (lax.pcast(each, TENSOR, to="varying") for each in (x, weights))
    tokens, weights, theirs = dispatch.send(ops, EXPERT, x, weights, experts, rows)

    first = lax.axis_index(EXPERT) * down.shape[0]
    gate_up, down = ops.expert_weights(gate_up, down, DATA)
    out, sizes = apply(tokens, theirs - first, weights, gate_up, down, ops, room.rows)
    out = dispatch.fetch(ops, EXPERT, out.astype(x.dtype), rows)
    load = jax.nn.one_hot(experts, config.experts, dtype=jnp.int32).sum((0, 1))
    num_rows = lax.pmax(sizes.sum(), TENSOR)  # the same on all of its devices
    routing = Routing(load[None], (experts.size - num_rows)[None])
    return lax.psum(out, TENSOR), routing


def apply_experts(x, experts, weights, gate_up, down, ops: Ops, capacity=None):
    """x [T, D] -> [T, D] f32, of the experts [T, k] of which the weights are at hand; and their rows [E].

    gate_up is [E, D, 2F], and down [E, F, D]. A number of an expert outside of [0, E) counts
    nothing, and so does a row beyond the capacity.
    """
    by_expert = sort_by_expert(experts, gate_up.shape[0], capacity)
    out = ops.ragged_feed_forward(spread(x, by_expert.of_tokens), gate_up, down, by_expert.sizes)
    weights = spread(weights.reshape(-1, 1), by_expert.of_slots)
    return combine(out, weights, by_expert.of_tokens), by_expert.sizes


def route(x, router, bias, config: Config):
    """The experts of each token and their weights, [T, k] both.

    The bias takes part in choosing experts, but not in their weights: no gradient reaches it. All is f32, so
    that the two precisions of a run differ here by what they put in alone.
    """
    logits = jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, config.experts_per_token)
    # A product with one-hot rows, where a gather's gradient would be a scatter.
    weights = jnp.sum(jax.nn.one_hot(experts, config.experts) * scores[:, None], axis=-1)
    return experts, config.routed_scaling * weights / weights.sum(axis=-1, keepdims=True)


def update_bias(bias, load, speed):
    """The bias [L, E] after a step that gave each expert load [L, E] tokens: up if it had too few.

    Load balancing without an auxiliary loss: the sign of the error alone, outside of the gradient.
    """
    load = load.astype(jnp.float32)
    return bias + speed * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
