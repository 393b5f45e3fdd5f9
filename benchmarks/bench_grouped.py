"""Times the grouped GEMMs against their peers, all in one process and in one run.

    python -m benchmarks.bench_grouped
    python -m benchmarks.bench_grouped --rows masked_few ragged_k --peers fp8_gemm deepgemm
    python -m benchmarks.bench_grouped --rows masked-32x20-4096x7168 --no-wall

Writes benchmarks/results/grouped-<GPU>.json after every row and prints a table. README.md here says what is
measured.
"""

from __future__ import annotations

import argparse

from benchmarks import compare, workloads
from benchmarks.operands import random_grouped_operands
from benchmarks.peers import GROUPED_PEERS

BASELINES = ("deepgemm", "deepgemm_padding", "ragged_dot_bf16", "tokamax_bf16")
GROUPED = compare.Comparison("grouped", GROUPED_PEERS, BASELINES, random_grouped_operands)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_grouped", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[tag for tag in workloads.GROUPED_TAGS if tag != "quick"],
        metavar="NAME",
        help=f"names of workloads, or of these groups of them: {', '.join(workloads.GROUPED_TAGS)}",
    )
    compare.add_arguments(parser, GROUPED)
    parser.add_argument(
        "--sustained-seconds", type=float, default=0.0, help="of the rows tagged so (default: skipped)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = _parse_arguments()
    return compare.run(GROUPED, workloads.select_grouped(*arguments.rows), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
