"""What kernels depend on beside the call: each of the facts, and the digest of all."""

import pytest

from jax_fp8gemm.jit import fingerprint as module
from jax_fp8gemm.jit import settings, tuned
from jax_fp8gemm.jit.device import H200, find_device
from jax_fp8gemm.jit.fingerprint import facts_of_device, facts_of_library, fingerprint


@pytest.fixture(autouse=True)
def private_environment(monkeypatch, tmp_path):
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path))


def changed(before):
    after = {**facts_of_library(), **facts_of_device()}
    assert set(after) == set(before)
    return [name for name in after if after[name] != before[name]]


def use_h20(monkeypatch):
    monkeypatch.setattr(module, "current_device", lambda: find_device("NVIDIA H20"))


def measure(monkeypatch):
    path = tuned.user_table(H200)
    path.parent.mkdir()
    path.write_text("{}")


@pytest.mark.parametrize(("change", "name"), [
    (lambda patch: patch.setenv("JAX_FP8GEMM_NUM_SMS", "64"), "JAX_FP8GEMM_NUM_SMS"),
    (lambda patch: patch.setenv("JAX_FP8GEMM_LINE_INFO", "1"), "JAX_FP8GEMM_LINE_INFO"),
    (lambda patch: patch.setattr(module, "headers_digest", lambda: "others"), "headers of the kernels"),
    (lambda patch: patch.setattr(module, "_sources_digest", lambda: "others"), "sources of jax_fp8gemm"),
    (lambda patch: patch.setattr(module, "compiler_identity", lambda nvcc: "another"),
     "compiler of the kernels"),
    (use_h20, "GPU to compile for"),
    (measure, "own measured configurations (JAX_FP8GEMM_CACHE_DIR)"),
])
def test_each_fact_is_one_of_the_fingerprint(monkeypatch, change, name):
    facts, digest = {**facts_of_library(), **facts_of_device()}, fingerprint()
    assert changed(facts) == []
    assert fingerprint() == digest
    change(monkeypatch)
    assert changed(facts) == [name]
    assert fingerprint() != digest


def test_limit_sms_changes_it():
    digest = fingerprint()
    with settings.limit_sms(64):
        assert facts_of_library()["JAX_FP8GEMM_NUM_SMS"] == "64"
        assert fingerprint() != digest


def test_what_changes_no_kernel_does_not(monkeypatch, tmp_path):
    digest = fingerprint()
    for name, value in {"LOG": "debug", "PRINT_CONFIG": "1", "DUMP_DIR": str(tmp_path),
                        "CACHE_DIR": str(tmp_path / "another")}.items():
        monkeypatch.setenv(settings.PREFIX + name, value)
    assert fingerprint() == digest


def test_an_error_is_a_fact(monkeypatch):
    """It is told to the other processes, and raised where a kernel is compiled."""
    monkeypatch.setenv("JAX_FP8GEMM_NVCC", "/no/such/nvcc")
    monkeypatch.setenv("JAX_FP8GEMM_NUM_SMS", "lots")
    facts = facts_of_library()
    assert facts["compiler of the kernels"] == (
        "ValueError: JAX_FP8GEMM_NVCC: expected the path of an nvcc, got '/no/such/nvcc'")
    assert facts["JAX_FP8GEMM_NUM_SMS"].startswith("ValueError: JAX_FP8GEMM_NUM_SMS: expected a positive")
