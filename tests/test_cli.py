"""The command line, run in this process; one command in its own."""

import dataclasses
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jax_fp8gemm import __main__ as cli
from jax_fp8gemm import diagnose, fp8_gemm_masked, quantize
from jax_fp8gemm.jit import settings, toolchain, tuned
from jax_fp8gemm.jit.cache import cache_key, kernel_cache
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.problem import GemmProblem


@pytest.fixture(autouse=True)
def private_environment(monkeypatch, tmp_path):
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_module_runs_and_its_help_has_the_environment(tmp_path):
    command = [sys.executable, "-m", "jax_fp8gemm", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    commands = "info", "explain", "warmup", "autotune", "cache", "launch"
    for word in (*commands, *(v.name for v in settings.VARIABLES)):
        assert word in done.stdout


def test_explain(capsys):
    status, out, _ = run(capsys, "explain", 64, 2112, 7168, "--rows", 3)
    assert status == 0
    assert "64x2112x7168 bf16 on NVIDIA H200, 132 SMs" in out
    assert "winner, by the" in out
    status, out, _ = run(
        capsys, "explain", 64, 2112, 7170, "--gpu", "NVIDIA H20", "--num-sms", 50, "--out-dtype", "f32",
        "--accumulate", "--batch", 2, "--rhs-scale-rows", 1, "--batch-invariant")
    assert status == 0
    assert "2 x 64x2112x7184 f32 accumulate 1x128 rhs on NVIDIA H20, 50 SMs" in out
    assert "split-K" not in out.split("rejected")[0]


@pytest.mark.parametrize(("arguments", "title"), [
    ((32768, 4096, 7168, "--kind", "ragged_m", "--groups", 8), "ragged_m 8 x ~4096x4096x7168 bf16"),
    ((8192, 4096, 7168, "--kind", "ragged_m", "--groups", 64, "--expected-m", 20),
     "ragged_m 64 x ~20x4096x7168 bf16"),
    ((1024, 4096, 7168, "--kind", "masked", "--groups", 32, "--expected-m", 20, "--batch", 2),
     "2 x masked 32 x ~20x4096x7168 bf16"),
    ((4096, 7168, 32760, "--kind", "ragged_k", "--groups", 8, "--accumulate"),
     "ragged_k 8 x 4096x7168x~4096 f32 accumulate"),
    ((4096, 7168, 32768, "--kind", "ragged_k", "--groups", 8, "--out-dtype", "bf16"),
     "ragged_k 8 x 4096x7168x~4096 bf16"),
])
def test_explain_groups(capsys, arguments, title):
    status, out, _ = run(capsys, "explain", *arguments, "--rows", 1)
    assert status == 0
    assert out.startswith(f"{title} on NVIDIA H200, 132 SMs\n")
    assert "winner, by the" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (("explain", 0, 8, 128), "GemmProblem.m: expected a whole number of at least 1, got 0"),
    (("explain", 8, 8, 128, "--accumulate"), "GemmProblem.accumulate: expected out_dtype 'f32', got 'bf16'"),
    (("explain", 8, 8, 128, "--groups", 3), "GemmProblem.groups: expected 1 for kind 'dense', got 3"),
    (("explain", 8, 8, 128, "--kind", "ragged_k", "--expected-m", 3),
     "GemmProblem.expected_m: expected None for kind 'ragged_k', got 3"),
    (("explain", 8, 8, 128, "--kind", "ragged_k", "--rhs-scale-rows", 128),
     "GemmProblem.rhs_scale_rows: expected 1 for kind 'ragged_k', got 128"),
    (("warmup", "64x64"), "shapes: expected MxNxK, such as 64x2112x7168, or a file of these, got '64x64'"),
])
def test_bad_input_is_said_in_one_line(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err == f"jax_fp8gemm: {message}\n"


def test_a_bad_environment_variable_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("JAX_FP8GEMM_NUM_SMS", "lots")
    status, _, err = run(capsys, "explain", 8, 8, 128)
    assert status == 2
    assert err == "jax_fp8gemm: JAX_FP8GEMM_NUM_SMS: expected a positive integer, got 'lots'\n"


def test_a_folder_that_cannot_be_made_is_said_in_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_FP8GEMM_DUMP_DIR", str(tmp_path / "file" / "dumps"))
    status, _, err = run(capsys, "warmup", "8x8x128")
    assert status == 2
    assert err.splitlines()[-1].startswith("jax_fp8gemm: ")
    assert "dumps" in err.splitlines()[-1]


def test_read_shapes_from_a_file(tmp_path):
    path = tmp_path / "shapes"
    path.write_text("# decode\n1x2112x7168\n\n64x7168x2048  # twice\n")
    assert cli.read_shapes(str(path)) == [(1, 2112, 7168), (64, 7168, 2048)]
    assert cli.read_shapes("3x4x5") == [(3, 4, 5)]
    path.write_text("1x2112x7168\n1,2,3\n")
    with pytest.raises(ValueError, match="got '1,2,3'"):
        cli.read_shapes(str(path))


def test_warmup_then_cache_then_clear(capsys, tmp_path):
    (tmp_path / "shapes").write_text("16x256x512\n16x320x512\n")
    status, out, err = run(capsys, "warmup", tmp_path / "shapes", "16x256x512")
    assert status == 0
    assert out.startswith("2 kernels ready in ")
    assert "100%" in err
    tuned.add(tuned.user_table(H200), H200, [tuned.Entry(GemmProblem(1, 8, 128), GemmConfig(64, 16, 4), 1.0)])
    status, out, _ = run(capsys, "cache")
    assert status == 0
    assert str(tmp_path / "cache" / "cubins") in out
    assert ": 2 kernels, 0." in out
    status, out, _ = run(capsys, "cache", "--clear")
    assert out.splitlines()[0] == "2 kernels deleted"
    assert ": 0 kernels, 0.0 MB" in out
    assert len(tuned.load(tuned.user_table(H200))) == 1, "measurements stay"


def test_warmup_compiles_what_a_grouped_call_asks_for(capsys):
    status, out, _ = run(capsys, "warmup", "64x256x512", "--kind", "masked", "--groups", 4, "--expected-m", 8)
    assert status == 0
    assert out.startswith("1 kernels ready in ")
    warm = kernel_cache().entries()
    assert len(warm) == 1
    x, w = (quantize(jnp.ones((4, rows, 512)), (step, 128)) for rows, step in ((64, 1), (256, 128)))
    gemm = jax.jit(partial(fp8_gemm_masked, expected_group_size=8))
    gemm.trace(x, w, jnp.full(4, 8)).lower(lowering_platforms=("cuda",))
    assert kernel_cache().entries() == warm


@pytest.mark.parametrize(("problem", "options"), [
    (GemmProblem(16, 256, 512), ()),
    (GemmProblem(64, 256, 512, kind="masked", groups=4, expected_m=8),
     ("--kind", "masked", "--groups", 4, "--expected-m", 8)),
    (GemmProblem(64, 256, 512, kind="ragged_k", groups=4, rhs_scale_rows=1, out_dtype="f32"),
     ("--kind", "ragged_k", "--groups", 4)),
], ids=["dense", "masked", "ragged_k"])
def test_autotune(capsys, monkeypatch, problem, options):
    entry = tuned.Entry(problem, GemmConfig(64, 64, 4), 3.25)
    seen = {}

    def fake(problems, **options):
        seen.update(options, problems=problems)
        return [entry], "the table"

    monkeypatch.setattr(cli, "autotune", fake)
    status, out, _ = run(
        capsys, "autotune", f"{problem.m}x256x512", *options, "--candidates", 5, "--rounds", 3)
    assert status == 0
    assert seen == {"problems": [entry.problem], "num_candidates": 5, "num_rounds": 3}
    assert out.splitlines() == [f"{problem}: 3.25 us  {entry.config}", "added to the table"]


NAMES = ["Python", "jax", "jaxlib", "plugin", "driver", "GPU", "compiler", "headers", "FFI module"]


def test_info_fits_on_a_screen_and_covers_everything(capsys):
    status, out, _ = run(capsys, "info")
    lines = out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 160
    assert [line[4:15].strip() for line in lines[:len(NAMES)]] == NAMES
    can_run = "This machine can run the kernels." in out
    assert status == (0 if can_run else 1)
    assert all(line.startswith("ok") for line in lines[:len(NAMES)]) == can_run
    assert "0 kernels, 0.0 MB" in out
    assert "0 of your own" in out


def test_info_says_what_mends_a_machine(capsys, monkeypatch):
    checks = [diagnose.Check(name, "fine") for name in NAMES]
    monkeypatch.setattr(diagnose, "checks", lambda: checks)
    assert run(capsys, "info")[0] == 0
    checks[3] = diagnose.Check("plugin", "JAX has no CUDA plugin", 'pip install "jax[cuda13]"')
    status, out, _ = run(capsys, "info")
    assert status == 1
    assert '    plugin:      pip install "jax[cuda13]"' in out.splitlines()
    assert "--  plugin      JAX has no CUDA plugin" in out.splitlines()


def test_checks_find_what_is_missing(monkeypatch):
    monkeypatch.setattr(diagnose.sys, "version_info", (3, 10, 9))
    monkeypatch.setattr(diagnose, "_version", lambda package: None)

    def no_nvrtc(nvcc=None):
        raise RuntimeError("no NVRTC")

    def no_driver(name):
        raise OSError(name)

    def no_gpu(backend):
        raise RuntimeError(backend)

    monkeypatch.setattr(toolchain, "compiler_version", no_nvrtc)
    monkeypatch.setattr(toolchain, "headers", no_nvrtc)
    monkeypatch.setattr(diagnose.ctypes, "CDLL", no_driver)
    monkeypatch.setattr(diagnose.jax, "local_devices", no_gpu)
    monkeypatch.setattr(diagnose.ffi, "available", lambda: False)
    remedies = {check.name: check.remedy for check in diagnose.checks()}
    assert list(remedies) == NAMES
    assert None not in remedies.values()
    assert remedies["compiler"] == "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc"
    assert remedies["jax"] == remedies["plugin"] == 'pip install "jax[cuda13]"'
    assert remedies["FFI module"].startswith("pip install")


@dataclasses.dataclass
class FakeGpu:
    device_kind: str
    compute_capability: str
    core_count: int = 132


@pytest.mark.parametrize(("gpu", "good"), [
    (FakeGpu("NVIDIA H200", "9.0"), True), (FakeGpu("NVIDIA B200", "10.0"), False)])
def test_only_hopper_will_do(monkeypatch, gpu, good):
    monkeypatch.setattr(diagnose.jax, "local_devices", lambda backend: [gpu, gpu])
    check = diagnose._gpu()
    assert check.state == f"2 x {gpu.device_kind} (compute capability {gpu.compute_capability})"
    assert (check.remedy is None) == good


def test_cache_state(monkeypatch, tmp_path):
    kernel_cache().get(cache_key("x"), lambda: bytes(250_000))
    assert diagnose.cache_state() == f"{tmp_path / 'cache' / 'cubins'}: 1 kernels, 0.3 MB"
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path / "file"))
    assert "cannot be written: set JAX_FP8GEMM_CACHE_DIR" in diagnose.cache_state()
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", "none")
    assert diagnose.cache_state() == "in memory only (JAX_FP8GEMM_CACHE_DIR)"
