"""Grouped GEMMs that a JAX user can call: ours, jax.lax.ragged_dot and tokamax's in bf16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.operands import SCALE_BLOCK, GroupedOperands, tokens_in_blocks
from benchmarks.peers.base import Absent, Unsupported
from benchmarks.peers.jax_peers import JaxPeer, dequantize
from benchmarks.workloads import GroupedWorkload
from jax_fp8gemm import ScaledArray, fp8_gemm_masked, fp8_gemm_ragged_k, fp8_gemm_ragged_m

_ROWS, _SQUARES = (1, SCALE_BLOCK), (SCALE_BLOCK, SCALE_BLOCK)


class GroupedFp8Gemm(JaxPeer):
    title = "jax_fp8gemm"
    note = "fp8_gemm_ragged_m, _masked and _ragged_k under jax.jit; 1x128 scales stored with rows fastest"

    def gemm(self, workload, lhs, lhs_scale, rhs, rhs_scale, group_sizes):
        lhs = ScaledArray(lhs, lhs_scale, _ROWS)
        if workload.kind == "ragged_k":
            return fp8_gemm_ragged_k(lhs, ScaledArray(rhs, rhs_scale, _ROWS), group_sizes)
        rhs = ScaledArray(rhs, rhs_scale, _SQUARES)
        if workload.kind == "masked":
            expected = workload.expected_group_size
            return fp8_gemm_masked(lhs, rhs, group_sizes, expected_group_size=expected)
        return fp8_gemm_ragged_m(lhs, rhs, group_sizes)

    def arguments(self, workload):
        struct, fp8 = jax.ShapeDtypeStruct, jnp.float8_e4m3fn
        lhs, rhs = struct(workload.lhs_shape, fp8), struct(workload.rhs_shape, fp8)
        lhs_scale, rhs_scale = (
            struct(shape, jnp.float32) for shape in (workload.lhs_scale_shape, workload.rhs_scale_shape)
        )
        structs = lhs, lhs_scale, rhs, rhs_scale, struct((workload.groups,), jnp.int32)
        return tuple(zip(structs, self._formats(workload), strict=True))

    def arrays(self, operands):
        found = (
            _to_e4m3(operands.lhs),
            operands.lhs_scale,
            _to_e4m3(operands.rhs),
            operands.rhs_scale,
            operands.group_sizes,
        )
        formats = self._formats(operands.workload)
        return tuple(self._put(x, layout) for x, layout in zip(found, formats, strict=True))

    def _formats(self, workload):
        rhs_scale = self._rows_fastest() if workload.kind == "ragged_k" else None
        return None, self._rows_fastest(len(workload.lhs_shape)), None, rhs_scale, None


class RaggedDot(JaxPeer):
    """bf16 on the tokens that there are, one group's after the other's: a masked workload is packed.

    Only on workloads tagged for it, and kernel time alone: XLA tunes each of its programs for long.
    """

    title = "lax.ragged_dot bf16"
    note = "jax.lax.ragged_dot on dequantised tokens, packed, rhs [G, K, N]; ragged_dot_general for ragged K"

    def refusal(self, workload: GroupedWorkload) -> str | None:
        """Why it does not take a workload."""
        return None if "ragged_dot" in workload.tags else "compared on some of the workloads"

    def prepare(self, workloads, programs=False):
        super().prepare([workload for workload in workloads if not self.refusal(workload)])

    def bind(self, operands):
        if reason := self.refusal(operands.workload):
            raise Unsupported(reason)
        return super().bind(operands)

    def bind_program(self, operands):
        return None

    def gemm(self, workload, lhs, rhs, group_sizes):
        if workload.kind != "ragged_k":
            return jax.lax.ragged_dot(lhs, rhs, group_sizes)
        contracting = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(
            lhs, rhs, group_sizes, contracting, preferred_element_type=jnp.float32
        )

    def arguments(self, workload):
        if workload.kind == "ragged_k":
            lhs, rhs = (workload.tokens, workload.m), (workload.tokens, workload.n)
        else:
            lhs, rhs = (workload.tokens, workload.k), (workload.groups, workload.k, workload.n)
        bf16 = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        return self._row_major(bf16(lhs), bf16(rhs), jax.ShapeDtypeStruct((workload.groups,), jnp.int32))

    def arrays(self, operands):
        return tuple(self._put(x) for x in _in_bf16(operands))

    def to_host(self, workload, result, rows):
        if workload.kind == "masked":
            rows = np.searchsorted(workload.valid_rows, rows)
        return super().to_host(workload, result, rows)


class Tokamax(RaggedDot):
    title = "tokamax bf16"
    note = "tokamax.ragged_dot, its own choice of implementation, on the operands of lax.ragged_dot"

    def __init__(self):
        super().__init__()
        try:
            import tokamax
        except Exception as error:  # its import builds Pallas kernels' tables, which fails in many ways
            raise Absent(f"tokamax cannot be imported: {type(error).__name__}: {error}") from None
        self._ragged_dot = tokamax.ragged_dot

    def _compile(self, workload, calls):
        try:
            return super()._compile(workload, calls)
        except ValueError as error:  # such as for numbers of tokens that are no multiple of 8
            raise Unsupported(f"tokamax: {str(error).splitlines()[0]}") from None

    def gemm(self, workload, lhs, rhs, group_sizes):
        return self._ragged_dot(lhs, rhs, group_sizes=group_sizes, preferred_element_type=jnp.bfloat16)

    def refusal(self, workload):
        if workload.kind == "ragged_k":
            return "tokamax.ragged_dot has no ragged contraction"
        return super().refusal(workload)


@jax.jit
def _to_e4m3(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


def _in_bf16(operands: GroupedOperands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """lhs [tokens, K], rhs [G, K, N] and sizes; for ragged K lhs [tokens, M] and rhs [tokens, N]."""
    workload = operands.workload
    if workload.kind == "ragged_k":
        tokens = np.flatnonzero(tokens_in_blocks(workload.group_sizes))
        lhs, rhs = (
            dequantize(_to_e4m3(bits), scale, 1)[:, tokens].T
            for bits, scale in ((operands.lhs, operands.lhs_scale), (operands.rhs, operands.rhs_scale))
        )
        return lhs, rhs, operands.group_sizes
    lhs = dequantize(_to_e4m3(operands.lhs), operands.lhs_scale, 1)
    rhs = dequantize(_to_e4m3(operands.rhs), operands.rhs_scale, SCALE_BLOCK)
    packed = lhs.reshape(-1, workload.k)[workload.valid_rows]
    return packed, jnp.swapaxes(rhs, 1, 2), operands.group_sizes
