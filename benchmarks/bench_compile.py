"""Times compilation, each case in a fresh process with fresh cache folders.

    python -m benchmarks.bench_compile

| case                | what is timed                                                                     |
|---------------------|-----------------------------------------------------------------------------------|
| cold, first kernel  | problem to launch plan with empty caches; loads NVRTC                               |
| cold, further ones  | the same for more problems in that process                                         |
| disk cache          | the same problems in a new process: the cubins come from disk                      |
| XLA program, cold   | lowering and compiling a jitted fp8_gemm with empty caches                         |
| XLA program, cached | the same in a new process with JAX's compilation cache and the cubins in place     |

Kernels are timed without a GPU too. Writes benchmarks/results/compile-<GPU>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from benchmarks import environment, workloads

_SHAPES = tuple(workloads.select("batch", "prefill"))[::3]


def _milliseconds(start: float) -> float:
    return round((time.perf_counter() - start) * 1e3, 3)


def time_kernels() -> dict[str, Any]:
    """Milliseconds from each problem to its launch plan, in this process."""
    from jax_fp8gemm.jit.compiler import build
    from jax_fp8gemm.jit.device import current_device
    from jax_fp8gemm.jit.problem import GemmProblem

    current_device()  # starts JAX, which is not compiling
    times = []
    for shape in _SHAPES:
        start = time.perf_counter()
        build(GemmProblem(shape.m, shape.n, shape.k))
        times.append(_milliseconds(start))
    return {"kernels_ms": times}


def time_program() -> dict[str, Any]:
    """Milliseconds to lower and compile one jitted fp8_gemm, and how many kernels that compiled."""
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm import ScaledArray, fp8_gemm
    from jax_fp8gemm.jit import cubin

    compiled_kernels, compile_source = [], cubin.compile_source

    def counting(*arguments, **options):
        compiled_kernels.append(1)
        return compile_source(*arguments, **options)

    cubin.compile_source = counting
    m, n, k = 4096, 4096, 7168
    jax.block_until_ready(jnp.zeros(8))  # starting JAX is not compiling
    lhs = ScaledArray(jnp.zeros((m, k), jnp.float8_e4m3fn), jnp.ones((m, k // 128)), (1, 128))
    rhs = ScaledArray(jnp.zeros((n, k), jnp.float8_e4m3fn), jnp.ones((n // 128, k // 128)), (128, 128))
    start = time.perf_counter()
    lowered = jax.jit(fp8_gemm).lower(lhs, rhs)
    lower_ms = _milliseconds(start)
    start = time.perf_counter()
    lowered.compile()
    return {
        "lower_ms": lower_ms,
        "compile_ms": _milliseconds(start),
        "kernels_compiled": len(compiled_kernels),
    }


_CASES = {"kernels": time_kernels, "program": time_program}


def run_case(case: str, cache: pathlib.Path) -> dict[str, Any]:
    """A case in a process of its own, with all caches under one folder.

    Raises:
      RuntimeError: the process failed; the message has the end of its output.
    """
    variables = {
        "JAX_FP8GEMM_CACHE_DIR": str(cache / "kernels"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "CUDA_CACHE_DISABLE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_compile", "--case", case],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"case {case!r} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_once() -> dict[str, Any]:
    """Every case once, cold and then again on the caches that it left."""
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder)
        cold, hit = run_case("kernels", cache), run_case("kernels", cache)
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder)
        program, cached = run_case("program", cache), run_case("program", cache)
    return {
        "first_kernel_ms": cold["kernels_ms"][0],
        "further_kernels_ms": cold["kernels_ms"][1:],
        "first_disk_hit_ms": hit["kernels_ms"][0],
        "further_disk_hits_ms": hit["kernels_ms"][1:],
        "program_cold": program,
        "program_cached": cached,
    }


def print_table(report: Mapping[str, Any]) -> None:
    runs = report["runs"]
    median = lambda values: statistics.median(list(values))
    print(f"\n{report['gpu']}, medians of {len(runs)} fresh processes, ms")
    print(f"  cold, first kernel     {median(run['first_kernel_ms'] for run in runs):9.1f}")
    print(f"  cold, further ones     {median(t for run in runs for t in run['further_kernels_ms']):9.1f}")
    print(f"  disk cache, first hit  {median(run['first_disk_hit_ms'] for run in runs):9.1f}")
    print(f"  disk cache, further    {median(t for run in runs for t in run['further_disk_hits_ms']):9.1f}")
    for name, title in (("program_cold", "XLA program, cold"), ("program_cached", "XLA program, cached")):
        lower, compiled = (median(run[name][field] for run in runs) for field in ("lower_ms", "compile_ms"))
        kernels = max(run[name]["kernels_compiled"] for run in runs)
        print(
            f"  {title:22} {lower + compiled:9.1f}  lowering {lower:.1f}, compiling {compiled:.1f}, "
            f"{kernels} kernels compiled"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per case (default 3)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file (default benchmarks/results/compile-<GPU>.json)"
    )
    parser.add_argument(
        "--case", choices=_CASES, help="run one case in this process and print its times as JSON"
    )
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_CASES[arguments.case]()))
        return 0
    report = environment.describe("compile") | {"runs": []}
    out = arguments.out or environment.result_path(report)
    for _ in tqdm.trange(arguments.repeats, desc="measuring"):
        report["runs"].append(measure_once())
        environment.write(out, report)
    environment.write(out, report | {"complete": True})
    print_table(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
