"""Weights and products of inference: no gradients, and weights that are quantised once and for all.

| weight    | in training          | here, in FP8                              |
|-----------|----------------------|-------------------------------------------|
| matrices  | f32, in parts (FSDP) | ScaledArray [*, N, K], whole along `data` |
| kv_up     | the same             | in bf16, too, for what is cached          |
| embedding, head | the same       | bf16                                      |
| router, norms   | f32            | the same                                  |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from examples.deepseek import precision
from examples.deepseek.mesh import EXPERT, TENSOR, Layout, param_specs, without_data
from examples.deepseek.precision import Ops, swiglu
from examples.deepseek.rows import combine, copies, in_blocks, sort_by_expert
from jax_fp8gemm import (
    ScaledArray,
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_m,
    quantize,
    quantize_swiglu,
)
from jax_fp8gemm.scaling import SQUARE_BLOCKS

_AS_THEY_ARE = ("router", "norm", "q_norm", "kv_norm")
_EXPERTS = ("experts_gate_up", "experts_down")
# Of [E, D, 2, F] and [E, F, D]; a device has all of D.
_TRAINED_EXPERTS = P(None, EXPERT, None, None, TENSOR), P(None, EXPERT, TENSOR, None)


@dataclasses.dataclass(frozen=True)
class InferenceOps(Ops):
    """As Ops, for the weights of inference.

    Attributes:
      weight: (f32 [*, K, N]) -> what the products take.
      masked_feed_forward: (rows [E, M, D], gate_up, down, sizes [E]) -> [E, M, D], of which the first rows of
        each expert mean something.
    """

    weight: Callable
    masked_feed_forward: Callable


def inference_ops(name: str, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> InferenceOps:
    """The products of a precision: "bf16", "f32", or "fp8" with activations of `dtype` between them."""
    experts = P(EXPERT, None, TENSOR), P(EXPERT, TENSOR, None)
    as_they_are = lambda gate_up, down, mesh_axis=None: (gate_up, down)
    if name == "fp8":
        dtype = jnp.dtype(dtype)
        return InferenceOps(
            dtype, *(partial(function, dtype) for function in (_dot, _feed_forward, _ragged_feed_forward)),
            pack=quantize, unpack=lambda packed, _: packed, expert_weights=as_they_are,
            expert_specs=experts[::-1], weight=_scaled,
            masked_feed_forward=partial(_masked_feed_forward, dtype))
    plain = precision.ops(name)
    return InferenceOps(
        plain.dtype, plain.dot, plain.feed_forward, plain.ragged_feed_forward, plain.pack, plain.unpack,
        expert_weights=as_they_are, expert_specs=experts, weight=lambda w: w.astype(plain.dtype),
        masked_feed_forward=_plain_masked_feed_forward)


# ---- weights


def load(params: dict[str, Any], ops: InferenceOps, layout: Layout) -> dict[str, Any]:
    """The weights of inference from a training run's parameters, which may lie on the mesh."""
    specs = param_specs(params)

    def weight(name, w, spec):
        if name in _EXPERTS:
            return _load_experts(_EXPERTS.index(name), w, ops, layout)
        whole = layout.constrain(w, *without_data(spec))
        return whole if name in _AS_THEY_ARE else ops.weight(whole)

    def layers(kind):
        loaded = {block: {name: weight(name, w, specs[kind][block][name]) for name, w in weights.items()}
                  for block, weights in params[kind].items()}
        spec = without_data(specs[kind]["attention"]["kv_up"])
        kv_up = params[kind]["attention"]["kv_up"].astype(ops.dtype)
        loaded["attention"]["kv_up_for_cache"] = layout.constrain(kv_up, *spec)
        return loaded

    outside = {name: layout.constrain(params[name].astype(ops.dtype), *without_data(specs[name]))
               for name in ("embedding", "head")}
    return {**outside, "norm": params["norm"], "dense": layers("dense"), "moe": layers("moe")}


def _load_experts(idx, w, ops, layout):
    """Of all layers; each device has the same part of gate as of up, one behind the other."""
    local = lambda w: ops.weight(w.reshape(*w.shape[:3], -1) if w.ndim == 5 else w)
    if layout.mesh is None:
        return local(w)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=_TRAINED_EXPERTS[idx],
                         out_specs=P(None, *ops.expert_specs[idx]))(w)


def _scaled(w):
    return quantize(w.mT, SQUARE_BLOCKS)


# ---- products


def _dot(dtype, x, w):
    out = fp8_gemm(_rows(x.reshape(-1, x.shape[-1])), w, out_dtype=dtype)
    return out.reshape(*x.shape[:-1], -1)


def _feed_forward(dtype, x, gate_up, down):
    hidden = quantize_swiglu(_dot(dtype, x, gate_up).reshape(-1, gate_up.shape[0]))
    return fp8_gemm(hidden, down, out_dtype=dtype).reshape(*x.shape[:-1], -1)


def _ragged_feed_forward(dtype, x, gate_up, down, group_sizes):
    gates = fp8_gemm_ragged_m(_rows(x), gate_up, group_sizes, out_dtype=dtype)
    hidden = quantize_swiglu(gates, group_sizes=group_sizes)
    return fp8_gemm_ragged_m(hidden, down, group_sizes, out_dtype=dtype)


def _masked_feed_forward(dtype, x, gate_up, down, sizes):
    gates = fp8_gemm_masked(x, gate_up, sizes, out_dtype=dtype)
    return fp8_gemm_masked(quantize_swiglu(gates, group_sizes=sizes), down, sizes, out_dtype=dtype)


def _rows(x):
    """Tokens that came from another device are quantised already."""
    return x if isinstance(x, ScaledArray) else quantize(x)


def _plain_masked_feed_forward(x, gate_up, down, sizes):
    hidden = swiglu(jnp.einsum("emd,edf->emf", x, gate_up))
    return jnp.einsum("emf,efd->emd", hidden, down)


def apply_experts_masked(x, experts, weights, gate_up, down, ops: InferenceOps, capacity=None):
    """`layers.apply_experts` with a place for every token at every expert: a few tokens, in a CUDA graph.

    The shapes are those of the most that can come, the time that of what does.
    """
    # Quantised here, where a token is one row, unless it was before it came from another device.
    x = x if isinstance(x, ScaledArray) else ops.pack(x)
    num_experts = gate_up.shape[0]
    by_expert = in_blocks(sort_by_expert(experts, num_experts, capacity), len(experts))
    in_groups = lambda leaf: leaf.reshape(num_experts, len(experts), -1)
    rows = jax.tree.map(in_groups, copies(x, by_expert.of_tokens))
    out = ops.masked_feed_forward(rows, gate_up, down, by_expert.sizes)
    weights = copies(weights.reshape(-1, 1), by_expert.of_slots)
    return combine(out.reshape(len(weights), -1), weights, by_expert.of_tokens), by_expert.sizes
