"""A Transformer block of Flax linen, trained in FP8 and in bf16 from the same seed.

    python examples/interop/flax_linen.py

All projections are in FP8, those of attention included. Its scores and their product with the values, which
have no weights, stay in bf16.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jax_fp8gemm.dot_general import dot_general

FEATURES, HEADS, BATCH, LENGTH, STEPS = 128, 4, 8, 32, 30


class Block(nn.Module):
    dot_general: object

    @nn.compact
    def __call__(self, x):
        dense = lambda features: nn.Dense(features, dtype=jnp.bfloat16, dot_general=self.dot_general)
        x += nn.MultiHeadDotProductAttention(
            HEADS, dtype=jnp.bfloat16, qkv_dot_general=self.dot_general,
            out_dot_general=self.dot_general)(nn.LayerNorm()(x))
        return x + dense(FEATURES)(nn.relu(dense(4 * FEATURES)(nn.LayerNorm()(x))))


def train(dot_general):
    """The losses of all steps, each before its update. Weights, data and targets are always the same."""
    block, optimizer = Block(dot_general), optax.adam(1e-3)
    x = jax.random.normal(jax.random.key(2), (STEPS, BATCH, LENGTH, FEATURES))
    teacher, params = (Block(jax.lax.dot_general).init(jax.random.key(i), x[0]) for i in range(2))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x):
        target = Block(jax.lax.dot_general).apply(teacher, x)
        mean_square = lambda params: jnp.square(block.apply(params, x) - target).mean()
        loss, gradients = jax.value_and_grad(mean_square)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for batch in x:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    bf16, fp8 = train(jax.lax.dot_general), train(dot_general)
    print("step   loss in bf16   in FP8")
    for i in range(0, STEPS, 3):
        print(f"{i:4d}{bf16[i]:15.5f}{fp8[i]:9.5f}")
