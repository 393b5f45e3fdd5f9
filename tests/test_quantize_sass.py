"""What the compiler makes of the quantisation kernels: vector loads in flight, few registers, no spills."""

import itertools

import pytest

from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.problem import MASKED, RAGGED_M
from jax_fp8gemm.jit.quantize import THREADS, QuantizeProblem, Tile, choose_tile, quantize_kernel
from sass import accesses, assert_no_spills, assert_room_for, compiled

DTYPES = list(itertools.product(("bf16", "f16", "f32"), ("e4m3", "e5m2")))
SHAPES = [(4096, 7168), (64, 7168), (3, 128), (300, 200), (300, 1021)]
PROBLEMS = [
    *(QuantizeProblem(1, 4096, 7168, *dtypes, block_rows) for dtypes in DTYPES for block_rows in (1, 128)),
    *(QuantizeProblem(2, *shape, block_rows=block_rows) for shape in SHAPES for block_rows in (1, 128)),
    *(QuantizeProblem(2, *shape, swiglu=True, kind=kind, groups=1 if kind != RAGGED_M else 8)
      for shape in SHAPES for kind in (None, RAGGED_M, MASKED)),
    QuantizeProblem(1, 4096, 2048, "f32", "e5m2", swiglu=True),
]
KERNELS = {quantize_kernel(problem, tile).source(): (problem, tile)
           for problem in PROBLEMS for tile in [choose_tile(problem, H200)]}


@pytest.mark.parametrize("source", KERNELS, ids=[f"{p}, {t}" for p, t in KERNELS.values()])
def test_kernel(source, tmp_path):
    problem, tile = KERNELS[source]
    instructions, usage = compiled(source, tmp_path)
    assert_no_spills(instructions, usage)
    # Four CTAs on a multiprocessor keep some 100 KB in flight, two of those with f32 as much.
    heavy = problem.input_dtype == "f32" or problem.columns % 8
    assert_room_for(2 if heavy else 4, THREADS, usage)
    if problem.columns % 8 == 0:
        _check_vectors(problem, tile, instructions)
    else:
        assert not any(".128" in each.name for each in instructions if each.is_a("LDG", "LDGSTS", "STG"))


def _check_vectors(problem, tile, instructions):
    """All of a thread's loads are of 16 bytes and come before its stores, of 8."""
    loads, stores = accesses(instructions, "LDG.128"), accesses(instructions, "STG.64")
    chunks = tile.thread_rows * (2 if problem.swiglu else 1)
    assert len(loads) == chunks * (2 if problem.input_dtype == "f32" else 1)
    assert len(stores) == tile.thread_rows
    assert not any(each.is_a("SHFL") for each in instructions[loads[0] : loads[-1]])
    assert max(loads) < min(stores)


@pytest.mark.parametrize(("problem", "tile"), [
    (QuantizeProblem(1, 4096, 7168), Tile(4, 8)), (QuantizeProblem(1, 64, 7168), Tile(4, 1)),
    (QuantizeProblem(1, 10000, 256), Tile(2, 4)), (QuantizeProblem(1, 1, 1), Tile(1, 1)),
    (QuantizeProblem(1, 4096, 7168, "f32"), Tile(4, 4)),
    (QuantizeProblem(1, 64, 7168, block_rows=128), Tile(1, 8)),
    (QuantizeProblem(1, 4096, 7168, swiglu=True), Tile(4, 4)),
])
def test_tiles_fill_the_gpu_where_they_can(problem, tile):
    assert choose_tile(problem, H200) == tile
    assert tile.count(problem) >= 2 * H200.num_sms or tile.thread_rows in (1, 8)
