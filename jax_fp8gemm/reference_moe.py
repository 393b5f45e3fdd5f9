"""The meaning in plain jnp, as in reference.py, of what surrounds the grouped GEMMs.

`sort_by_expert`, `permute` and `quantize_transposed` are defined to the bit; `unpermute` is up to whether a
product is rounded before it is added.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8gemm.jit.problem import SCALE_BLOCK
from jax_fp8gemm.reference import MIN_SCALE, group_bounds, quantize
from jax_fp8gemm.scaling import ROW_BLOCKS, ragged_k_size


def sort_by_expert(expert_ids, *, num_experts):
    """expert_ids [B, T, top_k] -> group_sizes [B, E], positions [B, T, top_k], num_rows [B], all int32.

    positions are the places of the ids in a stable sort of each batch, in (token, slot) order; an id outside
    of [0, E) has none, and T * top_k instead. num_rows is the sum of the group sizes.
    """
    batch, tokens, top_k = expert_ids.shape
    flat = expert_ids.reshape(batch, tokens * top_k)
    keys = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(keys, axis=1, stable=True)
    rows, each = jnp.arange(tokens * top_k, dtype=jnp.int32), jnp.arange(batch)[:, None]
    positions = jnp.zeros_like(flat).at[each, order].set(rows)
    positions = jnp.where(keys < num_experts, positions, tokens * top_k)
    group_sizes = jnp.zeros((batch, num_experts), jnp.int32).at[each, keys].add(1, mode="drop")
    return [group_sizes, positions.reshape(expert_ids.shape), group_sizes.sum(axis=1, dtype=jnp.int32)]


def permute(x, positions, num_rows, *, dtype):
    """x [B, T, K], positions [B, T, top_k] -> values [B, T * top_k, K], scales [B, T * top_k, ceil(K/128)].

    Row positions[b, t, j] is x[b, t], quantised in blocks of 1 x 128. The rows from num_rows [B] on, which no
    position names, are zeros with the smallest scale.
    """
    batch, tokens, top_k = positions.shape
    rows, each = positions.reshape(batch, tokens * top_k), jnp.arange(batch)[:, None]

    def scatter(of_tokens, fill):
        of_slots = jnp.repeat(of_tokens, top_k, axis=1)
        return jnp.full(of_slots.shape, fill, of_slots.dtype).at[each, rows].set(of_slots, mode="drop")

    values, scales = quantize(x, granularity=ROW_BLOCKS, dtype=dtype)
    codes = scatter(lax.bitcast_convert_type(values, jnp.uint8), 0)
    return [lax.bitcast_convert_type(codes, dtype), scatter(scales, MIN_SCALE)]


# There is no kernel for this: a hand-written one moved 88 to 100 % of what a copy does on an H200, and XLA's
# fusion of these lines 80 to 101 %, as much or more of it with most of the large sizes.
@jax.jit
def unpermute(y, positions, weights):
    """y [M, D], positions and weights [T, top_k] -> [T, D] of y's dtype.

    out[t] is the sum over j of weights[t, j] * y[positions[t, j]], in f32, in the order of j, rounded once. A
    position outside of [0, M) contributes nothing.
    """
    (num_rows, columns), (tokens, top_k) = y.shape, positions.shape
    out = jnp.zeros((tokens, columns), jnp.float32)
    for slot in range(top_k if num_rows else 0):
        position, weight = positions[:, slot], weights[:, slot]
        is_row = (position >= 0) & (position < num_rows)
        rows = y.at[jnp.where(is_row, position, 0)].get(mode="clip").astype(jnp.float32)
        out += jnp.where(is_row[:, None], weight[:, None] * rows, 0)
    return out.astype(y.dtype)


def quantize_transposed(x, group_sizes, *, dtype):
    """x [B, T, N], group_sizes [B, G] -> values [B, N, K], scales [B, N, K/128], K = ragged_k_size(T, G).

    Column c of a group is its token c, and the columns of each group begin where 128-block after 128-block of
    the groups before end; all other columns are zeros. Sizes count as in `group_bounds`.
    """
    (_, tokens, _), num_groups = x.shape, group_sizes.shape[1]
    starts, ends = group_bounds(group_sizes, tokens)
    num_blocks = (ends - starts + SCALE_BLOCK - 1) // SCALE_BLOCK
    block_ends = jnp.cumsum(num_blocks, axis=1, dtype=jnp.int32)
    columns = jnp.arange(ragged_k_size(tokens, num_groups), dtype=jnp.int32)

    def transpose(x, starts, ends, block_starts, block_ends):
        group = jnp.searchsorted(block_ends, columns // SCALE_BLOCK, side="right")
        take = lambda of_groups: of_groups.at[group].get(mode="fill", fill_value=0)
        token = take(starts) + columns - take(block_starts) * SCALE_BLOCK
        is_token = token < take(ends)
        return jnp.where(is_token[:, None], x.at[jnp.where(is_token, token, 0)].get(mode="clip"), 0).T

    transposed = jax.vmap(transpose)(x, starts, ends, block_ends - num_blocks, block_ends)
    return list(quantize(transposed, granularity=ROW_BLOCKS, dtype=dtype))
