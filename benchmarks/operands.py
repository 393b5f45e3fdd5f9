"""Random operands, the same for every peer: of dense GEMMs on the host, of grouped ones on the device.

FP8 travels as uint8 bits, which every framework can view as its own type. The values are those of quantised
normal data (the exponents, and so the power that the tensor cores draw, are real); scales are random, so
that a wrong scale index shows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from benchmarks.workloads import SCALE_BLOCK, GroupedWorkload, Workload

if TYPE_CHECKING:
    import jax

_CHECKED_ROWS, _CHECKED_COLUMNS = 16, 64
_TYPICAL_AMAX = 2.7  # of 128 normal numbers: the magnitude that quantisation maps to the largest e4m3
_E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Operands:
    """The operands of one dense GEMM; M, N, K as in `workload`.

    Attributes:
      lhs: uint8 [M, K], bits of e4m3.
      lhs_scale: f32 [M, ceil(K/128)].
      rhs: uint8 [N, K], bits of e4m3.
      rhs_scale: f32 [ceil(N/128), ceil(K/128)].
    """

    workload: Workload
    lhs: np.ndarray
    lhs_scale: np.ndarray
    rhs: np.ndarray
    rhs_scale: np.ndarray

    @property
    def checked_rows(self) -> np.ndarray:
        """Rows of the result that `error` wants to see."""
        return _evenly(self.workload.m, _CHECKED_ROWS)

    @functools.cached_property
    def _references(self) -> dict[bool, np.ndarray]:
        return {}

    def error(self, rows: np.ndarray, uses_scales: bool = True) -> float:
        """Relative error of the checked rows of a result, [rows, N] f32."""
        if uses_scales not in self._references:
            self._references[uses_scales] = dequantized_product(self, self.checked_rows, uses_scales)
        return relative_error(rows, self._references[uses_scales])


@dataclasses.dataclass(frozen=True)
class GroupedOperands:
    """The operands of one grouped GEMM, on JAX's device; shapes as in `GroupedWorkload`.

    Attributes:
      lhs, rhs: uint8, bits of e4m3.
      lhs_scale: f32 [*, M, ceil(K/128)].
      rhs_scale: f32 [G, ceil(N/128), ceil(K/128)], or [N, ceil(K/128)] for ragged_k.
      group_sizes: int32 [G].
    """

    workload: GroupedWorkload
    lhs: jax.Array
    lhs_scale: jax.Array
    rhs: jax.Array
    rhs_scale: jax.Array
    group_sizes: jax.Array

    @property
    def checked_rows(self) -> np.ndarray:
        """Rows of the result, its leading axes flattened, that `error` wants to see."""
        rows = self.workload.valid_rows
        return rows[_evenly(len(rows), _CHECKED_ROWS)]

    def error(self, rows: np.ndarray, uses_scales: bool = True) -> float:
        """Relative error of the checked rows of a result, [rows, N] f32, on some columns."""
        if not uses_scales:
            raise ValueError("error: expected a peer that uses the scales, got one that does not")
        columns = _evenly(self.workload.n, _CHECKED_COLUMNS)
        return relative_error(rows[:, columns], self._reference)

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        """f32: the checked rows and columns of the product of the dequantised operands."""
        return np.stack([self._reference_row(int(row)) for row in self.checked_rows])

    def _reference_row(self, row: int) -> np.ndarray:
        workload, columns = self.workload, _evenly(self.workload.n, _CHECKED_COLUMNS)
        if workload.kind == "ragged_k":
            g, m = divmod(row, workload.m)
            blocks = [-(-size // SCALE_BLOCK) for size in workload.group_sizes]
            k_blocks = slice(sum(blocks[:g]), sum(blocks[: g + 1]))
            k = slice(k_blocks.start * SCALE_BLOCK, k_blocks.stop * SCALE_BLOCK)
            lhs = _dequantize(self.lhs[m : m + 1, k], self.lhs_scale[m : m + 1, k_blocks])
            rhs = _dequantize(self.rhs[columns, k], self.rhs_scale[columns, k_blocks])
            return (lhs @ rhs.T)[0]
        if workload.kind == "masked":
            g, m = divmod(row, workload.m)
            at = g, slice(m, m + 1)
        else:
            g = int(np.searchsorted(np.cumsum(workload.group_sizes), row, side="right"))
            at = slice(row, row + 1)
        lhs = _dequantize(self.lhs[at], self.lhs_scale[at])
        return (lhs @ _dequantize(self.rhs[g, columns], self.rhs_scale[g, columns // SCALE_BLOCK]).T)[0]


def _evenly(size: int, count: int) -> np.ndarray:
    """At most `count` indices below `size`, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def _table(rng: np.random.Generator) -> np.ndarray:
    """2^16 values. Drawing bits and looking them up here is ten times faster than rounding normal numbers."""
    normal = rng.standard_normal(1 << 16) * (_E4M3_MAX / _TYPICAL_AMAX)
    return np.clip(normal, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _values(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    table = _table(rng)
    return table[rng.integers(0, 1 << 16, size=(rows, columns), dtype=np.uint16)]


def _scales(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.uniform(0.5, 2.0, size=(rows, columns)).astype(np.float32) * np.float32(
        _TYPICAL_AMAX / _E4M3_MAX
    )


def random_operands(workload: Workload, seed: int = 0) -> Operands:
    """Random operands of a workload; the same seed gives the same bits everywhere."""
    rng = np.random.default_rng([seed, workload.m, workload.n, workload.k])
    k_blocks = -(-workload.k // SCALE_BLOCK)
    return Operands(
        workload,
        lhs=_values(rng, workload.m, workload.k),
        lhs_scale=_scales(rng, workload.m, k_blocks),
        rhs=_values(rng, workload.n, workload.k),
        rhs_scale=_scales(rng, -(-workload.n // SCALE_BLOCK), k_blocks),
    )


def random_grouped_operands(workload: GroupedWorkload, seed: int = 0) -> GroupedOperands:
    """Random operands of a workload; the same seed gives the same bits everywhere."""
    import jax
    import jax.numpy as jnp

    table, keys = jnp.asarray(_table(np.random.default_rng(seed))), jax.random.split(jax.random.key(seed), 4)

    @functools.partial(jax.jit, static_argnums=1)
    def values(key, shape):
        *leading, rows, k = shape
        draw = lambda key: table[jax.random.bits(key, (rows, k), jnp.uint16)]
        # One matrix after the other: bits take twice the memory of values.
        return jax.lax.map(draw, jax.random.split(key, math.prod(leading))).reshape(shape)

    def scales(key, shape):
        return jax.random.uniform(key, shape, minval=0.5, maxval=2.0) * (_TYPICAL_AMAX / _E4M3_MAX)

    lhs, rhs = values(keys[0], workload.lhs_shape), values(keys[1], workload.rhs_shape)
    if workload.kind == "ragged_k":
        is_token = jnp.asarray(tokens_in_blocks(workload.group_sizes))
        lhs, rhs = (jnp.where(is_token, x, jnp.uint8(0)) for x in (lhs, rhs))
    return GroupedOperands(
        workload,
        lhs=lhs,
        lhs_scale=scales(keys[2], workload.lhs_scale_shape),
        rhs=rhs,
        rhs_scale=scales(keys[3], workload.rhs_scale_shape),
        group_sizes=jnp.asarray(workload.group_sizes, jnp.int32),
    )


def tokens_in_blocks(group_sizes: tuple[int, ...]) -> np.ndarray:
    """Which columns of ragged K hold a token; the others fill up the last block of a group."""
    return np.concatenate([np.arange(-(-size // SCALE_BLOCK) * SCALE_BLOCK) < size for size in group_sizes])


def padded_rows(group_sizes: tuple[int, ...], alignment: int = SCALE_BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """The layout in which every group begins at a multiple of `alignment` rows.

    Returns:
      The row of each token, int64, and the group of each row, int32, -1 for padding.
    """
    groups = [np.repeat([g, -1], [size, -size % alignment]) for g, size in enumerate(group_sizes)]
    group_of_row = np.concatenate(groups).astype(np.int32)
    return np.flatnonzero(group_of_row >= 0), group_of_row


def dequantized_product(operands: Operands, rows: np.ndarray, uses_scales: bool = True) -> np.ndarray:
    """f32 [len(rows), N]: those rows of the product of the dequantised operands, or of their bare values."""
    n, k = operands.workload.n, operands.workload.k
    lhs, rhs = _to_f32(operands.lhs[rows]), _to_f32(operands.rhs)
    if uses_scales:
        lhs *= np.repeat(operands.lhs_scale[rows], SCALE_BLOCK, axis=1)[:, :k]
        rhs *= np.repeat(np.repeat(operands.rhs_scale, SCALE_BLOCK, axis=0)[:n], SCALE_BLOCK, axis=1)[:, :k]
    return lhs @ rhs.T


def _dequantize(bits: jax.Array, scale: jax.Array) -> np.ndarray:
    """f32 [rows, K] on the host, of e4m3 bits [rows, K] and scales [rows, ceil(K/128)]."""
    per_value = np.repeat(np.asarray(scale), SCALE_BLOCK, axis=1)[:, : bits.shape[1]]
    return _to_f32(np.asarray(bits)) * per_value


def _to_f32(bits: np.ndarray) -> np.ndarray:
    every_value = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return every_value[bits]


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """||out - reference|| / ||reference||, 2-norms; NaN where `out` has one."""
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))
