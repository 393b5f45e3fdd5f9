"""From source to cubin and from problem to plan: NVRTC, a given nvcc, errors, dumps, overrides."""

import stat
import sys

import jax
import jax.numpy as jnp
import pytest

from jax_fp8gemm.jit import compiler, cubin, toolchain
from jax_fp8gemm.jit.compiler import build, compile_kernel, override
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.launch import LaunchPlan
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.settings import VARIABLES, limit_sms
from jax_fp8gemm.jit.toolchain import CompileError, compile_source, compiler_identity, disassemble, headers

TOY = 'extern "C" __global__ void toy(float* x) { x[threadIdx.x] = x[threadIdx.x] / 3.0f; }'
PROBLEM = GemmProblem(64, 256, 1024)
CONFIG = GemmConfig(64, 64, 4)


@pytest.fixture(autouse=True)
def private_environment(monkeypatch, tmp_path):
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def fake_compiler(monkeypatch):
    """Replaces the compiler; the list of the sources that it got."""
    sources = []

    def compile_fake(source, **options):
        sources.append(source)
        return f"{options} {source}".encode()

    monkeypatch.setattr(cubin, "compile_source", compile_fake)
    monkeypatch.setattr(cubin, "compiler_identity", lambda nvcc: f"fake {nvcc}")
    return sources


def test_nvrtc_compiles_for_hopper_without_fast_math():
    cubin = compile_source(TOY)
    assert cubin.startswith(b"\x7fELF")
    assert b"toy" in cubin
    ptx = compile_source(TOY, output="ptx").decode()
    assert ".target sm_90a" in ptx
    assert ".entry toy" in ptx
    assert "div.rn.f32" in ptx, "division must round to nearest"


def test_kernels_may_include_the_headers_and_use_cpp20():
    source = ('#include "ptx/types.cuh"\n'
              "template <class T> concept Any = true; template <Any T> __device__ void f(T) {}\n")
    assert compile_source(source + TOY).startswith(b"\x7fELF")


def test_line_info_keeps_the_lines():
    assert b".debug_line" in compile_source(TOY, line_info=True)
    assert b".debug_line" not in compile_source(TOY)


def test_the_log_is_in_the_exception():
    with pytest.raises(CompileError, match=r'fp8_gemm\.cu\(2\): error: identifier "undeclared" is undefined'):
        compile_source('extern "C" __global__ void toy() {\n  undeclared = 1;\n}')


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="output: expected 'cubin' or 'ptx', got 'sass'"):
        compile_source(TOY, output="sass")


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def not_found(name):
        raise pathfinder.DynamicLibNotFoundError(f"lib{name}.so is nowhere")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", not_found)
    toolchain._nvrtc_version.cache_clear()
    for call in (lambda: compile_source(TOY), lambda: build(PROBLEM)):
        with pytest.raises(RuntimeError, match=f"{toolchain.INSTALL_NVRTC}.*nowhere"):
            call()


def _fake_nvcc(path, body):
    path.write_text(f"#!{sys.executable}\nimport sys\n"
                    f"if '--version' in sys.argv:\n    print('nvcc, version 1.2.3')\nelse:\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_given_nvcc_is_used(tmp_path, monkeypatch):
    body = "    open(sys.argv[sys.argv.index('-o') + 1], 'w').write(' '.join(sys.argv))\n"
    nvcc = _fake_nvcc(tmp_path / "nvcc", body)
    command = compile_source(TOY, nvcc=nvcc, line_info=True).decode()
    for option in ("-arch=sm_90a", "-std=c++20", "-cubin", "-lineinfo", f"-I{headers()}"):
        assert option in command.split()
    assert "fast_math" not in command
    assert "-ptx" in compile_source(TOY, nvcc=nvcc, output="ptx").decode().split()
    assert "nvcc, version 1.2.3" in compiler_identity(nvcc)
    monkeypatch.setenv("JAX_FP8GEMM_NVCC", str(nvcc))
    assert b"-cubin" in build(PROBLEM, CONFIG).cubin


def test_the_log_of_a_given_nvcc_is_in_the_exception(tmp_path):
    nvcc = _fake_nvcc(tmp_path / "nvcc", "    sys.exit('ptxas fatal: out of registers')\n")
    with pytest.raises(CompileError, match=r"(?s)nvcc .* failed:\nptxas fatal: out of registers"):
        compile_source(TOY, nvcc=nvcc)
    nvcc.chmod(0)
    missing = tmp_path / "missing"
    with pytest.raises(CompileError, match="missing could not be started"):
        compile_source(TOY, nvcc=missing)


def test_build_compiles_once_for_equal_sources(fake_compiler):
    first = build(PROBLEM, CONFIG)
    assert isinstance(first, LaunchPlan)
    assert b"line_info': False" in first.cubin
    assert build(PROBLEM, CONFIG) == first
    assert len(fake_compiler) == 1
    build(GemmProblem(33, 256, 1024), CONFIG)
    assert len(fake_compiler) == 1, "M is an argument of the kernel"
    build(GemmProblem(64, 320, 1024), CONFIG)
    assert len(fake_compiler) == 2


@pytest.mark.parametrize("change", ["headers", "compiler", "line info", "nvcc"])
def test_the_key_has_everything_that_matters(change, fake_compiler, monkeypatch, tmp_path):
    build(PROBLEM, CONFIG)
    if change == "headers":
        monkeypatch.setattr(cubin, "headers_digest", lambda: "other headers")
    elif change == "compiler":
        monkeypatch.setattr(cubin, "compiler_identity", lambda nvcc: "another")
    elif change == "line info":
        monkeypatch.setenv("JAX_FP8GEMM_LINE_INFO", "1")
    else:
        monkeypatch.setenv("JAX_FP8GEMM_NVCC", str(_fake_nvcc(tmp_path / "nvcc", "    pass\n")))
    build(PROBLEM, CONFIG)
    assert len(fake_compiler) == 2


def test_headers_digest_sees_names_and_content(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "headers", lambda: tmp_path)
    digests = set()
    (tmp_path / "ptx").mkdir()
    for name, text in (("a.cuh", "1"), ("a.cuh", "2"), ("ptx/b.cuh", ""), ("ptx/c.cuh", "x")):
        (tmp_path / name).write_text(text)
        digests.add(toolchain.headers_digest())
    (tmp_path / "README.md").write_text("no header")
    assert len(digests) == 4
    assert toolchain.headers_digest() in digests


def test_an_illegal_configuration_is_the_callers_error(fake_compiler):
    with pytest.raises(ValueError, match=r"config: expected one .* shared memory, above 232448"):
        build(PROBLEM, GemmConfig(128, 128, 12))
    with override(GemmConfig(96, 128, 4)), pytest.raises(ValueError, match="block_m 96 is no multiple"):
        build(PROBLEM)
    assert fake_compiler == []


def test_override_goes_before_the_choice_and_ends_with_its_context(fake_compiler):
    chosen = build(PROBLEM)
    with override(CONFIG):
        with override(GemmConfig(64, 128, 4)):
            assert build(PROBLEM) == build(PROBLEM, GemmConfig(64, 128, 4))
        assert build(PROBLEM) == build(PROBLEM, CONFIG) != chosen
    assert build(PROBLEM) == chosen


def test_override_never_reuses_a_trace_under_another_configuration():
    seen = []

    @jax.jit
    def call(x):
        seen.append(compiler._override.get())
        return x + 1

    x = jnp.ones(3)
    other = GemmConfig(64, 64, 4, split_k=2)
    same_in_print = GemmConfig(64, 64, 4, split_k=2, out_buffers=1)
    assert str(other) == str(same_in_print)
    for config in (CONFIG, other, CONFIG, same_in_print):
        with override(config):
            call(x)
    call(x)
    assert seen == [CONFIG, other, same_in_print, None]


def test_the_sm_limit_reaches_the_grid(fake_compiler):
    problem, config = GemmProblem(4096, 4096, 1024), GemmConfig(128, 128, 4)
    assert build(problem, config, device=H200).grid[0] == 132
    assert build(problem, config, num_sms=50).grid[0] == 50
    with limit_sms(40):
        assert build(problem, config).grid[0] == 40
        assert build(problem, config, num_sms=50).grid[0] == 50


def test_the_choice_is_printed_when_asked_for(fake_compiler, monkeypatch, capsys):
    build(PROBLEM, CONFIG)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("JAX_FP8GEMM_PRINT_CONFIG", "1")
    build(PROBLEM, CONFIG)
    build(PROBLEM)
    given, chosen = capsys.readouterr().err.splitlines()
    assert given == f"jax_fp8gemm: 64x256x1024 bf16: {CONFIG} (given)"
    assert chosen.endswith("(model)")


def test_dumps_have_source_ptx_cubin_and_sass(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_FP8GEMM_DUMP_DIR", str(tmp_path / "dump"))
    compiled = compile_kernel(PROBLEM, CONFIG)
    files = {path.suffix: path for path in (tmp_path / "dump").iterdir()}
    assert set(files) == {".cu", ".ptx", ".cubin", ".sass"}
    (stem,) = {path.stem for path in files.values()}
    assert stem.startswith("fp8_gemm_256x1024_")
    assert files[".cubin"].read_bytes() == compiled
    assert "wgmma.mma_async" in files[".ptx"].read_text()
    assert "QGMMA" in files[".sass"].read_text()


def test_without_nvdisasm_the_error_says_what_to_install(monkeypatch, tmp_path, caplog):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install nvidia-cuda-nvdisasm"):
        disassemble(b"")
    monkeypatch.setenv("JAX_FP8GEMM_DUMP_DIR", str(tmp_path / "dump"))
    compile_kernel(PROBLEM, CONFIG)
    assert {path.suffix for path in (tmp_path / "dump").iterdir()} == {".cu", ".ptx", ".cubin"}
    assert "pip install nvidia-cuda-nvdisasm" in caplog.text


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "__file__", str(tmp_path / "jax_fp8gemm" / "jit" / "toolchain.py"))
    with pytest.raises(RuntimeError, match=r"neither in .* nor in .*: install jax_fp8gemm again"):
        headers()
