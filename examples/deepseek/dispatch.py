"""Expert parallelism: tokens travel to the devices that have their experts, and the results travel back.

Inside of `jax.shard_map`, over the mesh axis of the experts. A token goes once to each device that has any of
its experts, whatever their number; that device adds up what its experts make of it. The ways are these four,
each one all-to-all of all that there is about a token, and one for each array that is large:

    forward    tokens as FP8 with their scales, their experts and weights there; sums in bf16 back
    gradient   gradients as FP8 with their scales there; sums in bf16 and the weights' gradients back

A device has the same room for each sender, `Room.tokens`: an all-to-all of blocks of one size, since XLA's
ragged one is 57 to 77 times slower on two H100s (`python -m benchmarks.bench_collectives`). What
finds no room is left out, and counted: the last tokens of a sender, and the rows of a device's last experts.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from examples.deepseek.precision import Ops
from examples.deepseek.rows import Rows, collect, copies
from examples.deepseek.words import from_words, to_words

# What `jax.checkpoint_policies` know the messages by that came in.
MESSAGE_NAME = "message"
# From so many bytes on an array travels alone. To copy it into a message and out of it would take longer than
# one more all-to-all of few bytes: 13 us at 2.5 TB/s, against what is assumed to be as much.
LARGE_BYTES = 8 * 2**20


class Room(NamedTuple):
    """What a device has room for: tokens from each device, and rows, copies of those for its experts."""

    tokens: int
    rows: int


def room(num_tokens: int, top_k: int, num_experts: int, num_devices: int, factor: float) -> Room:
    """Room for `factor` times what comes if all experts have as many tokens, but no more than can come.

    Args:
      num_tokens: T, of one device.
      top_k: experts of a token.
      num_experts: of all devices.
      num_devices: that the experts are divided among.
      factor: at least 1; infinite where nothing may be left out.
    """
    mean = num_tokens * top_k / num_devices
    tokens = math.ceil(min(num_tokens, factor * mean))
    most = num_devices * tokens * min(top_k, num_experts // num_devices)
    return Room(tokens, math.ceil(min(most, factor * num_tokens * top_k)))


def plan(experts: jax.Array, num_experts: int, num_devices: int, space: Room) -> Rows:
    """experts [T, k] -> the rows [num_devices * space.tokens] of all messages, each device's together."""
    num_tokens, num_rows = len(experts), num_devices * space.tokens
    device = jnp.arange(num_devices)
    goes = (experts[..., None] // (num_experts // num_devices) == device).any(axis=1)  # [T, devices]
    place = jnp.cumsum(goes, axis=0) - 1
    # Numbers past the last row, a different one for each: they name no row, and none twice.
    nowhere = num_rows + jnp.arange(goes.size).reshape(goes.shape)
    row = jnp.where(goes & (place < space.tokens), device * space.tokens + place, nowhere).astype(jnp.int32)
    token = jnp.full(num_rows, num_tokens, jnp.int32)
    owner = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], row.shape)
    token = token.at[row].set(owner, unique_indices=True, mode="drop")
    row = jnp.minimum(row, num_rows)
    if experts.shape[1] < num_devices:
        # A token has fewer experts than there are devices: one copy for each, of which those to one device
        # count once. Less to read than a row of each device, of which most are none.
        to = experts // (num_experts // num_devices)
        is_again = jnp.tril(to[:, :, None] == to[:, None, :], -1).any(-1)
        row = jnp.where(is_again, num_rows, jnp.take_along_axis(row, to, axis=1))
    return Rows(token, row)


def send(ops: Ops, axis: str, x, weights, experts, rows: Rows):
    """Tokens to the devices of the mesh axis: x [T, D], weights and experts [T, k] -> the same of [R, …].

    Rows that are of no token have features of zero, and -1 for experts.
    """
    return _send(ops, axis, x, weights, experts, rows)


def fetch(ops: Ops, axis: str, y, rows: Rows):
    """The sums of tokens from where `send` sent them: y [R, D] -> [T, D] f32."""
    return _fetch(ops, axis, y, rows)


# NOTES: the forward rules are written out, or policies of jax.checkpoint would not see the messages' name.


def _send_forward(ops, axis, x, weights, experts, rows):
    message = copies((ops.pack(x), weights), rows), copies(experts, rows, fill=-1)
    received = exchange(message, axis)
    (packed, weights), experts = jax.tree.map(lambda leaf: checkpoint_name(leaf, MESSAGE_NAME), received)
    return (ops.unpack(packed, x.dtype), weights, experts), (rows, x[:0])


def _send_backward(ops, axis, kept, gradients):
    rows, like_x = kept
    # What is small goes into one message. XLA would add a token's rows up again for each of its words.
    d_x, d_weights = exchange(lax.optimization_barrier(gradients[:2]), axis)
    return collect(d_x, rows).astype(like_x.dtype), collect(d_weights, rows), None, None


def _fetch_forward(ops, axis, y, rows):
    return collect(exchange(y, axis), rows), (rows, y[:0])


def _fetch_backward(ops, axis, kept, d_out):
    rows, like_y = kept
    packed = exchange(copies(ops.pack(d_out.astype(like_y.dtype)), rows), axis)
    return ops.unpack(packed, like_y.dtype), None


_send = jax.custom_vjp(lambda *args: _send_forward(*args)[0], nondiff_argnums=(0, 1))
_send.defvjp(_send_forward, _send_backward)
_fetch = jax.custom_vjp(lambda *args: _fetch_forward(*args)[0], nondiff_argnums=(0, 1))
_fetch.defvjp(_fetch_forward, _fetch_backward)


def exchange(message: Any, axis: str) -> Any:
    """Block i of each array [R, …] of a tree to device i of a mesh axis: large ones alone, others as one.

    Raises:
      ValueError: rows of an array that does not travel alone are no whole words of 4 bytes.
    """
    swap = partial(lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    leaves, tree = jax.tree.flatten(message)
    is_large = lambda x: x.size * x.dtype.itemsize >= LARGE_BYTES
    others = iter(_as_one(swap, [x for x in leaves if not is_large(x)]))
    return tree.unflatten([swap(x) if is_large(x) else next(others) for x in leaves])


def _as_one(swap, arrays):
    if not arrays:
        return []
    words = [to_words(x) for x in arrays]
    ends = itertools.accumulate((word.shape[1] for word in words), initial=0)
    received = swap(jnp.concatenate(words, axis=1))
    return [from_words(received[:, begin:end], x)
            for (begin, end), x in zip(itertools.pairwise(ends), arrays, strict=True)]
