"""Tokens and rows: a row is a copy of a token, for an expert or for a device. Copying, and adding up again.

Which is which is known from both sides, so that neither direction is a scatter: each is the other's gradient,
and adds up in one order.

Letters of axes: T tokens, J copies that a token can have, R rows, D features.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from examples.deepseek.words import from_words, to_words, whole

_NONE = jnp.iinfo(jnp.int32).max


@partial(jax.tree_util.register_dataclass, data_fields=["token", "row"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which token a row is of, and which rows a token has.

    Attributes:
      token: [R] int32, of each row; T where a row is of none.
      row: [T, J] int32, of each token; R where a copy is none.
    """

    token: jax.Array
    row: jax.Array


@jax.custom_vjp
def spread(x: Any, rows: Rows) -> Any:
    """x [T, D] -> [R, D], or a tree of such arrays: each row's token, zeros where it has none."""
    return copies(x, rows)


@jax.custom_vjp
def collect(y: jax.Array, rows: Rows) -> jax.Array:
    """y [R, D] -> [T, D] f32: the sum of each token's rows, in the order of its copies."""
    return y.at[rows.row].get(mode="fill", fill_value=0).astype(jnp.float32).sum(axis=1)


def _spread_backward(kept, gradients):
    rows, like = kept
    return jax.tree.map(lambda dy, x: collect(dy, rows).astype(x.dtype), gradients, like), None


def _collect_backward(kept, d_out):
    rows, like = kept
    return copies(d_out.astype(like.dtype), rows), None


spread.defvjp(lambda x, rows: (copies(x, rows), (rows, jax.tree.map(lambda leaf: leaf[:0], x))),
              _spread_backward)
collect.defvjp(lambda y, rows: (collect(y, rows), (rows, y[:0])), _collect_backward)


@jax.custom_vjp
def combine(y: jax.Array, weights: jax.Array, rows: Rows) -> jax.Array:
    """y [R, D] times weights [R, 1], collected: [T, D] f32.

    The backward pass keeps y in its own dtype, where that of a product in f32 would keep it as f32.
    """
    return collect(weights * y, rows)


def _combine_backward(kept, d_out):
    y, weights, rows = kept
    d_rows = copies(d_out, rows)
    d_weights = jnp.sum(y * d_rows, axis=-1, keepdims=True)
    return (weights * d_rows).astype(y.dtype), d_weights.astype(weights.dtype), None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


def copies(x: Any, rows: Rows, fill: int = 0) -> Any:
    """`spread` of each array of a tree, without a gradient, and with `fill` where a row is of no token."""
    def gather(leaf):
        return leaf.at[rows.token].get(mode="fill", fill_value=fill)

    # A GPU copies words faster than bytes.
    is_bytes = lambda leaf: leaf.dtype.itemsize == 1 and fill == 0 and whole(leaf)
    return jax.tree.map(
        lambda leaf: from_words(gather(to_words(leaf)), leaf) if is_bytes(leaf) else gather(leaf), x)


@partial(jax.tree_util.register_dataclass, data_fields=["of_tokens", "of_slots", "sizes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sorted:
    """Rows in the order of their experts, those of one expert in the order of their tokens.

    Attributes:
      of_tokens: Rows of the tokens [T], a copy for each of a token's experts.
      of_slots: the same of the slots [T * k], one copy each: what belongs to a token and an expert.
      sizes: [E] int32, the rows of each expert; what is past their sum are rows of none.
    """

    of_tokens: Rows
    of_slots: Rows
    sizes: jax.Array


def sort_by_expert(experts: jax.Array, num_experts: int, capacity: int | None = None) -> Sorted:
    """The rows of tokens with the experts [T, k]: for each expert in [0, num_experts), at most `capacity`."""
    num_tokens, k = experts.shape
    num_slots = num_tokens * k
    capacity = num_slots if capacity is None else capacity
    is_own = (experts >= 0) & (experts < num_experts)
    group = jnp.where(is_own, experts, num_experts).ravel()
    slots = jnp.argsort(group, stable=True).astype(jnp.int32)
    numbers = jnp.arange(num_slots, dtype=jnp.int32)
    position = jnp.zeros_like(slots).at[slots].set(numbers, unique_indices=True)

    ends = jnp.minimum(jnp.cumsum(jax.nn.one_hot(group, num_experts, dtype=jnp.int32).sum(0)), capacity)
    slot = jnp.where(jnp.arange(capacity) < ends[-1], slots[:capacity], num_slots)
    row = jnp.where(is_own.ravel(), jnp.minimum(position, capacity), capacity)
    return Sorted(Rows(slot // k, row.reshape(experts.shape)), Rows(slot, row[:, None]),
                  jnp.diff(ends, prepend=0))


def in_blocks(by_expert: Sorted, capacity: int) -> Sorted:
    """The same rows with `capacity` places for each expert, [E * capacity], of which it has the first ones.

    There has to be room for each expert's rows.
    """
    sizes = by_expert.sizes
    num_experts, ends = len(sizes), jnp.cumsum(sizes)
    starts = ends - sizes
    place = jnp.arange(capacity)
    sorted_row = jnp.where(place < sizes[:, None], starts[:, None] + place, _NONE)

    def moved(rows):
        num_rows = len(rows.token)
        expert = jnp.searchsorted(ends, rows.row, side="right", method="compare_all").astype(jnp.int32)
        offset = rows.row - starts.at[expert].get(mode="clip")
        row = jnp.where(rows.row < num_rows, expert * capacity + offset, num_experts * capacity)
        token = rows.token.at[sorted_row.ravel()].get(mode="fill", fill_value=len(rows.row))
        return Rows(token, row)

    return Sorted(moved(by_expert.of_tokens), moved(by_expert.of_slots), sizes)
