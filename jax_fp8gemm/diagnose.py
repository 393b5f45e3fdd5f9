"""Whether this machine can run the kernels: one check per thing that they need, each with what mends it."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import sys

import jax

from jax_fp8gemm import ffi
from jax_fp8gemm.jit import settings, toolchain, tuned
from jax_fp8gemm.jit.cache import kernel_cache
from jax_fp8gemm.jit.device import current_device
from jax_fp8gemm.operation import HOPPER

MIN_PYTHON = (3, 11)
MIN_DRIVER = 13000  # as cuDriverGetVersion counts: CUDA 13.0
INSTALL_JAX = 'pip install "jax[cuda13]"'
INSTALL_DRIVER = "install NVIDIA's driver 580 or newer"
INSTALL_PACKAGE = "pip install --force-reinstall --no-deps ., in a checkout of jax_fp8gemm"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that the kernels need; `remedy` is None where it is there."""

    name: str
    state: str
    remedy: str | None = None


def checks() -> list[Check]:
    """All checks, in the order in which their remedies should be tried."""
    return [_python(), *_jax(), _plugin(), driver(), _gpu(), _nvrtc(), _headers(), _extension()]


def report() -> tuple[str, bool]:
    """One screen of text, and whether the kernels can run."""
    results = checks()
    lines = [f"{'ok' if check.remedy is None else '--'}  {check.name:<11} {check.state}" for check in results]
    lines += ["", *(f"    {name:<11} {state}" for name, state in _surroundings()), ""]
    missing = [check for check in results if check.remedy is not None]
    if not missing:
        return "\n".join([*lines, "This machine can run the kernels."]), True
    lines.append("This machine cannot run the kernels: calls use the reference implementation. To mend it:")
    return "\n".join([*lines, *(f"    {check.name + ':':<12} {check.remedy}" for check in missing)]), False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    wanted = ".".join(map(str, MIN_PYTHON))
    old = sys.version_info < MIN_PYTHON
    return Check("Python", platform.python_version(), f"use Python {wanted} or newer" if old else None)


def _jax() -> list[Check]:
    versions = {name: _version(name) for name in ("jax", "jaxlib")}
    return [Check(name, version or "not installed", None if version else INSTALL_JAX)
            for name, version in versions.items()]


def _plugin() -> Check:
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        version = _version(name)
        if version:
            return Check("plugin", f"{name} {version}")
    return Check("plugin", "JAX has no CUDA plugin", INSTALL_JAX)


def driver() -> Check:
    """The newest CUDA that the NVIDIA driver knows."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return Check("driver", "no NVIDIA driver (libcuda.so.1)", INSTALL_DRIVER)
    text = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return Check("driver", text, INSTALL_DRIVER if version.value < MIN_DRIVER else None)


def _gpu() -> Check:
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return Check("GPU", "JAX sees none", "run on a machine with a Hopper GPU (H100, H200, H20, GH200)")
    kinds = {f"{d.device_kind} (compute capability {d.compute_capability})" for d in devices}
    hopper = all(d.compute_capability == HOPPER for d in devices)
    remedy = f"the kernels are for compute capability {HOPPER}: choose such GPUs by CUDA_VISIBLE_DEVICES"
    return Check("GPU", f"{len(devices)} x {', '.join(sorted(kinds))}", None if hopper else remedy)


def _nvrtc() -> Check:
    try:
        nvcc = settings.nvcc()
        version = toolchain.compiler_version(nvcc)
    except RuntimeError:
        return Check("compiler", "no NVRTC, or no cuda.core to call it", toolchain.INSTALL_NVRTC)
    except ValueError as error:
        return Check("compiler", "no nvcc where the environment says", str(error))
    return Check("compiler", version)


def _headers() -> Check:
    try:
        return Check("headers", str(toolchain.headers()))
    except RuntimeError:
        return Check("headers", "the kernels' sources are missing", INSTALL_PACKAGE)


def _extension() -> Check:
    if ffi.available():
        return Check("FFI module", "loads")
    return Check("FFI module", "does not load", INSTALL_PACKAGE)


def _surroundings() -> list[tuple[str, str]]:
    """What the kernels can do without: the cache, measurements, the environment."""
    device = current_device()
    shipped = {name: len(tuned.load(path)) for name, path in tuned.shipped_tables(device).items()}
    counts = [f"{count} in the {name}" for name, count in shipped.items() if count]
    own = f"{len(tuned.load(tuned.user_table(device)))} of your own"
    measured = f"{', '.join([*counts, own])}, for {device.name}"
    rows = [("cache", cache_state()), ("measured", measured)]
    return rows + [("set", f"{v.name}={v.get()}") for v in settings.VARIABLES if v.get()]


def cache_state() -> str:
    """The cache folder, whether it can be written, and what it holds."""
    cache = kernel_cache()
    if cache.folder is None:
        return f"in memory only ({settings.CACHE_DIR.name})"
    entries = cache.entries()
    existing = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
    writable = "" if existing.is_dir() and os.access(existing, os.W_OK) else (
        f"; cannot be written: set {settings.CACHE_DIR.name}")
    return f"{cache.folder}: {len(entries)} kernels, {_size(entries) / 1e6:.1f} MB{writable}"


def _size(paths: list[pathlib.Path]) -> int:
    return sum(path.stat().st_size for path in paths)
