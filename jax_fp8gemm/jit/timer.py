"""Times launch plans on the GPU, as a model would run them: chained in one jitted program, operands cold."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm.jit.custom_call import DTYPES, gemm_call
from jax_fp8gemm.jit.launch import LaunchPlan
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.tuned import tokens

CHAIN_BYTES = 400e6  # that the calls of a chain read: several times the 50 MB of a Hopper L2
MEMORY_BYTES = 4e9  # at most, of large operands
MIN_CALLS, MAX_CALLS = 8, 64
NUM_WARMUPS = 3  # XLA records its CUDA graph in the first runs
SAMPLE_SECONDS = 20e-3  # that a sample takes: starting the GPU and hearing of its end can cost a millisecond

Sampler = Callable[[], float]


def gpu_samplers(problem: GemmProblem, plans: Sequence[LaunchPlan]) -> list[Sampler]:
    """For each plan a function that times it once more and returns the seconds per GEMM.

    A run is a chain of GEMMs in one program. Each reads operands of its own, and all together more than L2
    holds, so that none finds its weights there (where MAX_CALLS of them are enough for that). A sample is
    some runs without a pause between them, as many of each plan, in the host's time.
    """
    operands = [random_operands(problem, seed) for seed in range(_num_calls(problem))]
    timers = [_timer(problem, plan, operands) for plan in plans]
    run_seconds = timers[0](8) * len(operands)
    num_runs = max(1, round(SAMPLE_SECONDS / run_seconds))
    return [functools.partial(timer, num_runs) for timer in timers]


def _num_calls(problem: GemmProblem) -> int:
    lhs, rhs = math.prod(problem.lhs_shape), math.prod(problem.rhs_shape)
    # Rows behind a group's own are not read: of masked groups, that may be most of lhs.
    read = rhs if problem.ends_anywhere else lhs + rhs
    calls = max(MIN_CALLS, min(CHAIN_BYTES // read, MAX_CALLS))
    return int(max(1, min(MEMORY_BYTES // (lhs + rhs), calls)))


def random_operands(problem: GemmProblem, seed: int) -> list[jax.Array]:
    """In the order of `gemm_call`. Values are random, since power depends on them; scales of single rows come
    as [..., Kb, rows]; every group has the tokens that are expected."""
    rng = np.random.default_rng(seed)

    def values(shape: tuple[int, ...], dtype: str) -> jax.Array:
        key = jax.random.key(rng.integers(2**31))
        return jax.random.normal(key, shape, jnp.bfloat16).astype(DTYPES[dtype])

    def scales(shape: tuple[int, ...], rows_fastest: bool) -> jax.Array:
        *leading, rows, columns = shape
        shape = (*leading, columns, rows) if rows_fastest else shape
        return jnp.asarray(rng.uniform(0.5, 1.5, shape).astype(np.float32))

    operands = [values(problem.lhs_shape, problem.lhs_dtype), scales(problem.lhs_scale_shape, True),
                values(problem.rhs_shape, problem.rhs_dtype),
                scales(problem.rhs_scale_shape, problem.rhs_scale_rows == 1)]
    if problem.is_grouped:
        operands.append(jnp.full((problem.batch, problem.groups), tokens(problem), jnp.int32))
    return operands


def chain(problem: GemmProblem, plan: LaunchPlan) -> jax.stages.Wrapped:
    """The jitted program that runs `plan` on each of a list of operands: (operands, accumulator) -> last
    result.

    The accumulator is a tuple of one donated array, or an empty one; it passes through all calls.
    """
    # The results share one buffer, so that XLA runs the calls one by one.
    call = gemm_call(problem, plan, has_side_effect=True)

    def gemm(lhs, lhs_scale, rhs, rhs_scale, *others):
        rhs_scale = jnp.swapaxes(rhs_scale, -2, -1) if problem.rhs_scale_rows == 1 else rhs_scale
        return call(lhs, jnp.swapaxes(lhs_scale, -2, -1), rhs, rhs_scale, *others)

    def run(operands, accumulator):
        for arrays in operands:
            out = gemm(*arrays, *accumulator)
            accumulator = (out,) * problem.accumulate
        return out

    return jax.jit(run, donate_argnums=1)


def _timer(problem: GemmProblem, plan: LaunchPlan, operands: list[list[jax.Array]]) -> Callable[[int], float]:
    """A function that runs the plan's chain so many times, and returns the seconds per GEMM."""
    run = chain(problem, plan)
    accumulator = (jnp.zeros(problem.out_shape, jnp.float32),) * problem.accumulate

    def seconds(num_runs: int) -> float:
        nonlocal accumulator
        start = time.perf_counter()
        for _ in range(num_runs):
            out = run(operands, accumulator)
            accumulator = (out,) * problem.accumulate
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / (num_runs * len(operands))

    for _ in range(NUM_WARMUPS):
        seconds(1)
    return seconds
