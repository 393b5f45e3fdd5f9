"""The one switch between bf16 and FP8: the products of activations with weights.

What is no such product is the same in both: attention between tokens, the router, the embedding and the
output head are bf16 or f32 everywhere. A third one, f32 in all, shows what rounding would blur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from examples.deepseek.grouped import grouped_dot
from examples.deepseek.mesh import experts_specs
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
      expert_weights: (experts_gate_up [E, D, 2, F], experts_down [E, F, D], mesh axis) -> as
        `ragged_feed_forward` takes them. A mesh axis is one over which D is divided, to be gathered here.
      expert_specs: how both lie on a mesh.
    """

    dtype: jnp.dtype
    dot: Callable
    feed_forward: Callable
    ragged_feed_forward: Callable
    pack: Callable
    unpack: Callable
    expert_weights: Callable
    expert_specs: tuple[PartitionSpec, PartitionSpec]


def ops(precision: str) -> Ops:
    if precision == "fp8":
        return Ops(jnp.dtype(jnp.bfloat16), autodiff.dot, autodiff.feed_forward, autodiff.ragged_feed_forward,
                   quantize, dequantize, partial(_expert_weights, _gathered_in_fp8), experts_specs())
    if precision in ("bf16", REFERENCE):
        dtype = jnp.dtype(jnp.float32 if precision == REFERENCE else jnp.bfloat16)
        return Ops(dtype, _dot, _feed_forward, _ragged_feed_forward, lambda x: x, lambda x, _: x,
                   partial(_expert_weights, partial(_gathered, dtype)), experts_specs())
    raise ValueError(f"precision: expected one of {', '.join((*PRECISIONS, REFERENCE))}, got {precision!r}")


def _dot(x, w):
    return jnp.dot(x, w.astype(x.dtype))


def _feed_forward(x, gate_up, down):
    return _dot(swiglu(_dot(x, gate_up)), down)


def _ragged_feed_forward(x, gate_up, down, group_sizes):
    gate_up, down = gate_up.astype(x.dtype), down.astype(x.dtype)
    return grouped_dot(swiglu(grouped_dot(x, gate_up, group_sizes)), down, group_sizes)


def swiglu(gate_up):
    """silu(gate) * up in f32, rounded once."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _expert_weights(gather, gate_up, down, mesh_axis=None):
    """Of the width F a device has the same part of gate and of up: [E, D, 2, F] becomes [E, D, 2F]."""
    gate_up = gate_up.reshape(*gate_up.shape[:2], -1)
    if mesh_axis is None:
        return gate_up, down
    return gather(gate_up, mesh_axis, -2), gather(down, mesh_axis, -1)


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
    gather = lambda array, along: jax.tree.map(
        lambda leaf: lax.all_gather(leaf, mesh_axis, axis=along % leaf.ndim, tiled=True), array)
    transposed = -3 - axis  # of -1 and -2 the other one
    return PreparedWeight(gather(w, axis), gather(part.forward, transposed), gather(part.backward, axis))
