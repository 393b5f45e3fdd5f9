"""Eight fake CPU devices for every test; Hopper GPUs for those in tests/gpu.

Tests that need more GPUs than there are are skipped; with JAX_FP8GEMM_REQUIRE_GPU=N those that need at most N
fail instead.
"""

import os

# Tuning XLA's own GEMMs, those that compute what is expected, would take longer than running them.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_gpu_autotune_level=0",
])

import jax
import numpy as np
import pytest

from jax_fp8gemm import moe_primitives, operation, quantize_primitives, quantize_training_primitives
from jax_fp8gemm.jit import compiler
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer
from jax_fp8gemm.operation import HOPPER


@pytest.fixture(autouse=True)
def device(request):
    """Where the test's arrays live."""
    if request.path.parent.name == "gpu":
        yield _hoppers(1)[0]
    else:
        device = jax.local_devices(backend="cpu")[0]
        with jax.default_device(device):
            yield device


@pytest.fixture
def gpus():
    """A function of a number: all Hopper GPUs, of which the test needs as many."""
    return _hoppers


def _hoppers(least):
    found = [d for d in jax.local_devices() if getattr(d, "compute_capability", None) == HOPPER]
    if len(found) < least:
        required = int(os.environ.get("JAX_FP8GEMM_REQUIRE_GPU", "0"))
        refuse = pytest.fail if least <= required else pytest.skip
        refuse(f"needs {least} NVIDIA Hopper GPU(s) (compute capability {HOPPER}); JAX has "
               f"{jax.local_devices()}")
    return found


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def built(monkeypatch):
    """The GEMMs that were compiled, for a CUDA that is Hopper, with a stand-in for the compiler."""
    problems = []

    def build(problem):
        problems.append(problem)
        buffers = tuple(Pointer(i) for i in range(5 + problem.is_grouped + problem.accumulate))
        return LaunchPlan(b"\x7fELF\x00", "fp8_gemm", (132, 1, 1), (2, 1, 1), 384, 200_000, buffers)

    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(operation, "targets_hopper", lambda: True)
    return problems


PLANS = {
    moe_primitives: ("plan_sort", "plan_permute"),
    quantize_primitives: ("plan_quantize", "plan_quantize_transposed"),
    quantize_training_primitives: (
        "plan_quantize_both", "plan_quantize_weights", "plan_quantize_swiglu_backward"),
}


@pytest.fixture
def planned(monkeypatch):
    """The problems of all other kernels, in the same way."""
    problems = []

    def plan(problem):
        problems.append(problem)
        return LaunchPlan(b"\x7fELF", "fp8_kernel", (9, 1, 1), (1, 1, 1), 256, 0, (Pointer(0), Pointer(1)))

    for module, names in PLANS.items():
        for name in names:
            monkeypatch.setattr(module, name, plan)
    monkeypatch.setattr(operation, "targets_hopper", lambda: True)
    return problems
