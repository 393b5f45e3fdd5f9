"""Differentiable products: bf16 in, bf16 out, and FP8 GEMMs forward, for the input and for the weight."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from jax_fp8gemm.autodiff_rules import Options, gated_product, product
from jax_fp8gemm.gemm import as_int32_vector
from jax_fp8gemm.mesh.explicit import requested_spec, spec_of
from jax_fp8gemm.operation import IMPLEMENTATIONS, match_varying
from jax_fp8gemm.prepared import PreparedWeight, check_float, prepare
from jax_fp8gemm.quantize import INPUT_DTYPES


def dot(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"] | PreparedWeight,
    *,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: PartitionSpec | NamedSharding | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """x @ w through FP8, differentiable: a drop-in for `jnp.dot` of activations and a weight.

    Both operands are quantised here, 1 x 128 of x and 128 x 128 of w, and so is the gradient that comes back;
    sums are float32. In `jax.grad` x is read once and kept as FP8, transposed, instead of in its own dtype.

    Args:
      x: [*, K] bfloat16, float16 or float32.
      w: [K, N], the same dtypes, not necessarily x's: a float32 master weight is quantised as it is. Or a
        PreparedWeight.
      preferred_element_type: of the result, one of these dtypes; x's by default.
      out_sharding: of the result, on Explicit mesh axes; needed where x and w leave it open, as where K is
        sharded. Gradients lie as x and w do.
      implementation: None takes kernels on Hopper GPUs and plain jnp elsewhere; "hopper" insists on kernels;
        "reference" takes jnp everywhere.

    Returns:
      [*, N]. Gradients have the dtypes of x and of w.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: as for `fp8_gemm`.

    Example:
      >>> x, w = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((256, 128), jnp.bfloat16)
      >>> y, (dx, dw) = jax.value_and_grad(lambda x, w: dot(x, w).sum(), (0, 1))(x, w)
      >>> y, dx[0, 0], dw[0, 0]
      (Array(131072, dtype=bfloat16), Array(128, dtype=bfloat16), Array(4, dtype=bfloat16))
    """
    check_float("dot: x", x, "[*, K]", lambda rank: rank >= 1)
    weight = _as_prepared("dot: w", w, "K N", x.shape[-1], implementation)
    with jax.named_scope("fp8_dot"):
        rows, out_spec = _as_rows(x), _out_spec("dot", out_sharding, x, weight)
        options = _options("dot", rows, [weight], preferred_element_type, implementation, out_spec)
        return _from_rows(product(options, *_matched(rows, weight)), x, out_spec)


def ragged_dot(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"] | PreparedWeight,
    group_sizes: Int32[Array, " G"],
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    group_offset: None = None,
    out_sharding: PartitionSpec | NamedSharding | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """`jax.lax.ragged_dot` through FP8, with its signature: the rows of each group times its rhs.

    Rows past the sum of the sizes are not read, and are zero in the result and in lhs's gradient. A group
    without rows has a gradient of exact zeros. The sizes stay on the device. Quantisation is that of `dot`.

    Args:
      lhs: [M, K] bfloat16, float16 or float32, rows sorted by group.
      rhs: [G, K, N], the same dtypes, not necessarily lhs's. Or a PreparedWeight.
      group_sizes: [G] integers. A negative one counts as zero; rows that do not exist are left out.
      precision: without meaning here; products of FP8 numbers are exact, and sums are float32.
      preferred_element_type: of the result, one of these dtypes; lhs's by default.
      group_offset: only None, as in `jax.lax.ragged_dot` itself.
      out_sharding: as for `dot`. M cannot be sharded: see `fp8_gemm_ragged_m`.
      implementation: as for `dot`.

    Returns:
      [M, N]. Gradients have the dtypes of lhs and of rhs.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: as for `fp8_gemm_ragged_m`; group_offset is not None.

    Example:
      >>> lhs, rhs = jnp.ones((5, 128), jnp.bfloat16), jnp.ones((2, 128, 64), jnp.bfloat16)
      >>> ragged_dot(lhs, rhs * jnp.array([1, 2])[:, None, None], jnp.array([3, 1]))[:, 0]
      Array([128, 128, 128, 256, 0], dtype=bfloat16)
    """
    if group_offset is not None:
        raise NotImplementedError(f"ragged_dot: group_offset: expected None, got {group_offset!r}; cut "
                                  "group_sizes and rhs to the groups that are wanted")
    check_float("ragged_dot: lhs", lhs, "[M, K]", lambda rank: rank == 2)
    weight = _as_prepared("ragged_dot: rhs", rhs, "G K N", lhs.shape[-1], implementation)
    group_sizes = as_int32_vector("ragged_dot: group_sizes", group_sizes, weight.shape[0])
    out_spec = _out_spec("ragged_dot", out_sharding, lhs, weight)
    options = _options("ragged_dot", lhs, [weight], preferred_element_type, implementation, out_spec)
    with jax.named_scope("fp8_ragged_dot"):
        return product(options, *_matched(lhs, weight, group_sizes=group_sizes))


def feed_forward(
    x: Float[Array, "*batch K"],
    gate_up: Float[Array, "K 2F"] | PreparedWeight,
    down: Float[Array, "F N"] | PreparedWeight,
    *,
    out_sharding: PartitionSpec | NamedSharding | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """(silu(x @ gate) * (x @ up)) @ down through FP8: a gated feed-forward layer in one piece.

    What `dot` and SwiGLU make one after the other, with less memory traffic: SwiGLU and its backward pass are
    fused with the quantisation of their results, in float32, and the layer keeps x in FP8 and x @ gate_up, of
    which the backward pass computes the hidden activations again.

    Args:
      x: [*, K] bfloat16, float16 or float32.
      gate_up: [K, 2F], the gate's columns and then up's. Or a PreparedWeight.
      down: [F, N]. Or a PreparedWeight.
      out_sharding, implementation: as for `dot`.

    Returns:
      [*, N] of x's dtype. Gradients have the dtypes of what they are gradients of.

    Raises:
      ValueError, NotImplementedError: as for `dot`.

    Example:
      >>> x, gate_up, down = jnp.full((2, 128), 0.5), jnp.full((128, 256), 1 / 64), jnp.ones((128, 64))
      >>> feed_forward(x, gate_up, down)[0, 0].round(1)  # 128 silu(1)
      Array(93.6, dtype=float32)
    """
    check_float("feed_forward: x", x, "[*, K]", lambda rank: rank >= 1)
    weights = _as_gated("feed_forward", x, gate_up, down, ("K 2F", "F N"), implementation)
    with jax.named_scope("fp8_feed_forward"):
        rows, out_spec = _as_rows(x), _out_spec("feed_forward", out_sharding, x, weights[1])
        options = _options("feed_forward", rows, weights, None, implementation, out_spec)
        return _from_rows(gated_product(options, *_matched(rows, *weights)), x, out_spec)


def ragged_feed_forward(
    x: Float[Array, "M K"],
    gate_up: Float[Array, "G K 2F"] | PreparedWeight,
    down: Float[Array, "G F N"] | PreparedWeight,
    group_sizes: Int32[Array, " G"],
    *,
    out_sharding: PartitionSpec | NamedSharding | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """`feed_forward` with the weights of each row's group: the experts of a Mixture-of-Experts layer.

    Rows and sizes are as for `ragged_dot`.

    Args:
      x: [M, K] bfloat16, float16 or float32, rows sorted by group.
      gate_up: [G, K, 2F]. Or a PreparedWeight.
      down: [G, F, N]. Or a PreparedWeight.
      group_sizes: [G] integers.
      out_sharding, implementation: as for `ragged_dot`.

    Returns:
      [M, N] of x's dtype.

    Raises:
      ValueError, NotImplementedError: as for `ragged_dot`.

    Example:
      >>> x, gate_up, down = jnp.full((4, 128), 0.5), jnp.full((2, 128, 256), 1 / 64), jnp.ones((2, 128, 64))
      >>> ragged_feed_forward(x, gate_up, down, jnp.array([1, 2]))[:, 0].round(1)
      Array([93.6, 93.6, 93.6,  0. ], dtype=float32)
    """
    function = "ragged_feed_forward"
    check_float(f"{function}: x", x, "[M, K]", lambda rank: rank == 2)
    weights = _as_gated(function, x, gate_up, down, ("G K 2F", "G F N"), implementation)
    group_sizes = as_int32_vector(f"{function}: group_sizes", group_sizes, weights[0].shape[0])
    out_spec = _out_spec(function, out_sharding, x, weights[1])
    options = _options(function, x, weights, None, implementation, out_spec)
    with jax.named_scope("fp8_ragged_feed_forward"):
        return gated_product(options, *_matched(x, *weights, group_sizes=group_sizes))


# ---- arguments


def _as_prepared(name, w, axes, contracted, implementation):
    """The weight, prepared where it is not. `axes` are its shape's, such as "G K N"."""
    names = axes.split()
    expected = f"[{', '.join(names)}]"
    master = w.master if isinstance(w, PreparedWeight) else w
    check_float(name, master, f"{expected} or a PreparedWeight", lambda rank: rank == len(names))
    if master.shape[-2] != contracted:
        raise ValueError(f"{name}: expected {names[-2]} = {contracted} in the last axis but one, got shape "
                         f"{tuple(master.shape)}")
    return w if isinstance(w, PreparedWeight) else prepare(w, implementation=implementation)


def _as_gated(function, x, gate_up, down, axes, implementation):
    gate_up = _as_prepared(f"{function}: gate_up", gate_up, axes[0], x.shape[-1], implementation)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{function}: gate_up: expected an even number of columns, gate and up, got shape "
                         f"{gate_up.shape}")
    down = _as_prepared(f"{function}: down", down, axes[1], gate_up.shape[-1] // 2, implementation)
    if down.shape[:-2] != gate_up.shape[:-2]:
        raise ValueError(f"{function}: down: expected G = {gate_up.shape[0]} in the first axis, as in "
                         f"gate_up of shape {gate_up.shape}, got shape {down.shape}")
    return gate_up, down


def _as_rows(x):
    """[*, K] -> [T, K]. On Explicit axes the tokens lie as the first leading axis does."""
    spec = spec_of(x)
    shape = math.prod(x.shape[:-1]), x.shape[-1]
    return jnp.reshape(x, shape, out_sharding=None if spec is None else _spec_of_rows(spec))


def _from_rows(out, x, out_spec):
    """[T, N] -> [*, N]. On Explicit axes it lies as asked, or with its tokens in the first leading axis."""
    spec = spec_of(out)
    if spec is not None and out_spec is None:
        out_spec = PartitionSpec(*[spec[0], *[None] * (x.ndim - 2)][:x.ndim - 1], spec[-1])
    return jnp.reshape(out, (*x.shape[:-1], out.shape[-1]), out_sharding=out_spec)


def _out_spec(function, out_sharding, x, weight):
    """What the caller asks of the result [*, N], with an entry for each axis."""
    if out_sharding is None:
        return None
    shape = *x.shape[:-1], weight.shape[-1]
    return requested_spec(function, out_sharding, shape, jax.typeof(x).sharding.mesh)


def _spec_of_rows(spec):
    return PartitionSpec(spec[0] if len(spec) > 1 else None, spec[-1])


def _options(function, rows, weights, preferred_element_type, implementation, out_spec):
    out_dtype = jnp.dtype(rows.dtype if preferred_element_type is None else preferred_element_type)
    if out_dtype not in INPUT_DTYPES:
        raise ValueError(f"{function}: preferred_element_type: expected bfloat16, float16 or float32, got "
                         f"{out_dtype}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    weight_dtypes = tuple(jnp.dtype(weight.dtype) for weight in weights)
    weight_specs = tuple(spec_of(weight.master) for weight in weights)
    out_spec = None if out_spec is None else _spec_of_rows(out_spec)
    return Options(jnp.dtype(rows.dtype), weight_dtypes, out_dtype, implementation, spec_of(rows),
                   weight_specs, out_spec)


def _matched(x, *weights, group_sizes=None):
    """group_sizes, x and the weights, all varying over the same manual mesh axes.

    The cast of a master weight stands in front of the rules, so that it is transposed there: to the sum over
    the mesh axes that the weight is the same on.
    """
    sizes = [] if group_sizes is None else [group_sizes]
    x, *rest = match_varying(jnp.asarray(x), *[weight.master for weight in weights], *sizes)
    weights = [dataclasses.replace(weight, master=master)
               for weight, master in zip(weights, rest[:len(weights)], strict=True)]
    return rest[-1] if sizes else None, x, *weights
