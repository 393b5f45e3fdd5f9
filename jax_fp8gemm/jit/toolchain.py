"""From CUDA C++ to a cubin, with NVRTC or a given nvcc, and from a cubin to SASS."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING

from jax_fp8gemm.jit import settings

if TYPE_CHECKING:
    from cuda.core import Program

ARCH = "sm_90a"
STD = "c++20"
# NOTES: NVRTC 13.0 takes a generic lambda inside of a device function for a host function, unless device is
# the default.
NVRTC_OPTIONS = {"arch": ARCH, "std": STD, "device_as_default_execution_space": True}
NVCC_OPTIONS = (f"-arch={ARCH}", f"-std={STD}")
NVRTC_WHEEL = "nvidia-cuda-nvrtc"
INSTALL_NVRTC = f"pip install cuda-core cuda-bindings {NVRTC_WHEEL}"
INSTALL_NVDISASM = "pip install nvidia-cuda-nvdisasm"
_import_lock = threading.Lock()


class CompileError(RuntimeError):
    """A kernel did not compile; the message has the compiler's log."""


def headers() -> pathlib.Path:
    """The folder of the kernels' headers: inside the installed package, else beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / "gemm.cuh").is_file():
            return folder
    raise RuntimeError(f"the kernels' headers are neither in {package / 'cuda'} nor in "
                       f"{package.parent / 'cuda'}: install jax_fp8gemm again")


def headers_digest() -> str:
    """A digest of every header, by name and content."""
    folder, digest = headers(), hashlib.sha256()
    for path in sorted(folder.rglob("*.cuh")):
        for part in (str(path.relative_to(folder)).encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def compiler_identity(nvcc: pathlib.Path | None = None) -> str:
    """What tells this compiler, with its options, from others that may make another cubin."""
    return f"{compiler_version(nvcc)}, {NVRTC_OPTIONS if nvcc is None else NVCC_OPTIONS}"


def compiler_version(nvcc: pathlib.Path | None = None) -> str:
    """The compiler's name and version, for people."""
    return _nvrtc_version() if nvcc is None else _nvcc_version(nvcc, os.stat(nvcc).st_mtime_ns)


@functools.cache
def _nvrtc_version() -> str:
    # The wheel, where the search for the library begins, tells its version without loading 100 MB, which
    # takes longer than to find a kernel in the cache. Another NVRTC tells its own to the minor number;
    # releases that differ in the patch number differ in size.
    try:
        return f"NVRTC {importlib.metadata.version(NVRTC_WHEEL)}"
    except importlib.metadata.PackageNotFoundError:
        path = find_nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"NVRTC {major.value}.{minor.value}, {os.path.getsize(path)} bytes"


@functools.cache
def _nvcc_version(nvcc: pathlib.Path, mtime_ns: int) -> str:
    return _run([str(nvcc), "--version"]).decode().strip().splitlines()[-1]


def find_nvrtc() -> str:
    """The path of NVRTC's library.

    Raises:
      RuntimeError: there is none, or no cuda.core to call it; the message says what to install.
    """
    try:
        if importlib.util.find_spec("cuda.core") is None:
            raise ImportError("no module cuda.core")
        from cuda import pathfinder  # here: only compiling needs it
        return pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"compiling a kernel needs NVRTC and cuda.core: `{INSTALL_NVRTC}` (or set {settings.NVCC.name} "
            f"to the path of an nvcc). The search ended with: {error}") from error


def compile_source(source: str, *, output: str = "cubin", line_info: bool = False,
                   nvcc: pathlib.Path | None = None) -> bytes:
    """Compiles CUDA C++ that may include the kernels' headers.

    Fast math is off, and stays off: the bits of a result are part of its meaning.

    Args:
      source: the translation unit.
      output: "cubin" or "ptx".
      line_info: keep line numbers, for profilers.
      nvcc: the nvcc to use instead of NVRTC.

    Returns:
      The cubin, or the PTX.

    Raises:
      CompileError: the source does not compile.
      RuntimeError: there is no compiler; the message says what to install.
    """
    if output not in ("cubin", "ptx"):
        raise ValueError(f"output: expected 'cubin' or 'ptx', got {output!r}")
    if nvcc is not None:
        return _compile_with_nvcc(source, output, line_info, nvcc)
    return _compile_with_nvrtc(source, output, line_info)


def _compile_with_nvrtc(source: str, output: str, line_info: bool) -> bytes:
    find_nvrtc()
    # cuda.core replaces its own __spec__ in the middle of its import, and with it the lock that would keep a
    # second thread from taking the half-imported module (NVIDIA/cuda-python #1389 is about its thread
    # safety).
    with _import_lock:
        from cuda.core import Program, ProgramOptions  # here: 0.2 s that only compiling needs
    options = ProgramOptions(
        name="fp8_gemm.cu", lineinfo=line_info, include_path=[str(headers())], **NVRTC_OPTIONS)
    program = Program(source, "c++", options)
    try:
        cubin = bytes(program.compile("cubin").code)
    except Exception as error:  # cuda.core's error types are not public; the message has NVRTC's log
        raise CompileError(f"NVRTC could not compile a kernel: {error}") from error
    return cubin if output == "cubin" else _ptx(program)


def _ptx(program: Program) -> bytes:
    """The PTX on the way to a compiled program's cubin; `compile("ptx")` would ask for a driver."""
    from cuda.bindings import nvrtc
    _, size = nvrtc.nvrtcGetPTXSize(program.handle)
    ptx = bytearray(size)
    nvrtc.nvrtcGetPTX(program.handle, ptx)
    return bytes(ptx).rstrip(b"\0")


def _compile_with_nvcc(source: str, output: str, line_info: bool, nvcc: pathlib.Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source_path = pathlib.Path(folder, "fp8_gemm.cu")
        output_path = source_path.with_suffix(f".{output}")
        source_path.write_text(source)
        options = [*NVCC_OPTIONS, f"-I{headers()}", f"-{output}", *["-lineinfo"] * line_info]
        _run([str(nvcc), *options, "-o", str(output_path), str(source_path)])
        return output_path.read_bytes()


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]} could not be started: {error}") from error
    if done.returncode:
        raise CompileError(f"`{' '.join(command)}` failed:\n{(done.stderr or done.stdout).decode()}")
    return done.stdout


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin.

    Raises:
      RuntimeError: there is no nvdisasm; the message says what to install.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run([find_nvdisasm(), "--print-code", file.name]).decode()


def find_nvdisasm() -> str:
    try:
        from cuda import pathfinder
        path = pathfinder.find_nvidia_binary_utility("nvdisasm")
    except (ImportError, AttributeError):  # AttributeError: a pathfinder that looks for libraries only
        path = None
    if path is None:
        raise RuntimeError(f"disassembling a kernel needs nvdisasm: `{INSTALL_NVDISASM}`")
    return path
