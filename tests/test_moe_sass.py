"""What the compiler makes of the kernels around the grouped GEMMs: wide accesses, no spills."""

import pytest

from jax_fp8gemm.jit.moe import PermuteProblem, SortProblem, permute_kernel, sort_kernel
from jax_fp8gemm.jit.quantize_transposed import TransposeProblem, transpose_kernel
from sass import accesses, assert_loads_are_in_flight_together, assert_no_spills, assert_room_for, compiled

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
    instructions, usage = compiled(kernel.source(), tmp_path)
    assert_no_spills(instructions, usage)
    assert_room_for(ctas, kernel.threads, usage)
    assert {access: len(accesses(instructions, access)) for access in wide} == wide


@pytest.mark.parametrize("name", ["permute", "transpose"])
def test_loads_are_in_flight_together(name, tmp_path):
    instructions, _ = compiled(KERNELS[name][0].source(), tmp_path)
    assert accesses(instructions, "LDG.128")
    assert_loads_are_in_flight_together(instructions)
