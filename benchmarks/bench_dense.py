"""Times fp8_gemm against its peers on dense GEMMs, all in one process and in one run.

    python -m benchmarks.bench_dense                                  # the README's rows and decode
    python -m benchmarks.bench_dense --quick --peers fp8_gemm deepgemm
    python -m benchmarks.bench_dense --shapes 64x2112x7168 7x576x7168 --out /tmp/dense.json

Writes benchmarks/results/dense-<GPU>.json after every row and prints a table. README.md here says what is
measured.
"""

from __future__ import annotations

import argparse

from benchmarks import compare, workloads
from benchmarks.operands import random_operands
from benchmarks.peers import PEERS

DENSE = compare.Comparison("dense", PEERS, ("deepgemm", "jnp_bf16"), random_operands)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_dense", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="three shapes, kernel time alone")
    parser.add_argument("--shapes", nargs="+", default=[], type=workloads.parse, metavar="MxNxK")
    parser.add_argument("--tags", nargs="+", default=["dense", "decode"], choices=workloads.TAGS)
    compare.add_arguments(parser, DENSE)
    parser.add_argument("--sustained-seconds", type=float, default=2.0, help="0 skips it (default 2)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tags, arguments.wall, arguments.sustained_seconds = ["quick"], False, 0.0
    return arguments


def main() -> int:
    arguments = _parse_arguments()
    return compare.run(DENSE, arguments.shapes or workloads.select(*arguments.tags), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
