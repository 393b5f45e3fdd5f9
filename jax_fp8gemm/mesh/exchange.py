"""Between neighbouring columns of two halves and the same part of either, by each device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8gemm.mesh.plan import Axes


def to_halves(x: jax.Array, axes: Axes, count: int) -> jax.Array:
    """Columns [2F] = [gate | up], cut into neighbouring parts -> each device's part of gate, then of up.

    A part is two units of F/count columns, and device d needs the units d and d + count. Each device sends
    both of its own, in two permutations of the devices: all of the data moves once.

    Args:
      x: [*, 2F / count], columns d * 2F / count and on of the whole on device d.
      axes: the mesh axes over which they are sharded.
      count: the number of devices along these.
    """
    device = lax.axis_index(axes)
    units = jnp.split(x, 2, axis=-1)

    def exchange(first):
        # Unit 2 * source + sent goes to the device of that number, modulo count. For an even count, the two
        # halves of the devices send different ones, or a device would receive two at a time.
        sent = lambda source: (source >= count // 2) ^ first if count % 2 == 0 else first
        pairs = [(source, (2 * source + sent(source)) % count) for source in range(count)]
        return lax.ppermute(jnp.where(sent(device), units[1], units[0]), axes, pairs)

    first, second = exchange(False), exchange(True)
    is_even = device % 2 == 0
    gate, up = jnp.where(is_even, first, second), jnp.where(is_even, second, first)
    return jnp.concatenate([gate, up], axis=-1)
