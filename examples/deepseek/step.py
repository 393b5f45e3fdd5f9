"""One step of training, and one of validation: compiled once for a configuration and a precision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.deepseek import model
from examples.deepseek.config import Config
from examples.deepseek.layers import update_bias
from examples.deepseek.precision import ops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      params: f32 master weights.
      optimizer: optax's state.
      bias: [moe_layers, E] f32, of the choice of experts.
      step: steps taken, int32.
    """

    params: dict[str, Any]
    optimizer: Any
    bias: jax.Array
    step: jax.Array


def init(config: Config, seed: int) -> TrainState:
    """The state before the first step, on its device for good: a restored one compiles no other step."""
    state = _draw(jax.random.key(seed), config)
    return jax.device_put(state, state.step.sharding)


@functools.partial(jax.jit, static_argnames="config")
def _draw(key, config):
    params = model.init(config, key)
    bias = jnp.zeros((config.moe_layers, config.experts))
    return TrainState(params, _optimizer(config).init(params), bias, jnp.int32(0))


@functools.lru_cache
def train_step(config: Config, precision: str) -> Callable:
    """Compiled: (state, sequences [B, S + 1]) -> the next state, in the same memory, and a dict of metrics.

    Metrics are the loss, the gradient's norm before it is clipped, and the load [moe_layers, E].
    """
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, sequences):
        loss = functools.partial(model.loss, config=config, ops=ops(precision))
        (value, load), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state.bias, sequences)
        updates, optimizer = _optimizer(config).update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        bias = update_bias(state.bias, load, config.bias_speed)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), "load": load}
        return TrainState(params, optimizer, bias, state.step + 1), metrics

    return step


@functools.lru_cache
def validation_loss(config: Config, precision: str) -> Callable:
    """Compiled: (state, sequences [B, S + 1]) -> the loss, in the precision of training."""
    @jax.jit
    def evaluate(state, sequences):
        return model.loss(state.params, state.bias, sequences, config, ops(precision))[0]

    return evaluate


@jax.jit
def digest(state: TrainState) -> jax.Array:
    """A checksum of the state's bits, uint32: two runs that have the same one went the same way."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(state):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        odd = 2 * jnp.arange(len(bits), dtype=jnp.uint32) + 1  # a place's factor, so that order counts
        total = total * jnp.uint32(31) + jnp.sum(bits * odd, dtype=jnp.uint32)
    return total


def _optimizer(config):
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=config.learning_rate, warmup_steps=config.warmup, decay_steps=config.steps,
        end_value=config.learning_rate / 10)
    adamw = optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay,
                        mask=lambda params: jax.tree.map_with_path(_is_matrix, params))
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def _is_matrix(path, _):
    return not path[-1].key.endswith("norm")
