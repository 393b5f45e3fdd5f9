"""What the compiler makes of the training quantisers: wide accesses, registers for enough CTAs, no spills."""

import itertools

import pytest

from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.quantize_training import (
    TokensProblem,
    WeightsProblem,
    both_kernel,
    swiglu_backward_kernel,
    swiglu_backward_shared_bytes,
    weights_kernel,
)
from sass import accesses, assert_loads_are_in_flight_together, assert_no_spills, assert_room_for, compiled

DTYPES = {"bf16": "e4m3", "f16": "e5m2", "f32": "e4m3"}


# A kernel, CTAs that a multiprocessor has room for at least, and numbers of wide loads and stores: of eight
# rows of a thread, 8 bytes by rows and 16 by columns. Rows that begin anywhere allow none.


def both(dtype, columns, groups):
    kernel = both_kernel(TokensProblem(1, 4096, columns, groups, dtype, DTYPES[dtype]))
    if columns % 8:
        return kernel, 2, {"LDG.128": 0, "STG.64": 0, "STG.128": 4}
    ctas, loads = (2, 16) if dtype == "f32" else (4, 8)
    return kernel, ctas, {"LDG.128": loads, "STG.64": 8, "STG.128": 4}


def weights(dtype, rows, columns):
    kernel = weights_kernel(WeightsProblem(1, rows, columns, dtype, DTYPES[dtype]))
    ctas = 2 if dtype == "f32" or columns % 8 else 4
    return kernel, ctas, {"STG.64": 0 if columns % 8 else 8, "STG.128": 0 if rows % 16 else 4}


def swiglu_backward(dtype, groups):
    kernel = swiglu_backward_kernel(TokensProblem(1, 4096, 2048, groups, dtype, DTYPES[dtype]))
    return kernel, 2, {"LDGSTS.128": 48 if dtype == "f32" else 24, "STG.128": 12}


KERNELS = {
    " ".join(map(str, (function.__name__, *arguments))): function(*arguments)
    for function, arguments_of in (
        (both, [*itertools.product(DTYPES, [7168], [None, 8]), ("bf16", 7169, 8)]),
        (weights, [*itertools.product(DTYPES, [4096], [7168]), ("bf16", 4097, 7168), ("bf16", 4096, 7169),
                   ("f32", 4097, 7169)]),
        (swiglu_backward, itertools.product(DTYPES, [None, 8])))
    for arguments in arguments_of
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name, tmp_path):
    kernel, ctas, wide = KERNELS[name]
    instructions, usage = compiled(kernel.source(), tmp_path)
    assert_no_spills(instructions, usage)
    assert_room_for(ctas, kernel.threads, usage)
    assert {access: len(accesses(instructions, access)) for access in wide} == wide
    assert_loads_are_in_flight_together(instructions)


@pytest.mark.parametrize(("dtype", "ctas"), [("bf16", 2), ("f16", 2), ("f32", 1)])
def test_operands_of_the_swiglu_backward_fit_into_shared_memory(dtype, ctas):
    needed = swiglu_backward_shared_bytes(TokensProblem(1, 4096, 2048, None, dtype))
    assert needed <= H200.shared_bytes
    assert ctas * (needed + 1024) <= 228 * 1024  # of a multiprocessor; the system takes 1024 of each CTA
