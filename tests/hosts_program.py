"""One process of several: a product with its gradients on a mesh over all of them, in every mesh mode.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 \\
        python -m jax_fp8gemm launch --processes 2 python tests/hosts_program.py FOLDER

Computes on eight CPU devices, and lowers the same program for CUDA. Each process writes digests of its
programs into FOLDER. With --own-cache each keeps kernels in a folder of its own, as if it were a host, and
only lowers.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import check_hosts, dot, ffi

T, K, N = 4 * 128, 256, 256  # whole blocks on each device
SPECS, OUT = (P("x", "y"), P("y", None)), P("x", None)  # sums run over x and over y


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--own-cache", action="store_true")
    args = parser.parse_args()
    jax.distributed.initialize()
    check_hosts()
    if args.own_cache:
        os.environ["JAX_FP8GEMM_CACHE_DIR"] += f"/{jax.process_index()}"
    found = {mode: run(*program, only_lower=args.own_cache) for mode, program in programs().items()}
    (args.folder / f"{jax.process_index()}.json").write_text(json.dumps(found))


def programs():
    """By mode: the mesh, the function of global arrays, and options of its `jax.jit`."""
    auto, explicit = map(mesh_over_processes, (AxisType.Auto, AxisType.Explicit))
    manual = jax.shard_map(lambda x, w: lax.psum(dot(x, w), "y"), mesh=auto, in_specs=SPECS, out_specs=OUT)
    shardings = tuple(NamedSharding(auto, spec) for spec in (OUT, *SPECS))
    return {
        "auto": (auto, dot, {"out_shardings": shardings}),
        "explicit": (explicit, partial(dot, out_sharding=OUT), {}),
        "shard_map": (auto, manual, {}),
    }


def mesh_over_processes(kind):
    """4 x 2 devices; the two of a row, whose number is half of all, are never of one process."""
    return Mesh(np.array(jax.devices()).reshape(2, 4).T, ("x", "y"), axis_types=(kind, kind))


def run(mesh, function, options, only_lower):
    """Digests of the program, whose results are checked."""
    from meshes import COMPILER_OPTIONS, place, use  # here: it takes the devices of all processes
    from test_sharding_autodiff import with_gradients

    with use(mesh):
        placed = place(mesh, operands(), (*SPECS, OUT))
        traced = jax.jit(partial(with_gradients, function), **options).trace(*placed)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        found = {"kernels": lowered.count(f"@{ffi.TARGET}"), "lowered": digest(lowered)}
        if only_lower:
            return found
        compiled = traced.lower().compile(COMPILER_OPTIONS)
        results = compiled(*placed)
    for result, expected in zip(results, of_one_device(), strict=True):
        assert_shards_equal(result, expected)
    return {**found, "compiled": digest(compiled.as_text())}


def operands():
    from test_sharding_autodiff import exact
    return [exact(*shape, seed=seed, dtype=jnp.float32)
            for seed, shape in enumerate([(T, K), (K, N), (T, N)])]


@functools.cache
def of_one_device():
    from meshes import run_alone
    from test_sharding_autodiff import with_gradients
    return jax.device_get(run_alone(partial(with_gradients, dot), *operands()))


def assert_shards_equal(array, expected):
    assert not array.is_fully_addressable
    for piece in array.addressable_shards:
        np.testing.assert_array_equal(piece.data, expected[piece.index])


def digest(text):
    """NOTES: with Auto axes JAX lowers to calls that name functions of this process by their addresses."""
    text = re.sub(r'(@CustomSPMDPartitioning.*backend_config = )"\d+"', r"\1", text)
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
