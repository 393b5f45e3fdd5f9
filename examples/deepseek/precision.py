"""The one switch between bf16 and FP8: the products of activations with weights.

What is no such product is the same in both: attention between tokens, the router, the embedding and the
output head are bf16 or f32 everywhere. A third
one, f32 in all, shows what rounding would blur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from examples.deepseek.grouped import grouped_dot
from jax_fp8gemm import PreparedWeight, autodiff, dequantize, prepare, quantize
from jax_fp8gemm.scaling import SQUARE_BLOCKS

PRECISIONS = ("bf16", "fp8")  # that are compared
REFERENCE = "f32"


@dataclasses.dataclass(frozen=True)
class Ops:
    """Products of activations with f32 master weights; gradients arrive in f32.

    Attributes:
      dtype: of activations, and so of results.
      dot: (x [*, K], w [K, N]) -> [*, N].
      feed_forward: (x [*, K], gate_up [K, 2F], down [F, N]) -> [*, N], down(silu(gate(x)) * up(x)).
      ragged_feed_forward: (x [M, K], gate_up [G, K, 2F], down [G, F, N], group_sizes [G]) -> [M, N], the same
        with the weights of each row's group.
      pack: (x [T, D]) -> what travels between devices in its place, a tree of arrays with T in front.
      unpack: (that, dtype) -> [T, D].
      gathered: (w [*, K, N], mesh axis, axis) -> the whole of a weight of which this device has a part of the
        axis -1 or -2, as the products take it.
    """

    dtype: jnp.dtype
    dot: Callable
    feed_forward: Callable
    ragged_feed_forward: Callable
    pack: Callable
    unpack: Callable
    gathered: Callable


def ops(precision: str) -> Ops:
    if precision == "fp8":
        return Ops(jnp.dtype(jnp.bfloat16), autodiff.dot, autodiff.feed_forward, autodiff.ragged_feed_forward,
                   quantize, dequantize, _gathered_in_fp8)
    if precision in ("bf16", REFERENCE):
        dtype = jnp.dtype(jnp.float32 if precision == REFERENCE else jnp.bfloat16)
        return Ops(dtype, _dot, _feed_forward, _ragged_feed_forward, lambda x: x, lambda x, _: x,
                   partial(_gathered, dtype))
    raise ValueError(f"precision: expected one of {', '.join((*PRECISIONS, REFERENCE))}, got {precision!r}")


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


def _gathered(dtype, w, mesh_axis, axis):
    return lax.all_gather(w.astype(dtype), mesh_axis, axis=axis % w.ndim, tiled=True)


def _gathered_in_fp8(w, mesh_axis, axis):
    """Gathered after it is quantised, where the part is whole blocks.

    The master weight is gathered for its gradient alone, which is summed up and cut into parts again; its
    values are used nowhere, so that XLA leaves out their way.
    """
    if w.shape[axis] % SQUARE_BLOCKS[0]:
        return _gathered(w.dtype, w, mesh_axis, axis)
    part = prepare(w)
    gather = lambda array, axis: jax.tree.map(
        lambda leaf: lax.all_gather(leaf, mesh_axis, axis=axis % leaf.ndim, tiled=True), array)
    transposed = -3 - axis
    return PreparedWeight(gather(w, axis), gather(part.forward, transposed), gather(part.backward, axis))
