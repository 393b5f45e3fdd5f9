"""Random operands on the host, the same for every peer.

FP8 travels as uint8 bits, which every framework can view as its own type. The values are those of quantised
normal data (the exponents, and so the power that the tensor cores draw, are real); scales are random, so
that a wrong scale index shows.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from benchmarks.workloads import Workload

SCALE_BLOCK = 128
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


def _values(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    # Drawing bits and looking values up is ten times faster than drawing and rounding normal numbers.
    normal = rng.standard_normal(1 << 16) * (_E4M3_MAX / _TYPICAL_AMAX)
    table = np.clip(normal, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
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


def dequantized_product(operands: Operands, rows: np.ndarray, uses_scales: bool = True) -> np.ndarray:
    """f32 [len(rows), N]: those rows of the product of the dequantised operands, or of their bare values."""
    n, k = operands.workload.n, operands.workload.k
    lhs, rhs = _to_f32(operands.lhs[rows]), _to_f32(operands.rhs)
    if uses_scales:
        lhs *= np.repeat(operands.lhs_scale[rows], SCALE_BLOCK, axis=1)[:, :k]
        rhs *= np.repeat(np.repeat(operands.rhs_scale, SCALE_BLOCK, axis=0)[:n], SCALE_BLOCK, axis=1)[:, :k]
    return lhs @ rhs.T


def _to_f32(bits: np.ndarray) -> np.ndarray:
    every_value = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return every_value[bits]


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """||out - reference|| / ||reference||, 2-norms; NaN where `out` has one."""
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))
