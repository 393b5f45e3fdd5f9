"""The language model: embedding, layers, head, and its loss."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.deepseek import dispatch, grouped, layers
from examples.deepseek.config import Config
from examples.deepseek.mesh import DATA, ONE_DEVICE, TENSOR, Layout
from examples.deepseek.precision import Ops
from jax_fp8gemm import save_dense_gemms, save_gemms

_policies = jax.checkpoint_policies

# Matrices whose products are added to the residual stream.
_BRANCH_ENDS = ("out", "down", "experts_down", "shared_down")
_INPUT_AXIS = {"experts_gate_up": -3}


def shapes(config: Config) -> dict[str, Any]:
    """The shape of every parameter. Matrices are [*, in, out]; layers of a kind are stacked in front.

    Gate and up of the routed experts have an axis of their own, [*, in, 2, out]: a device may have the same
    part of either.
    """
    c = config
    attention = {
        "norm": (c.hidden,),
        "compress": (c.hidden, c.q_rank + c.kv_rank + c.rope_dim),
        "q_norm": (c.q_rank,),
        "q_up": (c.q_rank, c.heads * c.qk_dim),
        "kv_norm": (c.kv_rank,),
        "kv_up": (c.kv_rank, c.heads * (c.nope_dim + c.v_dim)),
        "out": (c.heads * c.v_dim, c.hidden),
    }
    dense = {
        "norm": (c.hidden,),
        "gate_up": (c.hidden, 2 * c.dense_intermediate),
        "down": (c.dense_intermediate, c.hidden),
    }
    shared = c.shared_experts * c.expert_intermediate
    moe = {
        "norm": (c.hidden,),
        "router": (c.hidden, c.experts),
        "experts_gate_up": (c.experts, c.hidden, 2, c.expert_intermediate),
        "experts_down": (c.experts, c.expert_intermediate, c.hidden),
        "shared_gate_up": (c.hidden, 2 * shared),
        "shared_down": (shared, c.hidden),
    }

    def stacked(count, layer):
        return jax.tree.map(lambda shape: (count, *shape), layer, is_leaf=_is_shape)

    return {
        "embedding": (c.vocabulary, c.hidden),
        "dense": stacked(c.dense_layers, {"attention": attention, "feed_forward": dense}),
        "moe": stacked(c.moe_layers, {"attention": attention, "feed_forward": moe}),
        "norm": (c.hidden,),
        "head": (c.hidden, c.vocabulary),
    }


def _is_shape(node):
    return isinstance(node, tuple)


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """f32 parameters: norms of one, matrices of variance 1 / in, less where they end a residual branch."""
    paths, tree = jax.tree.flatten_with_path(shapes(config), is_leaf=_is_shape)

    def draw(index, path, shape):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape)
        deviation = 1.0 if name == "embedding" else shape[_INPUT_AXIS.get(name, -2)] ** -0.5
        if name in _BRANCH_ENDS:
            deviation /= math.sqrt(2 * config.layers)
        return deviation * jax.random.normal(jax.random.fold_in(key, index), shape)

    return jax.tree.unflatten(tree, [draw(index, *each) for index, each in enumerate(paths)])


def logits(params, bias, tokens, config: Config, ops: Ops, layout: Layout = ONE_DEVICE):
    """tokens [B, S] int32 -> logits [B, S, V] f32, and the Routing of each layer with experts."""
    # The lookup is a product with one-hot rows: its gradient is a GEMM, and so the same in every run; that of
    # a gather would add rows up in the order in which they come.
    one_hot = jax.nn.one_hot(layout.tokens(tokens), config.vocabulary, dtype=ops.dtype)
    # In parts once more, and then gathered: XLA would gather f32 first and round it after that.
    embedding = layout.constrain(params["embedding"].astype(ops.dtype), TENSOR, DATA)
    embedding = layout.constrain(embedding, TENSOR)
    x = layout.tokens(jnp.dot(one_hot, embedding))

    def attend(layer, x, state):
        out, *_ = layers.attention(layer, layers.rms_norm(x, layer["norm"]), config, ops)
        return x + layout.tokens(out), state, None

    remat = partial(jax.checkpoint, policy=_kept(config)) if config.remat else lambda layer: layer
    x, _, _, routing = through_layers(params, bias, x, None, attend, config, ops, layout, remat)
    x = layers.rms_norm(x, params["norm"])
    head = layout.constrain(params["head"].astype(ops.dtype), DATA, TENSOR)
    head = layout.constrain(head, None, TENSOR)
    return jnp.dot(x, head, preferred_element_type=jnp.float32), routing


def _kept(config):
    """What a rematerialised layer keeps: results of GEMMs, but not the products between tokens in attention;
    and what came from other devices, so that it travels once."""
    products, names = (save_dense_gemms, ()) if config.remat_experts else (save_gemms, (grouped.GEMM_NAME,))
    return functools.reduce(_policies.save_from_both_policies, (
        products, _policies.save_only_these_names(dispatch.MESSAGE_NAME, *names),
        _policies.dots_with_no_batch_dims_saveable))


def through_layers(params, bias, x, state, attend, config: Config, ops: Ops, layout: Layout,
                   wrap=lambda layer: layer, apply=layers.apply_experts):
    """x [B, S, D] through all layers.

    Args:
      state: goes from layer to layer beside x.
      attend: (a layer's attention, x, state) -> x, state, and what is kept of the layer.
      wrap: of the function of one layer, such as `jax.checkpoint`.
      apply: of `layers.routed_experts`.

    Returns:
      x, state, what was kept, stacked by layer, and the Routing of each layer with experts.
    """
    def dense_layer(carry, layer):
        x, state, kept = attend(layer["attention"], *carry)
        normed = layers.rms_norm(x, layer["feed_forward"]["norm"])
        return (x + layout.tokens(layers.dense_feed_forward(layer["feed_forward"], normed, ops)), state), kept

    def moe_layer(carry, layer_and_bias):
        layer, bias = layer_and_bias
        x, state, kept = attend(layer["attention"], *carry)
        normed = layers.rms_norm(x, layer["feed_forward"]["norm"]).reshape(-1, config.hidden)
        out, routing = layers.mixture_of_experts(
            layer["feed_forward"], bias, normed, config, ops, layout, apply)
        return (x + layout.tokens(out.reshape(x.shape)), state), (kept, routing)

    scan = partial(jax.lax.scan, unroll=config.unroll)
    carry, first = scan(wrap(dense_layer), (x, state), params["dense"])
    (x, state), (last, routing) = scan(wrap(moe_layer), carry, (params["moe"], bias))
    kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, last)
    return x, state, kept, routing


def loss(params, bias, sequences, config: Config, ops: Ops, layout: Layout = ONE_DEVICE):
    """Mean cross-entropy in nats of sequences [B, S + 1], each token given those before; and the Routing."""
    out, routing = logits(params, bias, sequences[:, :-1], config, ops, layout)
    labels = jax.nn.one_hot(sequences[:, 1:], config.vocabulary)  # for a gradient without a scatter
    return optax.softmax_cross_entropy(out, labels).mean(), routing
