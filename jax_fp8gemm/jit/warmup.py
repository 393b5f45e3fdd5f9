"""Many kernels compiled at once: NVRTC leaves Python's lock alone, so that threads compile side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from jax_fp8gemm.jit.choose import choose
from jax_fp8gemm.jit.compiler import compile_kernel
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import Device, current_device
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.toolchain import CompileError


def warmup(problems: Iterable[GemmProblem], *, device: Device | None = None, num_threads: int | None = None,
           progress: bool = True) -> int:
    """Compiles the kernels of `problems` into the cache, several at a time.

    Args:
      problems: the calls to come.
      device: the GPU to compile for; by default the one that JAX runs on, or an H200 where it has none.
      num_threads: kernels in work at a time; by default one for each core.
      progress: show a progress bar.

    Returns:
      The number of different kernels.

    Raises:
      CompileError: a kernel does not compile.

    Example:
      >>> warmup([GemmProblem(m, 4096, 7168) for m in (1, 8, 64, 4096)])
      4
    """
    device = device or current_device()
    jobs = list(dict.fromkeys((problem, choose(problem, device).config) for problem in problems))
    for result in compile_all(jobs, num_threads=num_threads, progress=progress):
        if isinstance(result, CompileError):
            raise result
    return len(jobs)


def compile_all(jobs: Sequence[tuple[GemmProblem, GemmConfig]], *, num_threads: int | None = None,
                progress: bool = True) -> list[bytes | CompileError]:
    """The cubin of each job, in order; the error in place of one that does not compile."""

    def compile_one(job: tuple[GemmProblem, GemmConfig]) -> bytes | CompileError:
        try:
            return compile_kernel(*job)
        except CompileError as error:
            return error

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        cubins = pool.map(compile_one, jobs)
        return list(tqdm(cubins, total=len(jobs), desc="compiling", disable=not progress))
