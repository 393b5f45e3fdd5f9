"""Counts what is asked of the CUDA driver, so that tests can tell a graph from single launches."""

import collections
import ctypes
import importlib.util
import os
import pathlib
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).with_name("driver_calls.cc")


def cupti():
    """Path of the library in NVIDIA's wheel, or its name for the loader to find."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else ()
    paths = [pathlib.Path(folder, "cu13", "lib", "libcupti.so.13") for folder in folders]
    return str(next((path for path in paths if path.exists()), "libcupti.so.13"))


@pytest.fixture(scope="session")
def driver_calls_library(tmp_path_factory):
    library = tmp_path_factory.mktemp("driver_calls") / "libdriver_calls.so"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def driver_calls(driver_calls_library):
    """A function that returns how often each function of the driver was called since it was last asked."""
    status = driver_calls_library.driver_calls_start(cupti().encode())
    assert status == 0, f"CUPTI: status {status}"

    def take():
        text = ctypes.create_string_buffer(1 << 16)
        assert driver_calls_library.driver_calls_take(text, len(text)) <= len(text)
        lines = (line.rsplit(" ", 1) for line in text.value.decode().splitlines())
        return collections.Counter({name: int(count) for name, count in lines})

    yield take
    assert driver_calls_library.driver_calls_stop() == 0
