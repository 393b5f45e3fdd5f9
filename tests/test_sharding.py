"""Every operation sharded along every axis, on Auto and Explicit axes and in shard_map: bits, collectives."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import (
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    permute,
    quantize,
    quantize_both,
    quantize_swiglu,
    quantize_swiglu_backward,
    quantize_transposed,
    quantize_weights,
)
from jax_fp8gemm.scaling import SQUARE_BLOCKS
from meshes import AUTO, EXPLICIT, assert_same_bits, normal, run, run_alone, scaled, weights

M, N, K, G = 24, 512, 512, 4
SIZES = jnp.array([5, 0, 9, 7], jnp.int32)  # of groups; rows are left over
IDS = jnp.arange(2 * M, dtype=jnp.int32).reshape(M, 2) * 7 % (G + 1)  # one of them is no expert's
X, Y, ROWS = P("x"), P("y"), P(None, "x")
ONE_SUM, SCATTERED = {"all-reduce": 1}, {"reduce-scatter": 1}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, its operands, how they are sharded, and what comes of it.

    Attributes:
      out: the result's PartitionSpec, where the operands leave it open.
      collectives: of the compiled program.
      local: whether the devices' own results, side by side, are the result: then it runs in shard_map, too,
        where `local_out` says how they lie.
    """

    function: Callable
    operands: tuple
    specs: tuple
    out: P | None = None
    collectives: dict = dataclasses.field(default_factory=dict)
    local_out: P | None = None

    def call(self, *operands, out_sharding=None):
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        return self.function(*operands, **options)


def accumulated(lhs, rhs, *sizes_and_accumulator, **options):
    *sizes, accumulator = sizes_and_accumulator
    gemm = fp8_gemm_ragged_k if sizes else fp8_gemm
    return gemm(lhs, rhs, *sizes, accumulator=accumulator, out_dtype=jnp.float32, **options)


def swiglu(x, sizes, **options):
    return quantize_swiglu(x, group_sizes=sizes, **options)


def routed(x, ids):
    return permute(x, ids, G)


squares = partial(quantize, granularity=SQUARE_BLOCKS)
invariant = partial(fp8_gemm, batch_invariant=True)
DENSE = scaled(M, K), weights(N, K)
BATCHED = scaled(4, M, K), weights(4, N, K)
GROUPED = scaled(M, K), weights(G, N, K), SIZES
MASKED = scaled(G, M, K), weights(G, N, K), SIZES
GRADIENT = scaled(M, K), scaled(N, K), jnp.array([130, 0, 60, 100], jnp.int32)
DENSE_SUM, GRADIENT_SUM = (*DENSE, jnp.ones((M, N))), (*GRADIENT, jnp.ones((G, M, N)))

CASES = {
    "gemm, M": Case(fp8_gemm, DENSE, (X, P()), local_out=X),
    "gemm, N": Case(fp8_gemm, DENSE, (P(), X), local_out=ROWS),
    "gemm, M and N": Case(fp8_gemm, DENSE, (X, Y), local_out=P("x", "y")),
    "gemm, M over two mesh axes": Case(fp8_gemm, DENSE, (P(("x", "y")), P()), local_out=P(("x", "y"))),
    "gemm, K": Case(fp8_gemm, DENSE, (ROWS, ROWS), P(), ONE_SUM),
    "gemm, K of lhs": Case(fp8_gemm, DENSE, (ROWS, P()), P(), ONE_SUM),
    "gemm, K of rhs": Case(fp8_gemm, DENSE, (P(), ROWS), P(), ONE_SUM),
    "gemm, K, scattered over M": Case(fp8_gemm, DENSE, (ROWS, ROWS), X, SCATTERED),
    "gemm, K, scattered over N": Case(fp8_gemm, DENSE, (ROWS, ROWS), ROWS, SCATTERED),
    "gemm, M and K": Case(fp8_gemm, DENSE, (P("x", "y"), P(None, "y")), X, ONE_SUM),
    "gemm, N and K, scattered over M": Case(
        fp8_gemm, DENSE, (P(None, "y"), P("x", "y")), P("y", "x"), SCATTERED),
    "gemm, K is gathered: bits are to depend on nothing": Case(
        invariant, DENSE, (ROWS, ROWS), P(), {"all-gather": 4}),
    "gemm, weights gathered, as for FSDP": Case(fp8_gemm, DENSE, (X, ROWS), X, {"all-gather": 2}),
    "gemm, B": Case(fp8_gemm, BATCHED, (X, X), local_out=X),
    "gemm, B and N": Case(fp8_gemm, BATCHED, (X, P("x", "y")), local_out=P("x", None, "y")),
    "gemm, B and K": Case(fp8_gemm, BATCHED, (P("x", None, "y"),) * 2, X, ONE_SUM),
    "gemm, rows of rhs scaled, N": Case(fp8_gemm, (scaled(M, K), scaled(72, K)), (P(), X), local_out=ROWS),
    "gemm, accumulator, M and N": Case(accumulated, DENSE_SUM, (X, Y, P("x", "y")), local_out=P("x", "y")),
    "gemm, accumulator, K": Case(accumulated, DENSE_SUM, (ROWS, ROWS, P()), P(), ONE_SUM),
    "gemm, accumulator, K, scattered": Case(accumulated, DENSE_SUM, (ROWS, ROWS, X), X, SCATTERED),
    "ragged M, N": Case(fp8_gemm_ragged_m, GROUPED, (P(), ROWS, P()), local_out=ROWS),
    "ragged M, K": Case(fp8_gemm_ragged_m, GROUPED, (ROWS, P(None, None, "x"), P()), P(), ONE_SUM),
    "ragged M, K, scattered": Case(
        fp8_gemm_ragged_m, GROUPED, (ROWS, P(None, None, "x"), P()), ROWS, SCATTERED),
    "ragged M, G": Case(fp8_gemm_ragged_m, GROUPED, (P(), X, P()), P(), ONE_SUM),
    "ragged M, G, scattered over M": Case(fp8_gemm_ragged_m, GROUPED, (P(), X, P()), X, SCATTERED),
    "ragged M, G and N": Case(fp8_gemm_ragged_m, GROUPED, (P(), P("x", "y"), P()), P(None, "y"), ONE_SUM),
    "ragged M, G and K": Case(
        fp8_gemm_ragged_m, GROUPED, (P(None, "y"), P("x", None, "y"), P()), P(), ONE_SUM),
    "masked, G": Case(fp8_gemm_masked, MASKED, (X, X, X), local_out=X),
    "masked, N": Case(fp8_gemm_masked, MASKED, (P(), ROWS, P()), local_out=P(None, None, "x")),
    "masked, M": Case(fp8_gemm_masked, MASKED, (ROWS, P(), P())),
    "masked, G and M": Case(fp8_gemm_masked, MASKED, (P("x", "y"), X, X)),
    "masked, K": Case(fp8_gemm_masked, MASKED, (P(None, None, "x"), P(None, None, "x"), P()), P(), ONE_SUM),
    "ragged K, M": Case(fp8_gemm_ragged_k, GRADIENT, (X, P(), P()), local_out=ROWS),
    "ragged K, N": Case(fp8_gemm_ragged_k, GRADIENT, (P(), X, P()), local_out=P(None, None, "x")),
    "ragged K, G": Case(fp8_gemm_ragged_k, GRADIENT, (P(), P(), P()), X),
    "ragged K, G and N": Case(fp8_gemm_ragged_k, GRADIENT, (P(), Y, P()), P("x", None, "y")),
    "ragged K, accumulator, G and M": Case(
        accumulated, GRADIENT_SUM, (Y, P(), P(), P("x", "y")), P("x", "y")),
    "quantize, R": Case(quantize, (normal(M, 200),), (X,), local_out=X),
    "quantize, C": Case(quantize, (normal(M, K),), (ROWS,), local_out=ROWS),
    "quantize, leading axes": Case(
        quantize, (normal(4, 2, 2, M, 200),), (P("x", "y"),), local_out=P("x", "y")),
    "quantize, squares": Case(squares, (normal(N, 256),), (P("x", "y"),), local_out=P("x", "y")),
    "quantize, part of a block": Case(quantize, (normal(M, 384),), (ROWS,), None, {"all-gather": 1}),
    "swiglu, M": Case(quantize_swiglu, (normal(M, 400),), (X,), local_out=X),
    "swiglu, F": Case(quantize_swiglu, (normal(M, 2 * K),), (ROWS,), None, {"collective-permute": 2}),
    "swiglu, ragged M, F": Case(
        swiglu, (normal(M, 2 * K), SIZES), (P(None, "y"), P()), None, {"collective-permute": 2}),
    "swiglu, masked, G": Case(swiglu, (normal(G, M, 400), SIZES), (X, X), local_out=X),
    "swiglu, masked, M": Case(swiglu, (normal(G, M, 400), SIZES), (ROWS, P())),
    "quantize_both, T": Case(quantize_both, (normal(N, 200),), (X,), local_out=(X, ROWS)),
    "quantize_both, N": Case(quantize_both, (normal(M, K),), (ROWS,), local_out=(ROWS, X)),
    "quantize_both, T, part of a block": Case(
        quantize_both, (normal(M, 200),), (X,), None, {"all-gather": 1}),
    "quantize_both, groups, N": Case(quantize_both, (normal(M, K), SIZES), (ROWS, P()), local_out=(ROWS, X)),
    "quantize_weights, K and N": Case(
        quantize_weights, (normal(N, 256),), (P("x", "y"),), local_out=(P("y", "x"), P("x", "y"))),
    "quantize_weights, G and N": Case(quantize_weights, (normal(G, 200, 256),), (P("x", None, "y"),),
                                      local_out=(P("x", "y"), P("x", None, "y"))),
    "swiglu backward, T": Case(quantize_swiglu_backward, (normal(N, 400), normal(N, 200)), (X, X),
                               local_out=(X, ROWS, ROWS)),
    "swiglu backward, F": Case(quantize_swiglu_backward, (normal(M, 2 * K), normal(M, K)), (ROWS, ROWS), None,
                               {"collective-permute": 10}),
    "swiglu backward, groups, F": Case(
        quantize_swiglu_backward, (normal(M, 2 * K), normal(M, K), SIZES), (ROWS, ROWS, P()), None,
        {"collective-permute": 10}),
    "quantize_transposed, N": Case(quantize_transposed, (normal(M, 64), SIZES), (ROWS, P()), local_out=X),
    "permute, K": Case(routed, (normal(M, K), IDS), (ROWS, P())),
}


@functools.cache
def expected(name):
    """What one device makes of it."""
    return run_alone(CASES[name].call, *CASES[name].operands)


@pytest.mark.parametrize("name", CASES)
def test_auto(name):
    case = CASES[name]
    options = {} if case.out is None else {"out_shardings": NamedSharding(AUTO, case.out)}
    actual, collectives = run(AUTO, case.call, case.operands, case.specs, **options)
    assert_same_bits(actual, expected(name))
    assert collectives == case.collectives


@pytest.mark.parametrize("name", CASES)
def test_explicit(name):
    case = CASES[name]
    call = partial(case.call, out_sharding=case.out)
    actual, collectives = run(EXPLICIT, call, case.operands, case.specs)
    assert_same_bits(actual, expected(name))
    assert collectives == case.collectives


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.local_out is not None])
def test_shard_map(name, check_vma):
    case = CASES[name]
    call = jax.shard_map(case.call, mesh=AUTO, in_specs=case.specs, out_specs=case.local_out,
                         check_vma=check_vma)
    actual, collectives = run(AUTO, call, case.operands, case.specs)
    assert_same_bits(actual, expected(name))
    assert collectives == {}
