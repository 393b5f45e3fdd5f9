"""Times `quantize` and `quantize_swiglu`: the kernel, and what XLA makes of the same in jnp, against a copy.

    python -m benchmarks.bench_quantize

Quantisation reads bf16 and writes e4m3 with its scales: it is bound by memory, and a device-to-device copy
shows what memory gives. Writes benchmarks/results/quantize-<GPU>.json.
"""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tqdm

from benchmarks import environment
from benchmarks.timing import Call, KernelTimer
from benchmarks.workloads import QUANTIZE_WORKLOADS, QuantizeWorkload

_COPY_BYTES = 4 << 30
IMPLEMENTATIONS = {"kernel": "hopper", "XLA": "reference"}


def copy_bandwidth(timer: KernelTimer, repeats: int) -> float:
    """GB/s of a large copy, bytes read and written counted both."""
    import torch

    source = torch.randint(0, 256, (_COPY_BYTES // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    call = Call(run=lambda: target.copy_(source), wait=lambda _: torch.cuda.synchronize())
    return _COPY_BYTES / timer({"copy": call}, repeats=repeats)["copy"].median / 1e3


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


def measure(
    workload: QuantizeWorkload, timer: KernelTimer, copy_gb_per_s: float, repeats: int
) -> dict[str, Any]:
    """One row of the JSON."""
    calls = {name: bind(workload, implementation) for name, implementation in IMPLEMENTATIONS.items()}
    results = {}
    for name, samples in timer(calls, repeats=repeats).items():
        gb_per_s = workload.bytes / samples.median / 1e3
        results[name] = {
            **samples.summary(),
            "gb_per_s": round(gb_per_s, 1),
            "of_copy": round(gb_per_s / copy_gb_per_s, 4),
        }
    return {
        "workload": workload.name,
        "rows": workload.rows,
        "columns": workload.columns,
        "granularity": list(workload.granularity),
        "swiglu": workload.swiglu,
        "bytes": workload.bytes,
        "results": results,
    }


def print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{report['gpu']}: a copy moves {report['copy_gb_per_s']:.0f} GB/s")
    print(f"{'rows x columns, block':>28}" + "".join(f"{name:>24}" for name in IMPLEMENTATIONS))
    print(" " * 28 + f"{'us':>10}{'GB/s':>7}{'copy':>7}" * len(IMPLEMENTATIONS))
    for row in report["rows"]:
        print(f"{row['workload']:>28}", end="")
        for result in row["results"].values():
            print(
                f"{result['median_us']:10.1f}{result['gb_per_s']:7.0f}{result['of_copy']:7.0%}",
                end="",
            )
        print()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_quantize", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples per row (default 20)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file (default benchmarks/results/quantize-<GPU>.json)"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with PyTorch
    report = environment.describe("quantize") | {"repeats": arguments.repeats, "rows": []}
    timer = KernelTimer()
    report["copy_gb_per_s"] = round(copy_bandwidth(timer, arguments.repeats), 1)
    out = arguments.out or environment.result_path(report)
    for workload in tqdm.tqdm(QUANTIZE_WORKLOADS, desc="measuring"):
        report["rows"].append(measure(workload, timer, report["copy_gb_per_s"], arguments.repeats))
        environment.write(out, report)
    environment.write(out, report | {"complete": True})
    print_table(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
