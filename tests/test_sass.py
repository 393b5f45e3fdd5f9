"""What the compiler makes of the kernels that real shapes get: their instructions, registers and stack."""

import re
import subprocess

import pytest
from cuda import pathfinder

from jax_fp8gemm.jit import tuned
from jax_fp8gemm.jit.choose import best
from jax_fp8gemm.jit.config import GemmConfig, rejection
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.source import gemm_source
from jax_fp8gemm.jit.tile import warpgroup_tile
from jax_fp8gemm.jit.toolchain import compile_source, disassemble

# N x K of DeepSeek-V3's layers, decoded (M 1, 64), in small batches and trained; and what else is awkward.
DENSE = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
PROBLEMS = [GemmProblem(m, n, k) for n, k in DENSE for m in (1, 64, 4096)] + [
    GemmProblem(128, 4096, 7168), GemmProblem(8192, 8192, 8192),
    GemmProblem(799, 7168, 2048, out_dtype="f32"),
    GemmProblem(33, 4096, 7168, out_dtype="f32", batch_invariant=True),
    GemmProblem(4096, 7168, 4096, out_dtype="f32", rhs_scale_rows=1, accumulate=True),
    GemmProblem(16, 576, 7168, rhs_scale_rows=1, batch=4, rhs_batched=False),
    GemmProblem(129, 1001, 400, lhs_dtype="e5m2"),
    GemmProblem(7, 1001, 400, rhs_dtype="e5m2"),
]
# Each feature of the kernel once, whatever the model prefers.
FEATURES = [
    (GemmProblem(4096, 4096, 4096), GemmConfig(128, 128, 4, partials=2)),
    (GemmProblem(4096, 4096, 4096), GemmConfig(192, 96, 5, 3, cluster_m=2)),
    (GemmProblem(64, 4096, 4096), GemmConfig(64, 128, 6, swap_ab=True, cluster_n=2)),
    (GemmProblem(64, 4096, 4096), GemmConfig(64, 128, 6, split_k=8)),
    (GemmProblem(64, 4096, 4096, out_dtype="f32", accumulate=True),
     GemmConfig(32, 128, 6, swap_ab=True, split_k=2)),
    (GemmProblem(4096, 4095, 4096), GemmConfig(128, 160, 4)),
]
TUNED = [(entry.problem, entry.config) for entry in tuned.load(tuned.shipped_table(H200))]
CHOSEN = [(problem, best(problem, H200)) for problem in PROBLEMS]
KERNELS = {gemm_source(*pair): pair for pair in [*CHOSEN, *FEATURES, *TUNED]}


@pytest.mark.parametrize("source", KERNELS, ids=[f"{p.n}x{p.k}: {c}" for p, c in KERNELS.values()])
def test_kernel(source, tmp_path):
    problem, config = KERNELS[source]
    assert rejection(problem, config, H200) is None
    cubin = compile_source(source)
    sass = disassemble(cubin)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)", sass, re.M)
    names = {instruction.split(".")[0] for instruction in instructions}
    assert {"QGMMA", "UTMALDG", "SYNCS"} <= names, "tensor core, copy engine, barriers"
    store = "UTMAREDG" if problem.accumulate else "UTMASTG"
    assert (store in names) == (problem.out_is_tma_aligned and config.split_k == 1)
    consumer = instructions[_first(instructions, "QGMMA"):-_first(instructions[::-1], "FFMA")]
    assert not any(name.startswith(("LDL", "STL")) for name in consumer), "the main loop spills"
    assert any("MULTICAST" in name for name in instructions) == (config.cluster_m * config.cluster_n > 1)
    usage = _resource_usage(cubin, tmp_path / "kernel.cubin")
    # The producer has few registers; a few words of its addresses in local memory cost nothing beside a copy.
    assert usage["STACK"] <= 16
    # The launch bound shares 64K registers among all threads; setmaxnreg then moves them to the consumers.
    assert usage["REG"] <= min(255, 65536 // (128 * (1 + config.num_consumers)) // 8 * 8)
    # Each sum of the tile is promoted by one FMA, in each copy of the loop body.
    p, q = warpgroup_tile(config)
    sums, copies = p // 64 * (q // 2), sum(name.startswith("FFMA") for name in instructions)
    assert copies and copies % sums == 0


def _first(instructions, name):
    return next(i for i, instruction in enumerate(instructions) if instruction.startswith(name))


def _resource_usage(cubin, path):
    """Registers, stack and local bytes of the kernel, as cuobjdump counts them."""
    tool = pathfinder.find_nvidia_binary_utility("cuobjdump")
    assert tool is not None, "cuobjdump is needed: pip install nvidia-cuda-cuobjdump"
    path.write_bytes(cubin)
    command = [tool, "--dump-resource-usage", str(path)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
