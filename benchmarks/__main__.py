"""Runs every benchmark, one process after the other, then draws the figures.

python -m benchmarks
"""

from __future__ import annotations

import subprocess
import sys

STEPS = ("bench_dense", "bench_grouped", "bench_quantize", "bench_moe", "bench_training_quantize",
         "bench_training", "bench_compile", "plot")


def main() -> int:
    failed = []
    for step in STEPS:
        print(f"== {step}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{step}"], check=False).returncode:
            failed.append(step)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
