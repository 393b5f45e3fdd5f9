"""What the Hopper kernel computes, to the bit: the second oracle, in numpy, independent of reference.py.

One tensor-core instruction adds 32 products to an f32 accumulator c. With E the largest exponent among c and
the products, zeros taking no part, it computes

    s = trunc(c) + sum_k trunc(a_k * b_k)    every term truncated toward zero to a multiple of 2^(E - 13)
    d = s truncated toward zero to 13 fraction bits of its own; a zero sum is +0

The exponent of a product is the sum of its operands' exponents, not renormalised; a subnormal operand has the
exponent of the smallest normal. NaN anywhere gives the canonical NaN, 0x7fffffff.

The kernel chains four such steps, from zero, over every 128-block of K, and promotes each block in K order:

    out = fma(rn(lhs_scale * rhs_scale), d, out)    in f32

The model equals an H200 in every bit of 2.9 million outputs of e4m3 operands; a sample is kept in
tests/data/wgmma_vectors_h200.npz: inputs as FP8 codes and the hardware's outputs. That e5m2 operands follow
the same rule is an extrapolation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import ml_dtypes
import numpy as np

K_STEP = 32  # products added by one instruction
K_BLOCK = 128
FRACTION_BITS = 13
CANONICAL_NAN = np.uint32(0x7FFFFFFF)

_ZERO = -60  # "exponent" of a zero: sums of two fit int8, and lie below those of every product
_SMALLEST_PRODUCT = -28  # exponent of two e5m2 subnormals; with a zero in it, a sum is at most -45
_NONE = -200  # "exponent" of a term that takes no part in the maximum
_TILE_M, _TILE_N = 64, 512  # of the output, so that temporaries stay in a core's cache


def gemm(lhs, lhs_scale, rhs, rhs_scale, *, accumulator=None, out_dtype=np.float32, split_k=1):
    """The kernel's result for lhs [M, K], lhs_scale [M, Kb], rhs [N, K], rhs_scale [N or ceil(N/128), Kb].

    Args:
      lhs, rhs: numpy arrays of float8_e4m3fn or float8_e5m2, without infinities.
      lhs_scale, rhs_scale: f32, Kb = ceil(K/128).
      accumulator: [M, N] f32, the last term of the sum.
      out_dtype: float32 or ml_dtypes.bfloat16.
      split_k: K is cut into parts of ceil(Kb / split_k) blocks; each is summed from zero, then the parts are
        added in their order.

    Returns:
      [M, N] of out_dtype.
    """
    lhs, rhs = np.asarray(lhs), np.asarray(rhs)
    lhs_scale, rhs_scale = (np.asarray(scale, np.float32) for scale in (lhs_scale, rhs_scale))
    if len(rhs_scale) != len(rhs):
        rhs_scale = np.repeat(rhs_scale, 128, axis=0)[: len(rhs)]
    num_blocks = lhs_scale.shape[1]
    out = np.zeros((len(lhs), len(rhs)), np.float32)
    with np.errstate(all="ignore"):
        part_blocks = -(-num_blocks // split_k)
        for part_idx, start in enumerate(range(0, num_blocks, max(part_blocks, 1))):
            part = np.zeros_like(out)
            for block in range(start, min(start + part_blocks, num_blocks)):
                k = slice(block * K_BLOCK, (block + 1) * K_BLOCK)
                scale = lhs_scale[:, None, block] * rhs_scale[None, :, block]
                part = _fma(scale, tensor_core(lhs[:, k], rhs[:, k]), part)
            out = part if part_idx == 0 else out + part
        out = out if accumulator is None else np.asarray(accumulator, np.float32) + out
    return _canonical(out).astype(out_dtype)


def group_slices(kind, group_sizes, limit):
    """Where each group lies: rows of lhs, or 128-blocks of K for ragged_k, of which there are `limit`.

    A negative size counts as zero, and what does not fit is cut off.
    """
    sizes = [max(int(size), 0) for size in group_sizes]
    if kind == "masked":
        return [slice(0, min(size, limit)) for size in sizes]
    if kind == "ragged_k":
        sizes = [-(-size // K_BLOCK) for size in sizes]
    ends = [min(end, limit) for end in itertools.accumulate(sizes, initial=0)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def gemm_ragged_m(lhs, lhs_scale, rhs, rhs_scale, group_sizes, **options):
    """lhs [M, K] x rhs [G, N, K] -> [M, N]: `gemm` of every group's rows; the rows behind them are zero."""
    out = np.zeros((len(lhs), rhs.shape[1]), options.get("out_dtype", np.float32))
    for g, rows in enumerate(group_slices("ragged_m", group_sizes, len(lhs))):
        out[rows] = gemm(lhs[rows], lhs_scale[rows], rhs[g], rhs_scale[g], **options)
    return out


def gemm_masked(lhs, lhs_scale, rhs, rhs_scale, group_sizes, **options):
    """lhs [G, M, K] x rhs [G, N, K] -> [G, M, N]: `gemm` of every group's first rows; the others are NaN."""
    out = np.full((*lhs.shape[:2], rhs.shape[1]), np.nan, options.get("out_dtype", np.float32))
    for g, rows in enumerate(group_slices("masked", group_sizes, lhs.shape[1])):
        out[g, rows] = gemm(lhs[g, rows], lhs_scale[g, rows], rhs[g], rhs_scale[g], **options)
    return out


def gemm_ragged_k(lhs, lhs_scale, rhs, rhs_scale, group_sizes, *, accumulator=None, **options):
    """lhs [M, K] x rhs [N, K] -> [G, M, N]: `gemm` over the 128-blocks of K of every group."""
    groups = []
    for g, blocks in enumerate(group_slices("ragged_k", group_sizes, lhs_scale.shape[1])):
        k = slice(blocks.start * K_BLOCK, blocks.stop * K_BLOCK)
        groups.append(gemm(lhs[:, k], lhs_scale[:, blocks], rhs[:, k], rhs_scale[:, blocks],
                           accumulator=None if accumulator is None else accumulator[g], **options))
    return np.stack(groups)


def tensor_core(a, b, c=None):
    """c + a @ b.T as a chain of instructions; a [M, K], b [N, K] of FP8, c [M, N] f32 or None (zeros)."""
    m, n = len(a), len(b)
    padding = ((0, 0), (0, -a.shape[1] % K_STEP))
    a, b = (_decode(np.pad(x, padding)) for x in (a, b))
    out = np.zeros((m, n), np.float32) if c is None else np.array(c, np.float32)
    special = ~np.isfinite(out)
    given, out = out, np.where(special, np.float32(0), out)
    for i in range(0, m, _TILE_M):
        for j in range(0, n, _TILE_N):
            rows, columns = slice(i, i + _TILE_M), slice(j, j + _TILE_N)
            out[rows, columns] = _chain(a[:, rows], b[:, columns], out[rows, columns])
    out = np.where(special, given, out)
    is_nan = a.is_nan.any(0)[:, None] | b.is_nan.any(0)[None] | np.isnan(given)
    return np.where(is_nan, CANONICAL_NAN, out.view(np.uint32)).view(np.float32)


@dataclasses.dataclass
class _Operand:
    """An FP8 matrix, K first: values (NaN as 0), exponents (int8), and where it is NaN."""

    values: np.ndarray
    exponents: np.ndarray
    is_nan: np.ndarray

    def __getitem__(self, index):
        return _Operand(self.values[index], self.exponents[index], self.is_nan[index])


@functools.cache
def _tables(dtype):
    """Of all 256 codes of an FP8 dtype: value (NaN as 0), exponent, whether NaN."""
    info = ml_dtypes.finfo(dtype)
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    is_nan = np.isnan(values)
    values = np.where(is_nan, np.float32(0), values)
    exponents = np.maximum(np.frexp(values)[1] - 1, info.minexp)
    return values, np.where(values == 0, _ZERO, exponents).astype(np.int8), is_nan


def _decode(x):
    values, exponents, is_nan = _tables(x.dtype)
    codes = np.ascontiguousarray(x.T).view(np.uint8)
    if np.isinf(values[codes]).any():
        raise ValueError("emulator: infinities are not modelled")
    return _Operand(values[codes], exponents[codes], is_nan[codes])


def _chain(a, b, c):
    """All instructions along K for one tile of the output: a [K, M], b [K, N], c [M, N] finite."""
    term, exponent_sum = np.empty(c.shape, np.float32), np.empty(c.shape, np.int8)
    for start in range(0, len(a.values), K_STEP):
        steps = range(start, start + K_STEP)
        largest = np.full(c.shape, -128, np.int8)
        for k in steps:
            np.add(a.exponents[k][:, None], b.exponents[k][None], out=exponent_sum)
            np.maximum(largest, exponent_sum, out=largest)
        negative, significand, exponent = _split(c)
        products_exponent = np.where(largest < _SMALLEST_PRODUCT, _NONE, largest.astype(np.int32))
        e = np.maximum(np.maximum(products_exponent, exponent), -126)

        # 8-bit products, scaled to the unit 2^(E - 13), truncated and summed (below 2^24): all exact in f32.
        total = np.zeros(c.shape, np.float32)
        unit = np.ldexp(np.float32(1), FRACTION_BITS - np.maximum(e, -60))
        for k in steps:
            np.multiply(a.values[k][:, None], b.values[k][None], out=term)
            np.multiply(term, unit, out=term)
            np.trunc(term, out=term)
            np.add(total, term, out=total)
        # c has 24 bits: its truncation is an integer shift.
        kept = significand >> np.clip(23 - FRACTION_BITS + e - exponent, 0, 31)
        total += np.where(negative, -kept, kept).astype(np.float32)
        bits = (total + np.float32(0)).view(np.int32) & np.int32(-1 << (23 - FRACTION_BITS))
        c = np.ldexp(bits.view(np.float32), e - FRACTION_BITS)
    return c


def _split(c):
    """Finite f32 -> whether negative, 24-bit significand, exponent; zeros have the exponent _NONE."""
    bits = np.ascontiguousarray(c).view(np.int32)
    field = bits >> 23 & 255
    significand = bits & 0x7FFFFF | (field > 0).astype(np.int32) << 23
    return bits < 0, significand, np.where(significand == 0, _NONE, np.maximum(field, 1) - 127)


def _fma(x, y, z):
    """x * y + z in f32, rounded once: the product is exact in f64, and the sum is rounded to odd there."""
    x, y, z = (np.asarray(v, np.float64) for v in (x, y, z))
    product = x * y
    total = product + z
    z_part = total - product
    error = (product - (total - z_part)) + (z - z_part)
    bits = total.view(np.int64)
    inexact_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    odd = bits + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact_even, odd, bits).view(np.float64).astype(np.float32)


def _canonical(x):
    return np.where(np.isnan(x), CANONICAL_NAN, x.view(np.uint32)).view(np.float32)
