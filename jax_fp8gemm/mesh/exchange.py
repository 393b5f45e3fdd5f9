"""Between neighbouring columns of two halves, and the same part of either half, on each device.

Columns [2F] = [gate | up], sharded over `count` devices, are 2 * count units of F / count columns. Device d
has the units 2d and 2d + 1, and needs d, its part of gate, and d + count, that of up; or the other way round.
Each unit moves once: every device sends both of its own, in two permutations of the devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8gemm.mesh.plan import Axes


def to_halves(x: jax.Array, axes: Axes, count: int, axis: int) -> jax.Array:
    """Neighbouring columns -> each device's part of gate, then its part of up.

    Args:
      x: a shard, with 2F / count columns.
      axes: the mesh axes over which the columns are sharded.
      count: the number of devices along these.
      axis: of the columns.
    """
    device, units = lax.axis_index(axes), jnp.split(x, 2, axis)
    first, second = (
        lax.ppermute(_pick(_sent(device, count, is_second), units), axes, _pairs(count, is_second))
        for is_second in (False, True))
    is_odd = device % 2 == 1  # then up came first
    return jnp.concatenate([_pick(is_odd, (first, second)), _pick(is_odd, (second, first))], axis)


def from_halves(x: jax.Array, axes: Axes, count: int, axis: int) -> jax.Array:
    """The inverse of `to_halves`: the same permutations, backwards."""
    device, halves = lax.axis_index(axes), jnp.split(x, 2, axis)
    is_odd = device % 2 == 1
    backwards = lambda pairs: [pair[::-1] for pair in pairs]
    first, second = (
        lax.ppermute(_pick(is_odd ^ is_second, halves), axes, backwards(_pairs(count, is_second)))
        for is_second in (False, True))
    sent = _sent(device, count, False)
    return jnp.concatenate([_pick(sent, (first, second)), _pick(sent, (second, first))], axis)


def _sent(device, count, is_second):
    """Which of its two units a device sends in the first permutation, or in the second.

    NOTES: unit j goes to device j modulo count. For an even count two devices' first units have the same
    goal, so that the second half of the devices begin with their other one.
    """
    return (device >= count // 2) ^ is_second if count % 2 == 0 else is_second


def _pairs(count, is_second):
    return [(device, (2 * device + int(_sent(device, count, is_second))) % count) for device in range(count)]


def _pick(index, pair):
    return jnp.where(index, pair[1], pair[0])
