"""Times `permute`, `unpermute` and `quantize_transposed`: kernels, and XLA's of the same jnp, against a copy.

    python -m benchmarks.bench_moe

They are bound by memory, and a device-to-device copy shows what memory gives. `permute` includes the sort of
the expert ids; `unpermute` is XLA's in every case. Writes benchmarks/results/moe-<GPU>.json.
"""

from __future__ import annotations

from benchmarks import bandwidth
from benchmarks.timing import Call
from benchmarks.workloads import MOE_WORKLOADS, MoeWorkload


def bind(workload: MoeWorkload, implementation: str) -> Call:
    """The operation on random data, compiled; scales lie in memory as a GEMM wants them.

    Experts of a token are distinct, and all are equally likely.
    """
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm import permute, quantize_transposed, unpermute

    tokens, columns, top_k, groups = workload.tokens, workload.columns, workload.top_k, workload.groups
    key, router_key = jax.random.split(jax.random.key(0))
    router = jax.random.uniform(router_key, (tokens, groups))
    weights, ids = jax.lax.top_k(router, top_k)
    rows = tokens * (top_k if workload.operation == "unpermute" else 1)
    x = jax.random.normal(key, (rows, columns), jnp.bfloat16)
    options = {"implementation": implementation}

    def run_permute(x, ids):
        array, group_sizes, positions = permute(x, ids, groups, **options)
        return array.values, array.scales.mT, group_sizes, positions

    def run_transposed(x, group_sizes):
        array = quantize_transposed(x, group_sizes, **options)
        return array.values, array.scales.mT

    if workload.operation == "permute":
        function, operands = run_permute, (x, ids)
    elif workload.operation == "unpermute":
        positions = permute(x[:tokens, :1], ids, groups, implementation="reference")[2]
        function, operands = unpermute, (x, positions, weights)
    else:
        function, operands = run_transposed, (x, jnp.bincount(ids[:, 0], length=groups).astype(jnp.int32))
    compiled = jax.jit(function).lower(*operands).compile()
    return Call(run=lambda: compiled(*operands), wait=jax.block_until_ready)


def main() -> int:
    return bandwidth.main("moe", __doc__.splitlines()[0], MOE_WORKLOADS, bind)


if __name__ == "__main__":
    raise SystemExit(main())
