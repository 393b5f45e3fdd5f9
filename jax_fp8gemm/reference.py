"""The meaning of every operation in plain jnp: the oracle, and what runs on anything but Hopper.

`quantize` and `dequantize` are defined to the bit, on every platform, and a kernel must match them;
`quantize_swiglu` up to the rounding of its f32 arithmetic. `gemm` is defined up to the rounding of sums: it
promotes every 128-block of K with its scales, in K order, as the Hopper kernel does, but sums the 128
products of a block in f32, in an order that XLA chooses. Hopper's tensor cores keep 13 fraction bits there.
tests/emulator.py models the kernel's own bits, and tests/bounds.py derives how far from exact they can be.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8gemm.jit.problem import RAGGED_M, SCALE_BLOCK, ceil_div
from jax_fp8gemm.operation import match_varying

# The smallest scale: the product of two is still a normal f32.
MIN_SCALE = 2.0**-63
NAN_CODE = 0x7F  # of e4m3 and e5m2: what Hopper's conversion makes of NaN


def quantize(x, *, granularity, dtype):
    """x [*, R, C] -> values [*, R, C] of FP8 `dtype`, scales [*, ceil(R/rows), ceil(C/columns)] f32.

    In f32, with rn() the rounding to nearest even and amax over a block's finite elements:

        scale  = max(rn(amax * rn(1 / max_float8)), MIN_SCALE)
        values = rn_float8(rn(x * rn(1 / scale)));  NaN where x is not finite

    NOTES: no division is left to XLA, which turns one by a constant into a product under jit alone, and gives
    another quotient on a GPU (2 ulp off) than on a CPU. Nor is the code of NaN, which for e5m2 changed from
    one jaxlib to another.
    """
    info = jnp.finfo(dtype)
    blocks = _to_blocks(x.astype(jnp.float32), granularity)
    finite = jnp.isfinite(blocks)
    amax = jnp.where(finite, jnp.abs(blocks), 0).max(axis=(-3, -1))
    scales = jnp.maximum(amax * jnp.float32(1 / float(info.max)), jnp.float32(MIN_SCALE))
    scaled = jnp.where(finite, blocks * _per_block(_reciprocal(scales)), 0)
    codes = lax.bitcast_convert_type(_round_to_float8(scaled, info).astype(dtype), jnp.uint8)
    values = lax.bitcast_convert_type(jnp.where(finite, codes, NAN_CODE), dtype)
    return _from_blocks(values, x.shape), scales


def quantize_swiglu(x, *group_sizes, kind, dtype):
    """x [B, M, 2F], gate | up -> values [B, M, F] of FP8 `dtype`, scales [B, M, ceil(F/128)] f32.

    silu(gate) * up with silu(gate) = gate / (1 + exp(-gate)), in f32, is quantised without being rounded to
    bf16 in between, in blocks of 1 x 128. A kernel matches up to the rounding of this f32 arithmetic
    (`exp` is not the same to the bit everywhere), so that a value is another number of the FP8 format only
    where it lies next to the middle between two; and its silu is -0 where exp(-gate) exceeds 2^126.

    kind: None; RAGGED_M, with group sizes [B, G]: rows of x[b] beyond the sum count as zeros; or MASKED, with
    group sizes [B]: rows of values[b] beyond the size are NaN here, and left alone by the kernel.
    """
    rows = x.shape[1]
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=2)
    y = gate / (1 + jnp.exp(-gate)) * up
    if kind is not None:
        (sizes,) = group_sizes
        ends = group_bounds(sizes, rows)[1] if kind == RAGGED_M else jnp.clip(sizes, 0, rows)[:, None]
        valid = ends.max(axis=1, initial=0)
        is_valid = jnp.arange(rows)[:, None] < valid[:, None, None]
        y = jnp.where(is_valid, y, 0 if kind == RAGGED_M else jnp.nan)
    return quantize(y, granularity=(1, SCALE_BLOCK), dtype=dtype)


def dequantize(values, scales, granularity):
    """values [*, R, C], scales [*, ceil(R/rows), ceil(C/columns)] -> rn(values * scales) [*, R, C] f32."""
    blocks = _to_blocks(values.astype(jnp.float32), granularity)
    return _from_blocks(blocks * _per_block(scales), values.shape)


def gemm(lhs, lhs_scale, rhs, rhs_scale, accumulator=None, *, out_dtype):
    """lhs [B, M, K] x rhs [B, N, K] -> [B, M, N]; a leading axis of 1 is shared by the batch.

    In f32, one 128-block of K after the other, and each operand is widened to f32 one block at a time:

        out = out + (lhs_scale * rhs_scale) * (lhs @ rhs.T of the block)

    then `accumulator` [B, M, N] f32, if given, is added, and the result rounded once to out_dtype.
    lhs_scale is [B, M, ceil(K/128)]; rhs_scale has one row per row or per 128 rows of rhs.
    """
    (lhs_batch, m, k), (rhs_batch, n, _) = lhs.shape, rhs.shape
    if k == 0:
        out = jnp.zeros((batch_size(lhs_batch, rhs_batch), m, n), jnp.float32)
    else:
        block = _products_of_blocks(lhs, lhs_scale, rhs, rhs_scale)
        out = lax.fori_loop(1, ceil_div(k, SCALE_BLOCK), lambda k_block, out: out + block(k_block), block(0))
    return (out if accumulator is None else accumulator + out).astype(out_dtype)


def gemm_ragged_m(lhs, lhs_scale, rhs, rhs_scale, group_sizes, *, out_dtype):
    """lhs [B, M, K] x rhs [B, G, N, K] -> [B, M, N]: the rows of a group with the rhs of that group.

    Group g has the group_sizes[b, g] rows after those of group g - 1 (`group_bounds`). A row is what `gemm`
    makes of it with rhs[:, g]; rows of no group are zero. lhs and rhs share leading axes of 1 as in `gemm`.
    """
    (_, m, _), (_, num_groups, n, _) = lhs.shape, rhs.shape
    out, _ = match_varying(jnp.zeros((group_sizes.shape[0], m, n), out_dtype), lhs)
    if num_groups == 0:
        return out
    starts, ends = group_bounds(group_sizes, m)

    def add_group(group, out):
        take = lambda x: lax.dynamic_index_in_dim(x, group, axis=1, keepdims=False)
        rows, start, end = jnp.arange(m), take(starts)[:, None], take(ends)[:, None]
        product = gemm(lhs, lhs_scale, take(rhs), take(rhs_scale), out_dtype=out_dtype)
        return jnp.where(((start <= rows) & (rows < end))[:, :, None], product, out)

    return lax.fori_loop(0, num_groups, add_group, out)


def gemm_masked(lhs, lhs_scale, rhs, rhs_scale, group_sizes, *, out_dtype):
    """lhs [B, G, M, K] x rhs [B, G, N, K] -> [B, G, M, N]: `gemm` of every group's first rows.

    Those are group_sizes[b, g]. The kernel leaves the other rows of the result alone; here they are NaN, so
    that a use by mistake shows.
    """
    product = jax.vmap(partial(gemm, out_dtype=out_dtype), in_axes=1, out_axes=1)
    is_valid = jnp.arange(lhs.shape[2]) < group_sizes[:, :, None]
    return jnp.where(is_valid[..., None], product(lhs, lhs_scale, rhs, rhs_scale), jnp.nan)


def gemm_ragged_k(lhs, lhs_scale, rhs, rhs_scale, group_sizes, accumulator=None, *, out_dtype):
    """lhs [B, M, K] x rhs [B, N, K] -> [B, G, M, N]: `gemm` over the 128-blocks of K of each group.

    Group g has the ceil(group_sizes[b, g] / 128) blocks of K after those of group g - 1 (`group_bounds`); it
    fills its last block up with zeros. A group without blocks is zero. `accumulator` is [B, G, M, N] f32.
    """
    (_, m, k), n, (batch, num_groups) = lhs.shape, rhs.shape[1], group_sizes.shape
    num_blocks = ceil_div(k, SCALE_BLOCK)
    ends = group_bounds(group_sizes // SCALE_BLOCK + (group_sizes % SCALE_BLOCK > 0), num_blocks)[1]
    out, _ = match_varying(jnp.zeros((batch, num_groups, m, n), jnp.float32), lhs)
    if k > 0:
        block = _products_of_blocks(lhs, lhs_scale, rhs, rhs_scale)

        def add_block(k_block, out):
            group = (ends <= k_block).sum(axis=1)  # num_groups where the block is behind the last one
            return out.at[jnp.arange(batch), group].add(block(k_block), mode="drop")

        out = lax.fori_loop(0, num_blocks, add_block, out)
    return (out if accumulator is None else accumulator + out).astype(out_dtype)


def group_bounds(group_sizes, limit):
    """Where groups begin and end that lie one after the other: int32 [*, G] -> starts, ends [*, G].

    A negative size counts as zero, and nothing reaches beyond `limit`: sums saturate there, before they could
    overflow.
    """
    saturating_sum = lambda a, b: jnp.minimum(a, limit - b) + b
    sizes = jnp.clip(group_sizes, 0, limit)
    ends = lax.associative_scan(saturating_sum, sizes, axis=sizes.ndim - 1)
    return jnp.pad(ends[..., :-1], ((0, 0),) * (ends.ndim - 1) + ((1, 0),))[..., : ends.shape[-1]], ends


def batch_size(lhs_batch, rhs_batch):
    """The leading axis of a product: an operand's 1 is shared by the whole batch, which may be empty."""
    return lhs_batch if rhs_batch == 1 else rhs_batch


def rows_per_scale(values, scales):
    """1 or 128: how many rows of [*, R, C] values share a row of scales (1 where both are true: R = 1)."""
    return 1 if scales.shape[-2] == values.shape[-2] else SCALE_BLOCK


def _products_of_blocks(lhs, lhs_scale, rhs, rhs_scale):
    """k_block -> (lhs_scale * rhs_scale) * (lhs @ rhs.T) of that 128-block of K: [B, M, N] f32."""
    k, n, rhs_scale_rows = lhs.shape[2], rhs.shape[1], rows_per_scale(rhs, rhs_scale)
    padding = ((0, 0), (0, 0), (0, -k % SCALE_BLOCK))
    lhs, rhs = jnp.pad(lhs, padding), jnp.pad(rhs, padding)

    def block(k_block):
        take_values = lambda x: lax.dynamic_slice_in_dim(x, k_block * SCALE_BLOCK, SCALE_BLOCK, axis=2)
        take_scales = lambda x: lax.dynamic_index_in_dim(x, k_block, axis=2, keepdims=False)
        lhs_block, rhs_block = (take_values(x).astype(jnp.float32) for x in (lhs, rhs))
        part = jnp.matmul(lhs_block, rhs_block.mT, precision=lax.Precision.HIGHEST)
        columns = jnp.repeat(take_scales(rhs_scale), rhs_scale_rows, axis=1)[:, None, :n]
        return take_scales(lhs_scale)[:, :, None] * columns * part

    return block


def _to_blocks(x, granularity):
    """[*, R, C] -> [*, ceil(R/rows), rows, ceil(C/columns), columns], filled up with zeros."""
    *leading, rows, columns = x.shape
    num_rows, num_columns = map(ceil_div, (rows, columns), granularity)
    padding = (0, num_rows * granularity[0] - rows), (0, num_columns * granularity[1] - columns)
    x = jnp.pad(x, (*[(0, 0)] * len(leading), *padding))
    return x.reshape(*leading, num_rows, granularity[0], num_columns, granularity[1])


def _per_block(scales):
    """[*, R/rows, C/columns] -> [*, R/rows, 1, C/columns, 1], to go with _to_blocks."""
    return scales[..., :, None, :, None]


def _from_blocks(blocks, shape):
    """The inverse of _to_blocks."""
    *leading, num_rows, rows, num_columns, columns = blocks.shape
    return blocks.reshape(*leading, num_rows * rows, num_columns * columns)[..., : shape[-2], : shape[-1]]


def _reciprocal(x):
    """1 / x rounded to nearest, for normal f32 0 < x <= 2^126, whatever the platform's division does."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent, significand = bits >> 23, bits & 0x7FFFFF | 0x800000
    # 2^47 / significand, in (2^23, 2^24], is 1 / x but for a power of two. A quotient that is a few units off
    # is mended by its remainder, which int32 holds exactly as it wraps around (2^47 is 0 there). A tie is
    # impossible.
    quotient = lax.round(2.0**47 / significand.astype(jnp.float32)).astype(jnp.int32)
    remainder = -quotient * significand
    for half in (1, 3, 5):
        quotient += (2 * remainder > half * significand).astype(jnp.int32)
        quotient -= (2 * remainder < -half * significand).astype(jnp.int32)
    # quotient * 2^-24 * 2^(127 - exponent)
    power = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    return quotient.astype(jnp.float32) * 2.0**-24 * power


def _round_to_float8(x, info):
    """x f32, below the overflow of the FP8 format, rounded to its nearest number, ties to even, in f32.

    The cast to FP8 is then exact. XLA's own cast of other numbers may round twice, by way of f16.
    """
    subnormal_step = float(info.smallest_subnormal)
    subnormal = lax.round(x * (1 / subnormal_step), lax.RoundingMethod.TO_NEAREST_EVEN) * subnormal_step
    normal = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    return jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, normal)
