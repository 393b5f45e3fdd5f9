"""The benchmark of what surrounds the grouped GEMMs: its operations compute, its bytes are their arrays'."""

import jax
import numpy as np
import pytest

from benchmarks.bench_moe import bind
from benchmarks.workloads import MOE_WORKLOADS, MoeWorkload


@pytest.mark.parametrize(("workload", "read"), [
    (MoeWorkload("permute", 256, 384, 8, 2), 2 * 256 * 384 + 4 * 512),
    (MoeWorkload("unpermute", 256, 384, 8, 2), 2 * 512 * 384 + 8 * 512),
    (MoeWorkload("transpose", 256, 384, 1, 1), 2 * 256 * 384),
], ids=lambda value: getattr(value, "operation", ""))
def test_bytes_are_those_of_operands_and_results(workload, read):
    results = jax.tree.leaves(bind(workload, "reference").run())
    small = 4 * workload.groups * (workload.operation == "permute")  # the group sizes, which do not count
    assert workload.bytes == read + sum(x.nbytes for x in results) - small
    assert all(np.asarray(x).any() for x in results)


def test_names_tell_workloads_apart():
    assert len({workload.name for workload in MOE_WORKLOADS}) == len(MOE_WORKLOADS)
