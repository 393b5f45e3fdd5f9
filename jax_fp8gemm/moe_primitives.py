"""Sorting and permuting as JAX primitives: results, batching and lowering, as table entries.

Operands are in canonical form: each has a batch axis first, and all vary over the same manual mesh axes
(`match_varying`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_fp8gemm import reference_moe, sharding
from jax_fp8gemm.jit.kernel import kernel_call
from jax_fp8gemm.jit.moe import PermuteProblem, SortProblem, plan_permute, plan_sort
from jax_fp8gemm.operation import Operation, fold_into_batch, register
from jax_fp8gemm.quantize_primitives import DTYPE_NAMES, scaled_results
from jax_fp8gemm.scaling import ROW_BLOCKS

_INT32 = jnp.dtype(jnp.int32)

# ---- fp8_sort_by_expert: expert_ids [B, T, top_k]
#      -> group_sizes [B, E], positions [B, T, top_k], num_rows [B]


def _sort_results(expert_ids, *, num_experts):
    batch = expert_ids.shape[0]
    return [((batch, num_experts), _INT32), (expert_ids.shape, _INT32), ((batch,), _INT32)]


def _sort_hopper(expert_ids, *, num_experts):
    batch, tokens, top_k = expert_ids.shape
    results = [jax.ShapeDtypeStruct(*result) for result in _sort_results(expert_ids, num_experts=num_experts)]
    return kernel_call(plan_sort(SortProblem(batch, tokens * top_k, num_experts)), results)(expert_ids)


sort_by_expert_p = register(Operation("fp8_sort_by_expert", _sort_results, fold_into_batch,
                                      reference_moe.sort_by_expert, _sort_hopper, sharding.sort_by_expert))


# ---- fp8_permute: x [B, T, K], positions [B, T, top_k], num_rows [B]
#      -> values [B, T * top_k, K], scales [B, T * top_k, ceil(K/128)], row-major


def _permute_results(x, positions, num_rows, *, dtype):
    batch, tokens, top_k = positions.shape
    return scaled_results((batch, tokens * top_k, x.shape[2]), ROW_BLOCKS, dtype)


def _permute_hopper(x, positions, num_rows, *, dtype):
    problem = PermuteProblem(*x.shape, top_k=positions.shape[2], input_dtype=DTYPE_NAMES[x.dtype],
                             float8_dtype=DTYPE_NAMES[dtype])
    results = [jax.ShapeDtypeStruct(*result)
               for result in _permute_results(x, positions, num_rows, dtype=dtype)]
    return kernel_call(plan_permute(problem), results)(x, positions, num_rows)


permute_p = register(Operation("fp8_permute", _permute_results, fold_into_batch, reference_moe.permute,
                               _permute_hopper, sharding.permute))
