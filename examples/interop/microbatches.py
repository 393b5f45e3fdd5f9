"""A step of several microbatches, whose weights are quantised once: `prepare`, `jax.lax.scan` and optax.

    python examples/interop/microbatches.py

The gradient of a prepared weight is that of its master weight, in `.master`. The scan adds these up in
float32, and keeps the activations of one microbatch at a time.
"""

import jax
import jax.numpy as jnp
import optax

from jax_fp8gemm import feed_forward, prepare

FEATURES, HIDDEN, MICROBATCHES, TOKENS, STEPS = 128, 256, 4, 96, 12

optimizer = optax.adam(1e-3)


def init(key):
    gate_up, down = jax.random.split(key)
    return {"gate_up": jax.random.normal(gate_up, (FEATURES, 2 * HIDDEN)) * FEATURES**-0.5,
            "down": jax.random.normal(down, (HIDDEN, FEATURES)) * HIDDEN**-0.5}


def mean_square(weights, batch):
    x, target = batch
    y = feed_forward(x, weights["gate_up"], weights["down"])
    return jnp.square(y.astype(jnp.float32) - target).mean()


def loss_and_gradients(weights, microbatches):
    """The means over the microbatches, [MICROBATCHES, TOKENS, FEATURES] both inputs and targets."""
    prepared = {name: prepare(w) for name, w in weights.items()}

    def add(total, microbatch):
        loss, gradients = jax.value_and_grad(mean_square)(prepared, microbatch)
        masters = {name: gradient.master for name, gradient in gradients.items()}
        return jax.tree.map(jnp.add, total, (loss, masters)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), weights))
    return jax.tree.map(lambda total: total / MICROBATCHES, jax.lax.scan(add, zeros, microbatches)[0])


@jax.jit
def step(weights, state, microbatches):
    loss, gradients = loss_and_gradients(weights, microbatches)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(weights, updates), state, loss


if __name__ == "__main__":
    teacher, weights = init(jax.random.key(0)), init(jax.random.key(1))
    state, losses = optimizer.init(weights), []
    for i in range(STEPS):
        x = jax.random.normal(jax.random.key(i), (MICROBATCHES, TOKENS, FEATURES), jnp.bfloat16)
        weights, state, loss = step(weights, state, (x, feed_forward(x, teacher["gate_up"], teacher["down"])))
        losses.append(float(loss))
        print(f"step {i:2d}   loss {loss:.5f}")
