"""What bench_dense and bench_grouped have in common: peers on workloads, in one process and in one run."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from benchmarks import environment
from benchmarks.operands import GroupedOperands, Operands
from benchmarks.peers import Absent, Peer, Unsupported, load
from benchmarks.timing import Call, KernelTimer, Samples, geometric_mean, sustained_time, wall_time
from benchmarks.workloads import GroupedWorkload, Workload

OURS = "fp8_gemm"
MEASURES = ("kernel", "wall", "sustained")
SLOW_US = 20e3  # calls that take longer are timed a few times only, and not in programs
_SLOW_REPEATS = 3
WALL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A benchmark of this library against others.

    Attributes:
      kind: of its reports.
      peers: those that there are, as in `peers.PEERS`.
      baselines: names of the peers that speeds are given over.
      operands: makes the operands of a workload.
    """

    kind: str
    peers: Mapping[str, tuple[str, str]]
    baselines: Sequence[str]
    operands: Callable[[Any], Operands | GroupedOperands]


def rates(samples: Samples, workload: Workload, calls: int = 1) -> dict[str, Any]:
    """Times of `calls` GEMMs as the JSON has them: per GEMM, with TFLOPS and GB/s of the median."""
    each = Samples(tuple(t / calls for t in samples.times), samples.kernels)
    return {
        **each.summary(),
        "tflops": round(workload.flops / each.median / 1e6, 1),
        "gb_per_s": round(workload.bytes / each.median / 1e3, 1),
    }


def prepare(
    peers: Mapping[str, Peer], workloads: Sequence[Workload | GroupedWorkload], programs: bool
) -> dict[str, str]:
    """Lets all peers compile side by side; returns why some turned out absent, by name."""
    absent = {}
    with concurrent.futures.ThreadPoolExecutor(len(peers) or 1) as pool:
        futures = {pool.submit(peer.prepare, workloads, programs): name for name, peer in peers.items()}
        done = concurrent.futures.as_completed(futures)
        for future in (bar := tqdm.tqdm(done, total=len(futures), desc="compiling")):
            bar.set_postfix_str(futures[future])
            try:
                future.result()
            except Absent as error:
                absent[futures[future]] = str(error)
    return absent


def bind_all(
    peers: Mapping[str, Peer], operands: Operands | GroupedOperands
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The calls of the peers that take the workload, and for every peer its error or why it doesn't."""
    calls: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        try:
            call = peer.bind(operands)
            result = call.run()
            call.wait(result)
        except Unsupported as error:
            results[name] = {"unsupported": str(error)}
            continue
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            results[name] = {"unsupported": f"out of memory: {error}".splitlines()[0]}
            continue
        rows = peer.to_host(operands.workload, result, operands.checked_rows)
        calls[name] = call
        results[name] = {"error": operands.error(rows, peer.uses_scales)}
    return calls, results


def slow_calls(calls: Mapping[str, Call]) -> set[str]:
    """The names of the calls that take longer than SLOW_US."""
    return {name for name, call in calls.items() if wall_time(call, runs=1, repeats=1).median > SLOW_US}


def program_runs(program: Call) -> int:
    """Runs per sample of wall time: 10, or as many as keep 20 samples near WALL_SECONDS."""
    seconds = wall_time(program, runs=1, repeats=1).median / 1e6
    return int(max(1, min(10, WALL_SECONDS / 20 / seconds)))


def speedups(
    results: Mapping[str, Mapping[str, Any]], measure: str, baselines: Sequence[str]
) -> dict[str, float]:
    """How many times faster fp8_gemm is than each baseline, where both were measured."""
    median = {name: result[measure]["median_us"] for name, result in results.items() if measure in result}
    return {
        name: round(median[name] / median[OURS], 4) for name in baselines if name in median and OURS in median
    }


def measure_row(
    comparison: Comparison,
    workload: Workload | GroupedWorkload,
    peers: Mapping[str, Peer],
    timer: KernelTimer | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that is measured of one workload, as a row of the JSON."""
    operands = comparison.operands(workload)
    calls, results = bind_all(peers, operands)
    slow = slow_calls(calls)
    if timer:
        for names, repeats in ((calls.keys() - slow, arguments.repeats), (slow, _SLOW_REPEATS)):
            group = {name: call for name, call in calls.items() if name in names}
            for name, samples in timer(group, repeats=repeats).items() if group else ():
                results[name]["kernel"] = rates(samples, workload)
    if arguments.sustained_seconds and "sustained" in workload.tags:
        for name, call in calls.items():
            results[name]["sustained"] = rates(sustained_time(call, arguments.sustained_seconds), workload)
    if arguments.wall:
        for name in calls.keys() - slow:
            if program := peers[name].bind_program(operands):
                samples = wall_time(program, runs=program_runs(program))
                results[name]["wall"] = rates(samples, workload, workload.program_calls)
    return make_row(workload, results, comparison.baselines)


def make_row(
    workload: Workload | GroupedWorkload, results: Mapping[str, Mapping[str, Any]], baselines: Sequence[str]
) -> dict[str, Any]:
    """A row of the JSON."""
    return {
        "workload": workload.name,
        **workload.sizes,
        "tags": sorted(workload.tags),
        "flops": workload.flops,
        "bytes": workload.bytes,
        "program_calls": workload.program_calls,
        "results": results,
        "speedup": {
            measure: found for measure in MEASURES if (found := speedups(results, measure, baselines))
        },
    }


def geometric_means(
    rows: Sequence[Mapping[str, Any]], baselines: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Geometric mean of the kernel-time speedups over each baseline, by tag."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for tag in sorted({tag for row in rows for tag in row["tags"]}):
        for baseline in baselines:
            found = [
                row["speedup"]["kernel"][baseline]
                for row in rows
                if tag in row["tags"] and baseline in row["speedup"].get("kernel", {})
            ]
            if found:
                means.setdefault(tag, {})[baseline] = {
                    "mean": round(geometric_mean(found), 4),
                    "min": min(found),
                    "rows": len(found),
                }
    return means


def print_table(report: Mapping[str, Any]) -> None:
    """Kernel time in microseconds of every peer, and fp8_gemm's speed over the baselines."""
    names = list(report["peers"])
    width = max(16, *(len(row["workload"]) for row in report["rows"]))
    print(f"\n{report['gpu']}, kernel time in us, cold L2, median of {report['repeats']}")
    header = [
        f"{'workload':>{width}}",
        *(f"{name[:13]:>14}" for name in names),
        "  TFLOPS   GB/s  speed over " + ", ".join(report["baselines"]),
    ]
    print("".join(header))
    for row in report["rows"]:
        cells = [f"{row['workload']:>{width}}"]
        for name in names:
            kernel = row["results"].get(name, {}).get("kernel")
            cells.append(f"{kernel['median_us']:14.1f}" if kernel else f"{'-':>14}")
        ours = row["results"].get(OURS, {}).get("kernel")
        cells.append(f"{ours['tflops']:8.0f} {ours['gb_per_s']:6.0f}  " if ours else " " * 17)
        ratios = row["speedup"].get("kernel", {})
        cells.append(
            ", ".join(f"{ratios[name]:.3f}" if name in ratios else "-" for name in report["baselines"])
        )
        print("".join(cells))
    for tag, means in report["geometric_means"].items():
        print(
            f"  {tag}: "
            + ", ".join(
                f"{mean['mean']:.3f}x {name} (min {mean['min']:.3f}, {mean['rows']} rows)"
                for name, mean in means.items()
            )
        )
    for row in report["rows"]:
        for measure in ("wall", "sustained"):
            found = {name: result[measure] for name, result in row["results"].items() if measure in result}
            if found:
                print(
                    f"  {measure} {row['workload']}: "
                    + ", ".join(
                        f"{name} {value['median_us']:.1f} us {value['tflops']:.0f} TFLOPS"
                        for name, value in found.items()
                    )
                )
    for name, reason in report["absent"].items():
        print(f"  absent: {name}: {reason.splitlines()[0][:200]}")
    for row in report["rows"]:
        for name, result in row["results"].items():
            if "unsupported" in result:
                print(f"  unsupported: {row['workload']} {name}: {result['unsupported'][:160]}")


def _kernel_timer(report: dict[str, Any]) -> KernelTimer | None:
    """The timer, or None with the reason in the report where kernels cannot be traced."""
    try:
        return KernelTimer()
    except (ImportError, AssertionError, RuntimeError) as error:
        report["absent"]["kernel time"] = f"{type(error).__name__}: {error}"
        return None


def add_arguments(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """The arguments that all comparisons have."""
    names = list(comparison.peers)
    parser.add_argument("--peers", nargs="+", default=names, choices=names)
    parser.add_argument("--repeats", type=int, default=20, help="samples per peer and row (default 20)")
    parser.add_argument(
        "--no-wall", dest="wall", action="store_false", help="skip wall time inside a jitted program"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help=f"JSON file (default benchmarks/results/{comparison.kind}-<GPU>.json)",
    )


def run(
    comparison: Comparison,
    workloads: Sequence[Workload | GroupedWorkload],
    arguments: argparse.Namespace,
) -> int:
    """Measures the workloads, writes the report after every row, and prints it at the end."""
    # PyTorch's peers share the GPU's memory with JAX.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    started = time.perf_counter()
    report = environment.describe(comparison.kind)
    peers, absent = load(arguments.peers, comparison.peers)
    report |= {"repeats": arguments.repeats, "baselines": [*comparison.baselines], "absent": absent}
    absent |= prepare(peers, workloads, arguments.wall)
    peers = {name: peer for name, peer in peers.items() if name not in absent}
    if not peers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise SystemExit(f"bench_{comparison.kind}: no peer can run here: {reasons}")
    timer = _kernel_timer(report)
    report["peers"] = {
        name: {"title": peer.title, "note": peer.note, "uses_scales": peer.uses_scales}
        for name, peer in peers.items()
    }
    report["rows"] = []
    out = arguments.out or environment.result_path(report)
    for workload in (bar := tqdm.tqdm(workloads, desc="measuring")):
        bar.set_postfix_str(workload.name)
        report["rows"].append(measure_row(comparison, workload, peers, timer, arguments))
        report["geometric_means"] = geometric_means(report["rows"], comparison.baselines)
        environment.write(out, report)
    report |= {"complete": True, "seconds": round(time.perf_counter() - started, 1)}
    environment.write(out, report)
    print_table(report)
    print(f"{out}, {report['seconds']} s")
    return 0
