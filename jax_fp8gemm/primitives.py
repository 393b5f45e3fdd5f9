"""The GEMMs as JAX primitives: result type, batching and lowering, written once for all kinds.

Operands are in canonical form, all varying over the same manual mesh axes (`match_varying`):

| primitive          | lhs          | rhs          | group_sizes | accumulator  | result       |
|--------------------|--------------|--------------|-------------|--------------|--------------|
| `gemm_p`           | [B, M, K]    | [B, N, K]    |             | [B, M, N]    | [B, M, N]    |
| `gemm_ragged_m_p`  | [B, M, K]    | [B, G, N, K] | [B, G]      |              | [B, M, N]    |
| `gemm_masked_p`    | [B, G, M, K] | [B, G, N, K] | [B, G]      |              | [B, G, M, N] |
| `gemm_ragged_k_p`  | [B, M, K]    | [B, N, K]    | [B, G]      | [B, G, M, N] | [B, G, M, N] |

lhs_scale comes after lhs, rhs_scale after rhs, with the leading axes of the values. For either pair B may be
1: then the whole batch shares it. B is the axis that `vmap` fills.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from jax_fp8gemm import ffi, reference, sharding
from jax_fp8gemm.jit.custom_call import DTYPES, gemm_call
from jax_fp8gemm.jit.problem import (
    DENSE,
    MASKED,
    MAX_SIZE,
    RAGGED_K,
    RAGGED_M,
    TMA_ALIGNMENT,
    GemmProblem,
)
from jax_fp8gemm.operation import Operation, match_varying, register

_DTYPE_NAMES = {jnp.dtype(dtype): name for name, dtype in DTYPES.items()}
_NUM_FACTORS = 4  # operands that are multiplied; group sizes and an accumulator come after them


# ---- results and lowering, whatever the kind


def _results(kind, lhs, lhs_scale, rhs, rhs_scale, *rest, out_dtype, **_):
    m, n = lhs.shape[-2], rhs.shape[-2]
    if kind == DENSE:
        return [((reference.batch_size(lhs.shape[0], rhs.shape[0]), m, n), out_dtype)]
    batch, groups = rest[0].shape
    return [((batch, m, n) if kind == RAGGED_M else (batch, groups, m, n), out_dtype)]


def _reference(function, *operands, out_dtype, batch_invariant=False, expected_m=None):
    return [function(*operands, out_dtype=out_dtype)]


def _hopper(kind, *operands, out_dtype, **hints):
    from jax_fp8gemm.jit import compiler  # loads NVRTC's bindings, which only this lowering needs

    lhs, lhs_scale, rhs, rhs_scale, *rest = operands
    lhs, rhs = map(_align_rows, (lhs, rhs))
    (out_shape, _), = _results(kind, lhs, lhs_scale, rhs, rhs_scale, *rest, out_dtype=out_dtype)
    (batch, *_, m, n), k = out_shape, lhs.shape[-1]
    groups = 1 if kind == DENSE else rest[0].shape[1]
    _check_sizes(kind, M=m, N=n, K=k, G=groups, batch=batch)
    if kind in (RAGGED_M, MASKED):  # each is one axis of a tensor map
        _check_sizes(kind, **{"groups of all batches": batch * groups,
                              "rows of all groups": math.prod(out_shape[:-1])})
    problem = GemmProblem(
        m, n, k, batch, lhs_batched=lhs.shape[0] == batch, rhs_batched=rhs.shape[0] == batch, kind=kind,
        groups=groups, lhs_dtype=_DTYPE_NAMES[lhs.dtype], rhs_dtype=_DTYPE_NAMES[rhs.dtype],
        out_dtype=_DTYPE_NAMES[out_dtype], rhs_scale_rows=reference.rows_per_scale(rhs, rhs_scale),
        accumulate=len(rest) > (kind != DENSE), **hints)
    return [gemm_call(problem, compiler.build(problem))(lhs, lhs_scale, rhs, rhs_scale, *rest)]


def _align_rows(x):
    """K filled up to whole 16 bytes: the copy engine reads no other rows."""
    padding = -x.shape[-1] % TMA_ALIGNMENT
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, padding),)) if padding else x


def _check_sizes(kind, **sizes):
    for name, size in sizes.items():
        if jax.export.is_symbolic_dim(size) or size > MAX_SIZE:
            raise NotImplementedError(f"{_NAMES[kind]}: {name}: the kernel is compiled for a number up to "
                                      f"{MAX_SIZE}, got {size}; use implementation='reference'")


# ---- batching: one launch whatever is mapped over


def _batch(kind, primitive, axis, operands, dims, **params):
    if all(dim is None for dim in dims):  # JAX asks even then
        return primitive.bind(*operands, **params), [None]

    def bind(*operands):
        (out,) = primitive.bind(*match_varying(*operands), **params)
        return out

    num_factors = _NUM_FACTORS + (kind != DENSE)
    if all(dim is None for dim in dims[:num_factors]):
        # An accumulator is the last term of the sum: adding it to the one product gives the same bits.
        return [_to_front(axis, operands[-1], dims[-1]) + bind(*operands[:num_factors])[None]], [0]
    if kind == DENSE and all(dim is None for dim in dims[2:_NUM_FACTORS]):
        return [_batch_over_rows(bind, axis, operands, dims)], [1]
    return [_batch_over_batch(bind, kind, axis, operands, dims)], [0]


def _batch_over_rows(bind, axis, operands, dims):
    """lhs, lhs_scale, accumulator [size, B, M, *]: the axis folds into M. Returns [B, size, M, N]."""

    def fold(x, dim):
        x = jnp.moveaxis(_to_front(axis, x, dim), 0, 1)
        return x.reshape(x.shape[0], axis.size * x.shape[2], x.shape[3])

    out = bind(*map(fold, operands[:2], dims[:2]), *operands[2:4], *map(fold, operands[4:], dims[4:]))
    return out.reshape(out.shape[0], axis.size, _unmapped_shape(operands[0], dims[0])[1], out.shape[2])


def _batch_over_batch(bind, kind, axis, operands, dims):
    """All operands: the axis folds into B, in front of what B has been. Returns [size, *result]."""
    leading = [_unmapped_shape(x, dim)[0] for x, dim in zip(operands, dims, strict=True)]
    batch = reference.batch_size(leading[0], leading[2]) if kind == DENSE else leading[_NUM_FACTORS]

    def fold(x, dim):
        x = _to_front(axis, x, dim)
        return jnp.broadcast_to(x, (axis.size, batch, *x.shape[2:])).reshape(axis.size * batch, *x.shape[2:])

    def fold_pair(values, scales):
        # A pair that the whole batch shares, the new axis included, stays one.
        if dims[values] is dims[scales] is None and leading[values] == 1:
            return operands[values], operands[scales]
        return fold(operands[values], dims[values]), fold(operands[scales], dims[scales])

    out = bind(*fold_pair(0, 1), *fold_pair(2, 3), *map(fold, operands[4:], dims[4:]))
    return out.reshape(axis.size, batch, *out.shape[1:])


def _unmapped_shape(x, dim):
    return [size for i, size in enumerate(x.shape) if i != dim]


def _to_front(axis, x, dim):
    return batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)


# ---- the table

_NAMES = {DENSE: "fp8_gemm", RAGGED_M: "fp8_gemm_ragged_m", MASKED: "fp8_gemm_masked",
          RAGGED_K: "fp8_gemm_ragged_k"}
_REFERENCES = {DENSE: reference.gemm, RAGGED_M: reference.gemm_ragged_m, MASKED: reference.gemm_masked,
               RAGGED_K: reference.gemm_ragged_k}
_RULES = {DENSE: sharding.gemm, RAGGED_M: sharding.gemm_ragged_m, MASKED: sharding.gemm_masked,
          RAGGED_K: sharding.gemm_ragged_k}

PRIMITIVES = {
    kind: register(Operation(name, partial(_results, kind), partial(_batch, kind),
                             partial(_reference, _REFERENCES[kind]), partial(_hopper, kind), _RULES[kind]))
    for kind, name in _NAMES.items()
}
gemm_p, gemm_ragged_m_p, gemm_masked_p, gemm_ragged_k_p = PRIMITIVES.values()


# NOTES: a program out of jax.export or out of the compilation cache runs without any lowering here.
if ffi.available():
    ffi.register()


# ---- for transformations that must know the operations by name


def save_gemms(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: keep the results of GEMMs, compute everything else again."""
    return primitive in PRIMITIVES.values()


def save_dense_gemms(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: keep the results of dense GEMMs; compute those of grouped ones again.

    What experts make of tokens is most of what a layer keeps with `save_gemms`.
    """
    return primitive is gemm_p


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=)` needs to let the kernels through."""
    return [jax.export.DisabledSafetyCheck.custom_call(ffi.TARGET)]
