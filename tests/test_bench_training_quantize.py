"""The benchmark of what a training step quantises: it computes, and its bytes are those of its arrays."""

import jax
import numpy as np
import pytest

from benchmarks.bench_training_quantize import bind
from benchmarks.workloads import TRAINING_QUANTIZE_WORKLOADS, TrainingQuantizeWorkload


@pytest.mark.parametrize("workload", [
    TrainingQuantizeWorkload("both", 256, 300),
    TrainingQuantizeWorkload("both", 256, 300, groups=1),
    TrainingQuantizeWorkload("weights", 200, 300, batch=3),
    TrainingQuantizeWorkload("swiglu backward", 256, 384),
    TrainingQuantizeWorkload("swiglu backward", 256, 384, groups=1),
], ids=lambda workload: workload.name)
def test_bytes_are_those_of_operands_and_results(workload):
    results = jax.tree.leaves(bind(workload, "reference").run())
    read = sum(2 * np.prod(shape) for shape in workload.operand_shapes)
    assert workload.bytes == read + sum(x.nbytes for x in results)
    assert all(np.asarray(x).any() for x in results)


def test_names_tell_workloads_apart():
    names = {workload.name for workload in TRAINING_QUANTIZE_WORKLOADS}
    assert len(names) == len(TRAINING_QUANTIZE_WORKLOADS)
