"""Writes the README's table from the results of bench_dense, between its two markers.

python -m benchmarks.readme_table                                       # the one result in benchmarks/results
python -m benchmarks.readme_table benchmarks/results/dense-nvidia-h200.json --readme README.md
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import environment

START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
README = pathlib.Path(__file__).parents[1] / "README.md"
_TAG = "dense"
_TIMES = {
    "fp8_gemm": "jax_fp8gemm us",
    "deepgemm": "DeepGEMM us",
    "cublaslt_block": "cuBLASLt us",
    "cutlass_block": "CUTLASS us",
    "jnp_bf16": "`jnp.dot` bf16 us",
}
_OURS = "fp8_gemm"
_RATIOS = {"deepgemm": "over DeepGEMM", "jnp_bf16": "over bf16"}


def _kernel(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return row["results"].get(name, {}).get("kernel")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _row(row: Mapping[str, Any]) -> str:
    ours = _kernel(row, _OURS)
    cells = [str(row[size]) for size in ("m", "n", "k")]
    cells += [f"{found['median_us']:.1f}" if (found := _kernel(row, name)) else "-" for name in _TIMES]
    cells += [f"{ours['tflops']:.0f}", f"{ours['gb_per_s']:.0f}"]
    ratios = row["speedup"].get("kernel", {})
    cells += [f"{ratios[name]:.2f}x" if name in ratios else "-" for name in _RATIOS]
    return _line(cells)


def _versions(report: Mapping[str, Any]) -> str:
    found = report["versions"]
    names = {
        "jax": "JAX",
        "torch": "PyTorch",
        "deep_gemm": "DeepGEMM",
        "tokenspeed-deepgemm": "DeepGEMM",
        "nvidia-cutlass": "CUTLASS",
    }
    return ", ".join(f"{title} {found[name]}" for name, title in names.items() if name in found)


def table(report: Mapping[str, Any]) -> str:
    """The table in Markdown, without the markers: the same text for the same report.

    Raises:
      ValueError: the report has no row with kernel times for the table.
    """
    rows = [row for row in report["rows"] if _TAG in row["tags"] and _kernel(row, _OURS)]
    if not rows:
        raise ValueError(f"report: expected {_TAG!r} rows with kernel times of {_OURS}, got none")
    header = ["M", "N", "K", *_TIMES.values(), "TFLOPS", "GB/s", *_RATIOS.values()]
    lines = [
        f"{report['gpu']}, driver {report['driver']}, {_versions(report)}, {report['date'][:10]}. "
        f"Kernel time, cold L2, median of {report['repeats']} interleaved runs in one process.",
        "",
        _line(header),
        "|" + "---:|" * len(header),
        *map(_row, rows),
        "",
    ]
    means = report["geometric_means"].get(_TAG, {})
    if means:
        lines.append(
            "Geometric mean: "
            + ", ".join(
                f"{means[name]['mean']:.2f}x {title} (worst row {means[name]['min']:.2f}x)"
                for name, title in _RATIOS.items()
                if name in means
            )
            + "."
        )
    return "\n".join(lines).rstrip() + "\n"


def insert(readme: str, text: str) -> str:
    """The README with `text` in place of what stood between the markers.

    Raises:
      ValueError: the README does not have each marker once, in order.
    """
    start, end = readme.find(START), readme.find(END)
    if not 0 <= start < end or readme.count(START) != 1 or readme.count(END) != 1:
        raise ValueError(f"README: expected one {START} followed by one {END}")
    return f"{readme[: start + len(START)]}\n{text}{readme[end:]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "report",
        type=pathlib.Path,
        nargs="?",
        default=environment.RESULTS / "dense-nvidia-h200.json",
        help="JSON file of bench_dense",
    )
    parser.add_argument("--readme", type=pathlib.Path, default=README)
    arguments = parser.parse_args()
    text = table(environment.read(arguments.report, "dense"))
    arguments.readme.write_text(insert(arguments.readme.read_text(), text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
