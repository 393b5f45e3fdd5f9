"""The GEMMs as JAX primitives: result type, batching and lowering, as one table entry each.

Operands are in canonical form: rank 3, [batch, rows, columns], where a leading axis of 1 is shared by the
whole batch, and all vary over the same manual mesh axes (`match_varying`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from jax_fp8gemm import ffi, reference
from jax_fp8gemm.jit.custom_call import DTYPES, gemm_call
from jax_fp8gemm.jit.problem import MAX_SIZE, TMA_ALIGNMENT, GemmProblem
from jax_fp8gemm.operation import Operation, match_varying, register

_DTYPE_NAMES = {jnp.dtype(dtype): name for name, dtype in DTYPES.items()}


# ---- fp8_gemm: lhs [B, M, K], lhs_scale [B, M, Kb], rhs [B, N, K], rhs_scale [B, Nb, Kb], acc [B, M, N]


def _gemm_results(lhs, lhs_scale, rhs, rhs_scale, *accumulator, out_dtype, batch_invariant):
    return [((reference.batch_size(lhs.shape[0], rhs.shape[0]), lhs.shape[1], rhs.shape[1]), out_dtype)]


def _gemm_reference(*operands, out_dtype, batch_invariant):
    return [reference.gemm(*operands, out_dtype=out_dtype)]


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
    return [gemm_call(problem, compiler.build(problem))(lhs, lhs_scale, rhs, rhs_scale, *accumulator)]


def _check_sizes(**sizes):
    for name, size in sizes.items():
        if jax.export.is_symbolic_dim(size) or size > MAX_SIZE:
            raise NotImplementedError(f"fp8_gemm: {name}: the kernel is compiled for a number up to "
                                      f"{MAX_SIZE}, got {size}; use implementation='reference'")


def _gemm_batch(axis, operands, dims, **params):
    """One launch whatever is mapped over: rhs gives more groups, lhs alone more rows."""

    def bind(operands):
        (out,) = gemm_p.bind(*match_varying(*operands), **params)
        return out

    def to_front(operands, dims):
        return [batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)
                for x, dim in zip(operands, dims, strict=True)]

    lhs_mapped, rhs_mapped = (any(dim is not None for dim in pair) for pair in (dims[0:2], dims[2:4]))
    lhs, rhs = operands[0:2], operands[2:4]
    lhs = to_front(lhs, dims[0:2]) if lhs_mapped else lhs
    rhs = to_front(rhs, dims[2:4]) if rhs_mapped else rhs
    accumulator = to_front(operands[4:], dims[4:])
    if rhs_mapped:
        return [_batch_over_groups(bind, lhs, rhs, accumulator, axis.size, lhs_mapped)], [0]
    if lhs_mapped:
        return [_batch_over_rows(bind, lhs, rhs, accumulator, axis.size)], [1]
    # The accumulator is the last term of the sum, so that adding it to the one product gives the same bits.
    return [accumulator[0] + bind([*lhs, *rhs])[None]], [0]


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


gemm_p = register(Operation("fp8_gemm", _gemm_results, _gemm_batch, _gemm_reference, _gemm_hopper))


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
