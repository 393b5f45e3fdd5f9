"""Kernels that are no GEMMs: the source around a device function, the plan, the custom call."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_fp8gemm import ffi
from jax_fp8gemm.jit import toolchain
from jax_fp8gemm.jit.kernel import Kernel, kernel_call
from jax_fp8gemm.jit.launch import Pointer, Scalar

HEADER = """
namespace fp8gemm {
using Word = unsigned;
template <class Config>
__device__ void scale(const float* x, float* y, unsigned size) {
  const typename Config::Index i = blockIdx.x * Config::kThreads + threadIdx.x;
  if (i < size) y[i] = x[i] * (Config::kHalve ? 0.5f : 1.0f);
}
}  // namespace fp8gemm
"""
KERNEL = Kernel("scale.cuh", "scale", {"Threads": 128, "Halve": True}, {"Index": "Word"},
                ("const float* x", "float* y", "unsigned size"), threads=128)


@pytest.fixture(autouse=True)
def header(monkeypatch, tmp_path):
    (tmp_path / "scale.cuh").write_text(HEADER)
    monkeypatch.setattr(toolchain, "headers", lambda: tmp_path)
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))


def plan():
    return KERNEL.plan(10, (Pointer(0), Pointer(2), Scalar(1234)), shared_bytes=64)


def test_the_plan_has_the_compiled_kernel_and_its_launch(tmp_path):
    got = plan()
    assert got.cubin.startswith(b"\x7fELF")
    assert b"fp8_scale" in got.cubin
    assert got.entry == "fp8_scale"
    assert (got.grid, got.cluster, got.block, got.shared_bytes) == ((10, 1, 1), (1, 1, 1), 128, 64)
    assert got.arguments == (Pointer(0), Pointer(2), Scalar(1234))
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


def test_bounds_of_a_launch_tell_how_many_ctas_registers_are_for():
    assert "__launch_bounds__(128) fp8_scale(" in KERNEL.source()
    assert "__launch_bounds__(128, 4) fp8_scale(" in dataclasses.replace(KERNEL, ctas=4).source()


def test_dumps_are_named_after_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_FP8GEMM_DUMP_DIR", str(tmp_path / "dump"))
    plan()
    assert all(path.name.startswith("fp8_scale_") for path in (tmp_path / "dump").iterdir())
    assert "static constexpr bool kHalve = true;" in next((tmp_path / "dump").glob("*.cu")).read_text()


def test_the_call_has_several_results_in_the_layouts_asked_for():
    results = [jax.ShapeDtypeStruct((4, 256), jnp.float32), jax.ShapeDtypeStruct((2, 4, 2), jnp.float32)]
    call = jax.jit(lambda x: kernel_call(plan(), results, [None, (0, 2, 1)])(x))
    text = call.trace(jnp.ones((4, 256))).lower(lowering_platforms=("cuda",)).as_text()
    line, = (line for line in text.splitlines() if f"stablehlo.custom_call @{ffi.TARGET}" in line)
    assert "operand_layouts = [dense<[1, 0]> : tensor<2xindex>]" in line
    assert ("result_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[1, 2, 0]> : tensor<3xindex>]") in line
    assert "(tensor<4x256xf32>) -> (tensor<4x256xf32>, tensor<2x4x2xf32>)" in line
    assert 'entry = "fp8_scale"' in line
