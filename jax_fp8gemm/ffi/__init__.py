"""The XLA FFI target that launches every kernel of this package, and its registration.

The C++ side opens the CUDA driver at run time, so that this package imports anywhere; README.md says what
each stage of the target may do.
"""

from __future__ import annotations

import functools
import threading

import jax

TARGET = "jax_fp8gemm_launch_v1"  # the number changes with the attributes: see jit/launch.py

_KERNEL_TYPE = "jax_fp8gemm_kernel_v1"
_PLATFORM = "CUDA"


_registration = threading.Lock()


@functools.cache
def _extension():
    try:
        from jax_fp8gemm.ffi import _ffi
    except ImportError as error:
        raise ImportError(
            f"jax_fp8gemm: the extension module does not load ({error}); reinstall the package"
        ) from error
    return _ffi


def available() -> bool:
    """Whether the extension module loads. It needs neither a GPU nor a driver."""
    try:
        _extension()
    except ImportError:
        return False
    return True


def register() -> None:
    """Makes `TARGET` known to XLA on CUDA; call it before lowering to it. Calls after the first do nothing.

    Raises:
      ImportError: the extension module does not load.
    """
    with _registration:
        _register_once()


@functools.cache
def _register_once() -> None:
    extension = _extension()
    jax.ffi.register_ffi_type(_KERNEL_TYPE, extension.kernel_type(), platform=_PLATFORM)
    jax.ffi.register_ffi_target(TARGET, extension.handlers(), platform=_PLATFORM)


def describe_plan(entry, launch, arguments) -> dict:
    """A launch plan's attributes (`jit.launch.LaunchPlan.attributes`) as the C++ side decodes them.

    Returns:
      The fields of `LaunchPlan` but the cubin; `arguments` is a tuple of dictionaries with the fields of
      `Pointer`, `Scalar` or `TensorMap`, and their `kind`.

    Raises:
      ValueError: the attributes are malformed; XLA would report the same when it compiles the call.
    """
    return _extension().describe_plan(entry, launch, arguments)
