"""A DeepSeek-V3 MoE layer with grouped FP8 GEMMs on the devices at hand, against the same in bf16.

    python examples/moe_layer.py

    x [T, 7168] -> sum over a token's top 8 of 256 experts, of those that are here, of
                   weight * down(silu(gate(x)) * up(x))    gate, up [2048, 7168], down [7168, 2048]

Experts are divided among 32 ranks, 8 to each, and every device here is one of them, from the first on. x
holds the tokens of all ranks, gathered, and the results of the devices are added up. V3's shared expert, its
bias of the scores and its limit of nodes are left out; `examples/deepseek` has the whole model.

On GPUs the layer has V3's real sizes, and its time is shown beside that of `jax.lax.ragged_dot`; on a CPU it
is smaller, and runs in plain jnp.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from side_by_side import MESH, ON_GPU, compare, normal_matrix, swiglu

from jax_fp8gemm import ScaledArray, fp8_gemm_ragged_m, permute, quantize, quantize_swiglu, unpermute

HIDDEN, INTERMEDIATE = (7168, 2048) if ON_GPU else (512, 256)
EXPERTS, TOP_K, RANKS = 256, 8, 32
LOCAL_EXPERTS = EXPERTS // RANKS
HERE = MESH.size * LOCAL_EXPERTS
TOKENS = (32 * 128, 32 * 512) if ON_GPU else (256, 1024)  # of all ranks: decoding, prefill
SCALING = 2.5  # of V3's routing weights
WEIGHT_BLOCKS = (128, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """router [256, 7168]; of E experts gate, then up, in one array, and down: [E, in, out] in bf16, as
    `jax.lax.ragged_dot` takes them, or ScaledArrays [E, out, in]."""

    router: jax.Array
    gate_up: jax.Array | ScaledArray
    down: jax.Array | ScaledArray


SPECS = Weights(P(), gate_up=P("devices"), down=P("devices"))


def init(key) -> Weights:
    router, gate_up, down = jax.random.split(key, 3)
    return Weights(normal_matrix(router, (EXPERTS, HIDDEN), HIDDEN),
                   normal_matrix(gate_up, (HERE, HIDDEN, 2 * INTERMEDIATE), HIDDEN),
                   normal_matrix(down, (HERE, INTERMEDIATE, HIDDEN), INTERMEDIATE))


@jax.jit
def to_fp8(weights: Weights) -> Weights:
    gate_up, down = (quantize(w.swapaxes(1, 2), WEIGHT_BLOCKS) for w in (weights.gate_up, weights.down))
    return Weights(weights.router, gate_up, down)


def route(x, router):
    """The experts of each token, counted from this rank's first one, and their weights, [T, top 8] both."""
    scores = jax.nn.sigmoid(jnp.dot(x, router.T, preferred_element_type=jnp.float32))
    weights, experts = jax.lax.top_k(scores, TOP_K)
    first = LOCAL_EXPERTS * jax.lax.axis_index("devices")
    return experts - first, SCALING * weights / weights.sum(axis=1, keepdims=True)


def most_rows(num_tokens):
    """Rows that this rank computes at most: twice its share. The layer leaves out what is beyond."""
    return 2 * num_tokens * TOP_K // RANKS


def sum_of_ranks(rank):
    """A layer on the mesh from one rank's part: the tokens, its experts -> [T, 7168]."""
    def run(x, weights):
        out = rank(x, weights).astype(jnp.float32)
        return jax.lax.psum(out, "devices").astype(x.dtype)

    return jax.jit(jax.shard_map(run, mesh=MESH, in_specs=(P(), SPECS), out_specs=P()))


@sum_of_ranks
def moe_fp8(x, weights: Weights):
    experts, routing_weights = route(x, weights.router)
    rows, group_sizes, positions = permute(x, experts, LOCAL_EXPERTS)  # drops the other ranks' experts
    rows = jax.tree.map(lambda leaf: leaf[:most_rows(len(x))], rows)
    gate_up = fp8_gemm_ragged_m(rows, weights.gate_up, group_sizes)
    hidden = quantize_swiglu(gate_up, group_sizes=group_sizes)
    y = fp8_gemm_ragged_m(hidden, weights.down, group_sizes)
    return unpermute(y, positions, routing_weights)


@sum_of_ranks
def moe_bf16(x, weights: Weights):
    experts, routing_weights = (leaf.ravel() for leaf in route(x, weights.router))
    is_here = (experts >= 0) & (experts < LOCAL_EXPERTS)
    experts = jnp.where(is_here, experts, LOCAL_EXPERTS)  # the other ranks' come last
    slots = jnp.argsort(experts, stable=True)[:most_rows(len(x))]
    group_sizes = jnp.bincount(experts, length=LOCAL_EXPERTS)
    tokens = slots // TOP_K
    gate, up = jnp.split(jax.lax.ragged_dot(x[tokens], weights.gate_up, group_sizes), 2, axis=1)
    y = jax.lax.ragged_dot(swiglu(gate, up), weights.down, group_sizes)
    y = y * routing_weights[slots, None]
    return jnp.zeros(x.shape, jnp.float32).at[tokens].add(y).astype(x.dtype)


if __name__ == "__main__":
    compare(f"DeepSeek-V3 MoE layer, hidden {HIDDEN}, intermediate {INTERMEDIATE}, "
            f"{HERE} of {EXPERTS} experts here", moe_fp8, moe_bf16, hidden=HIDDEN,
            token_counts=TOKENS, draw_weights=init, specs=SPECS, to_fp8=to_fp8)
