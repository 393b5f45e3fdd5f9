"""A Flax nnx model, trained in FP8 and in bf16 from the same seed: one argument of its layers differs.

    python examples/interop/flax_nnx.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_fp8gemm.dot_general import dot_general

FEATURES, HIDDEN, OUTPUTS, BATCH, STEPS = 256, 512, 128, 512, 30


class Model(nnx.Module):
    def __init__(self, dot_general, rngs):
        linear = partial(nnx.Linear, dtype=jnp.bfloat16, dot_general=dot_general, rngs=rngs)
        self.up, self.down = linear(FEATURES, HIDDEN), linear(HIDDEN, OUTPUTS)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x))).astype(jnp.float32)


@nnx.jit
def step(model, optimizer, x, target):
    loss, gradients = nnx.value_and_grad(lambda model: jnp.square(model(x) - target).mean())(model)
    optimizer.update(model, gradients)
    return loss


def train(dot_general):
    """The losses of all steps, each before its update. Weights, data and targets are always the same."""
    teacher, model = Model(jax.lax.dot_general, nnx.Rngs(0)), Model(dot_general, nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(2), (STEPS, BATCH, FEATURES), jnp.bfloat16)
    return [float(step(model, optimizer, batch, teacher(batch))) for batch in x]


if __name__ == "__main__":
    bf16, fp8 = train(jax.lax.dot_general), train(dot_general)
    print("step   loss in bf16   in FP8")
    for i in range(0, STEPS, 3):
        print(f"{i:4d}{bf16[i]:15.5f}{fp8[i]:9.5f}")
