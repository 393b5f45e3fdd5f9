"""Finds the fastest configuration on the GPU at hand and remembers it in the user's table."""

from __future__ import annotations

import logging
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from jax_fp8gemm.jit import settings, tuned
from jax_fp8gemm.jit.choose import choose, ranked
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import Device, current_device
from jax_fp8gemm.jit.launch import LaunchPlan
from jax_fp8gemm.jit.plan import plan_gemm
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.timer import Sampler, gpu_samplers
from jax_fp8gemm.jit.warmup import compile_all

logger = logging.getLogger(__name__)

Samplers = Callable[[GemmProblem, Sequence[LaunchPlan]], list[Sampler]]


def autotune(problems: Iterable[GemmProblem], *, num_candidates: int = 24, num_rounds: int = 9,
             device: Device | None = None, samplers: Samplers = gpu_samplers,
             progress: bool = True) -> tuple[list[tuned.Entry], pathlib.Path]:
    """Times the model's best candidates for each problem, and adds the winners to the user's table.

    The candidates are timed in turns, so that a drift of the clock meets all of them, and compared by their
    medians. The configuration that the problem has today is always among them.

    Args:
      problems: the calls to tune.
      num_candidates: how many candidates of the model to time.
      num_rounds: runs of each.
      device: the GPU; by default the one that JAX runs on.
      samplers: what times the plans (`timer.gpu_samplers`).
      progress: show progress bars.

    Returns:
      The winners, and the table that they were added to.

    Raises:
      ValueError: there is no folder for the table (JAX_FP8GEMM_CACHE_DIR).
      CompileError: not one of a problem's candidates compiles.
    """
    device = device or current_device()
    path, winners = tuned.user_table(device), []
    if path is None:
        raise ValueError(f"{settings.CACHE_DIR.name}: expected a folder to keep measurements in, got none")
    for problem in problems:
        plans = _compile(problem, _candidates(problem, device, num_candidates), device, progress)
        seconds = _time(problem, plans, num_rounds, samplers, progress)
        config = min(seconds, key=seconds.__getitem__)
        winners.append(tuned.Entry(problem, config, 1e6 * seconds[config]))
        tuned.add(path, device, winners[-1:])
    return winners, path


def _candidates(problem: GemmProblem, device: Device, count: int) -> list[GemmConfig]:
    """Today's choice and the model's best."""
    configs = [choose(problem, device).config, *(config for config, _ in ranked(problem, device)[:count])]
    return list(dict.fromkeys(configs))


def _compile(problem: GemmProblem, configs: list[GemmConfig], device: Device,
             progress: bool) -> dict[GemmConfig, LaunchPlan]:
    """The plans of the configurations that compile."""
    plans, errors = {}, []
    cubins = compile_all([(problem, config) for config in configs], progress=progress)
    for config, cubin in zip(configs, cubins, strict=True):
        if isinstance(cubin, Exception):
            logger.warning("%s left out of the tuning of %s: %s", config, problem, cubin)
            errors.append(cubin)
        else:
            plans[config] = plan_gemm(problem, config, cubin, device.num_sms)
    if not plans:
        raise errors[0]
    return plans


def _time(problem: GemmProblem, plans: dict[GemmConfig, LaunchPlan], num_rounds: int, samplers: Samplers,
          progress: bool) -> dict[GemmConfig, float]:
    """The median seconds of each configuration."""
    sample = dict(zip(plans, samplers(problem, list(plans.values())), strict=True))
    seconds = {config: [] for config in plans}
    for _ in tqdm(range(num_rounds), desc=f"timing {problem}", disable=not progress):
        for config in plans:
            seconds[config].append(sample[config]())
    return {config: statistics.median(values) for config, values in seconds.items()}
