"""What kernels depend on beside the call, by name: to compare processes, and as one digest."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

from jax_fp8gemm.jit import settings, tuned
from jax_fp8gemm.jit.cache import cache_key
from jax_fp8gemm.jit.device import current_device
from jax_fp8gemm.jit.toolchain import compiler_identity, headers, headers_digest


def fingerprint() -> str:
    """Equal where this library, the compiler, settings and measured configurations make the same kernels.

    It stands for the kernels in programs that do not carry them yet.
    """
    facts = {**facts_of_library(), **facts_of_device()}
    return cache_key(*(f"{name}: {value}" for name, value in facts.items()))


def facts_of_library() -> dict[str, str]:
    """What kernels depend on, but for the GPU: does not start a backend of JAX."""
    return {
        "sources of jax_fp8gemm": _sources_digest(),
        "headers of the kernels": _stated(headers_digest),
        "compiler of the kernels": _stated(lambda: compiler_identity(settings.nvcc())),
        settings.LINE_INFO.name: _stated(_line_info),
        settings.NUM_SMS.name: _stated(lambda: settings.num_sms() or settings.NUM_SMS.default),
    }


def facts_of_device() -> dict[str, str]:
    """The GPU that JAX runs on, and what was measured on it."""
    device = current_device()
    table = tuned.user_table(device)
    is_measured = table is not None and table.is_file()
    return {
        "GPU to compile for": repr(device),
        f"own measured configurations ({settings.CACHE_DIR.name})":
            cache_key(table.read_text()) if is_measured else "none",
    }


def _line_info() -> str:
    """Kernels with line numbers name the files that these are of."""
    return f"lines of {headers()}" if settings.line_info() else settings.LINE_INFO.default


def _stated(read: Callable[[], object]) -> str:
    """What `read` says. Its error is a fact like any other here; the kernels that it concerns raise it."""
    try:
        return str(read())
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@functools.cache
def _sources_digest() -> str:
    """Of the package, the tables of measured configurations included."""
    package = pathlib.Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json"))
    return cache_key(*(part for path in files for part in (str(path.relative_to(package)), path.read_text())))
