"""Programs lowered for CUDA, on any machine, as text.

The fixtures `built` and `planned` (conftest.py) go with them.
"""

import jax

from jax_fp8gemm import ffi

CALL = f"stablehlo.custom_call @{ffi.TARGET}"


def lower_for_cuda(function, *args, **options):
    fresh = jax.jit(lambda *args: function(*args), **options)  # or JAX finds an earlier lowering
    return fresh.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def call_line(text):
    line, = (line for line in text.splitlines() if CALL in line)
    return line


def signatures(text):
    """(operands) -> (results) of each custom call."""
    return [line.split(" : ")[-1] for line in text.splitlines() if CALL in line]
