"""Loading and registering the FFI target."""

import concurrent.futures
import sys

import jax
import jax.numpy as jnp
import pytest

from jax_fp8gemm import ffi
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer


def test_register_is_idempotent_and_thread_safe():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ffi.register) for _ in range(16)]:
            done.result()
    assert jnp.sum(jnp.ones(3)) == 3  # a faulty registration would end the process when a backend starts


def test_target_lowers_for_cuda_anywhere():
    ffi.register()
    plan = LaunchPlan(b"\x7fELF\0", "fp8_gemm", (4, 1, 1), (2, 1, 1), 384, 1000, (Pointer(0), Pointer(1)))
    call = lambda x: jax.ffi.ffi_call(ffi.TARGET, x)(x, **plan.attributes())
    text = jax.jit(call).trace(jnp.ones(4)).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.custom_call @jax_fp8gemm_launch_v1" in text
    assert 'cubin = "\\7FELF\\00"' in text
    assert "launch = dense<[4, 1, 1, 2, 1, 1, 384, 1000]> : tensor<8xi64>" in text


def test_extension_that_does_not_load(monkeypatch):
    assert ffi.available()
    monkeypatch.setattr(ffi, "_extension", ffi._extension.__wrapped__)  # not what this process loaded before
    monkeypatch.delattr(ffi, "_ffi")
    monkeypatch.setitem(sys.modules, "jax_fp8gemm.ffi._ffi", None)
    assert not ffi.available()
    with pytest.raises(ImportError, match=r"the extension module does not load .*; reinstall the package"):
        ffi.describe_plan("fp8_gemm", None, None)
