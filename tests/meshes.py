"""Meshes, of eight fake CPU devices by default; data whose sums are exact; the collectives of a program."""

import collections
import contextlib
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import ScaledArray
from jax_fp8gemm.mesh.plan import axes_of
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS, scale_shape


def mesh_of(*kinds, x=4, y=2, devices=None):
    """The first x * y devices, and the kinds of both axes or of each."""
    devices = jax.devices("cpu") if devices is None else devices
    return jax.make_mesh((x, y), ("x", "y"), devices=devices[:x * y],
                         axis_types=kinds if len(kinds) == 2 else kinds * 2)


AUTO, EXPLICIT = map(mesh_of, (AxisType.Auto, AxisType.Explicit))
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}  # machine code as it comes: these programs run once
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def scaled(*shape, granularity=ROW_BLOCKS):
    """Small whole numbers, and scales that are powers of two: every sum of products is exact in f32, and in
    the tensor cores, too.

    So a result does not depend on the order of sums, and its bits show every rounding.
    """
    rng = np.random.default_rng(len(shape) + shape[-2])
    values = jnp.asarray(rng.integers(-8, 9, shape), jnp.float8_e4m3fn)
    scales = 2.0 ** rng.integers(-2, 3, scale_shape(shape, granularity))
    return ScaledArray(values, jnp.asarray(scales, jnp.float32), granularity)


def weights(*shape):
    return scaled(*shape, granularity=SQUARE_BLOCKS)


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def use(mesh):
    """Explicit types need the mesh in context. An Auto mesh need only be in the operands' shardings."""
    return jax.set_mesh(mesh) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


def place(mesh, operands, specs):
    """Each operand, values and scales alike, sharded by its PartitionSpec; whole where it cannot be."""
    def place_leaf(leaf, sharding):
        parts = [math.prod(mesh.shape[axis] for axis in axes_of(entry)) for entry in sharding.spec]
        fits = all(size % count == 0 for size, count in zip(leaf.shape, parts, strict=False))
        return jax.device_put(leaf, sharding if fits else NamedSharding(mesh, P()))

    return [jax.tree.map(partial(place_leaf, sharding=NamedSharding(mesh, spec)), x)
            for x, spec in zip(operands, specs, strict=True)]


def run(mesh, function, operands, specs, compiler_options=COMPILER_OPTIONS, **options):
    """The results of `function` on operands that are sharded, and the collectives in the compiled program."""
    with use(mesh):
        placed = place(mesh, operands, specs)
        compiled = jax.jit(lambda *args: function(*args), **options).lower(*placed).compile(compiler_options)
        return compiled(*placed), collectives(compiled)


def run_alone(function, *operands, compiler_options=COMPILER_OPTIONS):
    """The results of one device, compiled with the same options."""
    return jax.jit(lambda *args: function(*args)).lower(*operands).compile(compiler_options)(*operands)


def collectives(compiled):
    return dict(collections.Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())))


def assert_same_bits(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (a, e))),
                 actual, expected)
