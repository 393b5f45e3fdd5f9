"""Training of examples/deepseek by its command line on two GPUs: interrupted, and as two processes.

Each call is a process of its own, as JAX is in this one.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# A small model of real widths; its digest after six steps is in the log.
ARGUMENTS = ["--config", "small", "--precision", "fp8", "--mesh", "expert=2", "--set", "moe_layers=2",
             "batch=4", "validation_every=6", "validation_batches=1"]


@pytest.fixture
def python(gpus, tmp_path):
    """Runs `python -m` with arguments, and returns what it printed."""
    gpus(2)
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_FP8GEMM_CACHE_DIR": str(tmp_path / "kernels"),
        "JAX_FP8GEMM_LOG": "info",
        # Products that are timed may be others in another process: nothing is timed.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0"}

    def run(*arguments):
        done = subprocess.run([sys.executable, "-m", *map(str, arguments)], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    return run


def train(python, out, *arguments, launcher=()):
    return python(*launcher, "examples.deepseek.train", *ARGUMENTS, "--out", out, *arguments)


def assert_identical(python, *runs):
    assert "identical" in python("examples.deepseek.compare", "--identical", *runs).splitlines()


def test_a_resumed_run_is_the_uninterrupted_one(python, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(python, whole, "--steps", "6", "--checkpoint-every", "0")
    train(python, parts, "--steps", "4")
    train(python, parts, "--steps", "6", "--checkpoint-every", "0", "--resume")
    assert_identical(python, whole / "fp8-0", parts / "fp8-0")


def test_two_processes_are_one_and_compile_each_kernel_once(python, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    printed = train(python, two, "--steps", "6", "--checkpoint-every", "0", "--distributed",
                    launcher=("jax_fp8gemm", "launch", "--processes", "2", sys.executable, "-m"))
    compiled = re.findall(r"jax_fp8gemm\.jit\.cubin: INFO: compiling (.*)", printed)
    kernels = list((tmp_path / "kernels/cubins").glob("*.cubin"))
    assert len(compiled) == len(set(compiled)) == len(kernels) >= 10
    train(python, one, "--steps", "6", "--checkpoint-every", "0")
    assert_identical(python, one / "fp8-0", two / "fp8-0")
