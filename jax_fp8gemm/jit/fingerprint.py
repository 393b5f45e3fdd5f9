"""A digest of what kernels depend on beside the call: for programs that do not carry their kernels yet."""

from __future__ import annotations

import functools
import pathlib

from jax_fp8gemm.jit import settings, tuned
from jax_fp8gemm.jit.cache import cache_key
from jax_fp8gemm.jit.device import current_device
from jax_fp8gemm.jit.toolchain import compiler_identity, headers_digest


def fingerprint() -> str:
    """Equal where this library, the compiler, settings and measured configurations make the same kernels."""
    device = current_device()
    table = tuned.user_table(device)
    measured = table.read_text() if table is not None and table.is_file() else ""
    try:
        compiler = compiler_identity(settings.nvcc())
    except RuntimeError:  # there is none, and there will be no kernels
        compiler = ""
    return cache_key(_sources_digest(), headers_digest(), compiler, f"line info {settings.line_info()}",
                     repr(device.limited_to(settings.num_sms())), measured)


@functools.cache
def _sources_digest() -> str:
    """Of the package, the tables of measured configurations included."""
    package = pathlib.Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json"))
    return cache_key(*(part for path in files for part in (str(path.relative_to(package)), path.read_text())))
