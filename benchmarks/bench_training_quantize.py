"""Times what a training step quantises: the kernel, and what XLA makes of the same in jnp, against a copy.

    python -m benchmarks.bench_training_quantize

`quantize_both`, `quantize_weights` and `quantize_swiglu_backward` are bound by memory, and a device-to-device
copy shows what memory gives. Writes benchmarks/results/training_quantize-<GPU>.json.
"""

from __future__ import annotations

from benchmarks import bandwidth
from benchmarks.timing import Call
from benchmarks.workloads import TRAINING_QUANTIZE_WORKLOADS, TrainingQuantizeWorkload


def bind(workload: TrainingQuantizeWorkload, implementation: str) -> Call:
    """The quantisation of random bf16 data, compiled; scales lie in memory as a GEMM wants them.

    All groups are equally likely for a token.
    """
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm import quantize_both, quantize_swiglu_backward, quantize_weights

    functions = {"both": quantize_both, "weights": quantize_weights,
                 "swiglu backward": quantize_swiglu_backward}
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [jax.random.normal(key, shape, jnp.bfloat16)
                for key, shape in zip(keys, workload.operand_shapes, strict=False)]
    if workload.groups:
        ids = jax.random.randint(keys[2], workload.rows, 0, workload.groups)
        operands.append(jnp.bincount(ids, length=workload.groups).astype(jnp.int32))

    def run(*operands):
        arrays = functions[workload.operation](*operands, implementation=implementation)
        return [(array.values, array.scales.mT if array.granularity[0] == 1 else array.scales)
                for array in arrays]

    compiled = jax.jit(run).lower(*operands).compile()
    return Call(run=lambda: compiled(*operands), wait=jax.block_until_ready)


def main() -> int:
    return bandwidth.main("training_quantize", __doc__.splitlines()[0], TRAINING_QUANTIZE_WORKLOADS, bind)


if __name__ == "__main__":
    raise SystemExit(main())
