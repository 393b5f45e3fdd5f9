"""Instantiate, Initialize and Execute of the built extension, against doubles of XLA and the CUDA driver."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from ffi_double import scenarios
from jax_fp8gemm.jit import launch

DOUBLE = pathlib.Path(scenarios.__file__).parent


def cuda_include():
    """The folder of cuda.h: from the wheel nvidia-cuda-runtime, or from a toolkit."""
    nvidia = importlib.util.find_spec("nvidia")
    wheels = [
        pathlib.Path(folder, "cu13") for folder in (nvidia.submodule_search_locations if nvidia else ())
    ]
    toolkits = [pathlib.Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for root in (*wheels, *toolkits, pathlib.Path("/usr/local/cuda")):
        if (root / "include" / "cuda.h").exists():
            return root / "include"
    raise FileNotFoundError("cuda.h: pip install 'nvidia-cuda-runtime>=13', or set CUDA_HOME")


def compile_shared(source, output, *options):
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", *options, source, "-o", output], check=True)


def compile_fake_cuda(folder, *options):
    """Writes libcuda.so.1 into the folder."""
    compile_shared(DOUBLE / "fake_cuda.cc", folder / "libcuda.so.1", "-isystem", cuda_include(), *options)


@pytest.fixture(scope="session")
def fakes(tmp_path_factory):
    """A folder with libcuda.so.1 and libxla.so."""
    folder = tmp_path_factory.mktemp("ffi_double")
    compile_fake_cuda(folder)
    compile_shared(DOUBLE / "fake_xla.cc", folder / "libxla.so", "-isystem", jax.ffi.include_dir())
    return folder


def failure(name, fakes, driver=None):
    """What a scenario, in a process of its own, found wrong; "" where that is nothing.

    `driver` is the folder of its libcuda.so.1 (that of the fakes).
    """
    extension = importlib.util.find_spec("jax_fp8gemm.ffi._ffi").origin
    ran = subprocess.run(
        [sys.executable, scenarios.__file__, name, extension, launch.__file__, fakes / "libxla.so"],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver or fakes)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return f"exit code {ran.returncode}: {ran.stdout}{ran.stderr}" if ran.returncode else ""


@pytest.mark.parametrize("name", [name for name in vars(scenarios) if name.startswith("scenario_")])
def test_stages(name, fakes):
    assert failure(name, fakes) == ""


def test_old_driver(fakes, tmp_path):
    compile_fake_cuda(tmp_path, "-DcuFuncLoad=cuSomethingElse")
    assert failure("old_driver", fakes, driver=tmp_path) == ""
    assert "AssertionError" in failure("old_driver", fakes)  # this driver is a new one
