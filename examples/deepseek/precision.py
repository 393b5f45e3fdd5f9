"""The one switch between bf16 and FP8: the products of activations with weights.

What is no such product is the same in both: attention between tokens, the router, the embedding and the
output head are bf16 or f32 everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from examples.deepseek.grouped import grouped_dot
from jax_fp8gemm import autodiff

PRECISIONS = ("bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class Ops:
    """Products of bf16 activations with f32 master weights, bf16 results; gradients arrive in f32.

    Attributes:
      dot: (x [*, K], w [K, N]) -> [*, N].
      feed_forward: (x [*, K], gate_up [K, 2F], down [F, N]) -> [*, N], down(silu(gate(x)) * up(x)).
      ragged_feed_forward: (x [M, K], gate_up [G, K, 2F], down [G, F, N], group_sizes [G]) -> [M, N], the same
        with the weights of each row's group.
    """

    dot: Callable
    feed_forward: Callable
    ragged_feed_forward: Callable


def ops(precision: str) -> Ops:
    if precision == "fp8":
        return Ops(autodiff.dot, autodiff.feed_forward, autodiff.ragged_feed_forward)
    if precision == "bf16":
        return Ops(_dot, _feed_forward, _ragged_feed_forward)
    raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def _dot(x, w):
    return jnp.dot(x, w.astype(x.dtype))


def _feed_forward(x, gate_up, down):
    return _dot(_swiglu(_dot(x, gate_up)), down)


def _ragged_feed_forward(x, gate_up, down, group_sizes):
    gate_up, down = gate_up.astype(x.dtype), down.astype(x.dtype)
    return grouped_dot(_swiglu(grouped_dot(x, gate_up, group_sizes)), down, group_sizes)


def _swiglu(gate_up):
    """silu(gate) * up in f32, rounded once."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
