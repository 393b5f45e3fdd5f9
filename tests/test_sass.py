"""What the compiler makes of the kernels that real shapes get: their instructions, registers and stack."""

import itertools
import re

import pytest

from jax_fp8gemm.jit import tuned
from jax_fp8gemm.jit.choose import best
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200, KNOWN_DEVICES
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.source import gemm_source
from jax_fp8gemm.jit.tile import warpgroup_tile
from sass import REGISTERS, assert_no_spills, compiled

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
    GemmProblem(8192, 4096, 7168, kind="ragged_m", groups=256),
    GemmProblem(1000, 1001, 400, kind="ragged_m", groups=3, out_dtype="f32"),
    GemmProblem(128, 7168, 2048, kind="masked", groups=32, expected_m=8),
    GemmProblem(512, 7168, 2048, kind="masked", groups=4, rhs_scale_rows=1),
    GemmProblem(576, 7168, 65536, kind="ragged_k", groups=64, rhs_scale_rows=1),
    GemmProblem(576, 7169, 65536, kind="ragged_k", groups=64, rhs_scale_rows=1, out_dtype="f32",
                accumulate=True),
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
    (GemmProblem(8192, 4096, 4096, kind="ragged_m", groups=8), GemmConfig(128, 128, 5, cluster_m=2)),
    (GemmProblem(8192, 4096, 4096, kind="masked", groups=8), GemmConfig(256, 128, 3, cluster_n=2)),
    (GemmProblem(4096, 4096, 8192, kind="ragged_k", groups=8, rhs_scale_rows=1, accumulate=True,
                 out_dtype="f32"), GemmConfig(128, 112, 5, partials=2)),
]
# Each distinct configuration of the shipped tables, with one of its problems.
SHIPPED = [entry for device in KNOWN_DEVICES for entry in tuned.load(tuned.shipped_table(device))]
TUNED = [(problem, config) for config, problem in {entry.config: entry.problem for entry in SHIPPED}.items()]
CHOSEN = [(problem, best(problem, H200)) for problem in PROBLEMS]
KERNELS = {gemm_source(*pair): pair for pair in [*CHOSEN, *FEATURES, *TUNED]}


@pytest.mark.parametrize("source", KERNELS, ids=[f"{p.n}x{p.k}: {c}" for p, c in KERNELS.values()])
def test_kernel(source, tmp_path):
    problem, config = KERNELS[source]
    assert rejection(problem, config, H200) is None
    instructions, usage = compiled(source, tmp_path)
    _check_units(problem, config, {instruction.name.split(".")[0] for instruction in instructions})
    _check_multiplication(config, instructions)
    _check_promotion(problem, config, instructions)
    assert any("MULTICAST" in each.name for each in instructions) == (config.cluster_m * config.cluster_n > 1)
    assert_no_spills(instructions, usage)
    # The launch bound shares 64K registers among all threads; setmaxnreg then moves them to the consumers.
    assert usage["REG"] <= min(255, REGISTERS // (128 * (1 + config.num_consumers)) // 8 * 8)


def _check_units(problem, config, opcodes):
    """The kernel works with tensor cores, copy engine and barriers."""
    assert {"QGMMA", "UTMALDG", "SYNCS"} <= opcodes
    store = "UTMAREDG" if problem.accumulate else "UTMASTG"
    assert (store in opcodes) == (problem.out_is_tma_aligned and config.split_k == 1)


def _check_multiplication(config, instructions):
    """Four wgmma cover a block of K without a wait in between.

    Where ptxas takes accumulators to be in use, it serialises: each wgmma then has its own arrival and wait.
    Where it takes the loop to be divergent, it moves each descriptor to uniform registers (R2UR) first. One
    move in a block is nothing; nor are those in the loop of what batches leave over.
    """
    order = [each.name.split(".R")[0] for each in instructions
             if each.is_a("QGMMA", "R2UR") or each.name.startswith(("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR"))]
    letters = {"QGMMA": "q", "R2UR": "r", "WARPGROUP.ARRIVE": "a", "WARPGROUP.DEPBAR": "d"}
    kinds = "".join(letter for name in order for start, letter in letters.items() if name.startswith(start))
    assert re.fullmatch(r"r*((a(r*q){4})+d[dr]*)+", kinds), kinds
    loops = re.findall(r"(?:a(?:r*q){4})+", kinds)
    if config.partials > 1:
        loops = [loop for loop in loops if loop.count("a") > 1]
    assert loops
    assert all(loop.count("r") <= loop.count("a") for loop in loops), kinds


def _check_promotion(problem, config, instructions):
    """Each sum of the tile has one FMA in each copy of the loop body, and one for its scales where both sides
    have them by row; every other one yields.

    Without the yields the kernel is 35 % slower where consumers share the tensor cores
    (docs/notes/dense-gemm.md). So where one in 25 of the FMAs that follow each other directly breaks the
    alternation, it is 1.4 % slower at the most, if each costs the same. What stands between two FMAs, such as
    reads of the columns' scales, takes a turn of its own: those pairs do not count. The compiler leaves the
    yields out where there is one consumer, and alternates less regularly where products that are no FMAs come
    in between (swap-AB), and in the short loops of split-K, which the tensor cores do not bound.
    """
    promotions = [each for each in instructions if each.is_a("FFMA")]
    p, q = warpgroup_tile(config)
    fmas = p // 64 * (q // 2) * (2 if problem.rhs_scale_rows == 1 else 1)
    assert promotions
    assert len(promotions) % fmas == 0
    if config.num_consumers == 1:
        return
    yields = [promotion.yields for promotion in promotions]
    assert any(yields)
    if not config.swap_ab and config.split_k == 1:
        alike = [a.yields == b.yields for a, b in itertools.pairwise(instructions)
                 if a.is_a("FFMA") and b.is_a("FFMA")]
        assert 0.4 <= sum(yields) / len(yields) <= 0.6
        assert len(alike) >= 0.8 * len(yields)
        assert sum(alike) <= len(alike) / 25
