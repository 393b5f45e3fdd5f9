"""A DeepSeek-V3 feed-forward block with FP8 GEMMs, against the same block in bf16.

    python examples/feed_forward.py

    x [T, 7168] -> down(silu(gate(x)) * up(x))        gate, up [18432, 7168], down [7168, 18432]

The intermediate features are divided over all devices that there are: each multiplies with its part of the
matrices, and one sum over devices follows. Nothing in the block says so; where the weights lie does.

On GPUs the block has V3's real sizes, and its time is shown beside that of jnp.dot; on a CPU it is smaller,
and runs in plain jnp.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from side_by_side import ON_GPU, compare, normal_matrix, swiglu

from jax_fp8gemm import ScaledArray, fp8_gemm, quantize

HIDDEN, INTERMEDIATE = (7168, 18432) if ON_GPU else (512, 2048)
TOKENS = (64, 4096) if ON_GPU else (16, 128)
WEIGHT_BLOCKS = (128, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """[out, in] matrices of the block: bf16 arrays or ScaledArrays."""

    gate: jax.Array | ScaledArray
    up: jax.Array | ScaledArray
    down: jax.Array | ScaledArray


SPECS = Weights(gate=P("devices", None), up=P("devices", None), down=P(None, "devices"))


def init(key) -> Weights:
    gate, up, down = jax.random.split(key, 3)
    return Weights(normal_matrix(gate, (INTERMEDIATE, HIDDEN), HIDDEN),
                   normal_matrix(up, (INTERMEDIATE, HIDDEN), HIDDEN),
                   normal_matrix(down, (HIDDEN, INTERMEDIATE), INTERMEDIATE))


@jax.jit
def to_fp8(weights: Weights) -> Weights:
    return jax.tree.map(lambda w: quantize(w, WEIGHT_BLOCKS), weights)


@jax.jit
def feed_forward_fp8(x, weights: Weights):
    x = quantize(x)
    hidden = swiglu(fp8_gemm(x, weights.gate), fp8_gemm(x, weights.up))
    return fp8_gemm(quantize(hidden), weights.down)


@jax.jit
def feed_forward_bf16(x, weights: Weights):
    hidden = swiglu(jnp.dot(x, weights.gate.T), jnp.dot(x, weights.up.T))
    return jnp.dot(hidden, weights.down.T)


if __name__ == "__main__":
    compare(f"DeepSeek-V3 feed-forward block, hidden {HIDDEN}, intermediate {INTERMEDIATE}",
            feed_forward_fp8, feed_forward_bf16, hidden=HIDDEN, token_counts=TOKENS, draw_weights=init,
            specs=SPECS, to_fp8=to_fp8)
