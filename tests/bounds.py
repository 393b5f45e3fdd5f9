"""How far a GEMM may be from the exact product of its dequantised operands: derived, and checked per tile.

Let a and b be the FP8 values of a row of lhs and of rhs, sa and sb their scales, and |a| a Euclidean norm.

**Worst case**, of every element:

1. One tensor-core step (emulator.py) truncates 33 terms at 2^(E - 13) and its result at 13 fraction bits.
   Truncation only shrinks terms, so the accumulator c is at most the sum of the |a_k b_k| that the block has
   added so far, at most |a| |b| over these k (Cauchy-Schwarz). With x and y the largest powers of two not
   above an operand's values in this step (a subnormal counts as the smallest normal),

       2^E <= max(x y, |a| |b| before the step) <= A B,    A = max(x, |a|), B = max(y, |b|)
       error of the step <= 2^-13 (33 A B + |a| |b| after the step)

   Each term is a number per row of lhs times one per row of rhs: summed over the steps, with the scales in,
   it is a small matrix product.
2. Promotion rounds in f32, once for sa sb and once for the sum, which is at most T = sum_blocks sa sb |a|
   |b|; split-K rounds once more per part. Each rounding errs by at most 2^-24 T.
3. An accumulator rounds once, by 2^-24 (|accumulator| + T).
4. bf16 has 8 significant bits: the last rounding errs by at most a relative 2^-8.

Terms of second order are covered by a factor of 1 + 2^-8.

**Random signs.** Where signs are random, errors add up as their squares do. A truncation is off by less than
a unit u with the sign of its term, hence by u^2 / 3 in the mean square, a rounding by half a unit, by u^2 /
12; and c^2 is |a|^2 |b|^2 / n after n products. That predicts the root mean square of a tile, each element
measured by its own deviation: it must be below 1, and is 10 to 100 times tighter than the worst case. A scale
that is 1 % off shows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from emulator import FRACTION_BITS, K_BLOCK, K_STEP, group_slices

_TILE = 128
_STEPS = K_BLOCK // K_STEP
_TERMS = K_STEP + 1
_SECOND_ORDER = 1 + 2.0**-8
_TINY = 2.0**-133  # the smallest subnormal bf16


def assert_within_bound(out, lhs, rhs, *, accumulator=None, split_k=1, random_signs=False):
    """Check out [M, N], bf16 or f32, against the exact product of two ScaledArrays, [M, K] and [N, K].

    `random_signs` says that the signs of the products are random, and checks the mean square of each tile as
    well. An AssertionError names the worst tile. Returns the largest ratios, of error to bound and of mean
    square, at most 1.
    """
    if 0 in out.shape:
        return 0.0, 0.0
    with jax.enable_x64(True):
        largest, rms = map(np.asarray, _tile_ratios(jnp.asarray(out), lhs, rhs, accumulator, split_k))
    return _check_ratios(largest, rms, random_signs)


def assert_groups_within_bound(out, lhs, rhs, group_sizes, *, kind, accumulator=None, random_signs=False):
    """`assert_within_bound` of each group of a grouped GEMM; what belongs to no group is not looked at.

    Args:
      out: as `emulator.gemm_<kind>` returns it.
      lhs, rhs: ScaledArrays of the shapes that it takes.
      group_sizes: sequence of G numbers.
      kind: "ragged_m", "masked" or "ragged_k".
      accumulator, random_signs: as for `assert_within_bound`.
    """
    limit = lhs.scales.shape[1] if kind == "ragged_k" else lhs.shape[-2]
    slices = group_slices(kind, group_sizes, limit)
    starts, ends = (np.array([getattr(s, end) for s in slices], np.int32) for end in ("start", "stop"))
    with jax.enable_x64(True):
        ratios = _group_tile_ratios(kind, jnp.asarray(out), lhs, rhs, accumulator, starts, ends)
    return _check_ratios(*map(np.asarray, ratios), random_signs)


def _check_ratios(largest, rms, random_signs):
    checks = [(largest, "its largest error")] + [(rms, "its mean square error")] * random_signs
    for ratios, what in checks:
        tile = np.unravel_index(np.argmax(np.nan_to_num(ratios, nan=np.inf)), ratios.shape)
        assert ratios[tile] <= 1, (
            f"tile {tuple(map(int, tile))} of {ratios.shape}: {what} is {ratios[tile]:.3g} times what is "
            f"possible; {np.sum(~(ratios <= 1))} tiles are out of bounds")
    return float(largest.max()), float(rms.max())


@partial(jax.jit, static_argnums=0)
def _group_tile_ratios(kind, out, lhs, rhs, accumulator, starts, ends):
    """What `_tile_ratios` gives of each group; all that does not belong to the group is zero there."""
    pick = lambda array, g: jax.tree.map(lambda leaf: leaf[g], array)

    def of_group(bounds):
        g, start, end = bounds
        is_inside = lambda indices: (start <= indices) & (indices < end)
        keep = lambda mask, array: jax.tree.map(lambda leaf: jnp.where(mask, leaf, leaf.dtype.type(0)), array)
        if kind == "ragged_k":
            columns = is_inside(jnp.arange(lhs.shape[1]) // K_BLOCK)
            blocks = is_inside(jnp.arange(lhs.scales.shape[1]))
            left, right = (
                type(x)(keep(columns, x.values), keep(blocks, x.scales), x.granularity) for x in (lhs, rhs))
            return _tile_ratios(out[g], left, right, pick(accumulator, g), 1)
        rows = is_inside(jnp.arange(lhs.shape[-2]))[:, None]
        of_rows = (lambda x: x) if kind == "ragged_m" else partial(pick, g=g)
        # The weights of a group without rows may be anything.
        right = keep(start < end, pick(rhs, g))
        return _tile_ratios(keep(rows, of_rows(out)), keep(rows, of_rows(lhs)), right, None, 1)

    return jax.lax.map(of_group, (np.arange(len(starts)), starts, ends))


@jax.jit
def _tile_ratios(out, lhs, rhs, accumulator, split_k):
    """Per tile: the largest |error| / bound, and the root mean square of error / deviation."""
    exact = _dequantize(lhs) @ _dequantize(rhs).T
    if accumulator is not None:
        exact += accumulator
    error = jnp.abs(out.astype(jnp.float64) - exact)
    bound = _worst_case(lhs, rhs, accumulator, split_k)
    variance = _variance(lhs, rhs)
    if out.dtype == jnp.bfloat16:
        bound += 2.0**-8 * (jnp.abs(exact) + bound)
        variance += jnp.square(2.0**-7 * exact) / 12
    deviation = jnp.sqrt(variance) + bound * 2.0**-20  # exact zeros deviate by nothing
    tiles = lambda x: _to_tiles(x / (_TINY + deviation))
    largest = _to_tiles(error / (_TINY + bound)).max((1, 3))
    inside = _to_tiles(deviation > 0).sum((1, 3))  # what must be zero is no sample of a deviation
    return largest, jnp.sqrt(jnp.square(tiles(error)).sum((1, 3)) / jnp.maximum(inside, 1))


def _worst_case(lhs, rhs, accumulator, split_k):
    a, b = _Magnitudes(lhs), _Magnitudes(rhs)
    total = a.after[:, _STEPS - 1 :: _STEPS] @ b.after[:, _STEPS - 1 :: _STEPS].T
    largest = jnp.maximum(a.power, a.before) @ jnp.maximum(b.power, b.before).T
    bound = 2.0**-FRACTION_BITS * (_TERMS * largest + a.after @ b.after.T)
    bound += 2.0**-24 * (2 * lhs.scales.shape[1] + split_k) * total
    if accumulator is not None:
        bound += 2.0**-24 * (jnp.abs(accumulator) + total)
    return bound * _SECOND_ORDER


def _variance(lhs, rhs):
    a, b = _Magnitudes(lhs), _Magnitudes(rhs)
    products_before = jnp.tile(jnp.arange(_STEPS) * K_STEP, lhs.scales.shape[1])
    squares = lambda x, y, weights=1.0: (jnp.square(x) * weights) @ jnp.square(y).T
    c_before = squares(a.before, b.before, 1 / jnp.maximum(products_before, 1))
    c_after = squares(a.after, b.after, 1 / (products_before + K_STEP))
    units = _TERMS * (squares(a.power, b.power) + c_before) + c_after
    return units * 4.0**-FRACTION_BITS / 3


class _Magnitudes:
    """Of a ScaledArray [R, K], for every step along K and with the scales in: [R, 4 * Kb] f64.

    power: the largest power of two not above a value of the step; before, after: the norm of what the block
      has summed.
    """

    def __init__(self, array):
        rows, k = array.shape
        values = jnp.abs(jnp.pad(array.values, ((0, 0), (0, -k % K_BLOCK))).astype(jnp.float32))
        values = values.reshape(rows, -1, _STEPS, K_STEP)
        largest = values.max(-1)
        normal = jnp.maximum(largest, float(jnp.finfo(array.dtype).smallest_normal))
        power = jnp.where(largest > 0, jnp.ldexp(1.0, jnp.frexp(normal)[1] - 1), 0)
        after = jnp.sqrt(jnp.cumsum(jnp.square(values.astype(jnp.float64)).sum(-1), axis=-1))
        before = jnp.pad(after, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        scales = _row_scales(array)[..., None]
        self.power, self.before, self.after = ((scales * x).reshape(rows, -1) for x in (power, before, after))


def _row_scales(array):
    """[R, Kb] f64, one row of scales per row of values."""
    return jnp.repeat(array.scales.astype(jnp.float64), array.granularity[0], axis=0)[: array.shape[0]]


def _dequantize(array):
    scales = jnp.repeat(_row_scales(array), K_BLOCK, axis=1)[:, : array.shape[1]]
    return array.values.astype(jnp.float64) * scales


def _to_tiles(x):
    """[M, N] -> [ceil(M/128), 128, ceil(N/128), 128], filled up with zeros."""
    m, n = x.shape
    x = jnp.pad(x, ((0, -m % _TILE), (0, -n % _TILE)))
    return x.reshape(x.shape[0] // _TILE, _TILE, x.shape[1] // _TILE, _TILE)
