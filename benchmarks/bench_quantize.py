"""Times `quantize` under jax.jit against the bandwidth of a device-to-device copy.

    python -m benchmarks.bench_quantize

Quantisation reads bf16 and writes e4m3 with its scales: it is bound by memory, and a copy shows what memory
gives. Writes benchmarks/results/quantize-<GPU>.json.
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


def copy_bandwidth(timer: KernelTimer, repeats: int) -> float:
    """GB/s of a large copy, bytes read and written counted both."""
    import torch

    source = torch.randint(0, 256, (_COPY_BYTES // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    call = Call(run=lambda: target.copy_(source), wait=lambda _: torch.cuda.synchronize())
    return _COPY_BYTES / timer({"copy": call}, repeats=repeats)["copy"].median / 1e3


def bind(workload: QuantizeWorkload) -> Call:
    """`quantize` of random bf16 data, compiled."""
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm import quantize

    x = jax.random.normal(jax.random.key(0), (workload.rows, workload.columns), jnp.bfloat16)
    compiled = jax.jit(lambda x: quantize(x, workload.granularity)).lower(x).compile()
    return Call(run=lambda: compiled(x), wait=jax.block_until_ready)


def measure(
    workload: QuantizeWorkload, timer: KernelTimer, copy_gb_per_s: float, repeats: int
) -> dict[str, Any]:
    """One row of the JSON."""
    samples = timer({"quantize": bind(workload)}, repeats=repeats)["quantize"]
    gb_per_s = workload.bytes / samples.median / 1e3
    return {
        "workload": workload.name,
        "rows": workload.rows,
        "columns": workload.columns,
        "granularity": list(workload.granularity),
        "bytes": workload.bytes,
        **samples.summary(),
        "gb_per_s": round(gb_per_s, 1),
        "of_copy": round(gb_per_s / copy_gb_per_s, 4),
    }


def print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{report['gpu']}: a copy moves {report['copy_gb_per_s']:.0f} GB/s")
    print(f"{'rows x columns, block':>24}{'us':>10}{'GB/s':>8}{'of copy':>9}{'kernels':>9}")
    for row in report["rows"]:
        print(
            f"{row['workload']:>24}{row['median_us']:10.1f}{row['gb_per_s']:8.0f}{row['of_copy']:9.0%}"
            f"{len(row['kernels']):9}"
        )


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
