"""Times `quantize` and `quantize_swiglu`: the kernel, and what XLA makes of the same in jnp, against a copy.

    python -m benchmarks.bench_quantize

Quantisation reads bf16 and writes e4m3 with its scales: it is bound by memory, and a device-to-device copy
shows what memory gives. Writes benchmarks/results/quantize-<GPU>.json.
"""

from __future__ import annotations

from benchmarks import bandwidth
from benchmarks.timing import Call
from benchmarks.workloads import QUANTIZE_WORKLOADS, QuantizeWorkload


def bind(workload: QuantizeWorkload, implementation: str) -> Call:
    """The quantisation of random bf16 data, compiled; the scales lie in memory as a GEMM wants them."""
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm import quantize, quantize_swiglu

    def run(x):
        if workload.swiglu:
            array = quantize_swiglu(x, implementation=implementation)
        else:
            array = quantize(x, workload.granularity, implementation=implementation)
        return array.values, array.scales.mT if workload.granularity[0] == 1 else array.scales

    shape = workload.rows, workload.columns * (2 if workload.swiglu else 1)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    compiled = jax.jit(run).lower(x).compile()
    return Call(run=lambda: compiled(x), wait=jax.block_until_ready)


def main() -> int:
    return bandwidth.main("quantize", __doc__.splitlines()[0], QUANTIZE_WORKLOADS, bind)


if __name__ == "__main__":
    raise SystemExit(main())
