"""Times fp8_gemm against its peers on dense GEMMs, all in one process and in one run.

    python -m benchmarks.bench_dense                                  # the README's rows and decode
    python -m benchmarks.bench_dense --quick --peers fp8_gemm deepgemm
    python -m benchmarks.bench_dense --shapes 64x2112x7168 7x576x7168 --out /tmp/dense.json

Writes benchmarks/results/dense-<GPU>.json after every row and prints a table. README.md here says what is
measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from benchmarks import environment, workloads
from benchmarks.operands import Operands, dequantized_product, random_operands, relative_error
from benchmarks.peers import PEERS, Absent, Peer, Unsupported, load
from benchmarks.timing import Call, KernelTimer, Samples, geometric_mean, sustained_time, wall_time
from benchmarks.workloads import Workload

OURS, BASELINES = "fp8_gemm", ("deepgemm", "jnp_bf16")
PROGRAM_CALLS = 20  # GEMMs in one jitted program, where wall time is measured
_CHECKED_ROWS = 16


def rates(samples: Samples, workload: Workload, calls: int = 1) -> dict[str, Any]:
    """Times of `calls` GEMMs as the JSON has them: per GEMM, with TFLOPS and GB/s of the median."""
    each = Samples(tuple(t / calls for t in samples.times), samples.kernels)
    return {
        **each.summary(),
        "tflops": round(workload.flops / each.median / 1e6, 1),
        "gb_per_s": round(workload.bytes / each.median / 1e3, 1),
    }


def prepare(peers: Mapping[str, Peer], shapes: Sequence[Workload], calls: Sequence[int]) -> dict[str, str]:
    """Lets all peers compile side by side; returns why some turned out absent, by name."""
    absent = {}
    with concurrent.futures.ThreadPoolExecutor(len(peers) or 1) as pool:
        futures = {pool.submit(peer.prepare, shapes, calls): name for name, peer in peers.items()}
        done = concurrent.futures.as_completed(futures)
        for future in (bar := tqdm.tqdm(done, total=len(futures), desc="compiling")):
            bar.set_postfix_str(futures[future])
            try:
                future.result()
            except Absent as error:
                absent[futures[future]] = str(error)
    return absent


def error_of(peer: Peer, result: Any, operands: Operands, references: dict[bool, np.ndarray]) -> float:
    """Relative error of some rows of a peer's result; `references` keeps the products, by use of scales."""
    m = operands.workload.m
    rows = np.unique(np.linspace(0, m - 1, min(m, _CHECKED_ROWS)).astype(np.int64))
    if peer.uses_scales not in references:
        references[peer.uses_scales] = dequantized_product(operands, rows, peer.uses_scales)
    return relative_error(peer.to_host(result, rows), references[peer.uses_scales])


def bind_all(
    peers: Mapping[str, Peer], operands: Operands
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The calls of the peers that take the workload, and for every peer its error or why it doesn't."""
    calls: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    references: dict[bool, np.ndarray] = {}
    for name, peer in peers.items():
        try:
            call = peer.bind(operands)
        except Unsupported as error:
            results[name] = {"unsupported": str(error)}
            continue
        result = call.run()
        call.wait(result)
        calls[name] = call
        results[name] = {"error": error_of(peer, result, operands, references)}
    return calls, results


def speedups(results: Mapping[str, Mapping[str, Any]], measure: str) -> dict[str, float]:
    """How many times faster fp8_gemm is than each baseline, where both were measured."""
    median = {name: result[measure]["median_us"] for name, result in results.items() if measure in result}
    return {
        name: round(median[name] / median[OURS], 4) for name in BASELINES if name in median and OURS in median
    }


def measure_row(
    workload: Workload, peers: Mapping[str, Peer], timer: KernelTimer | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is measured of one workload, as a row of the JSON."""
    operands = random_operands(workload)
    calls, results = bind_all(peers, operands)
    if timer:
        for name, samples in timer(calls, repeats=arguments.repeats).items():
            results[name]["kernel"] = rates(samples, workload)
    if arguments.sustained_seconds and "sustained" in workload.tags:
        for name, call in calls.items():
            results[name]["sustained"] = rates(sustained_time(call, arguments.sustained_seconds), workload)
    if arguments.wall:
        for name in calls:
            if program := peers[name].bind_program(operands, PROGRAM_CALLS):
                results[name]["wall"] = rates(wall_time(program), workload, PROGRAM_CALLS)
    measures = ("kernel", "wall", "sustained")
    return {
        "workload": workload.name,
        "m": workload.m,
        "n": workload.n,
        "k": workload.k,
        "tags": sorted(workload.tags),
        "flops": workload.flops,
        "bytes": workload.bytes,
        "results": results,
        "speedup": {measure: found for measure in measures if (found := speedups(results, measure))},
    }


def geometric_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Geometric mean of the kernel-time speedups over each baseline, by tag."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for tag in sorted({tag for row in rows for tag in row["tags"]}):
        for baseline in BASELINES:
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
    print(f"\n{report['gpu']}, kernel time in us, cold L2, median of {report['repeats']}")
    header = [
        f"{'M x N x K':>16}",
        *(f"{name[:14]:>14}" for name in names),
        "  TFLOPS   GB/s  speed over " + ", ".join(BASELINES),
    ]
    print("".join(header))
    for row in report["rows"]:
        cells = [f"{row['workload']:>16}"]
        for name in names:
            kernel = row["results"].get(name, {}).get("kernel")
            cells.append(f"{kernel['median_us']:14.1f}" if kernel else f"{'-':>14}")
        ours = row["results"].get(OURS, {}).get("kernel")
        cells.append(f"{ours['tflops']:8.0f} {ours['gb_per_s']:6.0f}  " if ours else " " * 17)
        cells.append(", ".join(f"{ratio:.3f}" for ratio in row["speedup"].get("kernel", {}).values()))
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


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_dense", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="three shapes, kernel time alone")
    parser.add_argument("--shapes", nargs="+", default=[], type=workloads.parse, metavar="MxNxK")
    parser.add_argument("--tags", nargs="+", default=["dense", "decode"], choices=workloads.TAGS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--repeats", type=int, default=20, help="samples per peer and row (default 20)")
    parser.add_argument(
        "--no-wall", dest="wall", action="store_false", help="skip wall time inside a jitted program"
    )
    parser.add_argument("--sustained-seconds", type=float, default=2.0, help="0 skips it (default 2)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file (default benchmarks/results/dense-<GPU>.json)"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tags, arguments.wall, arguments.sustained_seconds = ["quick"], False, 0.0
    return arguments


def main() -> int:
    arguments = _parse_arguments()
    # PyTorch's peers share the GPU's memory with JAX.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shapes = arguments.shapes or workloads.select(*arguments.tags)
    started = time.perf_counter()
    report = environment.describe("dense")
    peers, absent = load(arguments.peers)
    report |= {"repeats": arguments.repeats, "program_calls": PROGRAM_CALLS, "absent": absent}
    absent |= prepare(peers, shapes, (1, PROGRAM_CALLS) if arguments.wall else (1,))
    peers = {name: peer for name, peer in peers.items() if name not in absent}
    if not peers:
        raise SystemExit(
            "bench_dense: no peer can run here: " + "; ".join(f"{n}: {r}" for n, r in absent.items())
        )
    timer = _kernel_timer(report)
    report["peers"] = {
        name: {"title": peer.title, "note": peer.note, "uses_scales": peer.uses_scales}
        for name, peer in peers.items()
    }
    out = arguments.out or environment.result_path(report)
    report["rows"] = []
    for workload in (bar := tqdm.tqdm(shapes, desc="measuring")):
        bar.set_postfix_str(workload.name)
        report["rows"].append(measure_row(workload, peers, timer, arguments))
        report["geometric_means"] = geometric_means(report["rows"])
        environment.write(out, report)
    report |= {"complete": True, "seconds": round(time.perf_counter() - started, 1)}
    environment.write(out, report)
    print_table(report)
    print(f"{out}, {report['seconds']} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
