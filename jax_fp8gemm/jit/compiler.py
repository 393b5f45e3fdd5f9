"""From a problem to a launch plan: choose a configuration, generate the source, compile it or find it."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator

from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.choose import Choice, choose
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.cubin import find_or_compile
from jax_fp8gemm.jit.device import Device, current_device
from jax_fp8gemm.jit.launch import LaunchPlan
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.plan import plan_gemm
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.source import gemm_source

_override: contextvars.ContextVar[GemmConfig | None] = contextvars.ContextVar(
    "jax_fp8gemm_override", default=None)


@contextlib.contextmanager
def override(config: GemmConfig) -> Iterator[None]:
    """Every kernel that is lowered in this context gets `config`: for tests and tuning.

    Like `settings.limit_sms`, it holds for jitted functions that were traced before.

    Example:
      >>> with override(GemmConfig(128, 112, num_stages=6)):
      ...   out = jax.jit(fp8_gemm)(lhs, rhs)
    """
    token = _override.set(config)
    try:
        with settings.in_jit_key("config", repr(config)):
            yield
    finally:
        _override.reset(token)


def build(problem: GemmProblem, config: GemmConfig | None = None, *, num_sms: int | None = None,
          device: Device | None = None) -> LaunchPlan:
    """The compiled kernel for `problem`, and how to launch it.

    Args:
      problem: the call.
      config: the configuration; by default that of `override`, else a measured winner, else the cost model's.
      num_sms: SMs that the kernel may use; by default what `settings.num_sms()` says.
      device: the GPU to build for; by default the one that JAX runs on, or an H200 where it has none.

    Raises:
      ValueError: `config` is illegal for the problem; the message says why.
      CompileError: the kernel does not compile.
      RuntimeError: there is no compiler; the message says what to install.
    """
    settings.configure_logging()
    device = (device or current_device()).limited_to(num_sms or settings.num_sms())
    choice = _choose(problem, config, device)
    if settings.print_config():
        print(f"jax_fp8gemm: {problem}: {choice.config} ({choice.source})", file=sys.stderr)
    cubin = compile_kernel(problem, choice.config)
    return plan_gemm(problem, choice.config, cubin, device.num_sms)


def _choose(problem: GemmProblem, config: GemmConfig | None, device: Device) -> Choice:
    given = config or _override.get()
    if given is None:
        return choose(problem, device)
    reason = rejection(problem, given, device)
    if reason is not None:
        raise ValueError(f"config: expected one that is legal for {problem}, got {given!r}: {reason}")
    return Choice(given, "given")


def compile_kernel(problem: GemmProblem, config: GemmConfig) -> bytes:
    """The cubin of `problem` under `config`, from the cache where it has one."""
    return find_or_compile(gemm_source(problem, config), stem=f"fp8_gemm_{problem.n}x{problem.k}",
                           description=f"{problem}: {config}")
