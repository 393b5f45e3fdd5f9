"""What the compiler makes of the kernels around the grouped GEMMs: wide accesses, no spills."""

import pytest

from jax_fp8gemm.jit.moe import PermuteProblem, SortProblem, permute_kernel, sort_kernel
from jax_fp8gemm.jit.quantize_transposed import TransposeProblem, transpose_kernel
from jax_fp8gemm.jit.toolchain import compile_source
from sass import disassemble, resource_usage

REGISTERS = 65536  # of a multiprocessor

# Each with CTAs that a multiprocessor has room for at least, and numbers of wide loads and stores. Rows that
# begin anywhere allow none.
KERNELS = {
    "sort": (sort_kernel(SortProblem(1, 32768, 256)), 1, {}),
    "sort 5000 experts": (sort_kernel(SortProblem(1, 32768, 5000)), 1, {}),
    "permute": (permute_kernel(PermuteProblem(1, 4096, 7168, 8), 4), 3,
                {"LDG.128": 4, "STG.64": 64, "STG.128": 2}),
    "permute a few": (permute_kernel(PermuteProblem(1, 64, 7168, 8), 1), 6, {"LDG.128": 1, "STG.64": 16}),
    "permute f32": (permute_kernel(PermuteProblem(1, 4096, 7168, 8, "f32", "e5m2"), 2), 4,
                    {"LDG.128": 4, "STG.64": 32}),
    "permute top 20": (permute_kernel(PermuteProblem(1, 4096, 7168, 20), 4), 3, {"LDG.128": 4}),
    "permute odd": (permute_kernel(PermuteProblem(1, 4096, 7169, 8), 1), 6, {"LDG.128": 0, "STG.64": 0}),
    "transpose": (transpose_kernel(TransposeProblem(1, 8192, 7168, 8)), 4, {"LDG.128": 8, "STG.128": 4}),
    "transpose f32": (transpose_kernel(TransposeProblem(1, 8192, 7168, 8, "f32", "e5m2")), 2,
                      {"LDG.128": 16, "STG.128": 4}),
    "transpose odd": (transpose_kernel(TransposeProblem(1, 8192, 7169, 8)), 4, {"LDG.128": 0, "STG.128": 4}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name, tmp_path):
    kernel, ctas, wide = KERNELS[name]
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compile_source(kernel.source()))
    names = [instruction.name for instruction in disassemble(path)]
    usage = resource_usage(path)
    assert usage["STACK"] == 0
    assert not any(name.startswith(("LDL", "STL")) for name in names), "spills"
    assert -(-usage["REG"] // 8) * 8 * kernel.threads * ctas <= REGISTERS
    for access, expected in wide.items():
        opcode, width = access.split(".")
        assert sum(name.startswith(opcode) and f".{width}" in name for name in names) == expected


@pytest.mark.parametrize("name", ["permute", "transpose"])
def test_loads_are_in_flight_together(name, tmp_path):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compile_source(KERNELS[name][0].source()))
    names = [instruction.name for instruction in disassemble(path)]
    loads = [i for i, name in enumerate(names) if name.startswith("LDG") and ".128" in name]
    waits = [i for i, name in enumerate(names) if name.startswith(("STG", "STS", "BAR", "FFMA", "F2FP"))]
    assert not [i for i in waits if loads[0] < i < loads[-1]]
