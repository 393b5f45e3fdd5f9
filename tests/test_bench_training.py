"""What of bench_training needs no GPU: the steps, their agreement, the split of their time, the table."""

import pathlib
import sys

import jax.numpy as jnp
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # last, as in test_benchmarks.py

from benchmarks import bench_training, readme_table, timing
from benchmarks.timing import Activity, Samples
from benchmarks.workloads import TrainingWorkload

HEAD = {"kind": "training", "gpu": "NVIDIA H100", "driver": "580", "versions": {"jax": "0.11"},
        "date": "2026-11-26T00:00", "repeats": 20}


def test_the_readme_table():
    result = lambda us, **more: {"median_us": us, **more}
    parts = {"gemm": 60.0, "quantize": 20.0, "other": 0.5}
    rows = [
        {"workload": "4096x7168x4096", "speedup_over_best_bf16": {"fp8": 1.5, "fp8_prepared": 1.7},
         "results": {"bf16": result(120.4), "fp8": result(80.5, parts_us=parts),
                     "fp8_prepared": result(70.2)}},
        {"workload": "alone", "speedup_over_best_bf16": {},
         "results": {"fp8": result(80.5, parts_us=parts), "fp8_prepared": result(70.2)}},
        {"workload": "experts", "speedup_over_best_bf16": {"fp8": 1.1, "fp8_prepared": 1.2},
         "results": {"ragged_dot": result(900.0), "tokamax": result(90.0),
                     "fp8": result(80.5, parts_us=parts), "fp8_prepared": result(70.2)}},
    ]
    lines = readme_table.table({**HEAD, "rows": rows}).splitlines()
    assert lines[4:] == [
        "| 4096x7168x4096 | 80 | 60 | 20 (25%) | 70 | 120 | `jnp.dot` | 1.50x | 1.70x |",
        "| alone | 80 | 60 | 20 (25%) | 70 | - | - | - | - |",
        "| experts | 80 | 60 | 20 (25%) | 70 | 90 | tokamax | 1.10x | 1.20x |",
    ]
    assert lines[2].count("|") == lines[3].count("|") == 10


def test_kernels_of_a_step_are_divided_by_what_they_do():
    times = {"fp8_gemm": 5.0, "fp8_quantize_both": 2.0, "fp8_quantize": 1.0, "loop_fusion": 0.25}
    assert bench_training.by_part(Samples((8.25,), tuple(times), times)) == {
        "gemm": 5.0, "quantize": 3.0, "other": 0.25}


def test_kernel_times_are_medians_of_sums():
    runs = [[Activity("a", 0, 1000), Activity("b", 1000, 1000 + b), Activity("a", 9000, 11000)]
            for b in (2000, 3000, 9000)]
    samples = timing.samples_of(runs)
    assert samples.kernel_times == {"a": 3.0, "b": 3.0}
    assert samples.kernels == ("a", "b", "a")
    assert samples.times == (5.0, 6.0, 11.0)  # what overlaps counts once


@pytest.mark.parametrize("workload", [
    TrainingWorkload(200, 128, n=256), TrainingWorkload(130, 128, f=128, group_sizes=(70, 0, 60))],
    ids=lambda workload: workload.name)
def test_training_steps_agree(workload, device):
    calls, absent = bench_training.bind(workload, [*bench_training.BF16, *bench_training.FP8])
    assert set(absent) <= {"tokamax"}
    dense = {"fp8", "fp8_prepared", "bf16"}
    assert calls.keys() - {"tokamax"} == (dense - {"bf16"} | {"ragged_dot"} if workload.f else dense)
    y, dx, *dw = next(iter(calls.values())).run()
    assert (y.shape, dx.shape) == ((workload.tokens, workload.out_features), (workload.tokens, workload.k))
    assert [each.shape for each in dw] == [*workload.weight_shapes]
    assert workload.flops == 6 * sum(
        workload.tokens * shape[-2] * shape[-1] for shape in workload.weight_shapes)


def test_a_step_that_computes_something_else_is_found():
    workload = TrainingWorkload(200, 128, n=256)
    y = [jnp.ones((200, 256)), jnp.ones((200, 128))]
    expected = bench_training.check(workload, "fp8", y, None)
    bench_training.check(workload, "bf16", [1.05 * each for each in y], expected)
    with pytest.raises(RuntimeError, match="200x128x256: bf16 differs from the first peer by 50"):
        bench_training.check(workload, "bf16", [y[0], 1.5 * y[1]], expected)
