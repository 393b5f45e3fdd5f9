"""The wheel: what is in it, and that it imports where there is no GPU, no driver and no repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import jax_fp8gemm

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = {".py", ".cuh", ".json"}


def run(*command, **options):
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files(folder, *suffixes):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in suffixes}


def test_contents(site):
    package = site / "jax_fp8gemm"
    assert files(package, ".py", ".json") == files(ROOT / "jax_fp8gemm", ".py", ".json")
    assert files(package / "cuda", ".cuh") == files(ROOT / "cuda", ".cuh") != set()
    others = {path.relative_to(package) for path in package.rglob("*.*") if path.suffix not in SOURCES}
    assert [(str(path.parent), path.name.split(".")[0]) for path in others] == [("ffi", "_ffi")]
    assert len(list(site.glob("*.dist-info/licenses/LICENSE"))) == 1


def test_version(wheel):
    """Written once, in the package: the wheel and the README's citation follow."""
    assert wheel.name.startswith(f"jax_fp8gemm-{jax_fp8gemm.__version__}-")
    assert f"version = {{{jax_fp8gemm.__version__}}}" in (ROOT / "README.md").read_text()


def test_stable_abi(wheel):
    """Python 3.12 and newer share a wheel."""
    expected = "cp312-abi3" if sys.version_info >= (3, 12) else "cp311-cp311"
    assert f"-{expected}-" in wheel.name


def test_imports_without_a_driver(site):
    """In a clean interpreter: the module loads and registers, and neither links nor opens libcuda."""
    script = """
import sys
sys.path += sys.argv[1:]  # as plain folders: no .pth file, so no editable installation of this package
from jax_fp8gemm import ffi
assert ffi.__file__.startswith(sys.argv[1]), ffi.__file__
ffi.register()
from jax_fp8gemm.ffi import _ffi
assert _ffi.__file__.startswith(sys.argv[1]), _ffi.__file__
print("libcuda.so" in open("/proc/self/maps").read())
"""
    interpreter = (sys.executable, "-I", "-S", "-c")
    libraries = sysconfig.get_path("purelib")
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = run(*interpreter, script, str(site), libraries, env=env, cwd=site)
    assert out.split() == ["False"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("gpus", "extras"), [
    ("GPU 0: NVIDIA H200", "test,bench,cuda"), ("No devices found", "test,bench")])
def test_make_installs_cuda_where_there_is_a_gpu(tmp_path, gpus, extras):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{gpus}'\n")
    smi.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = run("make", "--dry-run", "--always-make", "test", env=env, cwd=ROOT)
    assert f"--editable '.[{extras}]'" in out


def test_cuda_folder_leaves_the_cuda_packages_alone():
    """In the repository's root, `cuda` is also the kernels' folder: a namespace package has room for both."""
    out = run(
        sys.executable, "-c", "import cuda.core, cuda.bindings; print(*cuda.__path__, sep='\\n')", cwd=ROOT
    )
    assert len(out.splitlines()) >= 2  # the folder was in the way, and did no harm
    assert str(ROOT / "cuda") in out.splitlines()
    assert not (ROOT / "cuda" / "__init__.py").exists()
