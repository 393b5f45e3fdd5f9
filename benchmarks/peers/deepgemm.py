"""DeepGEMM (https://github.com/deepseek-ai/DeepGEMM), where its package and nvcc are installed.

python -m benchmarks.peers.deepgemm 64x2112x7168      # compiles one shape's kernel into DeepGEMM's cache
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence

from benchmarks.operands import SCALE_BLOCK, Operands
from benchmarks.peers.base import Absent, Unsupported
from benchmarks.peers.toolkit import cuda_home
from benchmarks.peers.torch_peer import TorchPeer, on_device, torch, wait
from benchmarks.timing import Call
from benchmarks.workloads import Workload, parse

_CACHE = "DG_JIT_CACHE_DIR"
_CACHE_DIR = pathlib.Path(os.environ.setdefault(_CACHE, str(pathlib.Path.home() / ".deep_gemm")))


def import_deep_gemm():
    """The module.

    Raises:
      Absent: it, or nvcc, is not installed.
    """
    os.environ["CUDA_HOME"] = str(cuda_home())
    try:
        import deep_gemm
    except Exception as error:  # its import compiles and loads native code, which fails in many ways
        raise Absent(f"deep_gemm cannot be imported: {type(error).__name__}: {error}") from None
    return deep_gemm


def bind(lhs: torch.Tensor, lhs_scale: torch.Tensor, rhs: torch.Tensor, rhs_scale: torch.Tensor) -> Call:
    """DeepGEMM's fp8_gemm_nt on device tensors.

    Args:
      lhs: e4m3 [M, K].
      lhs_scale: f32 [M, ceil(K/128)].
      rhs: e4m3 [N, K].
      rhs_scale: f32 [ceil(N/128), ceil(K/128)].

    Raises:
      Absent: DeepGEMM or nvcc is not installed.
      Unsupported: DeepGEMM refuses the shape.
    """
    deep_gemm = import_deep_gemm()
    out = torch.empty((lhs.shape[0], rhs.shape[0]), dtype=torch.bfloat16, device="cuda")

    def run() -> torch.Tensor:
        deep_gemm.fp8_gemm_nt((lhs, lhs_scale), (rhs, rhs_scale), out, disable_ue8m0_cast=True)
        return out

    try:
        lhs_scale = deep_gemm.get_mn_major_tma_aligned_tensor(lhs_scale)  # its own layout, outside the timing
        wait(run())
    except RuntimeError as error:
        raise Unsupported(str(error).splitlines()[0]) from None
    return Call(run, wait)


def _compile_one(workload: Workload) -> None:
    m, n, k = workload.m, workload.n, workload.k
    k_blocks, n_blocks = -(-k // SCALE_BLOCK), -(-n // SCALE_BLOCK)
    fp8 = lambda rows: torch.zeros((rows, k), dtype=torch.float8_e4m3fn, device="cuda")
    bind(
        fp8(m),
        torch.ones((m, k_blocks), device="cuda"),
        fp8(n),
        torch.ones((n_blocks, k_blocks), device="cuda"),
    )


def _compile_in_process(module: str, name: str) -> None:
    """Fills a cache of its own, then adds it to the common one: DeepGEMM's processes can race for one."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", module, name]
        with contextlib.suppress(subprocess.TimeoutExpired):  # `bind` will say what is wrong, if anything
            subprocess.run(
                command, env={**os.environ, _CACHE: cache}, capture_output=True, timeout=180, check=False
            )
        shutil.copytree(cache, _CACHE_DIR, dirs_exist_ok=True)


def prepare(names: Iterable[str], module: str = __name__) -> None:
    """Compiles the kernels of the workloads in parallel processes: one by one they take 3 to 4 s each.

    Args:
      names: of the workloads.
      module: what compiles one of them, as a command.

    Raises:
      Absent: DeepGEMM or nvcc is not installed.
    """
    import_deep_gemm()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(functools.partial(_compile_in_process, module), names))


class DeepGemm(TorchPeer):
    title = "DeepGEMM"
    note = "deep_gemm.fp8_gemm_nt; lhs scales in its own layout beforehand"

    def __init__(self):
        super().__init__()
        import_deep_gemm()

    def prepare(self, workloads: Sequence[Workload], programs: bool = False) -> None:
        prepare(workload.name for workload in workloads)

    def bind(self, operands: Operands) -> Call:
        return bind(*map(on_device, (operands.lhs, operands.lhs_scale, operands.rhs, operands.rhs_scale)))


if __name__ == "__main__":
    _compile_one(parse(sys.argv[1]))
