"""One step of training, and one of validation: compiled once for a configuration and a precision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.deepseek import model
from examples.deepseek.config import Config
from examples.deepseek.layers import update_bias
from examples.deepseek.mesh import ONE_DEVICE, Layout, param_specs
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


def init(config: Config, seed: int, layout: Layout = ONE_DEVICE) -> TrainState:
    """The state before the first step, where it stays: a restored one compiles no other step."""
    draw = functools.partial(_draw, config=config)
    if layout.mesh is not None:
        return jax.jit(draw, out_shardings=shardings(config, layout))(jax.random.key(seed))
    state = jax.jit(draw)(jax.random.key(seed))
    return jax.device_put(state, state.step.sharding)


def _draw(key, config):
    params = model.init(config, key)
    bias = jnp.zeros((config.moe_layers, config.experts))
    return TrainState(params, _optimizer(config).init(params), bias, jnp.int32(0))


def abstract_state(config: Config) -> TrainState:
    """Shapes and dtypes of the state."""
    return jax.eval_shape(functools.partial(_draw, config=config), jax.random.key(0))


def shardings(config: Config, layout: Layout) -> TrainState:
    """How the state lies on a mesh: the optimizer's as the parameters that it is of."""
    place = functools.partial(NamedSharding, layout.mesh)
    params = jax.tree.map(place, param_specs(model.shapes(config)))
    of_optimizer = optax.tree.map_params(
        _optimizer(config), lambda _, sharding: sharding, abstract_state(config).optimizer, params,
        transform_non_params=lambda _: place(P()))
    return TrainState(params, of_optimizer, place(P()), place(P()))


@functools.lru_cache
def train_step(config: Config, precision: str, layout: Layout = ONE_DEVICE) -> Callable:
    """Compiled: (state, sequences [B, S + 1]) -> the next state, in the same memory, and a dict of metrics.

    Metrics are the loss, the gradient's norm before it is clipped, the load [moe_layers, E], and what of it
    was dropped [moe_layers].
    """
    where = {} if layout.mesh is None else {
        "out_shardings": (shardings(config, layout), NamedSharding(layout.mesh, P()))}

    @functools.partial(jax.jit, donate_argnums=0, **where)
    def step(state, sequences):
        loss = functools.partial(model.loss, config=config, ops=ops(precision), layout=layout)
        (value, routing), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.bias, sequences)
        updates, optimizer = _optimizer(config).update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        bias = update_bias(state.bias, routing.load, config.bias_speed)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **routing._asdict()}
        return TrainState(params, optimizer, bias, state.step + 1), metrics

    return step


@functools.lru_cache
def validation_loss(config: Config, precision: str, layout: Layout = ONE_DEVICE) -> Callable:
    """Compiled: (state, sequences [B, S + 1]) -> the loss, in the precision of training."""
    @jax.jit
    def evaluate(state, sequences):
        return model.loss(state.params, state.bias, sequences, config, ops(precision), layout)[0]

    return evaluate


@jax.jit
def digest(state: TrainState) -> jax.Array:
    """A checksum of the state's bits, uint32: two runs that have the same one went the same way."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(state):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total = total * jnp.uint32(31) + jnp.sum(bits * (2 * _places(leaf.shape) + 1), dtype=jnp.uint32)
    return total


def _places(shape):
    """Each element's number, uint32: a factor of it makes order count. Not reshaped, so that shards stay."""
    number = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return number


def _optimizer(config):
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=config.learning_rate, warmup_steps=config.warmup, decay_steps=config.steps,
        end_value=config.learning_rate / 10)
    adamw = optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay,
                        mask=lambda params: jax.tree.map_with_path(_is_matrix, params))
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def _is_matrix(path, _):
    return not path[-1].key.endswith("norm")
