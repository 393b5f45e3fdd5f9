"""What of the benchmarks needs no GPU: workloads, operands, statistics, attribution of kernels, reports."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import sys
import time

import ml_dtypes
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last, so that an installed jax_fp8gemm goes before the checkout's

from benchmarks import (  # noqa: E402
    bench_compile,
    bench_dense,
    bench_grouped,
    compare,
    environment,
    peers,
    plot,
    readme_table,
    timing,
    workloads,
)
from benchmarks.operands import (  # noqa: E402
    dequantized_product,
    padded_rows,
    random_grouped_operands,
    random_operands,
    relative_error,
)
from benchmarks.peers import jax_grouped, jax_peers  # noqa: E402
from benchmarks.timing import Activity, Call, Samples  # noqa: E402
from benchmarks.workloads import GroupedWorkload, Workload  # noqa: E402

PEERS = {"fp8_gemm": 10.0, "deepgemm": 12.0, "jnp_bf16": 30.0}  # microseconds in the made-up report


def _result(us: float, workload: Workload) -> dict:
    return {
        "error": 1.7e-3,
        "kernel": compare.rates(Samples((us, us + 1, us - 1), ("kernel",)), workload),
    }


@pytest.fixture
def report() -> dict:
    """A report as bench_dense writes it, with two rows of which DeepGEMM misses one."""
    rows = []
    for index, name in enumerate(("64x2112x7168", "4096x4096x7168")):
        workload = workloads.parse(name)
        results = {peer: _result(us * 2**index, workload) for peer, us in PEERS.items()}
        if index == 1:
            results["deepgemm"] = {"unsupported": "no such kernel"}
        rows.append(compare.make_row(workload, results, bench_dense.DENSE.baselines))
    return _report("dense", rows, bench_dense.DENSE.baselines, PEERS)


def _report(kind: str, rows: list[dict], baselines: tuple[str, ...], names) -> dict:
    return {
        "schema": environment.SCHEMA,
        "kind": kind,
        "complete": True,
        "date": "2026-11-21T07:00:00+00:00",
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "versions": {"jax": "0.11.2", "torch": "2.11.0"},
        "commit": "c0ffee",
        "repeats": 20,
        "baselines": [*baselines],
        "absent": {"cutlass_block": "nvcc is not installed"},
        "peers": {name: {"title": name.title(), "note": "", "uses_scales": True} for name in names},
        "rows": rows,
        "geometric_means": compare.geometric_means(rows, baselines),
    }


def test_the_list_has_the_problems_that_the_goals_are_stated_for():
    dense = workloads.select("dense")
    assert (
        [w.m for w in dense].count(64)
        == [w.m for w in dense].count(128)
        == [w.m for w in dense].count(4096)
        == 6
    )
    assert dense[-1].name == "8192x8192x8192"
    assert len(dense) == 19
    assert {w.m for w in workloads.select("decode")} == {1, 16}
    assert {w.name for w in workloads.select("sustained")} == {
        "4096x7168x16384",
        "4096x4096x7168",
        "8192x8192x8192",
    }
    assert len(set(workloads.WORKLOADS)) == len(workloads.WORKLOADS)
    assert {tag for w in workloads.WORKLOADS for tag in w.tags} == set(workloads.TAGS)


def test_bytes_count_every_array_once():
    # lhs 3x256, rhs 130x256, f32 scales 3x2 and 2x2, bf16 out 3x130
    assert Workload(3, 130, 256).bytes == 3 * 256 + 130 * 256 + 4 * (3 * 2 + 2 * 2) + 2 * 3 * 130
    assert Workload(3, 130, 256).flops == 2 * 3 * 130 * 256
    assert workloads.QuantizeWorkload(3, 256, (1, 128)).bytes == 3 * 3 * 256 + 4 * 3 * 2
    assert workloads.QuantizeWorkload(130, 256, (128, 128)).bytes == 3 * 130 * 256 + 4 * 2 * 2
    assert workloads.QuantizeWorkload(3, 256, swiglu=True).bytes == 5 * 3 * 256 + 4 * 3 * 2


def test_parse_finds_the_tags_of_listed_shapes():
    assert workloads.parse("64x2112x7168").tags == {"batch", "dense"}
    assert workloads.parse("7X576x7168") == Workload(7, 576, 7168)


@pytest.mark.parametrize("text", ["64x2112", "64x2112x", "0x16x16", "axbxc"])
def test_parse_names_what_is_wrong(text):
    with pytest.raises(ValueError, match=rf"shape: expected .*{text}"):
        workloads.parse(text)


def test_select_refuses_unknown_tags():
    with pytest.raises(ValueError, match=r"select: expected tags among .* got \['big'\]"):
        workloads.select("big")


def test_operands_are_reproducible_finite_and_of_real_magnitudes():
    workload = Workload(130, 260, 400)
    operands, again = random_operands(workload), random_operands(workload)
    assert operands.lhs_scale.shape == (130, 4)
    assert operands.rhs_scale.shape == (3, 4)
    for field in ("lhs", "lhs_scale", "rhs", "rhs_scale"):
        np.testing.assert_array_equal(getattr(operands, field), getattr(again, field))
    values = operands.rhs.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.isfinite(values).all()
    assert 150 < values.std() < 180  # 448 / 2.7 = 166, less what saturates
    assert not np.array_equal(random_operands(workload, seed=1).lhs, operands.lhs)


@pytest.mark.parametrize("uses_scales", [True, False])
def test_dequantized_product_is_the_product_of_values_and_scales(uses_scales):
    operands = random_operands(Workload(9, 200, 272))
    lhs, rhs = (
        bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for bits in (operands.lhs, operands.rhs)
    )
    if uses_scales:
        k_block = np.arange(272) // 128
        lhs = lhs * operands.lhs_scale[:, k_block]
        rhs = rhs * operands.rhs_scale[np.arange(200)[:, None] // 128, k_block[None, :]]
    rows = np.array([0, 4, 8])
    product = dequantized_product(operands, rows, uses_scales)
    assert relative_error(product, (lhs @ rhs.T)[rows]) < 272 * 2.0**-24
    assert relative_error(product * 1.02, (lhs @ rhs.T)[rows]) > 0.019


def test_samples():
    samples = Samples((4.0, 1.0, 2.0, 3.0, 100.0), ("gemm",))
    assert samples.median == 3.0
    assert samples.iqr == 2.0
    assert Samples((5.0,)).iqr == 0.0
    assert samples.summary() == {
        "median_us": 3.0,
        "min_us": 1.0,
        "iqr_us": 2.0,
        "samples_us": [4.0, 1.0, 2.0, 3.0, 100.0],
        "kernels": ["gemm"],
    }
    assert timing.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_busy_time_counts_overlaps_once_and_gaps_never():
    apart = [Activity("a", 0, 10), Activity("b", 15, 20)]
    assert timing.busy_time(apart) == 15
    assert timing.busy_time([*apart, Activity("c", 5, 17), Activity("d", 6, 7)]) == 20


def test_kernels_belong_to_the_call_between_two_markers():
    activities = [
        Activity("late", 50, 60),
        Activity("flush", 0, 1),
        Activity("gemm", 2, 3),
        Activity("stray", -5, -4),
        Activity("reduce", 3, 4),
        Activity("flush", 40, 45),
    ]
    names = [[a.name for a in group] for group in timing.split_at("flush", activities)]
    assert names == [["gemm", "reduce"], ["late"]]


def test_wall_time_divides_by_the_runs(monkeypatch):
    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    runs, waited = [], []
    samples = timing.wall_time(Call(lambda: runs.append(1) or len(runs), waited.append), runs=5, repeats=3)
    assert samples.times == pytest.approx((0.5 / 5 * 1e6,) * 3)
    assert len(runs) == 1 + 15
    assert waited == [1, 6, 11, 16]


def test_rates_are_per_gemm():
    workload = Workload(100, 100, 1280)
    rates = compare.rates(Samples((40.0,)), workload, calls=4)
    assert rates["median_us"] == 10.0
    assert rates["tflops"] == round(workload.flops / 10e-6 / 1e12, 1)
    assert rates["gb_per_s"] == round(workload.bytes / 10e-6 / 1e9, 1)


def test_speedups_and_their_means(report):
    assert report["rows"][0]["speedup"]["kernel"] == {"deepgemm": 1.2, "jnp_bf16": 3.0}
    assert report["rows"][1]["speedup"]["kernel"] == {"jnp_bf16": 3.0}
    assert report["geometric_means"]["dense"]["deepgemm"] == {"mean": 1.2, "min": 1.2, "rows": 1}
    assert report["geometric_means"]["dense"]["jnp_bf16"] == {"mean": 3.0, "min": 3.0, "rows": 2}


class _Peer(peers.Peer):
    """A peer that takes small problems and computes what it is told to be off by."""

    title, note = "made up", ""

    def __init__(self, factor: float = 1.0, absent: str = ""):
        self._factor, self._absent = factor, absent

    def prepare(self, workloads, programs=False):
        if self._absent:
            raise peers.Absent(self._absent)

    def bind(self, operands):
        if operands.workload.m > 16:
            raise peers.Unsupported("too many tokens")
        rows = np.arange(operands.workload.m)
        return Call(lambda: self._factor * dequantized_product(operands, rows), lambda _: None)

    def to_host(self, workload, result, rows):
        return result[rows]


def test_every_peer_gets_its_error_or_its_refusal():
    both = {"right": _Peer(), "wrong": _Peer(1.5)}
    calls, results = compare.bind_all(both, random_operands(Workload(16, 128, 128)))
    assert set(calls) == {"right", "wrong"}
    assert results["right"]["error"] == 0.0
    assert results["wrong"]["error"] == pytest.approx(0.5)
    calls, results = compare.bind_all(both, random_operands(Workload(17, 128, 128)))
    assert calls == {}
    assert results["right"] == {"unsupported": "too many tokens"}


def test_a_peer_that_cannot_be_built_is_absent_with_its_reason():
    both = {"fine": _Peer(), "broken": _Peer(absent="nvcc says no")}
    assert compare.prepare(both, [Workload(1, 128, 128)], False) == {"broken": "nvcc says no"}


def test_absent_peers_are_reported(monkeypatch):
    for module in ("torch", "deep_gemm", "cutlass_library"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    for module in ("deepgemm", "cublaslt", "cutlass", "torch_peer"):
        monkeypatch.delitem(sys.modules, f"benchmarks.peers.{module}", raising=False)
    present, absent = peers.load(["deepgemm", "cublaslt_block", "cublaslt_fast", "cutlass_block"])
    assert present == {}
    assert set(absent) == {"deepgemm", "cublaslt_block", "cublaslt_fast", "cutlass_block"}
    assert all("torch" in reason for reason in absent.values())


def test_unknown_peers_are_refused():
    with pytest.raises(ValueError, match=r"peers: expected names among .* got 'cudnn'"):
        peers.load(["cudnn"])


def test_reports_survive_the_disk(report, tmp_path):
    path = tmp_path / "results" / "dense.json"
    environment.write(path, report)
    assert environment.read(path, "dense") == report
    assert [p.name for p in path.parent.iterdir()] == ["dense.json"]
    with pytest.raises(
        ValueError, match="expected a report of kind 'compile' with schema 1, got \\('dense', 1\\)"
    ):
        environment.read(path, "compile")


def test_the_head_of_a_report_says_where_it_is_from(monkeypatch):
    head = environment.describe("dense")
    assert set(head) == {"schema", "kind", "complete", "date", "gpu", "driver", "versions", "commit"}
    assert head["complete"] is False
    assert "jax" in head["versions"]
    assert environment.result_path(head | {"gpu": "NVIDIA H200"}).name == "dense-nvidia-h200.json"
    monkeypatch.setenv("BENCHMARK_COMMIT", "c0ffee")
    assert environment.describe("dense")["commit"] == "c0ffee"


def test_the_printed_table_names_absent_and_unsupported_peers(report, capsys):
    compare.print_table(report)
    printed = capsys.readouterr().out
    assert "absent: cutlass_block: nvcc is not installed" in printed
    assert "unsupported: 4096x4096x7168 deepgemm: no such kernel" in printed
    assert "1.200, 3.000" in printed


def test_the_readme_table(report):
    text = readme_table.table(report)
    assert (
        "| 64 | 2112 | 7168 | 10.0 | 12.0 | - | - | 30.0 | 194 | 1589 | 1.20x | 3.00x |" in text.splitlines()
    )
    assert "| 4096 | 4096 | 7168 | 20.0 | - | - | - | 60.0 | 12026 | 4660 | - | 3.00x |" in text.splitlines()
    assert text.splitlines()[0].startswith(
        "NVIDIA H200, driver 580.1, JAX 0.11.2, PyTorch 2.11.0, 2026-11-21."
    )
    assert text.splitlines()[-1] == (
        "Geometric mean: 1.20x over DeepGEMM (worst row 1.20x), 3.00x over bf16 (worst row 3.00x)."
    )
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {13}


def test_the_readme_table_of_groups(report):
    row = {
        "workload": "masked-2x20", "kind": "masked", "m": 64, "n": 64, "k": 512, "group_sizes": [30, 10],
        "tags": ["masked"], "speedup": {"kernel": {"deepgemm": 1.25}},
        "results": {name: {"kernel": {"median_us": us, "tflops": 3.4, "gb_per_s": 5.6}}
                    for name, us in (("fp8_gemm", 4.0), ("deepgemm", 5.0))},
    }
    means = {"masked": {"deepgemm": {"mean": 1.25, "min": 1.25, "rows": 1}}}
    grouped = report | {"kind": "grouped", "rows": [row], "geometric_means": means}
    lines = readme_table.table(grouped).splitlines()
    cells = "masked", "2 x ~20", "", "64", "512", "4.0", "5.0", *"---", "3", "6", "1.25x", *"---"
    assert lines[4] == f"| {' | '.join(cells)} |"
    assert lines[-1] == "Masked: 1.25x over DeepGEMM (worst row 1.25x)."
    readme = "<!-- benchmark:grouped:start -->\n<!-- benchmark:grouped:end -->"
    assert lines[4] in readme_table.insert(readme, readme_table.table(grouped), "grouped")


def test_the_readme_table_goes_between_its_markers(report, tmp_path, monkeypatch):
    readme, results = tmp_path / "README.md", tmp_path / "dense.json"
    readme.write_text("# Title\n<!-- benchmark:start -->\nold\n<!-- benchmark:end -->\nrest\n")
    environment.write(results, report)
    monkeypatch.setattr(sys, "argv", ["readme_table", str(results), "--readme", str(readme)])
    assert readme_table.main() == 0
    first = readme.read_text()
    assert first == (
        f"# Title\n<!-- benchmark:start -->\n{readme_table.table(report)}<!-- benchmark:end -->\nrest\n"
    )
    assert readme_table.main() == 0
    assert readme.read_text() == first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- benchmark:start -->",
        "<!-- benchmark:end --><!-- benchmark:start -->",
        "<!-- benchmark:start --><!-- benchmark:end -->" * 2,
    ],
)
def test_a_readme_without_proper_markers_is_refused(text):
    with pytest.raises(ValueError, match="README: expected one"):
        readme_table.insert(text, "table")


def test_a_report_without_kernel_times_makes_no_table(report):
    bare = copy.deepcopy(report)
    for row in bare["rows"]:
        row["results"] = {}
    with pytest.raises(
        ValueError, match="expected 'dense' rows with kernel times of fp8_gemm, got none"
    ):
        readme_table.table(bare)


def test_figures_are_drawn(report, tmp_path):
    paths = plot.render(report, tmp_path, "dense")
    assert [path.name for path in paths] == ["dense-roofline.png", "dense-bars.png"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_the_roofline_shows_every_row_of_every_peer(report):
    figure = plot.roofline(report)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    plot.plt.close(figure)
    assert len(lines["Fp8_Gemm"]) == 2
    assert len(lines["Deepgemm"]) == 1
    row = report["rows"][0]
    np.testing.assert_allclose(
        lines["Fp8_Gemm"][0], [row["flops"] / row["bytes"], row["results"]["fp8_gemm"]["kernel"]["tflops"]]
    )


def test_compile_cases_report_a_failing_process(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_compile.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="case 'kernels' failed"):
        bench_compile.run_case("kernels", tmp_path)


def test_workloads_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        workloads.WORKLOADS[0].m = 1


GROUPED = [
    GroupedWorkload("ragged_m", 60, 130, 256, (20, 0, 7, 33), frozenset({"ragged_dot"})),
    GroupedWorkload("masked", 40, 130, 256, (20, 0, 7, 33), frozenset({"ragged_dot"})),
    GroupedWorkload("ragged_k", 30, 130, 512, (130, 0, 7, 33), frozenset({"ragged_dot"})),
]


def test_the_grouped_list_has_the_problems_that_the_goals_are_stated_for():
    by_tag = {tag: workloads.select_grouped(tag) for tag in workloads.GROUPED_TAGS}
    assert {tag: len(found) for tag, found in by_tag.items()} == {
        "contiguous": 4, "masked": 12, "masked_few": 4, "ragged_k": 4, "small_experts": 8, "ragged_dot": 9,
        "sustained": 2, "quick": 3,
    }
    assert len({w.name for w in workloads.GROUPED_WORKLOADS}) == len(workloads.GROUPED_WORKLOADS)
    assert {(w.groups, w.n, w.k) for w in by_tag["small_experts"]} == {
        (groups, n, k) for groups in (128, 64) for n in (4096, 3072) for k in (7168, 2048)
    }
    routed = by_tag["small_experts"][0]
    assert routed.tokens == 8192 * 8
    assert 350 < min(routed.group_sizes) < max(routed.group_sizes) < 700
    for workload in by_tag["masked"]:
        assert max(workload.group_sizes) <= workload.m
        assert workload.m % 64 == 0
    assert workloads.select_grouped("masked-8x16-7168x2048")[0].groups == 8
    with pytest.raises(ValueError, match=r"select_grouped: expected names or tags of .* got \['huge'\]"):
        workloads.select_grouped("huge", "masked")


def test_grouped_flops_and_bytes_are_those_of_the_tokens():
    ragged_m, masked, ragged_k = GROUPED
    assert ragged_m.flops == masked.flops == 2 * 60 * 130 * 256
    # three experts of 130x256 with 2x2 scales, 60 tokens of 256 with 2 scales and 130 bf16 results
    assert ragged_m.bytes == masked.bytes == 3 * (130 * 256 + 4 * 4) + 60 * (256 + 4 * 2 + 2 * 130)
    assert ragged_k.flops == 2 * 170 * 30 * 130
    assert ragged_k.bytes == 170 * (30 + 130) + 4 * 4 * (30 + 130) + 4 * 4 * 30 * 130
    assert masked.valid_rows.tolist() == [*range(20), *range(80, 87), *range(120, 153)]
    assert ragged_k.expected_group_size == 42


def test_rows_that_are_padded_to_whole_blocks():
    rows, groups = padded_rows((3, 0, 5, 4), alignment=4)
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14, 15]
    assert groups.tolist() == [0, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1, -1, 3, 3, 3, 3]


@pytest.mark.parametrize("peer", ["GroupedFp8Gemm", "RaggedDot"])
@pytest.mark.parametrize("workload", GROUPED, ids=lambda w: w.kind)
def test_grouped_peers_compute_the_product(monkeypatch, device, peer, workload):
    monkeypatch.setattr(jax_peers, "_gpu", lambda: device)
    peers_found = {"peer": getattr(jax_grouped, peer)()}
    operands = random_grouped_operands(workload)
    assert compare.prepare(peers_found, [workload], False) == {}
    calls, results = compare.bind_all(peers_found, operands)
    assert set(calls) == {"peer"}
    assert 0 < results["peer"]["error"] < 2.0**-7  # of operands or results in bf16
    rows = peers_found["peer"].to_host(workload, calls["peer"].run(), operands.checked_rows)
    assert operands.error(rows * 1.02) > 0.015
    assert operands.error(np.roll(rows, 1, axis=0)) > 0.5


def test_programs_run_a_workload_several_times(monkeypatch, device):
    monkeypatch.setattr(jax_peers, "_gpu", lambda: device)
    monkeypatch.setattr(workloads, "PROGRAM_CALLS", 3)
    peer, workload = jax_grouped.GroupedFp8Gemm(), GROUPED[0]
    results = peer.bind_program(random_grouped_operands(workload)).run()
    assert len(results) == workload.program_calls == 3


def test_figures_of_a_grouped_report(tmp_path):
    rows = []
    for workload in workloads.select_grouped("contiguous", "ragged_k"):
        found = {name: _result(us, workload) for name, us in (("fp8_gemm", 10.0), ("deepgemm", 12.0))}
        rows.append(compare.make_row(workload, found, bench_grouped.BASELINES))
    report = _report("grouped", rows, bench_grouped.BASELINES, ("fp8_gemm", "deepgemm"))
    assert report["geometric_means"]["ragged_k"] == {"deepgemm": {"mean": 1.2, "min": 1.2, "rows": 4}}
    assert rows[0]["group_sizes"] == [8192] * 4
    names = [path.name for path in plot.render(report, tmp_path, "grouped")]
    assert names == [f"grouped-{name}.png" for name in (
        "roofline", "contiguous-bars", "ragged_k-bars", "ragged_dot-bars")]


def test_slow_calls_are_found():
    waits = {"slow": compare.SLOW_US * 1.5e-6, "quick": 0.0}
    calls = {name: Call(lambda t=t: time.sleep(t), lambda _: None) for name, t in waits.items()}
    assert compare.slow_calls(calls) == {"slow"}
    assert compare.program_runs(calls["quick"]) == 10
    assert 1 <= compare.program_runs(calls["slow"]) < 3
