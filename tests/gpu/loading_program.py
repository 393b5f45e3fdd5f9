"""Kernels of fresh configurations are loaded while all GPUs are in collectives.

    python tests/gpu/loading_program.py --limit 240

Prints, as JSON, how many rounds there were, how many programs of collectives, and in how many rounds these
were still under way when the fresh kernel was to be loaded on its devices. Hangs if a kernel is loaded when
its device cannot answer: then the program ends itself, with all threads' Python stacks.
"""

import argparse
import faulthandler
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import ScaledArray, fp8_gemm
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape

# Of a program of collectives. Few large ones: where more launches wait than CUDA takes, the thread that would
# load a kernel is still launching.
SUMS = 20
M, BLOCK = 64, 128


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=240, help="seconds until the program gives up")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.5, help="of collectives in a round")
    parser.add_argument("--megabytes", type=float, default=1024, help="of a sum")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.limit, exit=True)
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("x",), devices=devices, axis_types=(AxisType.Auto,))
    sums, x = collectives(mesh, int(args.megabytes * 1e6) // 4)
    per_round = programs_of(sums, x, args.seconds)
    overlapped = 0
    for number in range(args.rounds):
        # On all devices, with a sum of its own; or on one, which has its part in the others' sums to do.
        where = mesh if number % 2 == 0 else devices[-1]
        operands, expected = fresh_operands(number, where, len(devices))
        # Compiles the kernel, before the sums: they are to be under way when it is loaded.
        lowered = jax.jit(partial(fp8_gemm, out_dtype=jnp.float32)).lower(*operands)
        for _ in range(per_round):
            x = sums(x)
        compiled = lowered.compile()
        overlapped += not x.is_ready()
        out = compiled(*operands)
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(x[::10007], 1)
    print(json.dumps({"rounds": args.rounds, "programs": args.rounds * per_round, "overlapped": overlapped}))


def collectives(mesh, size):
    """A program of sums over all devices that leaves ones as they are, and ones."""
    def local(x):
        return lax.fori_loop(0, SUMS, lambda _, x: lax.psum(x, "x") / lax.axis_size("x"), x)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    ones = partial(jnp.ones, (mesh.size * size,))
    return jax.jit(sharded, donate_argnums=0), jax.jit(ones, out_shardings=NamedSharding(mesh, P("x")))()


def programs_of(sums, x, seconds):
    """How many programs take this time; at most as many as XLA takes without waiting."""
    x = jax.block_until_ready(sums(x + 0))
    start = time.monotonic()
    jax.block_until_ready(sums(x))
    return min(24, max(1, round(seconds / (time.monotonic() - start))))


def fresh_operands(number, where, num_devices):
    """Of a product that no round has had, small whole numbers; where is a mesh, for K, or a device."""
    n, k = BLOCK + 16 * number, BLOCK * num_devices
    rng = np.random.default_rng(number)
    values = [rng.integers(-8, 9, shape) for shape in ((M, k), (n, k))]
    place = NamedSharding(where, P(None, "x")) if isinstance(where, jax.sharding.Mesh) else where
    def scaled(x, granularity):
        scales = np.ones(scale_shape(x.shape, granularity), np.float32)
        return jax.device_put(ScaledArray(x.astype(jnp.float8_e4m3fn), scales, granularity), place)

    operands = scaled(values[0], ROW_BLOCKS), scaled(values[1], SQUARE_BLOCKS)
    return operands, values[0] @ values[1].T


if __name__ == "__main__":
    main()
