"""Times operations that memory bounds: the kernel, and what XLA makes of the same in jnp, against a copy."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import tqdm

from benchmarks import environment
from benchmarks.timing import Call, KernelTimer

_COPY_BYTES = 4 << 30
IMPLEMENTATIONS = {"kernel": "hopper", "XLA": "reference"}


class Workload(Protocol):
    """A dataclass of what an operation depends on.

    Attributes:
      name: as the table calls it.
      bytes: what has to be read and written, once.
      has_kernel: or XLA's is the only one.
    """

    name: str
    bytes: int
    has_kernel: bool


def copy_bandwidth(timer: KernelTimer, repeats: int) -> float:
    """GB/s of a large copy, bytes read and written counted both."""
    import torch

    source = torch.randint(0, 256, (_COPY_BYTES // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    call = Call(run=lambda: target.copy_(source), wait=lambda _: torch.cuda.synchronize())
    return _COPY_BYTES / timer({"copy": call}, repeats=repeats)["copy"].median / 1e3


def measure(
    workload: Workload,
    bind: Callable[[Any, str], Call],
    timer: KernelTimer,
    copy_gb_per_s: float,
    repeats: int,
) -> dict[str, Any]:
    """One row of the JSON."""
    calls = {
        name: bind(workload, implementation)
        for name, implementation in IMPLEMENTATIONS.items()
        if workload.has_kernel or implementation == "reference"
    }
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
        **dataclasses.asdict(workload),
        "bytes": workload.bytes,
        "results": results,
    }


def print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{report['gpu']}: a copy moves {report['copy_gb_per_s']:.0f} GB/s")
    print(f"{'':>36}" + "".join(f"{name:>24}" for name in IMPLEMENTATIONS))
    print(" " * 36 + f"{'us':>10}{'GB/s':>7}{'copy':>7}" * len(IMPLEMENTATIONS))
    for row in report["rows"]:
        print(f"{row['workload']:>36}", end="")
        for name in IMPLEMENTATIONS:
            if result := row["results"].get(name):
                cells = f"{result['median_us']:.1f}", f"{result['gb_per_s']:.0f}", f"{result['of_copy']:.0%}"
            else:
                cells = "-", "-", "-"
            print("{:>10}{:>7}{:>7}".format(*cells), end="")
        print()


def main(kind: str, summary: str, workloads: Sequence[Workload], bind: Callable[[Any, str], Call]) -> int:
    """The program of a benchmark.

    Args:
      kind: of the report, and the end of the module's name.
      summary: what `--help` says of it.
      workloads: what is measured.
      bind: (workload, implementation) -> the compiled call.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{kind}", description=summary)
    parser.add_argument("--repeats", type=int, default=20, help="samples per row (default 20)")
    parser.add_argument(
        "--out", type=pathlib.Path, help=f"JSON file (default benchmarks/results/{kind}-<GPU>.json)"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with PyTorch
    report = environment.describe(kind) | {"repeats": arguments.repeats, "rows": []}
    timer = KernelTimer()
    report["copy_gb_per_s"] = round(copy_bandwidth(timer, arguments.repeats), 1)
    out = arguments.out or environment.result_path(report)
    for workload in tqdm.tqdm(workloads, desc="measuring"):
        row = measure(workload, bind, timer, report["copy_gb_per_s"], arguments.repeats)
        report["rows"].append(row)
        environment.write(out, report)
    environment.write(out, report | {"complete": True})
    print_table(report)
    return 0
