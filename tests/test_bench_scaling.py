"""What of bench_scaling and bench_collectives needs no GPU: timelines, rows, table, figure, collectives."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # last, as in test_benchmarks.py

from benchmarks import bench_collectives, bench_scaling, plot, readme_table, timeline
from benchmarks.timing import Activity

NCCL = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
TINY = ["--config", "tiny", "--set", "moe_layers=1", "batch=1", "sequence=16", "experts=2", "hidden=64"]


# ---- timelines


def test_union():
    assert timeline.union([(5, 9), (0, 2), (2, 3), (6, 7), (8, 12)]) == [(0, 3), (5, 12)]
    assert timeline.union([]) == []


@pytest.mark.parametrize(("others", "rest"), [
    ([], [(0, 10), (20, 30)]), ([(0, 10)], [(20, 30)]), ([(2, 4), (6, 25)], [(0, 2), (4, 6), (25, 30)]),
    ([(10, 20)], [(0, 10), (20, 30)]), ([(-5, 50)], []), ([(-5, 1), (29, 50)], [(1, 10), (20, 29)])])
def test_without(others, rest):
    assert timeline.without([(0, 10), (20, 30)], others) == rest


@pytest.mark.parametrize(("name", "kind"), [
    (NCCL, "communication"), ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(…)", "communication"),
    ("void stream_executor::gpu::AllReduceKernelImpl<float>", "communication"),
    ("Memcpy PtoP (Device -> Device)", "communication"), ("Memcpy DtoD (Device -> Device)", "other"),
    ("fp8_gemm", "gemm"), ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA", "gemm"), ("gemm_fusion_dot_7", "gemm"),
    ("fp8_quantize_both", "quantize"), ("loop_add_fusion", "other"), ("input_reduce_fusion_3", "other")])
def test_kinds_of_kernels(name, kind):
    assert timeline.kind_of(name) == kind


def test_a_step_is_divided_into_parts_that_add_up():
    """Of two steps: communication under a GEMM, then alone, and a quantisation beside a GEMM."""
    us = 1000
    activities = [
        Activity("fp8_gemm", 10 * us, 30 * us), Activity(NCCL, 25 * us, 50 * us),
        Activity("loop_fusion", 48 * us, 54 * us), Activity("fp8_quantize", 60 * us, 66 * us),
        Activity("gemm_fusion_dot", 62 * us, 70 * us),
        Activity(NCCL, 0, 8 * us, device=1), Activity(NCCL, 2 * us, 10 * us, device=1),
    ]
    assert timeline.split(activities, 2) == [
        {"device": 0, "gemm": 14.0, "quantize": 1.0, "other": 3.0, "exposed": 9.0, "idle": 3.0,
         "communication": 12.5, "step": 30.0},
        {"device": 1, "gemm": 0.0, "quantize": 0.0, "other": 0.0, "exposed": 5.0, "idle": 0.0,
         "communication": 5.0, "step": 5.0}]
    assert timeline.longest_kernels(activities, 2) == {
        f"communication: {NCCL}": 10.25, "gemm: fp8_gemm": 5.0, "gemm: gemm_fusion_dot": 2.0,
        "other: loop_fusion": 1.5, "quantize: fp8_quantize": 1.5}


# ---- bench_scaling


@pytest.fixture
def cpus(monkeypatch):
    """The devices that a program sees, whatever else the machine has."""
    devices = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda: devices[:2])
    return devices[:2]


@pytest.fixture
def quick_compilation():
    """Most of a test's time would be XLA's; what it computes is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_scaling_on_one_device_and_on_two(cpus, quick_compilation, tmp_path, capsys):
    out = tmp_path / "scaling.json"
    arguments = [*TINY, "--precision", "bf16", "--repeats", "2", "--steps", "1", "--out", str(out)]
    assert bench_scaling.main(arguments) == 0
    report = json.loads(out.read_text())
    assert report["complete"]
    assert (report["kind"], report["settings"]["experts"]) == ("scaling", 2)
    rows = {(row["precision"], row["devices"]): row for row in report["rows"]}
    assert [*rows] == [("bf16", 1), ("bf16", 2)]
    for (precision, count), row in rows.items():
        assert (row["experts"], row["tokens_per_device"]) == (2 * count, 16)
        assert row["efficiency"] == pytest.approx(
            rows[precision, 1]["median_us"] / row["median_us"], abs=1e-4)
        assert row["tokens_per_s_per_device"] == pytest.approx(16e6 / row["median_us"], abs=0.1)
        assert row["largest_load_over_mean"] >= 1
        assert row["loss"] == pytest.approx(np.log(256), rel=0.2)  # of random bytes
        assert row["split"] == []
    # Both experts of a token, of two, have room.
    assert rows["bf16", 1]["dropped"] == 0
    assert (tmp_path / "scaling-step.png").stat().st_size > 10_000
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" bf16")]
    assert [line[1] for line in lines] == ["1", "2"]


def test_the_table_and_the_figure_of_a_split(capsys):
    parts = {"gemm": 5e3, "quantize": 1e3, "other": 2e3, "exposed": 1e3, "idle": 500.0}
    row = {"precision": "fp8", "devices": 2, "median_us": 9000.0, "tokens_per_s_per_device": 1e5,
           "dropped": 0.01, "efficiency": 0.8,
           "split": [{"device": 0, **parts, "communication": 3e3, "step": 9.5e3},
                     {"device": 1, **parts | {"gemm": 7e3}, "communication": 1e3, "step": 11.5e3}]}
    report = {"kind": "scaling", "gpu": "NVIDIA H100", "config": "small", "rows": [row]}
    bench_scaling.print_table(report)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "fp8", "2", "9.00", "100000", "80.0%", "1.00%", "|", "6.00", "1.00", "2.00", "1.00", "0.50", "2.00"]
    figure = plot.scaling(report)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [6.0, 1.0, 2.0, 1.0, 0.5]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[2, 0.8]]
    plot.plt.close(figure)


def test_the_table_of_the_readme():
    parts = {"gemm": 5e3, "quantize": 1e3, "other": 2e3, "exposed": 1e3, "idle": 500.0}
    row = {"precision": "fp8", "devices": 2, "median_us": 9000.0, "tokens_per_s_per_device": 123456.7,
           "efficiency": 0.8, "split": [{"device": 0, **parts, "communication": 3e3, "step": 9.5e3},
                                        {"device": 1, **parts, "communication": 1e3, "step": 9.5e3}]}
    report = {"kind": "scaling", "gpu": "NVIDIA H100", "driver": "580", "versions": {"jax": "0.11.2"},
              "date": "2026-11-27T00:00:00+00:00", "repeats": 6, "steps": 5,
              "rows": [row, row | {"split": []}]}
    head, _, titles, _, *rows = readme_table.table(report).splitlines()
    assert head == ("NVIDIA H100, driver 580, JAX 0.11.2, 2026-11-27. Wall time, median of 6 samples of 5 "
                    "steps; its parts, ms, from profiled steps, the mean of the GPUs.")
    assert rows == ["| fp8 | 2 | 9.0 | 123,457 | 80.0% | 5.0 | 1.0 | 2.0 | 1.0 | 0.5 | 2.0 |",
                    "| fp8 | 2 | 9.0 | 123,457 | 80.0% | - | - | - | - | - | - |"]
    assert titles.count("|") == rows[0].count("|")


def test_more_devices_than_there_are(cpus, capsys):
    with pytest.raises(SystemExit):
        bench_scaling.main(["--devices", "1", "4"])
    assert "--devices: expected at most 2, got 4" in capsys.readouterr().err


def test_powers_of_two():
    assert bench_scaling.powers_of_two(1) == [1]
    assert bench_scaling.powers_of_two(7) == [1, 2, 4]
    assert bench_scaling.powers_of_two(8) == [1, 2, 4, 8]


# ---- bench_collectives


def test_messages_are_those_of_the_model():
    """On 2 devices a token may go to both, on 8 to twice as many as 2 of 8; rows of 2048, 64 and 16 bytes."""
    tokens = 16 * 1024
    assert bench_collectives.messages(2)["tokens in FP8"] == 2 * tokens * 2128
    assert bench_collectives.messages(8) == {
        "tokens in FP8": 4 * tokens * 2128, "sums in bf16": 4 * tokens * 4096, "a matrix in f32": 2**26}


@pytest.mark.parametrize("name", [name for name in bench_collectives.SENT if name != "ragged_all_to_all"])
def test_collectives(cpus, name):
    call, num_bytes = bench_collectives.bind(name, 8 * 4096 + 5, cpus)  # 4 rows of each device for each
    assert num_bytes == 8 * 4096
    result = np.asarray(call.run())
    assert (result == result[:, :1]).all()
    numbers = np.arange(16)
    expected = {
        "all_to_all": [*numbers[0:4], *numbers[8:12], *numbers[4:8], *numbers[12:16]],
        "all_gather": [*numbers[:8]] * 2,
        "reduce_scatter": numbers[:8] + numbers[8:],
        "all_reduce": [*numbers[:8] + numbers[8:]] * 2,
    }[name]
    np.testing.assert_array_equal(result[:, 0], expected)


def test_collectives_in_a_report(cpus, tmp_path, capsys):
    out = tmp_path / "collectives.json"
    assert bench_collectives.main(["--megabytes", "0.1", "--repeats", "2", "--out", str(out)]) == 0
    rows = {row["collective"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == bench_collectives.SENT.keys()
    assert "absent" in rows.pop("ragged_all_to_all")  # XLA has none for CPUs
    for name, row in rows.items():
        assert (row["bytes"], row["devices"]) == (98_304, 2)  # 12 rows of 4096 bytes for each device
        sent = {"all_reduce": 98_304}.get(name, 49_152)
        assert row["bus_gb_per_s"] == pytest.approx(sent / row["median_us"] / 1e3, abs=0.006)
    assert "all_reduce" in capsys.readouterr().out
