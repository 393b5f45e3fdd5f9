"""The examples run, and print what they promise."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("devices", [1, 5])
@pytest.mark.parametrize("script", ["feed_forward.py", "moe_layer.py"])
def test_an_example_prints_a_small_error(script, devices):
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / script], capture_output=True, check=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES.parent),
             "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"})
    assert f", on {1 if devices == 1 else 4} x cpu\n" in result.stdout, "a power of two"
    errors = [float(percent) for percent in re.findall(r"^ +\d+ +([\d.]+)%$", result.stdout, re.MULTILINE)]
    assert len(errors) == 2
    assert all(1 < error < 10 for error in errors)
