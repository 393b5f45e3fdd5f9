"""CUTLASS's own Hopper GEMM with block scales, built from the nvidia-cutlass package with nvcc."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
from collections.abc import Sequence

from benchmarks.operands import Operands
from benchmarks.peers.base import Absent, Unsupported
from benchmarks.peers.toolkit import cuda_home
from benchmarks.peers.torch_peer import TorchPeer, on_device, torch, wait
from benchmarks.timing import Call, wall_time
from benchmarks.workloads import Workload

_SOURCE = pathlib.Path(__file__).with_name("cutlass_gemm.cu")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A tile configuration: the fastest one of a workload counts."""

    tile_m: int
    tile_n: int
    cluster_m: int
    cluster_n: int
    pingpong: bool

    @property
    def defines(self) -> list[str]:
        return [
            f"-D{field.name.upper()}={int(getattr(self, field.name))}" for field in dataclasses.fields(self)
        ]


VARIANTS = (
    Variant(64, 128, 1, 1, pingpong=True),
    Variant(64, 128, 2, 1, pingpong=True),
    Variant(128, 128, 1, 2, pingpong=False),
    Variant(128, 128, 2, 1, pingpong=False),
)


def _cutlass_source() -> pathlib.Path:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        raise Absent("the package nvidia-cutlass is not installed")
    return pathlib.Path(spec.origin).parent / "source"


def _cache_dir() -> pathlib.Path:
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    return root / "jax_fp8gemm" / "benchmarks"


def _build(variant: Variant) -> pathlib.Path:
    """The shared library of a variant, from the cache or compiled."""
    source, home = _cutlass_source(), cuda_home()
    command = [
        f"{home}/bin/nvcc",
        "-O3",
        "-std=c++17",
        "-shared",
        "-Xcompiler=-fPIC",
        "--expt-relaxed-constexpr",
        "-DNDEBUG",
        "-gencode=arch=compute_90a,code=sm_90a",
        f"-I{source}/include",
        f"-I{source}/tools/util/include",
        *variant.defines,
    ]
    version = importlib.metadata.version("nvidia-cutlass")
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), version, *command]).encode()).hexdigest()[:16]
    library = _cache_dir() / f"cutlass-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        built = subprocess.run(
            [*command, "-o", partial, _SOURCE], capture_output=True, text=True, check=False
        )
        if built.returncode:
            raise Absent(f"nvcc cannot compile {_SOURCE.name}: {built.stderr.strip()[-2000:]}")
        partial.replace(library)
    return library


@functools.cache
def _load(variant: Variant) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build(variant)))
    library.cutlass_gemm_create.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 6
    library.cutlass_gemm_run.argtypes = [ctypes.c_void_p] * 2
    library.cutlass_gemm_destroy.argtypes, library.cutlass_gemm_destroy.restype = [ctypes.c_void_p], None
    library.cutlass_gemm_status.argtypes, library.cutlass_gemm_status.restype = (
        [ctypes.c_int],
        ctypes.c_char_p,
    )
    return library


class _Gemm:
    """One variant bound to operands."""

    def __init__(self, variant: Variant, operands: Sequence[torch.Tensor], m: int, n: int, k: int):
        self._library = _load(variant)
        self._operands = operands
        self._out = torch.empty((m, n), dtype=torch.bfloat16, device="cuda")
        self._handle = ctypes.c_void_p()
        pointers = [tensor.data_ptr() for tensor in (*operands, self._out)]
        self._check(self._library.cutlass_gemm_create(m, n, k, *pointers, ctypes.byref(self._handle)))

    def _check(self, status: int) -> None:
        if status:
            raise Unsupported(f"CUTLASS: {self._library.cutlass_gemm_status(status).decode()}")

    def __call__(self) -> torch.Tensor:
        self._check(self._library.cutlass_gemm_run(self._handle, torch.cuda.current_stream().cuda_stream))
        return self._out

    def __del__(self):
        if self._handle:
            self._library.cutlass_gemm_destroy(self._handle)


class CutlassBlock(TorchPeer):
    title = "CUTLASS block-scaled"
    note = f"CUTLASS's sm90 blockwise collective, the fastest of {len(VARIANTS)} configurations per row"

    def __init__(self):
        super().__init__()
        _cutlass_source()
        cuda_home()

    def prepare(self, workloads: Sequence[Workload], programs: bool = False) -> None:
        with concurrent.futures.ThreadPoolExecutor(len(VARIANTS)) as pool:
            list(pool.map(_load, VARIANTS))

    def bind(self, operands: Operands) -> Call:
        workload = operands.workload
        lhs_scale = on_device(operands.lhs_scale).T.contiguous()  # M fastest
        tensors = (on_device(operands.lhs), lhs_scale, on_device(operands.rhs), on_device(operands.rhs_scale))
        calls, refusals = [], []
        for variant in VARIANTS:
            try:
                calls.append(Call(_Gemm(variant, tensors, workload.m, workload.n, workload.k), wait))
            except Unsupported as error:
                refusals.append(str(error))
        if not calls:
            raise Unsupported("; ".join(sorted(set(refusals))))
        return min(calls, key=lambda call: wall_time(call, runs=20, repeats=3).median)
