"""The operations as JAX primitives: result type, batching and lowering, as one table entry each.

Operands are in canonical form: rank 3, [batch, rows, columns], where a leading axis of 1 is shared by the
whole batch, and all vary over the same manual mesh axes (`match_varying`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType

from jax_fp8gemm import ffi, reference
from jax_fp8gemm.jit.custom_call import DTYPES, gemm_call
from jax_fp8gemm.jit.problem import MAX_SIZE, TMA_ALIGNMENT, GemmProblem

HOPPER = "9.0"  # compute capability
IMPLEMENTATIONS = (None, "hopper", "reference")

_DTYPE_NAMES = {jnp.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one primitive is; `register` makes it from this.

    Attributes:
      name: of the primitive, as a jaxpr shows it.
      result: (*operands, **params) -> shape and dtype of the result.
      batch: (axis, operands, dims, **params) -> result and its batched dimension; dims are as for `jax.vmap`.
      reference: (*operands, **params) -> result, in plain jnp.
      hopper: the same through the custom call; never sees an empty operand or result.
    """

    name: str
    result: Callable
    batch: Callable
    reference: Callable
    hopper: Callable


def register(operation: Operation) -> Primitive:
    """A primitive with the rules of `operation`; its parameter `implementation` picks the lowering."""
    primitive = Primitive(operation.name)

    @primitive.def_abstract_eval
    def type_of_result(*operands, implementation, **params):
        if any(AxisType.Explicit in x.sharding.mesh.axis_types and any(x.sharding.spec) for x in operands):
            raise NotImplementedError(f"{operation.name}: an operand is sharded over an Explicit mesh axis; "
                                      "call it inside jax.shard_map")
        shape, dtype = operation.result(*operands, **params)
        return operands[0].update(shape=shape, dtype=dtype, weak_type=False)

    primitive.def_impl(lambda *operands, **params: _run_eagerly(primitive, tuple(params.items()), *operands))
    batching.fancy_primitive_batchers[primitive] = operation.batch
    mlir.register_lowering(primitive, partial(_lower_elsewhere, operation))
    mlir.register_lowering(primitive, partial(_lower_for_cuda, operation), platform="cuda")
    return primitive


@partial(jax.jit, static_argnums=(0, 1))
def _run_eagerly(primitive, params, *operands):
    return primitive.bind(*operands, **dict(params))


def _lower_for_cuda(operation, ctx, *operands, implementation, **params):
    empty = 0 in ctx.avals_out[0].shape or any(0 in aval.shape for aval in ctx.avals_in)
    if implementation == "reference" or empty:
        return _lower(operation.reference, ctx, operands, params)
    if targets_hopper():
        return _lower(operation.hopper, ctx, operands, params)
    return _lower_elsewhere(operation, ctx, *operands, implementation=implementation, **params)


def _lower_elsewhere(operation, ctx, *operands, implementation, **params):
    if implementation == "hopper":
        platform = " or ".join(ctx.module_context.platforms)
        raise NotImplementedError(
            f"{operation.name}: implementation='hopper' needs an NVIDIA Hopper GPU (compute capability "
            f"{HOPPER}), but is lowered for {platform}; implementation=None runs there too")
    return _lower(operation.reference, ctx, operands, params)


def _lower(function, ctx, operands, params):
    return mlir.lower_fun(partial(function, **params), multiple_results=False)(ctx, *operands)


def targets_hopper() -> bool:
    """Whether lowering for CUDA is for Hopper; where JAX sees no NVIDIA GPU (cross-compilation) it is."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return True
    return all(device.compute_capability == HOPPER for device in devices)


def match_varying(*arrays):
    """The arrays, cast to vary over the same manual mesh axes, as operands must inside shard_map."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset.union(*varying) - axes)) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True)]


# ---- fp8_gemm: lhs [B, M, K], lhs_scale [B, M, Kb], rhs [B, N, K], rhs_scale [B, Nb, Kb], acc [B, M, N]


def _gemm_result(lhs, lhs_scale, rhs, rhs_scale, *accumulator, out_dtype, batch_invariant):
    return (reference.batch_size(lhs.shape[0], rhs.shape[0]), lhs.shape[1], rhs.shape[1]), out_dtype


def _gemm_reference(*operands, out_dtype, batch_invariant):
    return reference.gemm(*operands, out_dtype=out_dtype)


def _gemm_hopper(lhs, lhs_scale, rhs, rhs_scale, *accumulator, out_dtype, batch_invariant):
    from jax_fp8gemm.jit import compiler  # loads NVRTC's bindings, which only this lowering needs

    if padding := -lhs.shape[2] % TMA_ALIGNMENT:
        lhs, rhs = (jnp.pad(x, ((0, 0), (0, 0), (0, padding))) for x in (lhs, rhs))
    (lhs_batch, m, k), (rhs_batch, n, _) = lhs.shape, rhs.shape
    batch = reference.batch_size(lhs_batch, rhs_batch)
    _check_sizes(M=m, N=n, K=k, batch=batch)
    problem = GemmProblem(
        m, n, k, batch, lhs_batched=lhs_batch == batch, rhs_batched=rhs_batch == batch,
        lhs_dtype=_DTYPE_NAMES[lhs.dtype], rhs_dtype=_DTYPE_NAMES[rhs.dtype],
        out_dtype=_DTYPE_NAMES[out_dtype], rhs_scale_rows=reference.rows_per_scale(rhs, rhs_scale),
        accumulate=bool(accumulator), batch_invariant=batch_invariant)
    return gemm_call(problem, compiler.build(problem))(lhs, lhs_scale, rhs, rhs_scale, *accumulator)


def _check_sizes(**sizes):
    for name, size in sizes.items():
        if jax.export.is_symbolic_dim(size) or size > MAX_SIZE:
            raise NotImplementedError(f"fp8_gemm: {name}: the kernel is compiled for a number up to "
                                      f"{MAX_SIZE}, got {size}; use implementation='reference'")


def _gemm_batch(axis, operands, dims, **params):
    """One launch whatever is mapped over: rhs gives more groups, lhs alone more rows."""

    def bind(operands):
        return gemm_p.bind(*match_varying(*operands), **params)

    def to_front(operands, dims):
        return [batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)
                for x, dim in zip(operands, dims, strict=True)]

    lhs_mapped, rhs_mapped = (any(dim is not None for dim in pair) for pair in (dims[0:2], dims[2:4]))
    lhs, rhs = operands[0:2], operands[2:4]
    lhs = to_front(lhs, dims[0:2]) if lhs_mapped else lhs
    rhs = to_front(rhs, dims[2:4]) if rhs_mapped else rhs
    accumulator = to_front(operands[4:], dims[4:])
    if rhs_mapped:
        return _batch_over_groups(bind, lhs, rhs, accumulator, axis.size, lhs_mapped), 0
    if lhs_mapped:
        return _batch_over_rows(bind, lhs, rhs, accumulator, axis.size), 1
    # The accumulator is the last term of the sum, so that adding it to the one product gives the same bits.
    return accumulator[0] + bind([*lhs, *rhs])[None], 0


def _batch_over_rows(bind, lhs, rhs, accumulator, size):
    """lhs, lhs_scale, accumulator [size, B, M, *]: the axis folds into M. Returns [B, size, M, N]."""

    def fold(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], size * x.shape[2], x.shape[3])

    out = bind([*map(fold, lhs), *rhs, *map(fold, accumulator)])
    return out.reshape(out.shape[0], size, lhs[0].shape[2], out.shape[2])


def _batch_over_groups(bind, lhs, rhs, accumulator, size, lhs_mapped):
    """rhs, rhs_scale, accumulator [size, B, *, *]: the axis folds into B. Returns [size, B, M, N]."""
    batch = reference.batch_size(lhs[0].shape[-3], rhs[0].shape[1])

    def fold(x):
        return jnp.broadcast_to(x, (size, batch, *x.shape[-2:])).reshape(size * batch, *x.shape[-2:])

    # An lhs that the whole batch shares, the new axis included, stays one.
    is_shared = not lhs_mapped and lhs[0].shape[0] == 1
    out = bind([*(lhs if is_shared else map(fold, lhs)), *map(fold, rhs), *map(fold, accumulator)])
    return out.reshape(size, batch, *out.shape[1:])


gemm_p = register(Operation("fp8_gemm", _gemm_result, _gemm_batch, _gemm_reference, _gemm_hopper))


# NOTES: a program out of jax.export or out of the compilation cache runs without any lowering here.
if ffi.available():
    ffi.register()


# ---- for transformations that must know the operations by name


def save_gemms(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: keep the results of GEMMs, compute everything else again."""
    return primitive is gemm_p


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=)` needs to let the kernels through."""
    return [jax.export.DisabledSafetyCheck.custom_call(ffi.TARGET)]
