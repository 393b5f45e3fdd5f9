"""From the source of a kernel to its cubin: out of the cache, or compiled now; dumped where that is asked."""

from __future__ import annotations

import logging
import pathlib

from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.cache import cache_key, kernel_cache
from jax_fp8gemm.jit.toolchain import compile_source, compiler_identity, disassemble, headers_digest

logger = logging.getLogger(__name__)


def find_or_compile(source: str, *, stem: str, description: str) -> bytes:
    """The cubin of `source`.

    Args:
      source: the translation unit.
      stem: how the names of its dumped files begin.
      description: the kernel in a few words, for the log.

    Raises:
      CompileError: the kernel does not compile.
      RuntimeError: there is no compiler; the message says what to install.
    """
    nvcc, line_info = settings.nvcc(), settings.line_info()
    key = cache_key(source, headers_digest(), f"line info {line_info}", compiler_identity(nvcc))

    def compile_now() -> bytes:
        logger.info("compiling %s", description)
        return compile_source(source, line_info=line_info, nvcc=nvcc)

    cubin = kernel_cache().get(key, compile_now)
    folder = settings.dump_dir()
    if folder is not None:
        _dump(folder, f"{stem}_{key[:12]}", source, cubin)
    return cubin


def _dump(folder: pathlib.Path, stem: str, source: str, cubin: bytes) -> None:
    """Writes source, PTX, cubin and, where there is an nvdisasm, SASS."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / stem
    path.with_suffix(".cu").write_text(source)
    path.with_suffix(".cubin").write_bytes(cubin)
    path.with_suffix(".ptx").write_bytes(
        compile_source(source, output="ptx", line_info=settings.line_info(), nvcc=settings.nvcc()))
    try:
        path.with_suffix(".sass").write_text(disassemble(cubin))
    except RuntimeError as error:
        logger.warning("no SASS for %s: %s", stem, error)
