"""What a step has to communicate and to keep, by arithmetic from the sizes alone: it asks no compiler.

For meshes of the axes data and expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from examples.deepseek.config import Config
from examples.deepseek.dispatch import LARGE_BYTES
from examples.deepseek.pods.collectives import ITEM_BYTES, Traffic

BLOCK = 128
SUMS = "sums from experts, bf16"
F8, BF16, F32, S32, U32 = "f8e4m3fn", "bf16", "f32", "s32", "u32"
# The master weight and the two moments of AdamW.
STATE_BYTES_OF_A_PARAMETER = 3 * ITEM_BYTES[F32]


def matrices(c: Config) -> dict[str, dict[str, tuple[int, int]]]:
    """Of one layer of a kind, [in, out] of those that are divided over `data` and not over `expert`."""
    attention = {
        "compress": (c.hidden, c.q_rank + c.kv_rank + c.rope_dim),
        "q_up": (c.q_rank, c.heads * (c.nope_dim + c.rope_dim)),
        "kv_up": (c.kv_rank, c.heads * (c.nope_dim + c.v_dim)),
        "out": (c.heads * c.v_dim, c.hidden),
    }
    shared = c.shared_experts * c.expert_intermediate
    return {
        "dense": attention | {"gate_up": (c.hidden, 2 * c.dense_intermediate),
                              "down": (c.dense_intermediate, c.hidden)},
        "moe": attention | {"shared_gate_up": (c.hidden, 2 * shared), "shared_down": (shared, c.hidden)},
    }


def expert_matrices(c: Config) -> dict[str, tuple[int, int]]:
    """Of one routed expert."""
    return {"experts_gate_up": (c.hidden, 2 * c.expert_intermediate),
            "experts_down": (c.expert_intermediate, c.hidden)}


def vectors(c: Config) -> tuple[int, ...]:
    """The norms of one layer, of either kind."""
    return c.hidden, c.q_rank, c.kv_rank, c.hidden


def layer_counts(c: Config) -> dict[str, int]:
    return {"dense": c.dense_layers, "moe": c.moe_layers}


def device_tokens(c: Config, data: int, expert: int) -> int:
    return c.batch // (data * expert) * c.sequence


def message_rows(c: Config, tokens: int, expert: int) -> int:
    """The same room for each sender. A token goes there once, however many of its experts it takes."""
    return expert * min(tokens, math.ceil(c.capacity_factor * tokens * c.experts_per_token / expert))


def expert_rows(c: Config, tokens: int, expert: int) -> int:
    """What of them a device's experts have room for: a row has as many copies there as it has experts."""
    copies = min(c.experts_per_token, c.experts // expert)
    return min(message_rows(c, tokens, expert) * copies,
               math.ceil(c.capacity_factor * tokens * c.experts_per_token))


def packed(c) -> list[tuple[str, int]]:
    """A token in FP8, (dtype, numbers): its features, and a scale for each 128 of them."""
    return [(F8, c.hidden), (F32, math.ceil(c.hidden / BLOCK))]


def packed_bytes(c) -> int:
    return sum(ITEM_BYTES[dtype] * columns for dtype, columns in packed(c))


def traffic(c: Config, data: int, expert: int) -> dict[str, list[Traffic]]:
    """The collectives of a step, by what they are for."""
    exchange = partial(_exchange, c, data, expert)
    # Experts and weights go with the tokens; the weights' gradients come back with those of the tokens.
    sums, weights, experts = (BF16, c.hidden), (F32, c.experts_per_token), (S32, c.experts_per_token)
    table = c.vocabulary * c.hidden
    purposes = {
        "weights, FP8": [*_gathered_weights(c, expert)],
        "embedding and head, bf16": [("all-gather", BF16, table, ("data",), 1)] * 2,
        "tokens to experts, FP8": [*exchange(*packed(c), weights, experts), *exchange(*packed(c))],
        SUMS: [*exchange(sums), *exchange(sums, weights)],
        "gradients of matrices, f32": [*_reduced_gradients(c, data, expert)],
        "gradients of embedding and head": [("all-reduce", F32, table, ("data", "expert"), 1),
                                            ("all-reduce", BF16, table, ("data", "expert"), 1)],
        "gradients of norms and routers": [*_small_gradients(c)],
        "numbers": [*_numbers(c)],
    }
    sizes = {"data": data, "expert": expert}
    return {purpose: [found for each in wanted if (found := _on(sizes, *each)).devices > 1]
            for purpose, wanted in purposes.items()}


def _on(sizes, kind, dtype, elements, axes, times):
    """An axis of one device is none."""
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    return Traffic(kind, dtype, elements, axes, math.prod(sizes[axis] for axis in axes), times)


def _exchange(c, data, expert, *arrays):
    """Of one way, (dtype, numbers of a token) of what travels: large arrays alone, the rest in words."""
    rows = message_rows(c, device_tokens(c, data, expert), expert)
    rest = 0
    for dtype, columns in arrays:
        if rows * columns * ITEM_BYTES[dtype] >= LARGE_BYTES:
            yield "all-to-all", dtype, rows * columns, ("expert",), c.moe_layers
        else:
            rest += rows * columns * ITEM_BYTES[dtype]
    if rest:
        yield "all-to-all", U32, rest // ITEM_BYTES[U32], ("expert",), c.moe_layers


def _of_layers(c) -> Iterator[tuple[int, int, int]]:
    """(layers, in, out) of each matrix of `matrices`."""
    for kind, of_layer in matrices(c).items():
        for shape in of_layer.values():
            yield layer_counts(c)[kind], *shape


def _gathered_weights(c, expert):
    """Each twice: one order of axes for the forward pass, the other for the backward pass. The former again
    where the experts' forward pass is repeated."""
    experts = c.experts // expert
    wanted = [(2, 1, *each) for each in _of_layers(c)]
    wanted += [(2 + c.remat_experts, experts, c.moe_layers, *shape) for shape in expert_matrices(c).values()]
    for times, count, layers, rows, columns in wanted:
        values = count * rows * columns
        scales = count * math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK)
        yield from [("all-gather", F8, values, ("data",), layers),
                    ("all-gather", F32, scales, ("data",), layers)] * times


def _reduced_gradients(c, data, expert):
    """Summed and divided over `data`, then what is whole on the axis `expert` summed over that."""
    for layers, rows, columns in _of_layers(c):
        yield "reduce-scatter", F32, rows * columns, ("data",), layers
        yield "all-reduce", F32, rows * columns // data, ("expert",), layers
    for rows, columns in expert_matrices(c).values():
        yield "reduce-scatter", F32, c.experts // expert * rows * columns, ("data",), c.moe_layers


def _small_gradients(c):
    for layers in layer_counts(c).values():
        for size in vectors(c):
            yield "all-reduce", F32, size, ("data", "expert"), layers
    yield "all-reduce", F32, c.hidden * c.experts, ("data", "expert"), c.moe_layers
    yield "all-reduce", F32, c.hidden, ("data", "expert"), 1  # of the last norm


def _numbers(c):
    """Loads and what was dropped; the loss; norms of gradients, once to clip them and once as a metric."""
    yield "all-reduce", S32, c.experts, ("data", "expert"), c.moe_layers
    yield "all-reduce", S32, 1, ("data", "expert"), c.moe_layers
    yield "all-reduce", F32, 1, ("data", "expert"), 1
    experts = len(expert_matrices(c))
    divided = sum(map(len, matrices(c).values())) + experts + 2  # and the embedding and the head
    yield from [("all-reduce", F32, 1, ("data",), 1)] * (2 * divided)
    yield from [("all-reduce", F32, 1, ("expert",), 1)] * (2 * experts)


def state_bytes(c: Config, data: int, expert: int) -> int:
    """Of master weights and moments, the router's biases, and the counters of steps, on a device."""
    divided = sum(layers * rows * columns for layers, rows, columns in _of_layers(c))
    divided += 2 * c.vocabulary * c.hidden
    one_expert = sum(math.prod(shape) for shape in expert_matrices(c).values())
    divided += c.moe_layers * c.experts // expert * one_expert
    whole = c.layers * sum(vectors(c)) + c.hidden + c.moe_layers * c.hidden * c.experts
    biases = ITEM_BYTES[F32] * c.moe_layers * c.experts
    # Of the state, of AdamW, and of its schedule.
    counters = 3 * ITEM_BYTES[S32]
    return STATE_BYTES_OF_A_PARAMETER * (divided // data + whole) + biases + counters


def batch_bytes(c: Config, data: int, expert: int) -> int:
    """Of the sequences, with one token more to predict, on a device."""
    return ITEM_BYTES[S32] * c.batch // (data * expert) * (c.sequence + 1)


def kept_bytes(c: Config, data: int, expert: int) -> dict[str, int]:
    """Of what layers keep for the backward pass on a device: inputs, results of GEMMs, messages."""
    tokens = device_tokens(c, data, expert)
    products = [shape for name, shape in matrices(c)["dense"].items() if name != "down"]
    columns = sum(out for _, out in products)
    dense = tokens * ITEM_BYTES[BF16] * (c.hidden + columns)

    shared = [shape for name, shape in matrices(c)["moe"].items() if name != "shared_down"]
    columns = sum(out for _, out in shared)
    logits = ITEM_BYTES[F32] * c.experts
    message = packed_bytes(c) + (ITEM_BYTES[S32] + ITEM_BYTES[F32]) * c.experts_per_token
    moe = (tokens * (ITEM_BYTES[BF16] * (c.hidden + columns) + logits)
           + message_rows(c, tokens, expert) * message)
    products = 0 if c.remat_experts else expert_products_bytes(c, data, expert)
    return {"dense": c.dense_layers * dense, "moe": c.moe_layers * moe + products}


def expert_products_bytes(c: Config, data: int, expert: int) -> int:
    """Of the results of the routed experts' GEMMs, which are kept unless they are computed again."""
    rows = expert_rows(c, device_tokens(c, data, expert), expert)
    columns = sum(out for _, out in expert_matrices(c).values())
    return c.moe_layers * ITEM_BYTES[BF16] * rows * columns
