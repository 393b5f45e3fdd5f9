"""The persistent compilation cache and programs on Auto axes: hits in another process, never a mix-up."""

import json
import os
import subprocess
import sys

PROCESS = """
import json
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_fp8gemm import ScaledArray, fp8_gemm
from meshes import AUTO, collectives

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
values = np.arange(8 * 256).reshape(8, 256) % 7
x, w = (ScaledArray(*(jax.device_put(array, NamedSharding(AUTO, P(None, "y"))) for array in (
    values.astype(jnp.float8_e4m3fn), np.ones(scales, np.float32))), granularity)
    for scales, granularity in (((8, 2), (1, 128)), ((1, 2), (128, 128))))
events, programs = [], []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
for batch_invariant in (False, True):
    gemm = lambda x, w: fp8_gemm(x, w, out_dtype=jnp.float32, batch_invariant=batch_invariant)
    compiled = jax.jit(gemm).lower(x, w).compile()
    np.testing.assert_array_equal(compiled(x, w), values @ values.T)
    programs.append(collectives(compiled))
print(json.dumps([[event for event in events if event in ("cache_hits", "cache_misses")], programs]))
"""
PROGRAMS = [{"all-reduce": 1}, {"all-gather": 4}]
HITS, MISSES = ["cache_hits"] * 2, ["cache_misses"] * 2


def run_process(folder, **variables):
    """What the cache said to two calls that differ in `batch_invariant` alone, and their collectives."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.path.dirname(__file__), **variables}
    output = subprocess.run([sys.executable, "-c", PROCESS, str(folder)], check=True, env=environment,
                            stdout=subprocess.PIPE).stdout
    return json.loads(output)


def test_the_cache_knows_a_call_by_all_that_its_kernels_depend_on(tmp_path):
    assert run_process(tmp_path) == [MISSES, PROGRAMS]
    assert run_process(tmp_path) == [HITS, PROGRAMS]
    assert run_process(tmp_path, JAX_FP8GEMM_NUM_SMS="64") == [MISSES, PROGRAMS]
